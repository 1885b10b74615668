"""What grafted leaves do to the activations of the layer they lie beside: the ports.

The whole list of what a layer does because something is there:
- a Dense or Conv `kernel` that is itself a tree: quantised, and read as it is needed.
- `lora/{a, b, scale}` beside a Dense or Conv `kernel` or an Embed's `embedding`:
  y += scale * x @ a @ b.  With `lora/rate`: x is dropped at this rate there, of a Dense or Conv.
  With `lora/{inner, outer}` (VeRA): diagonal matrices after a and b.  With `lora/magnitude`
  (DoRA): y takes this length in every column of the kernel.
- `rescale/{in, out, shift}` in a Dense, Conv or norm: x *= in; y = y * out + shift.
- `serial/<activation>/{down, up, scale}` in Attention or Mlp: y += scale * up(act(down(y))).
- `parallel/<activation>/{down, up, scale}` there: y += scale * up(act(down(x))).
- `prefix/{key, value}` in Attention: more keys and values, which every token sees.
- `prompt` in a block: tokens that it reads and that are cut off after the last block; they take the
  place of those of the block below.
- `prompt` in a text's embedding: tokens in front; `skipped` there: positions that a prefix takes.
- a `dropout` rng: Dropout, DropPath and the dropout inside LoRA are on.
- `batch_stats` mutable (and not initialising): BatchNorm uses the batch and updates its averages.
- `fixed_stats/<norm>/{mean, var}`: that BatchNorm reads these instead, and updates nothing.
- `cut/blocks/before_<i>` (i > 0, without prompts), `cut/blocks/end`, `cut/<head>` (its input):
  replaces the activation there; where `cut` is mutable, what is not replaced is put there.
- an ambient mesh with Auto axes `data` and `fsdp`: activations are pinned at block boundaries.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from tljax.quantized import read
from tljax.types import Key

Leaves = Mapping[str, Any]
Rows = Float[Array, "n i"]

ACTIVATIONS = {"relu": jax.nn.relu, "swish": jax.nn.swish}


def port(module: nn.Module, name: str) -> Any:
    """Return what is grafted onto a module under a name, nothing if there is nothing."""
    return module.get_variable("params", name) if module.has_variable("params", name) else {}


def cut(module: nn.Module, name: str, x: Array) -> Array:
    """Return what the collection `cut` holds in place of x, else x, put there where it is mutable.

    What computes a replaced x is dead code, which XLA removes: the model starts at the cut.
    """
    if module.has_variable("cut", name):
        return module.get_variable("cut", name)
    if module.is_mutable_collection("cut") and not module.is_initializing():
        module.put_variable("cut", name, x)
    return x


def along_last(vector: Float[Array, " d"], like: Array) -> Array:
    """Give a vector `like`'s rank and dtype: implicit rank promotion is an error in our tests."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,)).astype(like.dtype)


def dropped(x: Array, rate: float | Array, key: Key, shape: tuple[int, ...]) -> Array:
    """Zero a fraction `rate` of x at random, in units of `shape`, and rescale the rest."""
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def kernel_of(module: nn.Module, init: Callable[..., Array], shape: tuple[int, ...]) -> Any:
    """Return a module's kernel, or the tree that is stored in its place."""
    stored = port(module, "kernel")
    return stored if isinstance(stored, Mapping) and stored else module.param("kernel", init, shape)


def multiplied(x: Array, kernel: Any, multiply: Callable[[Array, Array], Array]) -> Array:
    """Return multiply(x, kernel) in the dtype of x; a quantised kernel is read for it alone.

    Its values are made again for the backward pass: only the codes are kept in between.
    """
    if not isinstance(kernel, Mapping):
        return multiply(x, kernel.astype(x.dtype))
    return jax.checkpoint(lambda x, codes: multiply(x, read(codes).astype(x.dtype)))(x, kernel)


def low_rank(
    x: Array, lora: Leaves, key: Key | None, multiply: Callable[[Array, Array], Array]
) -> Array:
    """Return scale * dropout(x) @ a @ b, where multiply(x, a) is the layer's own product.

    Source: Hu et al. 2021, arXiv 2106.09685, eq. 3; Kopiczko et al. 2023, arXiv 2310.11454, eq. 2
    (inner and outer, there d and b).
    """
    a, b, scale = (lora[name].astype(x.dtype) for name in ("a", "b", "scale"))
    if key is not None and "rate" in lora:
        x = dropped(x, lora["rate"], key, x.shape)
    y = multiply(x, a)
    y = (y * along_last(lora["inner"], y) if "inner" in lora else y) @ b
    return (y * along_last(lora["outer"], y) if "outer" in lora else y) * scale


def folded(kernel: Any, lora: Leaves) -> Array:
    """Return kernel + scale * a @ b in float32, before any magnitude."""
    whole = read(kernel) if isinstance(kernel, Mapping) else kernel
    a, b = (lora[name].astype(jnp.float32) for name in ("a", "b"))
    a = a * along_last(lora["inner"], a) if "inner" in lora else a
    b = b * along_last(lora["outer"], b) if "outer" in lora else b
    return whole.astype(jnp.float32) + lora["scale"] * jnp.matmul(a, b, precision="highest")


def lengths(kernel: Float[Array, "*k o"]) -> Float[Array, " o"]:
    """Return the Euclidean length of what makes every output."""
    return jnp.sqrt(jnp.square(kernel).sum(tuple(range(kernel.ndim - 1))))


def adapted(
    x: Array, y: Array, kernel: Any, lora: Leaves, key: Key | None,
    multiply: Callable[[Array, Array], Array],
) -> Array:  # fmt: skip
    """Add the low-rank update of x to y, the product with the kernel, without its bias.

    DoRA's gradient takes the length as given (section 4.3), and PEFT's does: nothing is frozen by
    it, and the direction still learns.  Dropout falls on the input of the factors alone; PEFT's
    falls on that of the kernel too, so that the two are equal without it.
    Source: Liu et al. 2024, arXiv 2402.09353, eq. 5 and 11.
    """
    y += low_rank(x, lora, key, multiply)
    if "magnitude" in lora:
        length = jax.lax.stop_gradient(lengths(folded(kernel, lora)))
        y *= along_last(lora["magnitude"] / length, y)
    return y


def rescaled(y: Array, rescale: Leaves) -> Array:
    """Return y * out + shift, as far as they are there.

    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3, (IA)3; Lian et al. 2022, arXiv
    2210.08823, eq. 2, SSF.
    """
    y = y * along_last(rescale["out"], y) if "out" in rescale else y
    return y + along_last(rescale["shift"], y) if "shift" in rescale else y


def bottlenecks(module: nn.Module, x: Array, y: Array) -> Array:
    """Add the bottleneck adapters of a module that turned x into y.

    Source: Houlsby et al. 2019, arXiv 1902.00751, figure 2 (serial); He et al. 2021, arXiv
    2110.04366, table 1 (parallel, scaled).
    """
    for kind, tokens in (("serial", y), ("parallel", x)):
        for name, adapter in port(module, kind).items():
            rows = tokens.reshape(-1, tokens.shape[-1])
            hidden = ACTIVATIONS[name](affine(rows, adapter["down"]))
            y += (affine(hidden, adapter["up"]) * adapter["scale"].astype(y.dtype)).reshape(y.shape)
    return y


def affine(rows: Rows, leaves: Leaves) -> Float[Array, "n o"]:
    """Return rows @ kernel + bias in the dtype of the rows."""
    y = rows @ leaves["kernel"].astype(rows.dtype)
    return y + along_last(leaves["bias"], y)


def in_front(tokens: Float[Array, "n *d"], like: Float[Array, "b l *d"]) -> Float[Array, "b m *d"]:
    """Put the same tokens in front of those of every example."""
    tokens = jnp.broadcast_to(tokens.astype(like.dtype), (like.shape[0], *tokens.shape))
    return jnp.concatenate([tokens, like], axis=1)
