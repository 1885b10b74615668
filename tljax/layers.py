"""The doors: every kernel of every model is multiplied here, and nowhere else.

Parameters are float32 and may arrive in another dtype; products run in `dtype`, statistics and
reductions in float32.  Matmul precision follows `jax.default_matmul_precision`.

Ports, the whole list of what a layer does because something is there:
- `lora/{a, b, scale, rate}` beside a Dense `kernel`: y += scale * dropout(x, rate) @ a @ b.
- `lora/magnitude` among them (DoRA): y then takes this length in every column of the kernel.
- a `dropout` rng: Dropout, DropPath and the dropout inside LoRA are on.
- `batch_stats` mutable (and not initialising): BatchNorm uses the batch and updates its averages.
- `fixed_stats/<norm>/{mean, var}`: that BatchNorm reads these instead, and updates nothing.
- an ambient mesh with Auto axes `data` and `fsdp`: activations are pinned at block boundaries.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from tljax.tree import nearest
from tljax.types import BadInput, Key

Init = Callable[..., Array]
Features = Float[Array, "*b d"]
Projected = Float[Array, "*b o"]
Tokens = Float[Array, "b l d"]
Heads = Float[Array, "b _ h k"]
Image = Float[Array, "b h w c"]
Map = Float[Array, "b y x o"]
Kernel = Float[Array, "p q c o"]

lecun_normal = nn.initializers.lecun_normal()
small_normal = nn.initializers.truncated_normal(0.02)  # what BERT and ViT start tables with


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x Phi(x) by erf, in float32.

    jax.nn.gelu takes erfc for it, which on a CPU costs 2.7 times as much (benchmarks/README.md).
    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
    """
    y = x.astype(jnp.float32)
    return (y * (0.5 + 0.5 * jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": exact_gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
    "relu": jax.nn.relu,
}


def choose(table: Mapping[str, Any], name: str, field: str) -> Any:
    """Return `table[name]`.

    Raises: BadInput naming the field and the names there are.
    """
    if not isinstance(name, str) or name not in table:
        close = nearest(str(name), table, 1)
        raise BadInput(f"{field}={name!r} is none of {', '.join(table)}; the nearest is {close!r}")
    return table[name]


def along_last(vector: Float[Array, " d"], like: Array) -> Array:
    """Give a vector `like`'s rank and dtype: implicit rank promotion is an error in our tests."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,)).astype(like.dtype)


def constrain_batch(x: Array) -> Array:
    """Pin the batch axis over the mesh axes data and fsdp; nothing without such an ambient mesh.

    Without it a ViT-B FSDP step for 256 chips needs 34.6 GB a chip instead of 0.19 GB.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types or (), strict=False))
    # Manual and Explicit axes already say where their arrays live.
    if any(kinds.get(axis) != AxisType.Auto for axis in ("data", "fsdp")):
        return x
    return jax.lax.with_sharding_constraint(x, P(("data", "fsdp")))


class Dense(nn.Module):
    """Multiply the last axis by a kernel.  Has the LoRA port."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Init = lecun_normal

    @nn.compact
    def __call__(self, x: Features) -> Projected:
        # Unflattened, the weight gradient is slower on XLA:CPU: benchmarks/flattening.py.
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = product(rows, kernel.astype(self.dtype))
        if self.has_variable("params", "lora"):
            lora = self.get_variable("params", "lora")
            y += self.low_rank(rows, lora)
            if "magnitude" in lora:
                y *= along_last(lora["magnitude"] / column_lengths(kernel, lora), y)
        if self.use_bias:
            y += along_last(self.param("bias", nn.initializers.zeros, (self.features,)), y)
        return y.reshape(*x.shape[:-1], self.features)

    def low_rank(self, rows: Float[Array, "n i"], lora: Mapping[str, Array]) -> Float[Array, "n o"]:
        """Return scale * dropout(x) @ a @ b.  Source: Hu et al. 2021, arXiv 2106.09685, eq. 3."""
        a, b, scale = (lora[name].astype(self.dtype) for name in ("a", "b", "scale"))
        if self.has_rng("dropout"):
            key, rate = self.make_rng("dropout"), lora["rate"]
            # The rate is data, so that of zero draws no bits at run time.
            drop = lambda x: dropped(x, rate, key, x.shape)  # noqa: E731
            rows = jax.lax.cond(rate > 0, drop, lambda x: x, rows)
        return (rows @ a) @ b * scale


def column_lengths(kernel: Float[Array, "i o"], lora: Mapping[str, Array]) -> Float[Array, " o"]:
    """Return the length of every column of kernel + scale * a @ b, in float32, as a constant.

    DoRA's gradient takes the length as given (section 4.3), and PEFT's does: nothing is frozen by
    it, and the direction still learns.  Source: Liu et al. 2024, arXiv 2402.09353, eq. 5 and 11.
    """
    a, b = (lora[name].astype(jnp.float32) for name in ("a", "b"))
    folded = kernel.astype(jnp.float32) + lora["scale"] * jnp.matmul(a, b, precision="highest")
    return jax.lax.stop_gradient(jnp.sqrt(jnp.square(folded).sum(0)))


def zero_head(classes: int | None, features: Features, name: str = "head") -> Projected | None:
    """Apply a Dense of the calling module, which starts at zero and runs in float32."""
    if classes is None:
        return None
    return Dense(classes, kernel_init=nn.initializers.zeros, name=name)(features)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width of what may be a square."""
    return (size, size) if isinstance(size, int) else size


class Conv(nn.Module):
    """Convolve with symmetric zero padding, as torch does (XLA's SAME differs at stride 2).

    standardize: every filter gets zero mean and unit variance first, in float32.
    Source: Qiao et al. 2019, arXiv 1903.10520, with big_transfer's eps of 1e-10.
    """

    features: int
    size: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int = 0
    use_bias: bool = False
    standardize: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Map:
        size, stride = pair(self.size), pair(self.stride)
        kernel = self.param("kernel", lecun_normal, (*size, x.shape[-1], self.features))
        if self.standardize:
            kernel = standardised(kernel.astype(jnp.float32), (0, 1, 2), 1e-10)
        apart = size in ((1, 1), stride)
        on_cpu = conv_as_matmul if apart else conv_on_cpu
        by = on_cpu if jax.default_backend() == "cpu" else conv_by_xla
        y = by(x.astype(self.dtype), kernel.astype(self.dtype), stride, self.padding)
        if self.use_bias:
            y += along_last(self.param("bias", nn.initializers.zeros, (self.features,)), y)
        return y


def conv_by_xla(x: Image, kernel: Kernel, stride: tuple[int, int], padding: int) -> Map:
    """Convolve with the backend's own convolution."""
    axes, pads = ("NHWC", "HWIO", "NHWC"), [(padding, padding)] * 2
    return jax.lax.conv_general_dilated(x, kernel, stride, pads, dimension_numbers=axes)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_on_cpu(x: Image, kernel: Kernel, stride: tuple[int, int], padding: int) -> Map:
    """Convolve by XLA, with both gradients spelt as forward convolutions.

    XLA:CPU has a fast path for these alone, and inside the step's scan it does not bring jax's own
    spelling into that form: with it ResNet-50's stem takes half of a step (benchmarks/README.md).
    """
    return conv_by_xla(x, kernel, stride, padding)


def _conv_forward(x: Image, kernel: Kernel, *window: Any) -> tuple[Map, tuple[Image, Kernel]]:
    return conv_by_xla(x, kernel, *window), (x, kernel)


def _conv_backward(
    stride: tuple[int, int], padding: int, saved: tuple[Image, Kernel], dy: Map
) -> tuple[Image, Kernel]:
    x, kernel = saved
    axes = ("NHWC", "HWIO", "NHWC")
    sides = list(zip(kernel.shape[:2], dy.shape[1:3], x.shape[1:3], stride, strict=True))
    # y meets x at y * stride + p - padding: so does x the flipped kernel on a spread dy, and p a
    # window of the spread dy on x.
    pads = [(k - 1 - padding, n - 1 - (y - 1) * step + padding) for k, y, n, step in sides]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    dx = jax.lax.conv_general_dilated(
        dy, turned, (1, 1), pads, lhs_dilation=stride, dimension_numbers=axes
    )
    pads = [(padding, k + (y - 1) * step - n - padding) for k, y, n, step in sides]
    image, window = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    dkernel = jax.lax.conv_general_dilated(
        image, window, (1, 1), pads, rhs_dilation=stride, dimension_numbers=axes
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


conv_on_cpu.defvjp(_conv_forward, _conv_backward)


def conv_as_matmul(x: Image, kernel: Kernel, stride: tuple[int, int], padding: int) -> Map:
    """Convolve windows of one pixel, or as large as the stride, as one matrix product."""
    tall, broad = kernel.shape[:2]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    if (tall, broad) == (1, 1):
        x = x[:, :: stride[0], :: stride[1]]
    x = x[:, : x.shape[1] // tall * tall, : x.shape[2] // broad * broad]
    windows = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=tall, q=broad)
    y = product(windows.reshape(-1, windows.shape[-1]), kernel.reshape(-1, kernel.shape[-1]))
    return y.reshape(*windows.shape[:3], -1)


@jax.custom_vjp
def product(rows: Float[Array, "n i"], kernel: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """Multiply rows by a kernel; its gradient is formed with the wider side last.

    XLA:CPU transposes the left side of rows^T dy as it goes: 0.8 times the speed if it is wide.
    """
    return rows @ kernel


def _product_backward(
    saved: tuple[Float[Array, "n i"], Float[Array, "i o"]], dy: Float[Array, "n o"]
) -> tuple[Float[Array, "n i"], Float[Array, "i o"]]:
    rows, kernel = saved
    if jax.default_backend() != "cpu" or rows.shape[1] <= dy.shape[1]:
        return dy @ kernel.T, rows.T @ dy
    # The barrier keeps XLA from turning the product round again.
    return dy @ kernel.T, jax.lax.optimization_barrier(dy.T @ rows).T


product.defvjp(lambda rows, kernel: (rows @ kernel, (rows, kernel)), _product_backward)


class Embed(nn.Module):
    """A table of vectors: look rows up, or score features against every row (tied decoder)."""

    count: int
    features: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Create the table."""
        self.embedding = self.param("embedding", small_normal, (self.count, self.features))

    def __call__(self, ids: Int[Array, "*b"]) -> Features:
        """Return the rows at `ids`."""
        return self.embedding[ids].astype(self.dtype)

    def attend(self, x: Features) -> Projected:
        """Return the scalar product of x with every row."""
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        return (rows @ self.embedding.astype(self.dtype).T).reshape(*x.shape[:-1], -1)


def require_room(length: int, positions: int) -> None:
    """Raise BadInput for texts longer than the position table."""
    if length > positions:
        raise BadInput(
            f"texts of {length} tokens exceed the {positions} positions of this model; "
            "truncate them when tokenizing"
        )


def standardised(x: Float[Array, "..."], axes: tuple[int, ...], eps: float) -> Array:
    """Give x zero mean and unit (biased) variance over `axes`; two passes, against cancellation."""
    centred = x - x.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + eps)


class LayerNorm(nn.Module):
    """Standardise every vector, then scale and shift, in float32; the base of the other norms.

    Source: Ba et al. 2016, arXiv 1607.06450.
    """

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Features) -> Features:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = self._standardise(x.astype(jnp.float32))
        return (y * along_last(scale, y) + along_last(bias, y)).astype(self.dtype)

    def _standardise(self, x: Features) -> Features:
        return standardised(x, (-1,), self.eps)


class GroupNorm(LayerNorm):
    """Standardise groups of channels: 32, or the largest power of two that divides the width.

    Source: Wu and He 2018, arXiv 1803.08494.
    """

    def _standardise(self, x: Image) -> Image:
        grouped = x.reshape(*x.shape[:3], math.gcd(32, x.shape[-1]), -1)
        return standardised(grouped, (1, 2, 4), self.eps).reshape(x.shape)


class BatchNorm(LayerNorm):
    """Standardise by the batch or by stored statistics, as the collections say (see the ports).

    The stored variance is the biased one, as in Flax; torch stores the unbiased one, n/(n-1)
    times larger.  momentum is the weight of the old average.
    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """

    momentum: float = 0.9

    def _standardise(self, x: Features) -> Features:
        mean, var = (along_last(value, x) for value in self._statistics(x))
        return (x - mean) * jax.lax.rsqrt(var + self.eps)

    def _statistics(self, x: Features) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        if self.has_variable("fixed_stats", "mean"):
            return self.get_variable("fixed_stats", "mean"), self.get_variable("fixed_stats", "var")
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        if self.is_initializing() or not self.is_mutable_collection("batch_stats"):
            return mean.value, var.value
        axes = tuple(range(x.ndim - 1))
        own = x.mean(axes), x.var(axes)
        for average, value in zip((mean, var), own, strict=True):
            average.value = self.momentum * average.value + (1 - self.momentum) * value
        return own


class LayerScale(nn.Module):
    """Scale every feature.  Source: Touvron et al. 2021, arXiv 2103.17239."""

    start: float

    @nn.compact
    def __call__(self, x: Features) -> Features:
        start = nn.initializers.constant(self.start)
        return x * along_last(self.param("gamma", start, x.shape[-1:]), x)


def dropped(x: Array, rate: float | Array, key: Key, shape: tuple[int, ...]) -> Array:
    """Zero a fraction `rate` of x at random, in units of `shape`, and rescale the rest."""
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Dropout(nn.Module):
    """Zero single values at random when there is a `dropout` rng."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.rate == 0 or not self.has_rng("dropout"):
            return x
        return dropped(x, self.rate, self.make_rng("dropout"), self._units(x))

    def _units(self, x: Array) -> tuple[int, ...]:
        return x.shape


class DropPath(Dropout):
    """Zero whole examples instead.  Source: Huang et al. 2016, arXiv 1603.09382."""

    def _units(self, x: Array) -> tuple[int, ...]:
        return (x.shape[0],) + (1,) * (x.ndim - 1)


def attend_by_jax(
    query: Heads, key: Heads, value: Heads, mask: Bool[Array, "b 1 1 l"] | None, causal: bool
) -> Heads:
    """Attend as jax chooses to."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)


def attend_heads_first(
    query: Heads, key: Heads, value: Heads, mask: Bool[Array, "b 1 1 l"] | None, causal: bool
) -> Heads:
    """Attend with the heads before the tokens, whose products on a CPU are plain matrices' ones."""
    query, key, value = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    scores = jnp.einsum("bhmk,bhlk->bhml", query, key, preferred_element_type=jnp.float32)
    if causal:
        below = jnp.tri(*scores.shape[2:], dtype=bool)[None, None]
        mask = below if mask is None else mask & below
    if mask is not None:  # finite, as in jax: a row without any token is a mean, not NaN
        scores = jnp.where(mask, scores, 0.7 * jnp.finfo(jnp.float32).min)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - largest)  # divided by their sum where there are fewer numbers
    y = jnp.einsum("bhml,bhlk->bhmk", weights.astype(value.dtype), value)
    return (y / weights.sum(-1, keepdims=True)).astype(value.dtype).swapaxes(1, 2)


class Attention(nn.Module):
    """Multi-head attention, without dropout on its probabilities (not supported).

    qk_norm: the eps of a LayerNorm over every head of query and key.  causal: a token sees those
    before it and itself.  Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2; Dehghani et
    al. 2023, arXiv 2302.05442, section 2 (qk_norm).
    """

    heads: int
    dtype: Any = jnp.float32
    kernel_init: Init = lecun_normal
    qkv_bias: bool = True
    qk_norm: float | None = None
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        mask: Bool[Array, "b l"] | None = None,
        query: Float[Array, "b m d"] | None = None,
    ) -> Float[Array, "b m d"]:
        """Return what the tokens of `query`, or those of x itself, read from x."""
        if x.shape[-1] % self.heads:
            raise BadInput(f"width {x.shape[-1]} does not divide into heads={self.heads}")
        dense = partial(Dense, x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init)

        def project(name: str, tokens: Array) -> Array:
            y = dense(use_bias=self.qkv_bias, name=name)(tokens)
            y = rearrange(y, "b l (h k) -> b l h k", h=self.heads)
            if self.qk_norm is None or name == "value":
                return y
            return LayerNorm(self.qk_norm, self.dtype, name=f"norm_{name}")(y)

        heads = project("query", x if query is None else query), project("key", x)
        pairs = None if mask is None else mask[:, None, None, :]
        attend = attend_heads_first if jax.default_backend() == "cpu" else attend_by_jax
        y = attend(*heads, project("value", x), pairs, self.causal)
        return dense(name="out")(rearrange(y, "b l h k -> b l (h k)"))


class Mlp(nn.Module):
    """Two Dense layers with an activation between them."""

    hidden: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    kernel_init: Init = lecun_normal

    @nn.compact
    def __call__(self, x: Features) -> Features:
        act = choose(ACTIVATIONS, self.activation, "activation")
        y = act(Dense(self.hidden, dtype=self.dtype, kernel_init=self.kernel_init, name="up")(x))
        return Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init, name="down")(y)


class PreNormBlock(nn.Module):
    """x += scale(attention(norm(x))); x += scale(mlp(norm(x))).

    layer_scale: its start value, or None for none.
    Source: Dosovitskiy et al. 2020, arXiv 2010.11929, eq. 2 and 3.
    """

    heads: int
    mlp: int
    eps: float
    activation: str
    layer_scale: float | None = None
    qkv_bias: bool = True
    qk_norm: float | None = None
    causal: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def residual(self, y: Tokens, index: int) -> Tokens:
        """Scale and drop a branch."""
        y = Dropout(self.dropout)(y)
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, name=f"scale{index}")(y)
        return DropPath(self.drop_path)(y)

    @nn.compact
    def __call__(self, x: Tokens, mask: Bool[Array, "b l"] | None = None) -> Tokens:
        options = self.qkv_bias, self.qk_norm, self.causal
        attention = Attention(self.heads, self.dtype, lecun_normal, *options, name="attention")
        mlp = Mlp(self.mlp, self.activation, self.dtype, name="mlp")
        x = x + self.residual(attention(LayerNorm(self.eps, self.dtype, name="norm1")(x), mask), 1)
        return x + self.residual(mlp(LayerNorm(self.eps, self.dtype, name="norm2")(x)), 2)


def last_block(read: str | None, depth: int) -> int:
    """Return the index of the block that is read last.

    Raises: BadInput if `read` names no block.
    """
    names = {f"blocks/{index}": index for index in range(depth)}
    return depth - 1 if read is None else choose(names, read, "read")


class Blocks(nn.Module):
    """Run blocks in order; their names are "0", "1", .., so that paths read blocks/0/...

    make(i) builds block i and must name it str(i); a plain function, as Linen
    would adopt the module of a bound method.  Initialisation creates all of them, so that a
    whole pretrained file finds its place; afterwards those above `read` do not run.
    """

    make: Callable[[int], nn.Module]
    depth: int
    read: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], *rest: Any) -> Float[Array, "b ..."]:
        last = last_block(self.read, self.depth)
        found = x = constrain_batch(x)
        for index in range(self.depth if self.is_initializing() else last + 1):
            x = constrain_batch(self.make(index)(x, *rest))
            found = x if index == last else found
        return found
