"""What happens to a training image by chance.  Every choice comes from the generator passed in."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int
from PIL import Image, ImageEnhance, ImageOps

from tljax.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Pixels,
    normalise,
    resize,
    to_array,
    to_pil,
    to_rgb,
)
from tljax.types import BadInput

Rng = np.random.Generator
Box = tuple[int, int, int, int]


def sample_box(
    height: int, width: int, rng: Rng, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box | None:
    """Draw (top, left, height, width): area share uniform, aspect (w / h) log-uniform; 10 tries.

    Source: Szegedy et al. 2015, section 6, with the bounds and tries of common practice.
    """
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    return None


def random_resized_crop(
    image: Pixels,
    rng: Rng,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Pixels:
    """Cut a random box and resize it; when none fits, the largest middle box of a legal aspect."""
    height, width = image.shape[:2]
    box = sample_box(height, width, rng, scale, ratio)
    if box is None:
        box_width = min(width, round(height * ratio[1]))
        box_height = min(height, round(width / ratio[0]))
        box = (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
    top, left, box_height, box_width = box
    return resize(image[top : top + box_height, left : left + box_width], size, size)


def flip(image: Pixels, rng: Rng, chance: float = 0.5) -> Pixels:
    """Mirror left to right, with a chance."""
    return image[:, ::-1] if rng.random() < chance else image


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _enhance(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, strength: kind(image).enhance(1 + strength)


BINS = 31
_STEPS = np.arange(BINS) / (BINS - 1)
Operation = Callable[[Image.Image, float], Image.Image]
RAND_AUGMENT: dict[str, tuple[np.ndarray, bool, Operation]] = {
    # name: (strength by magnitude 0..30, whether its sign is drawn, what it does)
    "identity": (0 * _STEPS, False, lambda image, _: image),
    "shear_x": (0.3 * _STEPS, True, lambda image, s: _affine(image, 1, s, 0, 0, 1, 0)),
    "shear_y": (0.3 * _STEPS, True, lambda image, s: _affine(image, 1, 0, 0, s, 1, 0)),
    "translate_x": (
        150 / 331 * _STEPS,
        True,
        lambda image, s: _affine(image, 1, 0, -int(s * image.width), 0, 1, 0),
    ),
    "translate_y": (
        150 / 331 * _STEPS,
        True,
        lambda image, s: _affine(image, 1, 0, 0, 0, 1, -int(s * image.height)),
    ),
    "rotate": (30 * _STEPS, True, lambda image, s: image.rotate(s)),
    "brightness": (0.9 * _STEPS, True, _enhance(ImageEnhance.Brightness)),
    "color": (0.9 * _STEPS, True, _enhance(ImageEnhance.Color)),
    "contrast": (0.9 * _STEPS, True, _enhance(ImageEnhance.Contrast)),
    "sharpness": (0.9 * _STEPS, True, _enhance(ImageEnhance.Sharpness)),
    "posterize": (
        8 - np.round(4 * _STEPS),
        False,
        lambda image, s: ImageOps.posterize(image, int(s)),
    ),
    "solarize": (255 * (1 - _STEPS), False, ImageOps.solarize),
    "autocontrast": (0 * _STEPS, False, lambda image, _: ImageOps.autocontrast(image)),
    "equalize": (0 * _STEPS, False, lambda image, _: ImageOps.equalize(image)),
}


def rand_augment(image: Pixels, rng: Rng, count: int = 2, magnitude: int = 9) -> Pixels:
    """Apply `count` operations drawn with replacement, all at one magnitude of 0..30.

    Source: Cubuk et al. 2019 (RandAugment), with torchvision's 14 operations and strengths.
    """
    picture = to_pil(to_rgb(image))
    for name in rng.choice(list(RAND_AUGMENT), size=count):
        strengths, signed, operation = RAND_AUGMENT[str(name)]
        sign = -1 if signed and rng.random() < 0.5 else 1
        picture = operation(picture, sign * float(strengths[magnitude]))
    return to_array(picture)


def random_erasing(
    image: Float32[np.ndarray, "h w c"],
    rng: Rng,
    chance: float = 0.25,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> Float32[np.ndarray, "h w c"]:
    """Fill a random box of a normalised image with N(0, 1) noise, with a chance.

    Source: Zhong et al. 2017, filled per pixel as in the MAE recipe.
    """
    if rng.random() >= chance:
        return image
    box = sample_box(*image.shape[:2], rng, scale, ratio)
    if box is None:
        return image
    top, left, height, width = box
    erased = image.copy()
    noise = rng.standard_normal((height, width, image.shape[2]), dtype=np.float32)
    erased[top : top + height, left : left + width] = noise
    return erased


@dataclass(frozen=True)
class AugmentImage:
    """The training transform of images: crop, flip, RandAugment, normalise, erase.

    crop: range of the area share, or None to keep the frame.  rand_augment: (count, magnitude of
    0..30) or None.  flip, erase: chances.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: tuple[float, float] | None = (0.08, 1.0)
    flip: float = 0.5
    rand_augment: tuple[int, int] | None = None
    erase: float = 0.0

    def __call__(self, example: dict, rng: Rng) -> dict:
        """Replace the image of an example."""
        image = example["image"]
        if self.crop is None:
            image = resize(image, self.size, self.size)
        else:
            image = random_resized_crop(image, rng, self.size, self.crop)
        image = flip(image, rng, self.flip)
        if self.rand_augment:
            image = rand_augment(image, rng, *self.rand_augment)
        pixels = normalise(image, self.mean, self.std)
        return {**example, "image": random_erasing(pixels, rng, self.erase)}


def soften(
    labels: Int[np.ndarray, " b"] | Float[np.ndarray, "b c"], classes: int, smoothing: float = 0.0
) -> Float32[np.ndarray, "b c"]:
    """Give each example a distribution: (1 - smoothing) on its label plus smoothing / c on all.

    Source: Szegedy et al. 2016, section 7.
    """
    hard = np.eye(classes, dtype=np.float32)[labels] if labels.ndim == 1 else labels
    return np.float32(1 - smoothing) * hard + np.float32(smoothing / classes)


@dataclass(frozen=True)
class MixImages:
    """Soft labels for a batch; mix each row with its neighbour by mixup or cutmix.

    mixup, cutmix: the alpha of Beta(alpha, alpha), 0 for none; with both, each batch draws one of
    them evenly.  Rows 2i and 2i + 1 are partners (the order is random already), so that the result
    does not depend on how many processes share the batch.
    Source: Zhang et al. 2018 (mixup), Yun et al. 2019 (cutmix, label weight = area share).
    """

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0

    def __call__(self, batch: dict, rng: Rng) -> dict:
        """Replace the image and the label of a batch."""
        label = soften(batch["label"], self.classes, self.smoothing)
        image = batch["image"]
        if not (self.mixup or self.cutmix):
            return {**batch, "label": label}
        if len(image) % 2:
            raise BadInput(
                f"mixup and cutmix pair rows: a batch of {len(image)} per process is odd.\n"
                "Choose an even batch size for each process."
            )
        partner = np.arange(len(image)) ^ 1
        cut = rng.random() < 0.5 if self.mixup and self.cutmix else bool(self.cutmix)
        share = float(rng.beta(*(2 * (self.cutmix if cut else self.mixup,))))
        if cut:
            image, share = _paste(image, partner, share, rng)
        else:
            image = np.float32(share) * image + np.float32(1 - share) * image[partner]
        label = np.float32(share) * label + np.float32(1 - share) * label[partner]
        return {**batch, "image": image, "label": label}


def _paste(
    image: Float32[np.ndarray, "b h w c"], partner: Int[np.ndarray, " b"], share: float, rng: Rng
) -> tuple[Float32[np.ndarray, "b h w c"], float]:
    """Paste a box of the partner; return the share of pixels that is still each row's own."""
    height, width = image.shape[1:3]
    side = math.sqrt(1 - share)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    row, column = int(rng.integers(height)), int(rng.integers(width))
    rows = slice(max(row - half_height, 0), min(row + half_height, height))
    columns = slice(max(column - half_width, 0), min(column + half_width, width))
    mixed = image.copy()
    mixed[:, rows, columns] = image[partner, rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - pasted / (height * width)
