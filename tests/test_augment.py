"""Transforms and augmentations against Pillow, closed forms and published definitions."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from tljax.config import Augment
from tljax.data import augment
from tljax.data.augment import MixImages, TransformImage, random_erasing, random_resized_crop
from tljax.data.transforms import IMAGENET, fit, normalise, resize
from tljax.types import BadInput

pytestmark = pytest.mark.once


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def image() -> np.ndarray:
    """A photograph's like: smooth, with some noise, 40 rows of 56."""
    smooth = ndimage.gaussian_filter(rng(1).normal(size=(40, 56, 3)), (4, 4, 0)) * 900 + 128
    return np.clip(smooth + rng(2).normal(size=smooth.shape) * 8, 0, 255).astype(np.uint8)


# -- without chance -----------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("size", [(20, 30), (98, 80)])
def test_resize_equals_torch_with_antialias_to_rounding(image, size):
    import torch

    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    options = {"mode": "bicubic", "antialias": True, "align_corners": False}
    exact = torch.nn.functional.interpolate(tensor, size, **options)[0].permute(1, 2, 0).numpy()
    ours = resize(image, *size).astype(np.float32)
    # Pillow rounds and clips to bytes after each of its two passes: a few levels on photographs.
    assert np.abs(ours - exact.clip(0, 255)).max() <= 4
    assert np.abs(ours - exact.clip(0, 255)).mean() < 0.5


def test_fitting_keeps_the_middle_and_the_proportions(image):
    high = image.transpose(1, 0, 2)
    cases = ((image, (42, 30), (6, 0, 36, 30)), (high, (30, 42), (0, 6, 30, 36)))
    for pixels, size, box in cases:
        fitted = fit({"image": pixels}, 30)
        reference = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).crop(box)
        np.testing.assert_array_equal(fitted["image"], np.asarray(reference))
        assert fit(fitted, 30)["image"].tobytes() == fitted["image"].tobytes()
    assert fit({"image": image[:, :, :1]}, 24)["image"].shape == (24, 24, 1)


def test_normalise_follows_its_formula_in_float32_and_replicates_grey(image):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (image / 255 - mean) / std
    found = normalise(image, mean, std)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32 of numbers below 3
    grey = image[:, :40, :1]
    replicated = normalise(np.repeat(grey, 3, axis=2), mean, std)
    np.testing.assert_array_equal(normalise(grey, mean, std), replicated)
    evaluated = TransformImage(40, Augment(), mean, std)({"image": grey}, rng())["image"]
    np.testing.assert_array_equal(evaluated, replicated)


# -- crop, flip, erase --------------------------------------------------------------------------


def test_boxes_have_uniform_area_and_log_uniform_aspect():
    scale, ratio = (0.1, 0.5), (3 / 4, 4 / 3)  # on a large square every such box fits
    boxes = [augment.sample_box(4000, 4000, rng(i), scale, ratio) for i in range(1500)]
    top, left, height, width = np.array(boxes).T
    assert (top >= 0).all() and (top + height <= 4000).all()
    assert (left >= 0).all() and (left + width <= 4000).all()
    area = height * width / 4000**2
    aspect = np.log(width / height)
    low, high = np.log(ratio)
    # Seeds are fixed, so this cannot flicker; 1e-3 would be met by chance once in 1000.
    assert stats.kstest(area, stats.uniform(0.1, 0.4).cdf).pvalue > 1e-3
    assert stats.kstest(aspect, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    assert stats.kstest(top / (4000 - height), "uniform").pvalue > 1e-3
    assert stats.kstest(left / (4000 - width), "uniform").pvalue > 1e-3


def test_crop_is_the_box_resized_by_pillow(image):
    for seed in range(20):
        top, left, height, width = augment.sample_box(40, 56, rng(seed), (0.08, 1), (3 / 4, 4 / 3))
        box = (left, top, left + width, top + height)
        expected = Image.fromarray(image).crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        found = random_resized_crop(image, rng(seed), 32, scale=(0.08, 1))
        np.testing.assert_array_equal(found, np.asarray(expected))


def test_crop_falls_back_to_the_middle_box_of_a_legal_aspect():
    strip = np.zeros((10, 400, 3), np.uint8)
    strip[:, 193:206] = 200  # 10 x round(10 * 4 / 3) in the middle
    found = random_resized_crop(strip, rng(), 16, scale=(0.9, 1.0))
    assert (found == 200).all()


def test_flip_equals_pillow_and_is_even(image):
    mirrored = np.asarray(Image.fromarray(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    flips = 0
    for seed in range(400):
        found = augment.flip(image, rng(seed))
        flips += np.array_equal(found, mirrored)
        assert np.array_equal(found, mirrored) or np.array_equal(found, image)
    assert stats.binomtest(flips, 400).pvalue > 1e-3
    np.testing.assert_array_equal(augment.flip(image, rng(), chance=1), mirrored)
    np.testing.assert_array_equal(augment.flip(image, rng(), chance=0), image)


def test_erasing_fills_one_box_with_normal_noise():
    blank = np.full((64, 64, 3), 100, np.float32)
    drawn = []
    for seed in range(200):
        erased = random_erasing(blank, rng(seed), chance=1)
        rows, columns = np.nonzero((erased != 100).all(axis=2))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width  # the changed pixels are a full box
        assert 0.02 * 0.9 < height * width / 64**2 < 1 / 3 * 1.1  # sides are whole pixels
        drawn.append(erased[rows, columns].ravel())
    assert stats.kstest(np.concatenate(drawn)[:5000], "norm").pvalue > 1e-3
    assert random_erasing(blank, rng(), chance=0) is blank
    share = np.mean([random_erasing(blank, rng(i), chance=0.3) is not blank for i in range(1000)])
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 1000) ** 0.5
    assert (blank == 100).all()


# -- RandAugment --------------------------------------------------------------------------------


def torchvision_strength(name: str, magnitude: int, width: int, height: int) -> float:
    """torchvision's RandAugment._augmentation_space, 31 bins, written from its source."""
    bins = 31
    table = {
        "shear_x": np.linspace(0, 0.3, bins),
        "shear_y": np.linspace(0, 0.3, bins),
        "translate_x": np.linspace(0, 150 / 331 * width, bins),
        "translate_y": np.linspace(0, 150 / 331 * height, bins),
        "rotate": np.linspace(0, 30, bins),
        "brightness": np.linspace(0, 0.9, bins),
        "color": np.linspace(0, 0.9, bins),
        "contrast": np.linspace(0, 0.9, bins),
        "sharpness": np.linspace(0, 0.9, bins),
        "posterize": 8 - np.round(np.arange(bins) / ((bins - 1) / 4)),
        "solarize": np.linspace(255, 0, bins),
    }
    return float(table[name][magnitude]) if name in table else 0.0


def shifted(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Move the content down and right by whole pixels, black behind it."""
    out = np.zeros_like(pixels)
    height, width = pixels.shape[:2]
    source = pixels[
        max(-rows, 0) : height - max(rows, 0), max(-columns, 0) : width - max(columns, 0)
    ]
    top, left = max(rows, 0), max(columns, 0)
    out[top : top + source.shape[0], left : left + source.shape[1]] = source
    return out


def sheared(pixels: np.ndarray, amount: float, axis: int) -> np.ndarray:
    """Sample output (row, column) at column + amount * row (axis 1), nearest pixel centres."""
    rows, columns = np.indices(pixels.shape[:2]) + 0.5
    if axis == 1:
        columns = columns + amount * rows
    else:
        rows = rows + amount * columns
    i, j = np.floor(rows).astype(int), np.floor(columns).astype(int)
    inside = (i >= 0) & (i < pixels.shape[0]) & (j >= 0) & (j < pixels.shape[1])
    out = np.zeros_like(pixels)
    out[inside] = pixels[i[inside], j[inside]]
    return out


def expected_operation(name: str, pixels: np.ndarray, s: float) -> np.ndarray:
    picture = Image.fromarray(pixels)
    grey = np.asarray(picture.convert("L"), np.float64)
    blends = {
        "brightness": np.zeros(pixels.shape),
        "color": np.repeat(grey[:, :, None], 3, axis=2),
        "contrast": np.full(pixels.shape, int(grey.mean() + 0.5), np.float64),
    }
    if name in blends:
        mixed = blends[name] + (1 + s) * (pixels - blends[name])
        return np.clip(mixed, 0, 255).astype(np.uint8)
    exact = {
        "identity": lambda: pixels,
        "shear_x": lambda: sheared(pixels, s, axis=1),
        "shear_y": lambda: sheared(pixels, s, axis=0),
        "translate_x": lambda: shifted(pixels, 0, int(s)),
        "translate_y": lambda: shifted(pixels, int(s), 0),
        "rotate": lambda: np.asarray(picture.rotate(s, Image.Resampling.NEAREST)),
        "sharpness": lambda: np.asarray(ImageEnhance.Sharpness(picture).enhance(1 + s)),
        "posterize": lambda: pixels & np.uint8(256 - 2 ** (8 - int(s))),
        "solarize": lambda: np.where(pixels < s, pixels, 255 - pixels),
        "autocontrast": lambda: np.asarray(ImageOps.autocontrast(picture)),
        "equalize": lambda: np.asarray(ImageOps.equalize(picture)),
    }
    return exact[name]()


@pytest.mark.parametrize("name", sorted(augment.RAND_AUGMENT))
@pytest.mark.parametrize("magnitude", [0, 9, 17, 30])
def test_operation_equals_its_definition_at_torchvisions_strength(name, magnitude, image):
    (least, most), signed, operation = augment.RAND_AUGMENT[name]
    strength = least + (most - least) * magnitude / 30
    for sign in (1, -1) if signed else (1,):
        s = sign * torchvision_strength(name, magnitude, width=56, height=40)
        found = np.asarray(operation(Image.fromarray(image), sign * strength)).astype(int)
        difference = np.abs(found - expected_operation(name, image, s))
        if name in ("brightness", "color", "contrast"):
            assert difference.max() <= 1  # Pillow blends in float32, then truncates
        elif name.startswith("shear"):
            # Pillow steps in 16-bit fixed point: samples on a pixel border may fall either side.
            assert (difference.max(axis=2) > 0).mean() < 0.02
        else:
            assert difference.max() == 0


def test_rand_augment_applies_count_operations_drawn_evenly(image):
    names, seen = list(augment.RAND_AUGMENT), []
    table = dict(augment.RAND_AUGMENT)
    with pytest.MonkeyPatch.context() as patch:
        for name, (strengths, signed, operation) in table.items():
            spy = lambda x, s, name=name, op=operation: seen.append(name) or op(x, s)  # noqa: E731
            patch.setitem(augment.RAND_AUGMENT, name, (strengths, signed, spy))
        for seed in range(700):
            out = augment.rand_augment(image, rng(seed), count=2, magnitude=9)
            assert out.shape == image.shape and out.dtype == np.uint8
    counts = [seen.count(name) for name in names]
    assert len(seen) == 1400 and stats.chisquare(counts).pvalue > 1e-3


def test_augmentation_is_a_function_of_its_generator(image):
    some = Augment(crop_scale=(0.08, 1.0), flip=True, randaugment=(2, 9), erase=0.5)
    transform = TransformImage(32, some)
    first, again, other = (transform({"image": image}, rng(seed))["image"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (32, 32, 3) and first.dtype == np.float32
    grey = transform({"image": image[:, :, :1]}, rng())["image"]
    assert grey.shape == (32, 32, 3)


def test_without_augmentation_nothing_is_left_to_chance(image):
    evaluated = TransformImage(24, Augment())
    fitted = fit({"image": image}, 24)
    for seed in range(20):
        found = evaluated({"image": image}, rng(seed))["image"]
        np.testing.assert_array_equal(found, normalise(fitted["image"], **IMAGENET))
    np.testing.assert_array_equal(found, evaluated(fitted, rng())["image"])


# -- batches ------------------------------------------------------------------------------------


def batch(size: int = 8) -> dict:
    return {
        "image": rng(3).normal(size=(size, 20, 24, 3)).astype(np.float32),
        "label": np.arange(size, dtype=np.int32) % 5,
    }


@pytest.mark.torch
def test_smoothed_labels_give_torchs_smoothed_loss():
    import torch

    labels, logits = np.array([0, 3, 2]), rng().normal(size=(3, 5)).astype(np.float32)
    soft = augment.soften(labels, 5, smoothing=0.1)
    ours = -(soft * torch.log_softmax(torch.from_numpy(logits), 1).numpy()).sum(1).mean()
    theirs = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), label_smoothing=0.1
    )
    assert abs(ours - float(theirs)) < 1e-6  # float32 sums of 15 numbers near 1


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_shares_follow_the_beta_law_and_mix_images_and_labels_alike(alpha):
    data, shares = batch(), []
    for seed in range(600):
        out = MixImages(5, Augment(mixup=alpha))(data, rng(seed))
        share = float(out["label"][0, 0])  # row 0 has class 0, its partner class 1
        shares.append(share)
        expected = share * data["image"][0] + (1 - share) * data["image"][1]
        # float32 rounding of the share and of one product and sum of numbers below 4
        np.testing.assert_allclose(out["image"][0], expected, atol=2e-6)
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_cutmix_label_share_is_the_pasted_area_exactly():
    data, shares = batch(), []
    for seed in range(300):
        out = MixImages(5, Augment(cutmix=1.0))(data, rng(seed))
        own = (out["image"] == data["image"]).all(axis=3)
        partner = (out["image"] == data["image"][np.arange(8) ^ 1]).all(axis=3)
        assert (own ^ partner).all()
        shares.append(own[0].mean())
        # One float32 rounding of the share: the area itself is a whole number of pixels.
        np.testing.assert_allclose(out["label"][0, 0], own[0].mean(), rtol=1e-6)
        np.testing.assert_allclose(out["label"].sum(axis=1), 1, rtol=1e-6)
    assert min(shares) < 0.3 and max(shares) > 0.95


def test_cutmix_box_has_the_drawn_area_where_it_is_not_clipped():
    for seed in range(200):
        share = float(rng(seed).uniform())
        rows, columns, outside = augment._box(1000, 800, share, rng(seed))
        spans = (rows.stop - rows.start, columns.stop - columns.start)
        assert outside == 1 - math.prod(spans) / 800_000
        clipped = rows.start == 0 or rows.stop == 1000 or columns.start == 0 or columns.stop == 800
        if not clipped:
            assert abs(outside - share) < 0.005  # sides are even whole pixels


def test_mixing_does_not_depend_on_how_many_processes_share_the_batch():
    data = batch(8)
    mix = MixImages(5, Augment(mixup=0.8, cutmix=1.0, smoothing=0.1))
    kinds = set()
    for seed in range(20):
        whole = mix(data, rng(seed))
        halves = [mix({k: v[p : p + 4] for k, v in data.items()}, rng(seed)) for p in (0, 4)]
        for key in whole:
            np.testing.assert_array_equal(whole[key], np.concatenate([h[key] for h in halves]))
        kinds.add(bool((whole["image"] == data["image"]).any()))
    assert kinds == {True, False}  # both mixup and cutmix were drawn
    with pytest.raises(BadInput, match="7 rows a process are odd"):
        mix(batch(7), rng())


def test_without_mixing_only_labels_soften():
    out = MixImages(5, Augment(smoothing=0.1))(batch(7), rng())
    assert out["image"].tobytes() == batch(7)["image"].tobytes()
    np.testing.assert_allclose(out["label"].max(axis=1), 0.92, rtol=1e-6)
