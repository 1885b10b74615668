"""ResNet with BatchNorm (v1, v1.5, D), and BiT: pre-activation, GroupNorm, standardised kernels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from tljax import layers
from tljax.types import BadInput, Output

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


class DeepStem(nn.Module):
    """Three 3x3 convolutions in place of one 7x7.

    Source: He et al. 2018, arXiv 1812.01187, ResNet-C in figure 2.
    """

    width: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Image) -> Map:
        for index, stride in ((1, 2), (2, 1)):
            x = self.conv(self.width // 2, 3, stride, padding=1, name=f"conv{index}")(x)
            x = jax.nn.relu(self.norm(name=f"norm{index}")(x))
        return self.norm(name="norm")(self.conv(self.width, 3, padding=1, name="conv")(x))


class Block(nn.Module):
    """What both kinds of residual block share: two (basic) or three (bottleneck) convolutions.

    widths: channels after each convolution.  The stride is on the (first) 3x3 convolution, or with
    stride_first on the first one.  average: a shortcut that strides averages first.
    """

    widths: tuple[int, ...]
    stride: int
    stride_first: bool
    average: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    def convolve(self, x: Image, index: int) -> Map:
        """Apply convolution `index`, counted from 0."""
        size = 3 if len(self.widths) == 2 else (1, 3, 1)[index]
        strided = 0 if self.stride_first or len(self.widths) == 2 else 1
        stride = self.stride if index == strided else 1
        name = f"conv{index + 1}"
        return self.conv(self.widths[index], size, stride, padding=size // 2, name=name)(x)

    def shortcut(self, x: Image, source: Image, norm: Callable[..., nn.Module] | None) -> Map:
        """Return x where width and stride stay as they are, else the projected `source`."""
        if self.stride == 1 and x.shape[-1] == self.widths[-1]:
            return x
        stride = self.stride
        if self.average and stride > 1:
            # As torch: what the last window lacks at an odd border is not counted.
            pads = [(0, length % stride) for length in source.shape[1:3]]
            window = (stride, stride)
            source = nn.avg_pool(source, window, window, pads, count_include_pad=False)
            stride = 1
        conv = partial(self.conv, self.widths[-1], 1, stride)
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

    stages: blocks in each; width: channels of the stem, doubled from stage to stage.  widths:
    channels that come out of each stage, if not these (times 4 with bottleneck).  stem: "imagenet",
    "small" (3x3, no pooling) or "deep" (three 3x3).  stride_first: on the first 1x1 (v1), not on
    the 3x3.  downsample_first: the first stage strides too.  shortcut: "conv", or "avg" before it
    where it strides (ResNet-D).  Output: tokens are the feature map of the block at `read`, pooled
    its mean.  pool: what the stem's pooling pads with, "lowest" or "zero"; it makes a difference
    only where no relu comes before, in BiT, whose codes differ in it.
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    widths: tuple[int, ...] | None = None
    bottleneck: bool = True
    stride_first: bool = False
    downsample_first: bool = False
    shortcut: str = "conv"
    norm: str = "batch"
    stem: str = "imagenet"
    pool: str = "lowest"
    eps: float = 1e-5
    momentum: float = 0.9
    read: str | None = None
    num_classes: int | None = None
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Image) -> Output:
        kinds = {
            "batch": (PostNormBlock, partial(layers.BatchNorm, momentum=self.momentum)),
            "group": (PreNormBlock, layers.GroupNorm),
        }
        kind, norm = layers.choose(kinds, self.norm, "norm")
        norm = partial(norm, eps=self.eps, dtype=self.dtype)
        pre = kind is PreNormBlock
        conv = partial(layers.Conv, standardize=pre, dtype=self.dtype)
        average = layers.choose({"conv": False, "avg": True}, self.shortcut, "shortcut")
        layout = [(stage, i == 0) for stage, count in enumerate(self.stages) for i in range(count)]

        def make(index: int) -> nn.Module:
            stage, first = layout[index]
            stride = 2 if first and (stage or self.downsample_first) else 1
            shape = self.channels(stage), stride, self.stride_first, average
            return kind(*shape, conv, norm, name=str(index))

        x = self.stemmed(images, conv, norm, pre)
        x = layers.Blocks(make, len(layout), self.read, self.remat, name="blocks")(x)
        if pre and layers.last_block(self.read, len(layout)) == len(layout) - 1:
            x = jax.nn.relu(norm(name="norm")(x))
        elif pre and self.is_initializing():  # a block below has another width: only create it
            norm(name="norm")(jnp.zeros((1, 1, 1, self.channels(len(self.stages) - 1)[-1])))
        pooled = x.mean((1, 2), dtype=jnp.float32)
        tokens = rearrange(x, "b h w d -> b (h w) d")
        return Output(tokens, pooled, layers.zero_head(self, self.num_classes, pooled))

    def stemmed(
        self,
        images: Image,
        conv: Callable[..., nn.Module],
        norm: Callable[..., nn.Module],
        pre: bool,
    ) -> Map:
        """Turn images into what the first block reads."""

        def single(size: int, stride: int) -> nn.Module:
            first = partial(conv, self.width, size, stride, padding=size // 2)
            return ConvNorm(first, None if pre else norm, name="stem")

        stems = {"imagenet": lambda: single(7, 2), "small": lambda: single(3, 1)}
        if not pre:  # its norms stand between convolutions
            stems["deep"] = lambda: DeepStem(self.width, conv, norm, name="stem")
        x = layers.choose(stems, self.stem, "stem")()(images)
        x = x if pre else jax.nn.relu(x)
        if self.stem == "small":
            return x
        fill = layers.choose({"lowest": -jnp.inf, "zero": 0.0}, self.pool, "pool")
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=fill)
        return layers.max_pool(x)

    def channels(self, stage: int) -> tuple[int, ...]:
        """Return the channels after each convolution of a stage's blocks.

        Raises: BadInput if `widths` has not one entry for every stage.
        """
        first = self.width * (4 if self.bottleneck else 1)
        widths = self.widths or [first * 2**index for index in range(len(self.stages))]
        if len(widths) != len(self.stages):
            raise BadInput(f"widths={self.widths} are not one for each of stages={self.stages}")
        out = widths[stage]
        return (out // 4, out // 4, out) if self.bottleneck else (out, out)
