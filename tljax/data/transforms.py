"""What happens to an image without chance: decode, fit, normalise (numpy and Pillow)."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from tljax.types import BadInput
from tljax.weights.preprocess import FILTERS, IMAGENET

Pixels = UInt8[np.ndarray, "h w c"]
Picture = str | Path | bytes | Image.Image | np.ndarray
LARGEST = 1 << 28  # pixels that a resize may ask for: a thin picture of few bytes asks for more


def to_pil(image: Pixels) -> Image.Image:
    """View an array of one or three channels as a Pillow image."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def to_array(image: Image.Image) -> Pixels:
    """View a Pillow image as an array that always has a channel axis."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except (BadInput, MemoryError, PermissionError):
        raise
    except Exception as error:  # Pillow raises many kinds: SyntaxError on broken PNG chunks, ..
        raise BadInput(f"{name} cannot be decoded: {error}\nReplace or remove it.") from error


@contextmanager
def opened(data: bytes | str | Path, name: str) -> Iterator[Image.Image]:
    """Open a picture, not yet its pixels.

    Raises: BadInput that names a corrupt one, also when its pixels turn out to be.
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    with _decoding(name), Image.open(source) as picture:
        yield picture


def decode(data: bytes | str | Path, name: str) -> Pixels:
    """Decode a picture to one or three channels, transparency on white.

    Raises: BadInput that names a corrupt one.
    """
    with opened(data, name) as picture:
        return _to_pixels(picture)


def _to_pixels(picture: Image.Image) -> Pixels:
    if picture.mode[0] in "IF":  # Pillow would clip them at 255
        raise ValueError(f"its pixels are {picture.mode}, expected 8 bits a channel")
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, "white")
        page.alpha_composite(picture.convert("RGBA"))
        return to_array(page.convert("RGB"))
    return to_array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


def resize(image: Pixels, height: int, width: int, interpolation: str = "bicubic") -> Pixels:
    """Resize with one of Pillow's `FILTERS`, which are wide enough not to alias when shrinking.

    Raises: BadInput for a size that no memory should be spent on.
    """
    if image.shape[:2] == (height, width):
        return image
    if not 0 < height * width <= LARGEST:
        raise BadInput(
            f"a picture of {image.shape[1]} x {image.shape[0]} pixels would be resized to"
            f" {width} x {height}: expected 1 to {LARGEST} pixels\ncrop it first"
        )
    return to_array(to_pil(image).resize((width, height), FILTERS.index(interpolation)))


def normalise(
    image: Pixels, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float32[np.ndarray, "h w 3"]:
    """Map bytes to (x / 255 - mean) / std in float32; a single channel meets all three means."""
    scale, shift = 1 / (255 * np.asarray(std)), -np.asarray(mean) / np.asarray(std)
    return image * scale.astype(np.float32) + shift.astype(np.float32)


@dataclass(frozen=True)
class Preprocess:
    """What a source does to a picture before its model reads it: resize, cut the middle, normalise.

    mean, std: of bytes / 255.  size: (h, w) of the middle that is cut out, None for all of it.
    resize: the shorter side, or (h, w), which `aspect` says how to reach.  margins: where half a
    pixel of what is cut off goes.  fill: bytes around a picture smaller than `size`.
    """

    mean: tuple[float, ...] = IMAGENET["mean"]
    std: tuple[float, ...] = IMAGENET["std"]
    size: tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bicubic"
    aspect: str = "stretch"
    margins: str = "floor"
    fill: tuple[int, ...] = (0, 0, 0)

    def __post_init__(self):
        """Make tuples of JSON's lists, and refuse values that mean nothing."""
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        shorter = isinstance(self.resize, int)
        sides = [self.size, (self.resize,) * 2 if shorter else self.resize]
        for name, good, expected in (
            ("mean", _numbers(self.mean, 3), "three numbers"),
            ("std", _numbers(self.std, 3) and min(self.std) > 0, "three positive numbers"),
            ("size", _sides(sides[0]), "(height, width) or None"),
            ("resize", _sides(sides[1]), "the shorter side, (height, width) or None"),
            ("interpolation", self.interpolation in FILTERS, f"one of {sorted(FILTERS)}"),
            ("aspect", self.aspect in ASPECTS, f"one of {sorted(ASPECTS)}"),
            ("margins", self.margins in MARGINS, f"one of {sorted(MARGINS)}"),
            ("fill", _numbers(self.fill, 3) and {*self.fill} <= {*range(256)}, "three bytes"),
        ):
            if not good:
                given = getattr(self, name)
                raise BadInput(f"preprocessing: {name} is {given!r}, expected {expected}")

    @classmethod
    def read(cls, record: Mapping[str, Any] | None) -> Self:
        """Build it from a source's or a run's record; what that does not say is the default.

        Raises: BadInput for a field that is unknown or a value that means nothing.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(record or {}) - known):
            raise BadInput(f"preprocessing: no field {unknown[0]!r}, expected {sorted(known)}")
        return cls(**record or {})

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Float32[np.ndarray, "b h w 3"]:
        """Prepare one picture or several: paths, encoded bytes, Pillow images, uint8 arrays.

        Raises: BadInput for one that cannot be decoded, or where sizes differ and stay different.
        """
        alone = isinstance(pictures, Picture) and getattr(pictures, "ndim", 3) < 4
        listed: list[Any] = [pictures] if alone else list(pictures)  # type: ignore[arg-type]
        fitted = [self.fit(read_picture(one, f"picture {i}")) for i, one in enumerate(listed)]
        shapes = sorted({image.shape[:2] for image in fitted})
        if len(shapes) != 1:
            raise BadInput(f"pictures of sizes {shapes[:4]} make no batch: expected one size")
        return np.stack([normalise(image, self.mean, self.std) for image in fitted])

    def fit(self, image: Pixels) -> Pixels:
        """Resize and cut, in bytes."""
        if self.resize is not None:
            sides = self._shape(*image.shape[:2])
            image = resize(image, *sides, self.interpolation)
        return image if self.size is None else _cut(image, self.size, self.margins, self.fill)

    def _shape(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.resize, int):
            height, width = (self.resize * side // min(height, width) for side in (height, width))
            return height, width
        return ASPECTS[self.aspect](height, width, *self.resize)

    def at(self, size: int | tuple[int, int]) -> Self:
        """Adapt to another size, a square's side or (h, w): in the source's ratio of the cut."""
        own = (self.resize,) if isinstance(self.resize, int) else self.resize
        ratio = min(own) / min(self.size) if own and self.size else 1.0
        if isinstance(size, int):
            shorter = round(size * ratio)
            return replace(self, size=(size, size), resize=shorter, aspect="stretch")
        sides = round(size[0] * ratio), round(size[1] * ratio)
        return replace(self, size=size, resize=sides, aspect="cover")


def _numbers(values: Any, count: int) -> bool:
    if not isinstance(values, tuple) or len(values) != count:
        return False
    return all(isinstance(value, int | float) and np.isfinite(value) for value in values)


def _sides(sides: Any) -> bool:
    if sides is None:
        return True
    return _numbers(sides, 2) and all(isinstance(side, int) and side > 0 for side in sides)


def _scaled(height: int, width: int, ratio: float) -> tuple[int, int]:
    return round(height / ratio), round(width / ratio)


ASPECTS = {
    "stretch": lambda h, w, height, width: (height, width),
    "cover": lambda h, w, height, width: _scaled(h, w, min(h / height, w / width)),
    "contain": lambda h, w, height, width: _scaled(h, w, max(h / height, w / width)),
}
"""How (h, w) becomes (height, width): just so, or at one scale, as the larger or the smaller."""
MARGINS = {
    "floor": lambda spare: spare // 2,
    "round": lambda spare: round(spare / 2) if spare > 0 else -(-spare // 2),
}
"""Pixels before the middle of those to spare: as transformers cuts with Pillow, as torchvision."""


def _cut(image: Pixels, size: tuple[int, int], margins: str, fill: tuple[int, ...]) -> Pixels:
    top, left = (
        MARGINS[margins](side - wanted) for side, wanted in zip(image.shape, size, strict=False)
    )
    height, width = size
    inside = image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if inside.shape[:2] == size:
        return inside
    around = fill if len(set(fill)) > 1 else fill[: image.shape[2]]
    page = np.broadcast_to(np.asarray(around, np.uint8), (*size, len(around))).copy()
    rows, columns = (slice(max(-start, 0), None) for start in (top, left))
    page[rows, columns][: inside.shape[0], : inside.shape[1]] = inside
    return page


def read_picture(picture: Picture, name: str) -> Pixels:
    """Bring any form of a picture to uint8 [h, w, 1 or 3]; `name` is for those without a path.

    Raises: BadInput for what is no picture of 8 bits a channel.
    """
    if isinstance(picture, np.ndarray):
        pixels = picture[:, :, None] if picture.ndim == 2 else picture
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
            raise BadInput(
                f"{name} is an array of {picture.dtype} {list(picture.shape)},"
                " expected uint8 [h, w], [h, w, 1] or [h, w, 3]"
            )
        if not pixels.size:
            raise BadInput(f"{name} is empty: {list(picture.shape)}")
        return pixels
    if isinstance(picture, Image.Image):
        with _decoding(name):
            return _to_pixels(picture)
    return decode(picture, name if isinstance(picture, bytes) else str(picture))


_PLAIN = Preprocess()


def fit(example: dict, size: int, preprocess: Preprocess = _PLAIN) -> dict:
    """Bring an example's image to `size` x `size` pixels: the shorter side, then the middle."""
    return {**example, "image": preprocess.at(size).fit(example["image"])}
