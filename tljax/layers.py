"""The doors: every kernel of every model is multiplied here, and nowhere else.

Parameters are float32 and may arrive in another dtype; products run in `dtype`, statistics and
reductions in float32.  Matmul precision follows `jax.default_matmul_precision`.  What a layer does
because something is there is listed in `tljax.ports`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from tljax import ports
from tljax.ports import along_last, cut, dropped, port
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

    jax.nn.gelu takes erfc for it, which on a CPU costs 2.7 times as much.
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


def platform() -> str:
    """Name what the program is compiled for: the ambient mesh's devices, else those there are."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return str(device.platform if device else jax.default_backend())


class Dense(nn.Module):
    """Multiply the last axis by a kernel."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Init = lecun_normal

    @nn.compact
    def __call__(self, x: Features) -> Projected:
        # Unflattened, the weight gradient is slower on XLA:CPU: benchmarks/flattening.py.
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        kernel = ports.kernel_of(self, self.kernel_init, (x.shape[-1], self.features))
        rescale = port(self, "rescale")
        rows = rows * along_last(rescale["in"], rows) if "in" in rescale else rows
        multiply = product_on_cpu if platform() == "cpu" else jnp.matmul
        y = ports.multiplied(rows, kernel, multiply)
        if lora := port(self, "lora"):
            y = ports.adapted(rows, y, kernel, lora, chance(self), multiply)
        if self.use_bias:
            y += along_last(self.param("bias", nn.initializers.zeros, (self.features,)), y)
        return ports.rescaled(y, rescale).reshape(*x.shape[:-1], self.features)


def chance(module: nn.Module) -> Key | None:
    """Return a key to draw from where there is a `dropout` rng."""
    return module.make_rng("dropout") if module.has_rng("dropout") else None


def zero_head(
    module: nn.Module, classes: int | None, features: Features, name: str = "head"
) -> Projected | None:
    """Apply a Dense of the calling module, which starts at zero and runs in float32."""
    if classes is None:
        return None
    features = cut(module, name, features)
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
        kernel = ports.kernel_of(self, lecun_normal, (*size, x.shape[-1], self.features))
        lora, rescale = port(self, "lora"), port(self, "rescale")
        if self.standardize:  # what is standardised is the sum
            kernel, lora = (ports.folded(kernel, lora), {}) if lora else (kernel, lora)
            kernel = standardised(kernel.astype(jnp.float32), (0, 1, 2), 1e-10)
        on_cpu = conv_as_matmul if size in ((1, 1), stride) else conv_on_cpu
        by = on_cpu if platform() == "cpu" else conv_by_xla
        convolve = lambda x, kernel: by(x, kernel, stride, self.padding)  # noqa: E731
        x = x.astype(self.dtype)
        x = x * along_last(rescale["in"], x) if "in" in rescale else x
        y = ports.multiplied(x, kernel, convolve)
        if lora:
            y = ports.adapted(x, y, kernel, lora, chance(self), convolve)
        if self.use_bias:
            y += along_last(self.param("bias", nn.initializers.zeros, (self.features,)), y)
        return ports.rescaled(y, rescale)


def conv_by_xla(x: Image, kernel: Kernel, stride: tuple[int, int], padding: int) -> Map:
    """Convolve with the backend's own convolution."""
    axes, pads = ("NHWC", "HWIO", "NHWC"), [(padding, padding)] * 2
    return jax.lax.conv_general_dilated(x, kernel, stride, pads, dimension_numbers=axes)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_on_cpu(x: Image, kernel: Kernel, stride: tuple[int, int], padding: int) -> Map:
    """Convolve by XLA, with gradients that XLA:CPU has fast paths for: jax's own have none.

    The input's is spelt as a forward convolution, the kernel's as one product with the windows,
    which hold the input once a pixel of the kernel.
    """
    return conv_by_xla(x, kernel, stride, padding)


def _conv_forward(x: Image, kernel: Kernel, *window: Any) -> tuple[Map, tuple[Image, Kernel]]:
    return conv_by_xla(x, kernel, *window), (x, kernel)


def _conv_backward(
    stride: tuple[int, int], padding: int, saved: tuple[Image, Kernel], dy: Map
) -> tuple[Image, Kernel]:
    x, kernel = saved
    sides = zip(kernel.shape[:2], dy.shape[1:3], x.shape[1:3], stride, strict=True)
    # y meets x at y * stride + p - padding: so does x the flipped kernel on a spread dy.
    pads = [(k - 1 - padding, n - 1 - (y - 1) * step + padding) for k, y, n, step in sides]
    turned, axes = kernel[::-1, ::-1].swapaxes(2, 3), ("NHWC", "HWIO", "NHWC")
    dx = jax.lax.conv_general_dilated(dy, turned, (1, 1), pads, stride, dimension_numbers=axes)
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    tall, broad = (n - k + 1 for n, k in zip(x.shape[1:3], kernel.shape, strict=False))
    windows = [
        x[:, p : p + tall : stride[0], q : q + broad : stride[1]]
        for p, q in np.ndindex(*kernel.shape[:2])
    ]
    rows = jnp.concatenate(windows, -1).reshape(-1, math.prod(kernel.shape[:3]))
    return dx, transposed_product(rows, dy.reshape(-1, dy.shape[-1])).reshape(kernel.shape)


conv_on_cpu.defvjp(_conv_forward, _conv_backward)


def max_pool(x: Image) -> Map:
    """Take the maximum of windows of 3x3 pixels, at every other pixel; nothing is padded.

    On a CPU one side after the other: the gradient is 4 times as fast as that of whole windows.
    Equal maxima share their gradient there; elsewhere the first one has all of it.
    """
    if platform() != "cpu":
        return nn.max_pool(x, (3, 3), (2, 2))
    for axis in (1, 2):
        size = x.shape[axis] - 2
        x = reduce(jnp.maximum, [jax.lax.slice_in_dim(x, i, i + size, 2, axis) for i in range(3)])
    return x


def conv_as_matmul(x: Image, kernel: Kernel, stride: tuple[int, int], padding: int) -> Map:
    """Convolve windows of one pixel, or as large as the stride, as one matrix product."""
    tall, broad = kernel.shape[:2]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    if (tall, broad) == (1, 1):
        x = x[:, :: stride[0], :: stride[1]]
    x = x[:, : x.shape[1] // tall * tall, : x.shape[2] // broad * broad]
    windows = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=tall, q=broad)
    y = product_on_cpu(windows.reshape(-1, windows.shape[-1]), kernel.reshape(-1, kernel.shape[-1]))
    return y.reshape(*windows.shape[:3], -1)


@jax.custom_vjp
def product_on_cpu(rows: Float[Array, "n i"], kernel: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """Multiply rows by a kernel, whose gradient is `transposed_product`."""
    return rows @ kernel


def _product_backward(
    saved: tuple[Float[Array, "n i"], Float[Array, "i o"]], dy: Float[Array, "n o"]
) -> tuple[Float[Array, "n i"], Float[Array, "i o"]]:
    rows, kernel = saved
    return dy @ kernel.T, transposed_product(rows, dy)


def transposed_product(rows: Float[Array, "n i"], dy: Float[Array, "n o"]) -> Float[Array, "i o"]:
    """Return rows^T dy, formed with the wider side last.

    XLA:CPU transposes the left side as it goes: 0.8 times the speed if it is wide.
    """
    if rows.shape[1] <= dy.shape[1]:
        return rows.T @ dy
    # The barrier keeps XLA from turning the product round again.
    return jax.lax.optimization_barrier(dy.T @ rows).T


product_on_cpu.defvjp(lambda rows, kernel: (rows @ kernel, (rows, kernel)), _product_backward)


class Embed(nn.Module):
    """A table of vectors: look rows up, or score features against every row (tied decoder)."""

    count: int
    features: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Create the table."""
        self.embedding = self.param("embedding", small_normal, (self.count, self.features))
        self.lora: dict[str, Array] = port(self, "lora")

    def __call__(self, ids: Int[Array, "*b"]) -> Features:
        """Return the rows at `ids`."""
        y = self.embedding[ids].astype(self.dtype)
        if self.lora:
            update = self.lora["a"][ids.reshape(-1)] @ self.lora["b"] * self.lora["scale"]
            y += update.reshape(y.shape).astype(self.dtype)
        return y

    def attend(self, x: Features) -> Projected:
        """Return the scalar product of x with every row."""
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = rows @ self.embedding.astype(self.dtype).T
        if self.lora:
            turned = self.lora | {"a": self.lora["b"].T, "b": self.lora["a"].T}
            y += ports.low_rank(rows, turned, None, jnp.matmul)
        return y.reshape(*x.shape[:-1], -1)


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
        y = ports.rescaled(y * along_last(scale, y) + along_last(bias, y), port(self, "rescale"))
        return y.astype(self.dtype)

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
        below = jnp.tri(scores.shape[2], scores.shape[3], dtype=bool)[None, None]
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

        own = x if query is None else query
        keys, values = self.prefixed(project("key", x), project("value", x))
        if mask is not None:
            mask = ports.in_front(jnp.ones(keys.shape[1] - x.shape[1], bool), mask)
        pairs = None if mask is None else mask[:, None, None, :]
        attend = attend_heads_first if platform() == "cpu" else attend_by_jax
        y = attend(project("query", own), keys, values, pairs, self.causal)
        y = dense(name="out")(rearrange(y, "b l h k -> b l (h k)"))
        return ports.bottlenecks(self, own, y)

    def prefixed(self, *heads: Float[Array, "b l h k"]) -> tuple[Float[Array, "b m h k"], ...]:
        """Put learned keys and values in front.  Source: Li and Liang 2021, arXiv 2101.00190."""
        prefix = port(self, "prefix")
        if not prefix:
            return heads
        learned = (prefix[name].reshape(-1, *heads[0].shape[2:]) for name in ("key", "value"))
        return tuple(ports.in_front(*pair) for pair in zip(learned, heads, strict=True))


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
        y = Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init, name="down")(y)
        return ports.bottlenecks(self, x, y)


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

    remat: keep only what enters each block, and run it again in the backward pass.
    Source: Chen et al. 2016, arXiv 1604.06174.
    """

    make: Callable[[int], nn.Module]
    depth: int
    read: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], *rest: Any) -> Float[Array, "b ..."]:
        last = last_block(self.read, self.depth)
        run: Callable[..., Array] = lambda block, *inputs: block(*inputs)  # noqa: E731
        run = nn.remat(run) if self.remat and not self.is_initializing() else run
        found, x, extra = x, constrain_batch(x), 0
        for index in range(self.depth if self.is_initializing() else last + 1):
            x = cut(self, f"before_{index}", x) if index and not extra else x
            if (prompt := port(self, str(index)).get("prompt")) is not None:
                x, extra = ports.in_front(prompt, x[:, extra:]), len(prompt)
            x = constrain_batch(run(self.make(index), x, *rest))
            found = x[:, extra:] if index == last else found
        return cut(self, "end", found)
