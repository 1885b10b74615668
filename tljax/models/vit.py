"""Vision Transformer: pre-norm blocks on patches, as Google, DeiT, DINOv2, CLIP and timm do it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from tljax import layers
from tljax.types import BadInput, Output

Tokens = Float[Array, "b l d"]
Pooled = Float[Array, "b o"]
Grid = tuple[int, int]


def cubic(away: np.ndarray, a: float) -> np.ndarray:
    """Weigh samples by their distance.  Source: Keys 1981, doi 10.1109/TASSP.1981.1163711."""
    near = (a + 2) * away**3 - (a + 3) * away**2 + 1
    far = a * (away**3 - 5 * away**2 + 8 * away - 4)
    return np.select([away <= 1, away < 2], [near, far])


def centres(before: int, after: int) -> np.ndarray:
    """Return where the pixels of the new axis lie on the old one, with half-pixel centres."""
    return ((np.arange(after) + 0.5) * before / after - 0.5)[:, None]


def bicubic(before: int, after: int) -> np.ndarray:
    """Resample as torch's bicubic: a = -0.75, edges repeated; jax.image.resize has a = -0.5."""
    matrix = cubic(np.abs(centres(before, after) - np.arange(-2, before + 2)), -0.75)
    matrix[:, 2] += matrix[:, :2].sum(1)
    matrix[:, -3] += matrix[:, -2:].sum(1)
    return matrix[:, 2:-2]


def bicubic_antialias(before: int, after: int) -> np.ndarray:
    """Resample as torch's bicubic with antialias=True: a = -0.5, wider when shrinking, cut off."""
    away = np.abs(centres(before, after) - np.arange(before)) / max(before / after, 1)
    matrix = cubic(away, -0.5)
    return matrix / matrix.sum(1, keepdims=True)


def bilinear(before: int, after: int) -> np.ndarray:
    """Resample as scipy.ndimage.zoom of order 1: the first and last pixels stay where they are."""
    places = np.linspace(0, before - 1, after)[:, None]
    return np.maximum(1 - np.abs(places - np.arange(before)), 0)


RESAMPLERS: dict[str, Callable[[int, int], np.ndarray]] = {
    "bicubic": bicubic,
    "bicubic_antialias": bicubic_antialias,
    "bilinear": bilinear,
}
"""Name -> the [after, before] matrix of one axis."""


def resample(
    table: Float[Array, "1 n d"], before: Grid, after: Grid, kind: str, prefix: int
) -> Float[Array, "1 m d"]:
    """Resample a position table from one grid to another; its first `prefix` rows stay.

    In float32 at the highest matmul precision: it is a table, not a layer.
    """
    matrix = layers.choose(RESAMPLERS, kind, "resample")
    if tuple(before) == tuple(after):
        return table
    down, right = (matrix(*sides).astype(np.float32) for sides in zip(before, after, strict=True))
    grid = rearrange(table[:, prefix:].astype(jnp.float32), "1 (h w) d -> h (w d)", h=before[0])
    grid = jnp.matmul(down, grid, precision="highest")
    grid = rearrange(grid, "h (w d) -> w (h d)", w=before[1])
    grid = jnp.matmul(right, grid, precision="highest")
    grid = rearrange(grid, "w (h d) -> 1 (h w) d", h=after[0])
    return jnp.concatenate([table[:, :prefix], grid.astype(table.dtype)], axis=1)


class PatchEmbed(nn.Module):
    """Cut images into patches, embed them, put other tokens first, add positions.

    first: leaf names of the tokens put first; positions: whether these have rows in the table.
    norm: makes the norm of the sum.
    """

    patch: Callable[..., nn.Module]
    norm: Callable[..., nn.Module] | None
    first: tuple[str, ...]
    positions: bool
    registers: int
    grid: Grid
    resample: str
    dtype: Any

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Tokens:
        x = self.patch(name="patch")(images)
        (batch, *cells, width), rows = x.shape, len(self.first) * self.positions

        def learned(name: str, count: int = 1) -> Array:
            return self.param(name, layers.small_normal, (1, count, width))

        first = [learned(name).astype(self.dtype) for name in self.first]
        pos = learned("pos", rows + self.grid[0] * self.grid[1])
        pos = resample(pos, self.grid, tuple(cells), self.resample, rows).astype(self.dtype)
        if self.positions:
            first = [token + pos[:, [index]] for index, token in enumerate(first)]
        if self.registers:
            first.append(learned("registers", self.registers).astype(self.dtype))
        patches = rearrange(x, "b h w d -> b (h w) d") + pos[:, rows:]
        x = jnp.concatenate([*(jnp.repeat(token, batch, 0) for token in first), patches], axis=1)
        return x if self.norm is None else self.norm(name="norm")(x)


class MapHead(nn.Module):
    """Let a learned probe read the tokens: x = attention(probe); x + mlp(norm(x)).

    Source: Zhai et al. 2021, arXiv 2106.04560, section 3.4, as big_vision has it.
    """

    heads: int
    mlp: int
    eps: float
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Tokens) -> Float[Array, "b d"]:
        batch, _, width = tokens.shape
        probe = self.param("probe", layers.small_normal, (1, 1, width)).astype(self.dtype)
        attention = layers.Attention(self.heads, self.dtype, name="attention")
        x = attention(tokens, query=jnp.repeat(probe, batch, 0))
        mlp = layers.Mlp(self.mlp, self.activation, self.dtype, name="mlp")
        return (x + mlp(layers.LayerNorm(self.eps, self.dtype, name="norm")(x)))[:, 0]


class ViT(nn.Module):
    """Vision Transformer; the defaults are DINOv2's ViT-S/14 but for its LayerScale.

    patch: side, or height and width.  grid: rows and columns of the stored position table; other
    image sizes resample it, as `resample` says.  layer_scale: its start value, or None for none.
    distilled: a second token after the class token; registers: more tokens, without positions.
    prefix_positions: class and distillation token have rows in the table.  embed_norm: a norm
    before the blocks.  qk_norm: eps of a norm over every head of query and key.  norm_pooled: the
    final norm applies to what is pooled, and tokens come without it.

    pool: "cls", "mean" (of the patches), "cls+mean", "map" (attention by a probe, over the
    patches), or "pooler" (tanh of a Dense of cls, or of the mean if there is no class token).
    pooler, map_head: the file has such weights (a pooler of this width), so create their place.
    projection: width of a last Dense on the pooled vector, without bias.  distilled_head: logits
    are the mean of two heads, the second on the distillation token.

    drop_path: of the last block, growing linearly from 0.  Output: tokens (first the class token,
    the distillation token, the registers) and their pooled form come after the final norm.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp: int = 1536
    patch: int | tuple[int, int] = 14
    patch_bias: bool = True
    grid: tuple[int, int] = (37, 37)
    resample: str = "bicubic"
    class_token: bool = True
    distilled: bool = False
    prefix_positions: bool = True
    registers: int = 0
    embed_norm: bool = False
    qkv_bias: bool = True
    qk_norm: float | None = None
    layer_scale: float | None = None
    eps: float = 1e-6
    activation: str = "gelu"
    norm_pooled: bool = False
    pool: str = "cls"
    pooler: int | None = None
    map_head: bool = False
    projection: int | None = None
    read: str | None = None
    num_classes: int | None = None
    distilled_head: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Output:
        """Return tokens, their pooled form, and logits.

        Raises: BadInput if the patch does not divide the image, or a field has no such choice.
        """
        norm = partial(layers.LayerNorm, self.eps, self.dtype)
        shape = self.heads, self.mlp, self.eps, self.activation
        options = {"qkv_bias": self.qkv_bias, "qk_norm": self.qk_norm, "dtype": self.dtype}
        options |= {"layer_scale": self.layer_scale, "dropout": self.dropout}

        def make(index: int) -> nn.Module:
            drop_path = self.drop_path * index / max(self.depth - 1, 1)
            return layers.PreNormBlock(*shape, **options, drop_path=drop_path, name=str(index))

        x = layers.Dropout(self.dropout)(self.embed(images, norm))
        x = layers.Blocks(make, self.depth, self.read, self.remat, name="blocks")(x)
        last = norm(name="norm")
        tokens, finish = (x, last) if self.norm_pooled else (last(x), lambda vector: vector)
        pooled = self.pooled(tokens, finish)
        return Output(tokens, pooled, self.logits(pooled, tokens, finish))

    @property
    def first(self) -> tuple[str, ...]:
        """Name the tokens before registers and patches."""
        return ("cls",) * self.class_token + ("dist",) * self.distilled

    def cells(self, height: int, width: int) -> Grid:
        """Return the rows and columns of patches of an image.

        Raises: BadInput if the patch does not divide it.
        """
        tall, broad = layers.pair(self.patch)
        if height % tall or width % broad:
            raise BadInput(
                f"images of {height} x {width} do not divide into patches of {tall} x {broad}; "
                "resize or crop them to a multiple of the patch"
            )
        return height // tall, width // broad

    def embed(self, images: Float[Array, "b h w c"], norm: Callable[..., nn.Module]) -> Tokens:
        """Turn images into the tokens that the first block reads."""
        self.cells(*images.shape[1:3])
        fields = {"stride": self.patch, "use_bias": self.patch_bias, "dtype": self.dtype}
        return PatchEmbed(
            patch=partial(layers.Conv, self.width, self.patch, **fields),
            norm=norm if self.embed_norm else None,
            first=self.first,
            positions=self.prefix_positions,
            registers=self.registers,
            grid=self.grid,
            resample=self.resample,
            dtype=self.dtype,
            name="embed",
        )(images)

    def pooled(self, tokens: Tokens, finish: Callable[[Array], Array]) -> Pooled:
        """Pool the tokens; `finish` is applied to every pooled vector."""
        patches = tokens[:, len(self.first) + self.registers :]
        cls, mean = tokens[:, 0], patches.mean(1, dtype=jnp.float32).astype(self.dtype)
        shape = self.heads, self.mlp, self.eps, self.activation, self.dtype

        def pooler() -> Pooled:
            dense = layers.Dense(self.pooler or self.width, dtype=self.dtype, name="pooler")
            return jnp.tanh(dense(finish(cls if self.class_token else mean)))

        pools = {
            "mean": lambda: finish(mean),
            "map": lambda: finish(MapHead(*shape, name="map")(patches)),
            "pooler": pooler,
        }
        if self.class_token:
            pools["cls"] = lambda: finish(cls)
            pools["cls+mean"] = lambda: jnp.concatenate([finish(cls), finish(mean)], axis=-1)
        for name, there in (("map", self.map_head), ("pooler", self.pooler)):
            if there and name != self.pool and self.is_initializing():
                pools[name]()  # only create it
        x = layers.choose(pools, self.pool, "pool")()
        if self.projection is None:
            return x
        return layers.Dense(self.projection, False, self.dtype, name="projection")(x)

    def logits(
        self, pooled: Pooled, tokens: Tokens, finish: Callable[[Array], Array]
    ) -> Float[Array, "b c"] | None:
        """Apply the head, or the two heads of a distilled model."""
        logits = layers.zero_head(self, self.num_classes, pooled)
        if logits is None or not self.distilled_head:
            return logits
        if not self.distilled:
            raise BadInput("distilled_head=True reads the distillation token: set distilled=True")
        second = finish(tokens[:, self.first.index("dist")])
        return (logits + layers.zero_head(self, self.num_classes, second, "head_dist")) / 2
