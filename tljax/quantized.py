"""Kernels in 8 and 4 bits: what a frozen kernel is stored as, and how it is read.

int8: `{int8: [*k, o], scale: [o]}`, one scale for every column.
nf4:  `{nf4: [i/2, o], block: [m, 256], step: [m], mean: []}`: two codes a byte along the input
axis, blocks of 64 inputs of one column, whose largest absolute values are themselves 8-bit numbers
in groups of 256 (double quantisation).  4.13 bits a parameter.

Source: Dettmers et al. 2022, arXiv 2208.07339 (int8, by column); Dettmers et al. 2023, arXiv
2305.14314, section 3 (nf4; the second quantisation is linear here, 8-bit floating point there).
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

BLOCK = 64  # inputs that share a scale
GROUP = 256  # scales that share a step

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The 16 values: quantiles of a normal distribution, scaled to [-1, 1].  Source: appendix E."""


def to_int8(kernel: Float[Array, "*k o"]) -> dict[str, Array]:
    """Round every column to 255 steps of its largest absolute value."""
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(tuple(range(kernel.ndim - 1)))
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    codes = jnp.round(kernel / scale.reshape((1,) * (kernel.ndim - 1) + (-1,)))
    return {"int8": codes.astype(jnp.int8), "scale": scale}


def to_nf4(kernel: Float[Array, "i o"]) -> dict[str, Array]:
    """Round every number to the nearest of the 16 values times the largest of its block."""
    columns = kernel.astype(jnp.float32).T.reshape(-1, BLOCK)
    stored = double(jnp.abs(columns).max(1))
    # By the scales that will be read, so that their own rounding is not added to it.
    largest = scales(stored, len(columns))
    scaled = columns / jnp.where(largest > 0, largest, 1.0)[:, None]
    middle = (jnp.array(NF4[1:]) + jnp.array(NF4[:-1])) / 2
    codes = jnp.searchsorted(middle, scaled).astype(jnp.uint8)
    codes = codes.reshape(kernel.shape[1], kernel.shape[0]).T
    return {"nf4": codes[::2] | codes[1::2] << 4} | stored


def double(largest: Float[Array, " n"]) -> dict[str, Array]:
    """Store the blocks' scales in 8 bits, around their mean, in groups of 256."""
    mean = largest.mean()
    groups = jnp.pad(largest - mean, (0, -len(largest) % GROUP)).reshape(-1, GROUP)
    step = jnp.maximum(jnp.abs(groups).max(1), jnp.finfo(jnp.float32).tiny) / 127
    return {"block": jnp.round(groups / step[:, None]).astype(jnp.int8), "step": step, "mean": mean}


def scales(stored: Mapping[str, Array], count: int) -> Float[Array, " n"]:
    """Return the scale of every block."""
    return (stored["block"] * stored["step"][:, None]).reshape(-1)[:count] + stored["mean"]


def read(kernel: Mapping[str, Array]) -> Float[Array, "*k o"]:
    """Return the kernel that is stored, in float32."""
    if "int8" in kernel:
        codes: Int[Array, "*k o"] = kernel["int8"]
        return codes * kernel["scale"].reshape((1,) * (codes.ndim - 1) + (-1,))
    pairs: UInt[Array, "j o"] = kernel["nf4"]
    rows, columns = 2 * pairs.shape[0], pairs.shape[1]
    codes = jnp.stack([pairs & 15, pairs >> 4], axis=1).reshape(rows, columns)
    blocks = scales(kernel, rows // BLOCK * columns).reshape(columns, rows // BLOCK).T
    values = jnp.array(NF4, jnp.float32)[codes].reshape(-1, BLOCK, columns)
    return (values * blocks[:, None]).reshape(rows, columns)
