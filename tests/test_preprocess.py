"""Preprocessing: the pixels of transformers (Pillow) and timm, their files in both directions."""

import dataclasses
import importlib.util
import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tljax.config import Augment, Data
from tljax.data.pipeline import open_inputs, open_pipeline, unlabelled
from tljax.data.transforms import IMAGENET, Preprocess, fit, normalise, resize
from tljax.types import BadInput
from tljax.weights.preprocess import from_hf, from_timm, shift, to_hf, to_timm

pytestmark = pytest.mark.once

SIZES = [(37, 53), (61, 40), (300, 201), (97, 400), (411, 64), (224, 224), (225, 223), (11, 9)]
KEPT: list = []


@pytest.fixture(scope="module")
def torchvision():
    """Let transformers and timm import beside a torchvision whose operators do not load."""
    found = importlib.util.find_spec("torchvision")
    if found is None:
        return
    try:
        import torchvision
    except RuntimeError:
        import torch

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        KEPT.append(torch.library.Library("torchvision", "DEF"))
        source = Path(found.submodule_search_locations[0], "_meta_registrations.py").read_text()
        for name in sorted({*re.findall(r'register_meta\("(\w+)"', source), "nms", "qnms"}):
            KEPT[0].define(f"{name}(Tensor x) -> Tensor")
        import torchvision  # noqa: F401


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Draw waves and noise: edges for the filters, and bytes at both ends of their range."""
    draw = np.random.default_rng([*size, len(mode)])
    rows, columns = np.indices(size)
    waves = 127 + 120 * np.sin(rows[..., None] / 5 + columns[..., None] * draw.uniform(0.1, 0.4, 4))
    pixels = np.clip(waves + draw.normal(0, 40, (*size, 4)), 0, 255).astype(np.uint8)
    if mode == "P":  # as in files; Pillow alone makes palettes with an alpha of their own
        return Image.fromarray(pixels[..., :3]).convert("P")
    return Image.fromarray(pixels).convert(mode)


def pictures() -> list[Image.Image]:
    modes = [picture((83, 120), mode) for mode in ("L", "RGBA", "LA", "1", "P", "CMYK")]
    return [picture(size) for size in SIZES] + modes


def rounding(preprocess: Preprocess) -> float:
    """Give the error of a few float32 operations on numbers as large as these."""
    terms = [(1 + abs(m)) / s for m, s in zip(preprocess.mean, preprocess.std, strict=True)]
    return 4 * float(np.finfo(np.float32).eps) * max(terms)


# -- transformers ---------------------------------------------------------------------------------

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NORMAL = {"image_mean": MEAN, "image_std": STD}
CONFIGS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    "vit-wide": {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 40}},
    "vit-old": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 3},
    "vit-plain": {"size": 30},
    "vit-shorter": {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 20}},
    "vit-raw": {"image_processor_type": "ViTImageProcessor", "do_resize": False},
    "deit": {"image_processor_type": "DeiTImageProcessor"},
    "deit-old": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 40, "crop_size": 35},
    "dinov2": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 48},
        "crop_size": {"height": 43, "width": 43}, "resample": 3,
    },
    "bit-wide": {
        "image_processor_type": "BitImageProcessorFast", "size": {"shortest_edge": 30},
        "crop_size": {"height": 25, "width": 44}, "resample": 1,
    },
    "bit-larger": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 20},
        "crop_size": {"height": 33, "width": 26}, "resample": 5,
    },
    "bit-uncut": {
        "image_processor_type": "BitImageProcessor", "size": 20, "do_center_crop": False,
    },
    "bit-crop": {"image_processor_type": "BitImageProcessor", "do_resize": False, "crop_size": 50},
    "resnet": {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 32, "crop_pct": 0.875},
    "resnet-.95": {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.95,
                   "size": {"shortest_edge": 31}, "resample": 2},
    "resnet-384": {"image_processor_type": "ConvNextImageProcessor", "size": 384, "resample": 0},
    "clip": {"image_processor_type": "CLIPImageProcessor", "resample": 3},
    "clip-old": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28},
    "signed": {
        "image_processor_type": "ViTImageProcessor", "size": 16, "rescale_factor": 1 / 127.5,
        "image_mean": [1, 1, 1], "image_std": [1, 1, 1], "resample": 4,
    },
    "bytes": {"image_processor_type": "ViTImageProcessor", "size": 16, "do_rescale": False},
    "unnormalised": {"image_processor_type": "ViTImageProcessor", "size": 16,
                     "do_normalize": False},
}  # fmt: skip


def processor_of(config: dict):
    """Open a configuration with the Pillow class that its name stands for."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    classes = {
        "Bit": BitImageProcessorPil, "CLIP": CLIPImageProcessorPil, "DeiT": DeiTImageProcessorPil,
        "ConvNext": ConvNextImageProcessorPil, "ViT": ViTImageProcessorPil,
    }  # fmt: skip
    names = {"image_processor_type": "ViT", "feature_extractor_type": "ViT"}
    name = " ".join(str(config.get(key, "")) for key in names) or "ViT"
    return next((c for n, c in classes.items() if n in name), ViTImageProcessorPil)(**config)


def assert_same_pixels(ours: Preprocess, processor) -> None:
    asked = {"return_tensors": "np", "do_convert_rgb": True}
    for one in pictures():
        if one.mode == "RGB":
            raw = processor(one, do_rescale=False, do_normalize=False, **asked)["pixel_values"][0]
            np.testing.assert_array_equal(ours.fit(np.asarray(one)).transpose(2, 0, 1), raw)
        expected = processor(one, **asked)["pixel_values"]
        found = ours(one)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.transpose(0, 3, 1, 2), expected, 0, rounding(ours))


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_equal_those_of_transformers(name, torchvision):
    config = NORMAL | CONFIGS[name]
    assert_same_pixels(Preprocess.read(from_hf(config, "x.json")), processor_of(config))


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_for_transformers_gives_the_same_pixels(name, torchvision, tmp_path, capfd):
    from transformers import AutoImageProcessor

    ours = from_hf(NORMAL | CONFIGS[name], "x.json")
    written = to_hf(ours)
    assert from_hf(json.loads(json.dumps(written)), "x.json") == ours
    assert to_hf(json.loads(json.dumps(ours))) == written and shift(ours, "hf") is None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    capfd.readouterr()
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert not capfd.readouterr().err
    assert_same_pixels(Preprocess.read(ours), processor)
    assert processor.to_dict()["image_processor_type"] == written["image_processor_type"]


def test_a_file_without_a_processor_is_read_by_the_model_it_belongs_to():
    for kind, resized in {
        "vit": (8, 8),
        "resnet": 9,
        "dinov2": 8,
        "clip": 8,
        "deit": (8, 8),
    }.items():
        found = from_hf(NORMAL | {"size": 8, "crop_size": 8}, "x.json", kind)
        assert found["resize"] == resized and found["size"] == (8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "SegformerImageProcessor"}, "Segformer.*one of ViTImageProc"),
        ({"image_processor_type": 3}, "'3'.*one of ViTImageProc"),
        (
            {"image_processor_type": None, "feature_extractor_type": "WhisperFeatureExtractor"},
            "feature_extractor_type is 'Whisper",
        ),
        ({"image_mean": None}, "image_mean is None, expected three numbers"),
        ({"image_std": [0.5, 0.5]}, r"image_std is \[0.5, 0.5\]"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is .*positive"),
        ({"image_mean": ["a", 0, 0]}, "image_mean is"),
        ({"image_mean": [float("nan"), 0, 0]}, "image_mean is"),
        ({"size": {"longest_edge": 3}}, "size is .*shortest_edge"),
        ({"size": {"shortest_edge": 3, "longest_edge": 9}}, "size is .*shortest_edge"),
        ({"size": {"height": 3, "width": 0}}, "size is 0, expected whole"),
        ({"size": 2.5}, "size is 2.5"),
        ({"size": True}, "size is True"),
        ({"size": "224"}, "size is '224'"),
        ({"size": [1, 2, 3]}, r"size is \[1, 2, 3\]"),
        ({"resample": 9}, r"resample is 9, expected one of 0 \(nearest\)"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"resample": [3]}, r"resample is \[3\]"),
        ({"do_center_crop": True}, "crop_size is None"),
        ({"do_center_crop": "yes"}, "do_center_crop is 'yes', expected true or false"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 9}}, "crop_size is"),
        ({"do_pad": True}, "do_pad is True"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        ({"rescale_offset": True}, "rescale_offset is True"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"height": 8, "width": 8}},
         "size is .*shortest_edge"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 64, "crop_pct": -1},
         "crop_pct is -1"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 64, "do_center_crop": True,
          "crop_size": 60}, "crop_size is 60, expected 64"),
    ],
)  # fmt: skip
def test_wrong_values_name_the_file_the_key_and_what_is_known(change, message):
    with pytest.raises(BadInput, match=rf"^a/x\.json: .*{message}"):
        from_hf(NORMAL | {"image_processor_type": "ViTImageProcessor"} | change, "a/x.json")


# -- timm -----------------------------------------------------------------------------------------

TIMM = {
    "center": {"input_size": [3, 32, 32], "crop_pct": 0.875},
    "bilinear": {"input_size": [3, 29, 29], "crop_pct": 0.9, "interpolation": "bilinear"},
    "uncut": {"input_size": [3, 32, 32], "crop_pct": 1.0, "crop_mode": "center"},
    "wide": {"input_size": [3, 24, 41], "crop_pct": 0.9},
    "tall": {"input_size": [3, 47, 20], "crop_pct": 0.95, "interpolation": "lanczos"},
    "squash": {"input_size": [3, 33, 33], "crop_pct": 0.9, "crop_mode": "squash"},
    "squash-wide": {"input_size": [3, 20, 33], "crop_pct": 1.0, "crop_mode": "squash"},
    "border": {"input_size": [3, 33, 33], "crop_pct": 0.95, "crop_mode": "border"},
    "border-wide": {"input_size": [3, 22, 37], "crop_pct": 0.9, "crop_mode": "border",
                    "interpolation": "bilinear"},
    "half": {"input_size": [3, 224, 224], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3},
    "larger": {"input_size": [3, 33, 33], "crop_pct": 1.3},
    "silent": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def timm_data(torchvision):
    pytest.importorskip("torch", reason="timm needs torch")
    return pytest.importorskip("timm", reason="timm is not installed").data


@pytest.mark.parametrize("name", TIMM)
def test_pixels_equal_those_of_timm(name, timm_data):
    settings = timm_data.resolve_data_config(pretrained_cfg=TIMM[name] or {"num_classes": 9})
    transform = timm_data.create_transform(**settings)
    bytewise = timm_data.create_transform(**settings, normalize=False)
    ours = Preprocess.read(from_timm(TIMM[name]))
    for one in pictures():
        if one.mode in ("RGBA", "LA"):  # what becomes of transparency is left to its caller
            continue
        found = ours(one).transpose(0, 3, 1, 2)[0]
        np.testing.assert_allclose(found, transform(one.convert("RGB")), 0, rounding(ours))
        if one.mode == "RGB":
            expected = bytewise(one).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(ours.fit(np.asarray(one)), expected)


@pytest.mark.parametrize("name", TIMM)
def test_what_is_written_for_timm_is_read_back(name):
    ours = from_timm(TIMM[name])
    assert from_timm(json.loads(json.dumps(to_timm(ours)))) == ours
    assert shift(ours, "timm") is None


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (224, 248), (299, 341), (7, 9), (31, 25)])
def test_every_ratio_has_a_crop_pct(size, resize):
    ours = from_timm({}) | {"size": (size, size), "resize": resize}
    assert from_timm(to_timm(ours)) == ours


def test_exports_refuse_what_the_other_side_cannot_do_and_tell_what_shifts():
    cover, border = (from_timm(TIMM[name]) for name in ("wide", "border"))
    for ours, key in ((cover, "aspect"), (border, "aspect"), (cover | {"fill": (1, 2, 3)}, "")):
        with pytest.raises(BadInput, match=f"export to hf: {key}"):
            to_hf(ours)
    wide, raw = (from_hf(NORMAL | CONFIGS[name], "x") for name in ("bit-wide", "vit-raw"))
    with pytest.raises(BadInput, match="export to timm: resize is 30"):
        to_timm(wide)
    with pytest.raises(BadInput, match="export to timm: size is None"):
        to_timm(raw)
    centre, square = from_timm(TIMM["center"]), from_hf(NORMAL | CONFIGS["deit"], "x")
    assert "one pixel" in shift(centre, "hf") and to_hf(centre)["crop_size"]["height"] == 32
    assert "one pixel" in shift(from_hf(NORMAL | CONFIGS["dinov2"], "x"), "timm")
    # 256 -> 224 leaves 16 pixels on each side, whoever counts.
    assert shift(square, "timm") is None and to_timm(square)["crop_mode"] == "squash"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": [1, 28, 28]}, r"input_size is \[1, 28, 28\]"),
        ({"input_size": 224}, "input_size is 224"),
        ({"input_size": [3, 28, 0]}, "input_size is 0"),
        ({"interpolation": "random"}, "interpolation is 'random'.*bicubic"),
        ({"crop_mode": "corner"}, "crop_mode is 'corner'.*squash"),
        ({"crop_pct": 0}, "crop_pct is 0"),
        ({"mean": [0.5, 0.5]}, r"mean is \[0.5, 0.5\]"),
        ({"std": [0.5, 0.5, -1]}, "std is .*positive"),
    ],
)
def test_wrong_values_of_timm_are_named(change, message):
    with pytest.raises(BadInput, match=rf"^config\.json: .*{message}"):
        from_timm(change, "config.json")


# -- the dataclass --------------------------------------------------------------------------------


def test_one_picture_is_the_same_in_every_form(tmp_path):
    ours = Preprocess(size=(20, 24), resize=26)
    page = picture((50, 41))
    page.save(tmp_path / "x.png")
    stream = io.BytesIO()
    page.save(stream, "png")
    array = np.asarray(page)
    forms = [tmp_path / "x.png", str(tmp_path / "x.png"), stream.getvalue(), page, array]
    expected = normalise(ours.fit(array), **IMAGENET)
    assert expected.shape == (20, 24, 3)
    for form in forms:
        np.testing.assert_array_equal(ours(form)[0], expected)
    for several in (forms, tuple(forms), iter(forms), np.stack([array] * 5)):
        np.testing.assert_array_equal(ours(several), np.stack([expected] * 5))
    grey = np.asarray(picture((9, 30), "L"))
    np.testing.assert_array_equal(ours(grey), ours(np.repeat(grey[..., None], 3, 2)))


def test_what_is_no_picture_is_refused(tmp_path):
    ours = Preprocess(size=(8, 8), resize=8)
    refused = {
        "float32": np.zeros((9, 9, 3), np.float32),
        "picture 0 is an array": np.zeros((9, 9, 4), np.uint8),
        "picture 0 is empty": np.zeros((0, 9, 3), np.uint8),
        "cannot be decoded": b"no picture",
        "expected 8 bits": Image.fromarray(np.zeros((9, 9), np.uint16)),
        "nothing.png": tmp_path / "nothing.png",
        "no batch": [],
        "would be resized to": np.zeros((1, 1 << 23, 3), np.uint8),
    }
    for message, one in refused.items():
        with pytest.raises(BadInput, match=message):
            ours(one)
    with pytest.raises(BadInput, match=r"\(9, 9\), \(9, 10\).* make no batch"):
        Preprocess()([np.zeros((9, 9), np.uint8), np.zeros((9, 10), np.uint8)])


def test_a_record_of_it_survives_json_and_old_ones_are_read():
    for config in TIMM.values():
        ours = Preprocess.read(from_timm(config))
        record = json.loads(json.dumps(dataclasses.asdict(ours)))
        assert Preprocess.read(record) == ours and hash(Preprocess.read(record)) == hash(ours)
    old = Preprocess.read({"mean": [0.5] * 3, "std": [0.25] * 3})
    assert old == Preprocess((0.5,) * 3, (0.25,) * 3) and Preprocess.read(None) == Preprocess()
    with pytest.raises(BadInput, match=r"no field 'crop'.*'size'"):
        Preprocess.read({"crop": 3})
    for field, bad in {
        "mean": [1, 2], "std": [0.1, 0.1, 0], "size": 3, "resize": (1, 0), "aspect": "bent",
        "interpolation": "cubic", "margins": "left", "fill": (0, 0, 256),
    }.items():  # fmt: skip
        with pytest.raises(BadInput, match=f"preprocessing: {field} is "):
            Preprocess.read({field: bad})


# -- training runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 61), (90, 33), (24, 24)])
def test_a_source_without_a_ratio_is_fitted_as_ever(shape):
    image = np.asarray(picture(shape))
    sides = [side * 24 // min(shape) for side in shape]
    top, left = ((side - 24) // 2 for side in sides)
    expected = resize(image, *sides)[top : top + 24, left : left + 24]
    stretched = from_hf(NORMAL | CONFIGS["vit"] | {"resample": 3}, "x")
    for source in (Preprocess(), Preprocess.read(stretched)):
        np.testing.assert_array_equal(fit({"image": image}, 24, source)["image"], expected)


def test_a_ratio_holds_at_any_size_and_stays_when_it_is_recorded():
    source = Preprocess.read(from_timm({"input_size": [3, 224, 224], "crop_pct": 0.9}))
    own = source.at(98)
    assert (own.size, own.resize) == ((98, 98), round(98 * 248 / 224))
    assert own.at(98) == own and own.margins == "round" and own.interpolation == "bicubic"
    assert Preprocess.read(from_hf(NORMAL | CONFIGS["deit"], "x")).at(112).resize == 128


def image_folder(root: Path) -> Path:
    for part, label, i in itertools.product(("train", "test"), "ab", range(4)):
        path = root / part / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture((40 + i, 60 - 3 * i)).save(path)
    return root


def test_runs_evaluate_and_predict_as_their_source_does(tmp_path):
    """At the source's own size that is the source's own preprocessing, pixel for pixel."""
    source = from_timm({"input_size": [3, 20, 20], "crop_pct": 0.8, "interpolation": "bilinear"})
    data = Data(name=str(image_folder(tmp_path)), image_size=20, validation=2)
    reads = {"tokenizer": None, "batch": 4, "threads": 0}
    pipeline = open_pipeline(data, None, preprocess=source, seed=0, **reads)
    files = sorted((tmp_path / "test").rglob("*.png"))
    expected = Preprocess.read(source)(files)
    record = json.loads(json.dumps(pipeline.preprocess))
    inputs = open_inputs(data, "classify", preprocess=record, **reads)
    again = open_pipeline(data, None, preprocess=record, seed=0, **reads)
    rows = [{"image": file} for file in files]
    streams = [pipeline.eval_batches("test"), again.eval_batches("test")]
    for stream in [*streams, unlabelled(inputs, rows), unlabelled(pipeline, rows)]:
        found = [batch["image"][batch["valid"]] for batch in stream]
        np.testing.assert_array_equal(np.concatenate(found), expected)
    # Training without random crops sees pictures as evaluation does, flips aside.
    batch = next(pipeline.train_batches())["image"]
    assert batch.shape == (4, 20, 20, 3)


def test_random_crops_use_the_filter_of_the_source(tmp_path):
    augment = Augment(crop_scale=(0.5, 1.0))
    data = Data(name=str(image_folder(tmp_path)), image_size=20, validation=2, augment=augment)
    reads = {"tokenizer": None, "batch": 4, "threads": 0, "seed": 0}
    found = []
    for name in ("bicubic", "nearest"):
        source = dataclasses.asdict(Preprocess(interpolation=name))
        pipeline = open_pipeline(data, None, preprocess=source, **reads)
        found.append(next(pipeline.train_batches())["image"])
    assert np.abs(found[0] - found[1]).max() > 0.1
