"""What happens to an image without chance: decode, fit, normalise (numpy and Pillow)."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from tljax.types import BadInput

Pixels = UInt8[np.ndarray, "h w c"]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of bytes / 255


def to_pil(image: Pixels) -> Image.Image:
    """View an array of one or three channels as a Pillow image."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def to_array(image: Image.Image) -> Pixels:
    """View a Pillow image as an array that always has a channel axis."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


@contextmanager
def opened(data: bytes | Path, name: str) -> Iterator[Image.Image]:
    """Open a picture, not yet its pixels.

    Raises: BadInput that names a corrupt one, also when its pixels turn out to be.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
            yield picture
    # Pillow raises SyntaxError on broken PNG chunks, and ValueError on some broken compression.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{name} cannot be decoded: {error}\nReplace or remove it.") from error


def decode(data: bytes | Path, name: str) -> Pixels:
    """Decode a picture to one or three channels, transparency on white.

    Raises: BadInput that names a corrupt one.
    """
    with opened(data, name) as picture:
        if picture.mode[0] in "IF":  # Pillow would clip them at 255
            raise ValueError(f"its pixels are {picture.mode}, expected 8 bits a channel")
        if picture.has_transparency_data:
            page = Image.new("RGBA", picture.size, "white")
            page.alpha_composite(picture.convert("RGBA"))
            return to_array(page.convert("RGB"))
        return to_array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """Resize with Pillow's bicubic filter, which is wide enough not to alias when shrinking."""
    if image.shape[:2] == (height, width):
        return image
    return to_array(to_pil(image).resize((width, height), Image.Resampling.BICUBIC))


def normalise(
    image: Pixels, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float32[np.ndarray, "h w 3"]:
    """Map bytes to (x / 255 - mean) / std in float32; a single channel meets all three means."""
    scale, shift = 1 / (255 * np.asarray(std)), -np.asarray(mean) / np.asarray(std)
    return image * scale.astype(np.float32) + shift.astype(np.float32)


def fit(example: dict, size: int) -> dict:
    """Bring an example's image to `size` x `size` pixels: the shorter side, then the middle."""
    image = example["image"]
    height, width = (side * size // min(image.shape[:2]) for side in image.shape[:2])
    top, left = (height - size) // 2, (width - size) // 2
    image = resize(image, height, width)[top : top + size, left : left + size]
    return {**example, "image": image}
