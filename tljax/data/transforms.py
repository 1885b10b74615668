"""What happens to an image without chance: resize, crop, normalise (numpy and Pillow)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "h w c"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_pil(image: Pixels) -> Image.Image:
    """View an array of one or three channels as a Pillow image."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def to_array(image: Image.Image) -> Pixels:
    """View a Pillow image as an array that always has a channel axis."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """Resize with Pillow's bicubic filter, which is wide enough not to alias when shrinking."""
    if image.shape[:2] == (height, width):
        return image
    return to_array(to_pil(image).resize((width, height), Image.Resampling.BICUBIC))


def center_crop(image: Pixels, size: int) -> Pixels:
    """Cut the middle `size` x `size` pixels out."""
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def normalise(
    image: Pixels, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float32[np.ndarray, "h w 3"]:
    """Map bytes to (x / 255 - mean) / std in float32; a single channel meets all three means."""
    scale, shift = 1 / (255 * np.asarray(std)), -np.asarray(mean) / np.asarray(std)
    return image * scale.astype(np.float32) + shift.astype(np.float32)


@dataclass(frozen=True)
class FitImage:
    """Bring images to `size` x `size` bytes: shorter side to `resize`, then the middle.

    Deterministic, so that `Cached` may remember the result.
    """

    size: int
    resize: int

    def __call__(self, example: dict) -> dict:
        """Replace the image of an example."""
        image = example["image"]
        height, width = (side * self.resize // min(image.shape[:2]) for side in image.shape[:2])
        return {**example, "image": center_crop(resize(image, height, width), self.size)}


@dataclass(frozen=True)
class Normalise:
    """The evaluation transform of images: normalised float32 with three channels, no chance."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Replace the image of an example; `rng` is not read."""
        return {**example, "image": normalise(example["image"], self.mean, self.std)}
