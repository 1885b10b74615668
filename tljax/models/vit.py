"""Vision Transformer: pre-norm blocks on patches, with DINOv2's LayerScale."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from tljax import layers
from tljax.types import BadInput, Output

Tokens = Float[Array, "b l d"]


def cubic_matrix(before: int, after: int) -> np.ndarray:
    """Return the [after, before] matrix of torch's bicubic resampling of one axis.

    a = -0.75, half-pixel centres, edges repeated, no antialiasing; jax.image.resize has a = -0.5.
    Source: Keys 1981, doi 10.1109/TASSP.1981.1163711.
    """
    centres = (np.arange(after) + 0.5) * before / after - 0.5
    away = np.abs(centres[:, None] - np.arange(-2, before + 2))
    near = 1.25 * away**3 - 2.25 * away**2 + 1
    far = -0.75 * (away**3 - 5 * away**2 + 8 * away - 4)
    matrix = np.select([away <= 1, away < 2], [near, far])
    matrix[:, 2] += matrix[:, :2].sum(1)
    matrix[:, -3] += matrix[:, -2:].sum(1)
    return matrix[:, 2:-2].astype(np.float32)


def resample(
    table: Float[Array, "1 n d"], before: tuple[int, int], after: tuple[int, int]
) -> Float[Array, "1 m d"]:
    """Resample a position table (the class token first) from one grid to another.

    In float32 at the highest matmul precision: it is a table, not a layer.
    """
    if before == after:
        return table
    grid = rearrange(table[:, 1:].astype(jnp.float32), "1 (h w) d -> h (w d)", h=before[0])
    grid = jnp.matmul(cubic_matrix(before[0], after[0]), grid, precision="highest")
    grid = rearrange(grid, "h (w d) -> w (h d)", w=before[1])
    grid = jnp.matmul(cubic_matrix(before[1], after[1]), grid, precision="highest")
    grid = rearrange(grid, "w (h d) -> 1 (h w) d", h=after[0])
    return jnp.concatenate([table[:, :1], grid.astype(table.dtype)], axis=1)


class PatchEmbed(nn.Module):
    """Cut images into patches, embed them, put the class token first, add positions."""

    width: int
    patch: int
    grid: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Tokens:
        """Return the tokens.

        Raises: BadInput if the patch does not divide the image.
        """
        size = images.shape[1:3]
        if size[0] % self.patch or size[1] % self.patch:
            raise BadInput(
                f"images of {size[0]} x {size[1]} do not divide into patches of {self.patch}; "
                "resize or crop them to a multiple of the patch"
            )
        fields = {"stride": self.patch, "use_bias": True, "dtype": self.dtype}
        x = layers.Conv(self.width, self.patch, **fields, name="patch")(images)
        cells = (x.shape[1], x.shape[2])
        count = 1 + self.grid[0] * self.grid[1]
        cls = self.param("cls", layers.small_normal, (1, 1, self.width))
        pos = self.param("pos", layers.small_normal, (1, count, self.width))
        cls = jnp.broadcast_to(cls.astype(self.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([cls, rearrange(x, "b h w d -> b (h w) d")], axis=1)
        return x + resample(pos, self.grid, cells).astype(self.dtype)


class Block(nn.Module):
    """x += scale(attention(norm(x))); x += scale(mlp(norm(x))).

    Source: Dosovitskiy et al. 2020, arXiv 2010.11929, eq. 2 and 3.
    """

    heads: int
    mlp: int
    layer_scale: float | None
    eps: float
    activation: str
    dropout: float
    drop_path: float
    dtype: Any

    def residual(self, y: Tokens, index: int) -> Tokens:
        """Scale and drop a branch."""
        y = layers.Dropout(self.dropout)(y)
        if self.layer_scale is not None:
            y = layers.LayerScale(self.layer_scale, name=f"scale{index}")(y)
        return layers.DropPath(self.drop_path)(y)

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        attention = layers.Attention(self.heads, self.dtype, name="attention")
        mlp = layers.Mlp(self.mlp, self.activation, self.dtype, name="mlp")
        x = x + self.residual(attention(layers.LayerNorm(self.eps, self.dtype, name="norm1")(x)), 1)
        return x + self.residual(mlp(layers.LayerNorm(self.eps, self.dtype, name="norm2")(x)), 2)


class ViT(nn.Module):
    """Vision Transformer; the defaults are DINOv2's ViT-S/14 but for its LayerScale.

    grid: rows and columns of the stored position table; other image sizes resample it.
    layer_scale: its start value, or None for none.  drop_path: of the last block, growing linearly
    from 0.  Output: tokens (class token first) and their pooled form come after the final norm.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp: int = 1536
    patch: int = 14
    grid: tuple[int, int] = (37, 37)
    layer_scale: float | None = None
    eps: float = 1e-6
    activation: str = "gelu"
    pool: str = "cls"
    read: str | None = None
    num_classes: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Output:

        def make(index: int) -> nn.Module:
            drop_path = self.drop_path * index / max(self.depth - 1, 1)
            shape = self.heads, self.mlp, self.layer_scale, self.eps, self.activation
            return Block(*shape, self.dropout, drop_path, self.dtype, name=str(index))

        x = PatchEmbed(self.width, self.patch, self.grid, self.dtype, name="embed")(images)
        x = layers.Dropout(self.dropout)(x)
        x = layers.Blocks(make, self.depth, self.read, name="blocks")(x)
        tokens = layers.LayerNorm(self.eps, self.dtype, name="norm")(x)
        cls, mean = tokens[:, 0], tokens[:, 1:].mean(1, dtype=jnp.float32).astype(self.dtype)
        pools = {"cls": [cls], "mean": [mean], "cls+mean": [cls, mean]}
        pooled = jnp.concatenate(layers.choose(pools, self.pool, "pool"), axis=-1)
        return Output(tokens, pooled, layers.zero_head(self.num_classes, pooled))
