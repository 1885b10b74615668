"""What happens to a training image by chance.  Every choice comes from the generator passed in."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Num
from PIL import Image, ImageEnhance, ImageOps

from tljax.config import Augment
from tljax.data.transforms import IMAGENET, Pixels, fit, normalise, resize, to_array, to_pil
from tljax.types import BadInput

Rng = np.random.Generator
Range = tuple[float, float]
Floats = Float32[np.ndarray, "h w c"]


def sample_box(
    height: int, width: int, rng: Rng, scale: Range, ratio: Range
) -> tuple[int, int, int, int] | None:
    """Draw (top, left, height, width): area share uniform, aspect (w / h) log-uniform; 10 tries.

    Source: Szegedy et al. 2015, section 6, with the bounds and tries of common practice.
    """
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(*np.log(ratio)))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.integers((height - box_height + 1, width - box_width + 1)).tolist()
            return top, left, box_height, box_width
    return None


def random_resized_crop(
    image: Pixels, rng: Rng, size: int, scale: Range, interpolation: str = "bicubic"
) -> Pixels:
    """Cut a random box and resize it; when none fits, the largest middle box of a legal aspect."""
    ratio = (3 / 4, 4 / 3)
    height, width = image.shape[:2]
    box = sample_box(height, width, rng, scale, ratio)
    if box is None:
        box_height = min(height, round(width / ratio[0]))
        box_width = min(width, round(height * ratio[1]))
        box = (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
    top, left, box_height, box_width = box
    inside = image[top : top + box_height, left : left + box_width]
    return resize(inside, size, size, interpolation)


def flip(image: Pixels, rng: Rng, chance: float = 0.5) -> Pixels:
    """Mirror left to right, with a chance."""
    return image[:, ::-1] if rng.random() < chance else image


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


_REACH = 150 / 331  # of AutoAugment's largest translation, in pixels of its 331
RAND_AUGMENT: dict[str, tuple[Range, bool, Callable[[Image.Image, float], Image.Image]]] = {
    # name: (strength at magnitudes 0 and 30, whether its sign is drawn, what it does)
    "identity": ((0, 0), False, lambda x, s: x),
    "shear_x": ((0, 0.3), True, lambda x, s: _affine(x, 1, s, 0, 0, 1, 0)),
    "shear_y": ((0, 0.3), True, lambda x, s: _affine(x, 1, 0, 0, s, 1, 0)),
    "translate_x": ((0, _REACH), True, lambda x, s: _affine(x, 1, 0, -int(s * x.width), 0, 1, 0)),
    "translate_y": ((0, _REACH), True, lambda x, s: _affine(x, 1, 0, 0, 0, 1, -int(s * x.height))),
    "rotate": ((0, 30), True, lambda x, s: x.rotate(s)),
    "brightness": ((0, 0.9), True, lambda x, s: ImageEnhance.Brightness(x).enhance(1 + s)),
    "color": ((0, 0.9), True, lambda x, s: ImageEnhance.Color(x).enhance(1 + s)),
    "contrast": ((0, 0.9), True, lambda x, s: ImageEnhance.Contrast(x).enhance(1 + s)),
    "sharpness": ((0, 0.9), True, lambda x, s: ImageEnhance.Sharpness(x).enhance(1 + s)),
    "posterize": ((8, 4), False, lambda x, s: ImageOps.posterize(x, round(s))),
    "solarize": ((255, 0), False, lambda x, s: ImageOps.solarize(x, s)),  # type: ignore[arg-type]
    "autocontrast": ((0, 0), False, lambda x, s: ImageOps.autocontrast(x)),
    "equalize": ((0, 0), False, lambda x, s: ImageOps.equalize(x)),
}


def rand_augment(image: Pixels, rng: Rng, count: int = 2, magnitude: int = 9) -> Pixels:
    """Apply `count` operations drawn with replacement, all at one magnitude of 0..30.

    Source: Cubuk et al. 2019 (RandAugment), with torchvision's 14 operations and strengths.
    """
    picture = to_pil(image).convert("RGB")
    for name in rng.choice(list(RAND_AUGMENT), size=count):
        (least, most), signed, operation = RAND_AUGMENT[str(name)]
        sign = -1 if signed and rng.random() < 0.5 else 1
        picture = operation(picture, sign * (least + (most - least) * magnitude / 30))
    return to_array(picture)


def random_erasing(image: Floats, rng: Rng, chance: float) -> Floats:
    """Fill a random box of a normalised image with N(0, 1) noise, with a chance.

    Source: Zhong et al. 2017, filled per pixel as in the MAE recipe.
    """
    drawn = rng.random() < chance
    height, width, channels = image.shape
    box = sample_box(height, width, rng, (0.02, 1 / 3), (0.3, 3.3)) if drawn else None
    if box is None:
        return image
    top, left, height, width = box
    erased = image.copy()
    noise = rng.standard_normal((height, width, channels), dtype=np.float32)
    erased[top : top + height, left : left + width] = noise
    return erased


@dataclass(frozen=True)
class TransformImage:
    """The transform of images: crop or fit to `size` pixels, flip, RandAugment, normalise, erase.

    An `augment` of defaults leaves nothing to chance, which is evaluation.  What a source fitted to
    `size` by a ratio of its own (`fit`) is not fitted again.
    """

    size: int
    augment: Augment
    mean: tuple[float, ...] = IMAGENET["mean"]
    std: tuple[float, ...] = IMAGENET["std"]
    interpolation: str = "bicubic"

    def __call__(self, example: dict, rng: Rng) -> dict:
        """Replace the image of an example."""
        augment, size = self.augment, self.size
        if augment.crop_scale:
            image = random_resized_crop(
                example["image"], rng, size, augment.crop_scale, self.interpolation
            )
        else:
            image = fit(example, size)["image"]
        image = flip(image, rng, 0.5 * augment.flip)
        if augment.randaugment:
            image = rand_augment(image, rng, *augment.randaugment)
        pixels = normalise(image, self.mean, self.std)
        return {**example, "image": random_erasing(pixels, rng, augment.erase)}


def soften(
    labels: Num[np.ndarray, "b *c"], classes: int, smoothing: float = 0.0
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
    augment: Augment

    def __call__(self, batch: dict, rng: Rng) -> dict:
        """Replace the image and the label of a batch."""
        mixup, cutmix = self.augment.mixup, self.augment.cutmix
        label = soften(batch["label"], self.classes, self.augment.smoothing)
        if not (mixup or cutmix):
            return {**batch, "label": label}
        image = batch["image"]
        if len(image) % 2:
            raise BadInput(f"mixup and cutmix pair rows: {len(image)} rows a process are odd")
        partner = np.arange(len(image)) ^ 1
        cut = rng.random() < 0.5 if mixup and cutmix else bool(cutmix)
        alpha = cutmix if cut else mixup
        share = float(rng.beta(alpha, alpha))
        if cut:
            rows, columns, share = _box(image.shape[1], image.shape[2], share, rng)
            image = image.copy()
            image[:, rows, columns] = batch["image"][partner, rows, columns]
        else:
            image = np.float32(share) * image + np.float32(1 - share) * image[partner]
        label = np.float32(share) * label + np.float32(1 - share) * label[partner]
        return {**batch, "image": image, "label": label}


def _box(height: int, width: int, share: float, rng: Rng) -> tuple[slice, slice, float]:
    """Draw cutmix's box, clipped at the border; return the share of pixels outside it as well."""
    spans = []
    for side in (height, width):
        middle, half = int(rng.integers(side)), int(side * math.sqrt(1 - share)) // 2
        spans.append(slice(max(middle - half, 0), min(middle + half, side)))
    pasted = math.prod(span.stop - span.start for span in spans)
    return spans[0], spans[1], 1 - pasted / (height * width)
