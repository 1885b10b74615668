"""ResNet with BatchNorm (v1.5), and BiT: pre-activation, GroupNorm, standardised kernels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from tljax import layers
from tljax.types import Output

Image = Float[Array, "b h w c"]
Map = Float[Array, "b y x o"]


class ConvNorm(nn.Module):
    """A convolution, and in the BatchNorm network its norm: the stem, or a projecting shortcut."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, x: Image) -> Map:
        x = self.conv(name="conv")(x)
        return x if self.norm is None else self.norm(name="norm")(x)


class Block(nn.Module):
    """What both kinds of residual block share: two (basic) or three (bottleneck) convolutions.

    widths: channels after each convolution.  The stride is on the (first) 3x3 convolution.
    """

    widths: tuple[int, ...]
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    def convolve(self, x: Image, index: int) -> Map:
        """Apply convolution `index`, counted from 0."""
        size, strided = (3, index == 0) if len(self.widths) == 2 else ((1, 3, 1)[index], index == 1)
        stride = self.stride if strided else 1
        name = f"conv{index + 1}"
        return self.conv(self.widths[index], size, stride, padding=size // 2, name=name)(x)

    def shortcut(self, x: Image, source: Image, norm: Callable[..., nn.Module] | None) -> Map:
        """Return x where width and stride stay as they are, else the projected `source`."""
        if self.stride == 1 and x.shape[-1] == self.widths[-1]:
            return x
        conv = partial(self.conv, self.widths[-1], 1, self.stride)
        return ConvNorm(conv, norm, name="shortcut")(source)


class PostNormBlock(Block):
    """x -> relu(shortcut(x) + norm(conv(.. relu(norm(conv(x)))))).

    Source: He et al. 2015, arXiv 1512.03385, with the stride moved to the 3x3 (v1.5).
    """

    @nn.compact
    def __call__(self, x: Image) -> Map:
        y = x
        for index in range(len(self.widths)):
            y = y if index == 0 else jax.nn.relu(y)
            y = self.norm(name=f"norm{index + 1}")(self.convolve(y, index))
        return jax.nn.relu(y + self.shortcut(x, x, self.norm))


class PreNormBlock(Block):
    """x -> shortcut + conv(.. relu(norm(conv(relu(norm(x)))))).

    A projecting shortcut starts from the first relu(norm(x)), an identity one from x.
    Source: He et al. 2016, arXiv 1603.05027; Kolesnikov et al. 2019, arXiv 1912.11370.
    """

    @nn.compact
    def __call__(self, x: Image) -> Map:
        y = x
        for index in range(len(self.widths)):
            y = jax.nn.relu(self.norm(name=f"norm{index + 1}")(y))
            x = self.shortcut(x, y, None) if index == 0 else x
            y = self.convolve(y, index)
        return y + x


class ResNet(nn.Module):
    """ResNet (norm="batch") or BiT (norm="group").

    stages: blocks in each; width: channels of the stem, doubled from stage to stage.  Output:
    tokens are the feature map of the block at `read`, pooled its mean.
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    bottleneck: bool = True
    norm: str = "batch"
    stem: str = "imagenet"
    eps: float = 1e-5
    momentum: float = 0.9
    read: str | None = None
    num_classes: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Image) -> Output:
        kinds = {
            "batch": (PostNormBlock, partial(layers.BatchNorm, momentum=self.momentum)),
            "group": (PreNormBlock, layers.GroupNorm),
        }
        kind, norm = layers.choose(kinds, self.norm, "norm")
        norm = partial(norm, eps=self.eps, dtype=self.dtype)
        size, stride = layers.choose({"imagenet": (7, 2), "small": (3, 1)}, self.stem, "stem")
        pre = kind is PreNormBlock
        conv = partial(layers.Conv, standardize=pre, dtype=self.dtype)
        layout = [(stage, i == 0) for stage, count in enumerate(self.stages) for i in range(count)]

        def make(index: int) -> nn.Module:
            stage, first = layout[index]
            stride = 2 if first and stage else 1
            return kind(self.widths(stage), stride, conv, norm, name=str(index))

        stem = partial(conv, self.width, size, stride, padding=size // 2)
        x = ConvNorm(stem, None if pre else norm, name="stem")(images)
        x = x if pre else jax.nn.relu(x)
        if self.stem == "imagenet":
            # BiT pads its pool with zeros; after relu that is the same as torch's -inf.
            x = nn.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (2, 2))
        x = layers.Blocks(make, len(layout), self.read, name="blocks")(x)
        if pre and layers.last_block(self.read, len(layout)) == len(layout) - 1:
            x = jax.nn.relu(norm(name="norm")(x))
        elif pre and self.is_initializing():  # a block below has another width: only create it
            norm(name="norm")(jnp.zeros((1, 1, 1, self.widths(len(self.stages) - 1)[-1])))
        pooled = x.mean((1, 2), dtype=jnp.float32)
        tokens = rearrange(x, "b h w d -> b (h w) d")
        return Output(tokens, pooled, layers.zero_head(self.num_classes, pooled))

    def widths(self, stage: int) -> tuple[int, ...]:
        """Return the channels after each convolution of a stage's blocks."""
        width = self.width * 2**stage
        return (width, width, 4 * width) if self.bottleneck else (width, width)
