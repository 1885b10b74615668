"""What sources do to pictures: preprocessor_config.json and timm's configuration, both ways.

Between them stand the fields of `tljax.data.transforms.Preprocess`, as a plain dict.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from tljax.types import BadInput

Fields = dict[str, Any]
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # at Pillow's numbers
IMAGENET: Fields = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
MAX_SIDE = 1 << 16  # pixels
FLOOR, ROUND = "floor", "round"  # where transformers and timm put half a pixel of a margin
PLAIN: Fields = {
    "size": None, "resize": None, "interpolation": "bicubic", "aspect": "stretch",
    "margins": FLOOR, "fill": (0, 0, 0),
}  # fmt: skip


class Processor(NamedTuple):
    """What a Hugging Face image processor assumes where its file is silent."""

    size: Any
    crop_size: int | None = None  # None: it does not crop
    resample: int = FILTERS.index("bicubic")
    square: bool = False  # what a number as size means: a square, else the shorter side


_SHORTER = Processor({"shortest_edge": 224}, 224)
PROCESSORS: Mapping[str, Processor] = {
    "ViTImageProcessor": Processor(224, None, FILTERS.index("bilinear"), True),
    "DeiTImageProcessor": Processor(256, 224, square=True),
    "BitImageProcessor": _SHORTER,
    "CLIPImageProcessor": _SHORTER,
    "ConvNextImageProcessor": Processor({"shortest_edge": 384}),
}
"""Name in transformers -> its defaults, as version 5 has them."""
BY_MODEL: Mapping[str, str] = {
    "vit": "ViTImageProcessor", "deit": "DeiTImageProcessor", "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "dinov2": "BitImageProcessor", "dinov2_with_registers": "BitImageProcessor",
    "resnet": "ConvNextImageProcessor",
}  # fmt: skip
"""Model type -> the processor of a file that does not name one."""
STRETCHED = 384  # from this size on, ConvNext's processor stretches instead of cutting


def from_hf(config: Mapping[str, Any], origin: str, model_type: str = "vit") -> Fields:
    """Translate a preprocessor_config.json; what it does not say is its processor's default.

    model_type: of config.json, for a file that names no processor.  Keys that the processor does
    not read are passed over, as in transformers.
    Raises: BadInput for a processor or a value that cannot be reproduced, or no mean and std.
    """
    given = {key: value for key, value in config.items() if value is not None}
    kind = _kind(given, origin, model_type)
    known = PROCESSORS[kind]
    for key in ("do_pad", "use_square_size", "rescale_offset"):
        if given.get(key):
            raise _bad(origin, key, given[key], "false")
    number = given.get("resample", known.resample)
    if isinstance(number, bool) or number not in range(len(FILTERS)):
        names = ", ".join(f"{i} ({name})" for i, name in enumerate(FILTERS))
        raise _bad(origin, "resample", number, f"one of {names}")
    resize = _size(given.get("size", known.size), "size", origin, known.square)
    crop = _size(given.get("crop_size", known.crop_size), "crop_size", origin, True)
    if isinstance(crop, int):
        raise _bad(origin, "crop_size", given["crop_size"], "a height and a width")
    if not _flag(given, "do_center_crop", known.crop_size is not None, origin):
        crop = None
    elif crop is None:
        raise _bad(origin, "crop_size", None, "a size, because do_center_crop is true")
    if not _flag(given, "do_resize", True, origin):
        resize = None
    elif kind == "ConvNextImageProcessor":
        resize, crop = _convnext(resize, crop, given, origin)
    size = resize if crop is None and isinstance(resize, tuple) else crop
    shapes = {"size": size, "resize": resize, "interpolation": FILTERS[int(number)]}
    return _statistics(given, origin) | PLAIN | shapes


def _kind(given: Mapping[str, Any], origin: str, model_type: str) -> str:
    """Name the processor as version 5 of transformers does, without its backend."""
    key = next((k for k in ("image_processor_type", "feature_extractor_type") if k in given), "")
    name = str(given.get(key, BY_MODEL.get(model_type, "ViTImageProcessor")))
    kind = name.replace("FeatureExtractor", "ImageProcessor")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in PROCESSORS:
        raise _bad(origin, key, name, f"one of {', '.join(PROCESSORS)}")
    return kind


def _convnext(resize: Any, crop: Any, given: Mapping[str, Any], origin: str) -> tuple[Any, Any]:
    """Spell out the resize that crops by itself, or from 384 pixels on stretches."""
    if not isinstance(resize, int):
        raise _bad(origin, "size", given["size"], "the shortest_edge")
    if crop not in (None, (resize, resize)):
        raise _bad(origin, "crop_size", given["crop_size"], f"{resize}, which its resize leaves")
    if resize >= STRETCHED:
        return (resize, resize), None
    share = given.get("crop_pct", 224 / 256)
    return int(resize / _positive(share, "crop_pct", origin)), (resize, resize)


def _statistics(given: Mapping[str, Any], origin: str) -> Fields:
    """Give mean and std of bytes / 255, whatever the file scales by."""
    found: dict[str, tuple[float, ...]] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    if _flag(given, "do_normalize", True, origin):
        found = {k: _three(given.get(f"image_{k}"), f"image_{k}", origin) for k in found}
    if min(found["std"]) <= 0:
        raise _bad(origin, "image_std", given["image_std"], "positive numbers")
    factor = 1.0
    if _flag(given, "do_rescale", True, origin):
        factor = _positive(given.get("rescale_factor", 1 / 255), "rescale_factor", origin)
    return {k: tuple(x / (255 * factor) for x in values) for k, values in found.items()}


def to_hf(preprocess: Mapping[str, Any]) -> Fields:
    """Write a preprocessor_config.json that gives the same pixels in transformers (PIL backend).

    Half a pixel of a margin goes where transformers puts it, whatever `margins` says: `shift`.
    Raises: BadInput for what no processor of transformers does.
    """
    own = _own(preprocess)
    size, resize = own["size"], own["resize"]
    if isinstance(resize, tuple) and own["aspect"] != "stretch":
        raise _bad("export to hf", "aspect", own["aspect"], "stretch, or a shorter side")
    if any(own["fill"]):
        raise _bad("export to hf", "fill", own["fill"], "zeros")
    stretched = resize is not None and size is not None and resize == size
    config: Fields = {
        "image_processor_type": "ViTImageProcessor" if stretched else "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": resize is not None,
        "do_center_crop": size is not None and not stretched,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(own["mean"]),
        "image_std": list(own["std"]),
        "resample": FILTERS.index(own["interpolation"]),
    }
    if resize is not None:
        config["size"] = {"shortest_edge": resize} if isinstance(resize, int) else _named(resize)
    if config["do_center_crop"]:
        config["crop_size"] = _named(size)
    return config


def from_timm(config: Mapping[str, Any], origin: str = "pretrained_cfg") -> Fields:
    """Translate timm's pretrained_cfg to what its evaluation transform does.

    Raises: BadInput for a value that timm does not have, or pictures of other than 3 channels.
    """
    given = {key: value for key, value in config.items() if value is not None}
    shape = given.get("input_size", (3, 224, 224))
    if not isinstance(shape, list | tuple) or len(shape) != 3 or shape[0] != 3:
        raise _bad(origin, "input_size", shape, "[3, height, width]")
    size = (_side(shape[1], "input_size", origin), _side(shape[2], "input_size", origin))
    name, mode = given.get("interpolation", "bicubic"), given.get("crop_mode", "center")
    if name not in FILTERS:
        raise _bad(origin, "interpolation", name, f"one of {', '.join(FILTERS)}")
    if mode not in ("center", "squash", "border"):
        raise _bad(origin, "crop_mode", mode, "center, squash or border")
    share = _positive(given.get("crop_pct", 0.875), "crop_pct", origin)
    if share < 1e-3:  # of its inverse there would be too many pixels
        raise _bad(origin, "crop_pct", share, "a fraction of at least 0.001")
    scaled = (math.floor(size[0] / share), math.floor(size[1] / share))
    shorter = mode == "center" and scaled[0] == scaled[1]
    aspects = {"center": "stretch" if shorter else "cover", "border": "contain"}
    mean, std = (_three(given.get(k, IMAGENET[k]), k, origin) for k in ("mean", "std"))
    if min(std) <= 0:
        raise _bad(origin, "std", std, "positive numbers")
    return PLAIN | {
        "mean": mean,
        "std": std,
        "size": size,
        "resize": scaled[0] if shorter else scaled,
        "interpolation": name,
        "aspect": aspects.get(mode, "stretch"),
        "margins": ROUND,
        "fill": tuple(round(255 * m) for m in mean) if mode == "border" else (0, 0, 0),
    }


def to_timm(preprocess: Mapping[str, Any]) -> Fields:
    """Write the part of timm's pretrained_cfg that says what happens to a picture.

    Half a pixel of a margin goes where timm puts it, whatever `margins` says: `shift`.
    Raises: BadInput for what timm's evaluation transform does not do.
    """
    own = _own(preprocess)
    size, resize = own["size"], own["resize"]
    for key in ("size", "resize"):
        if own[key] is None:
            raise _bad("export to timm", key, None, "pixels: timm resizes, then cuts")
    modes = {"stretch": "squash", "cover": "center", "contain": "border"}
    mode = "center" if isinstance(resize, int) else modes[own["aspect"]]
    goal = (resize, resize) if isinstance(resize, int) else resize
    config: Fields = {
        "input_size": [3, *size],
        "interpolation": own["interpolation"],
        "crop_pct": _share(size, goal),
        "crop_mode": mode,
        "mean": list(own["mean"]),
        "std": list(own["std"]),
    }
    again = from_timm(config)
    for key in ("resize", "aspect", "fill"):
        if again[key] != own[key]:
            raise _bad("export to timm", key, own[key], f"{again[key]!r}, all that timm does there")
    return config


def _share(size: tuple[int, int], goal: tuple[int, int]) -> float:
    """Find the crop_pct, in few digits, of which timm's floor(size / crop_pct) makes `goal`."""
    largest = min(side / whole for side, whole in zip(size, goal, strict=True))
    for digits in range(1, 17):
        share = round(largest, digits) if digits < 16 else math.nextafter(largest, 0)
        if share > 0 and tuple(math.floor(side / share) for side in size) == goal:
            return share
    return largest  # none does: the caller compares


def shift(preprocess: Mapping[str, Any], to: str) -> str | None:
    """Say what an export to "hf" or "timm" cannot keep, or None where all pixels stay the same."""
    own = _own(preprocess)
    size, resize = own["size"], own["resize"]
    if size is None or own["margins"] == {"hf": FLOOR, "timm": ROUND}[to]:
        return None
    if isinstance(resize, tuple) and own["aspect"] == "stretch":
        spare = [side - wanted for side, wanted in zip(resize, size, strict=True)]
        if all(pixels >= 0 and pixels % 2 == 0 for pixels in spare):
            return None
    return "where an odd number of pixels is cut off, the middle may lie one pixel further"


def _own(preprocess: Mapping[str, Any]) -> Fields:
    own = PLAIN | dict(preprocess)
    return {key: tuple(x) if isinstance(x, list) else x for key, x in own.items()}


def _bad(origin: str, key: str, value: Any, expected: str) -> BadInput:
    given = reprlib.repr(value)
    return BadInput(f"{origin}: {key or 'the processor'} is {given}, expected {expected}")


def _named(sides: tuple[int, int]) -> dict[str, int]:
    return {"height": sides[0], "width": sides[1]}


def _flag(given: Mapping[str, Any], key: str, default: bool, origin: str) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise _bad(origin, key, value, "true or false")
    return value


def _side(value: Any, key: str, origin: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_SIDE:
        raise _bad(origin, key, value, f"whole numbers of pixels, from 1 to {MAX_SIDE:,}")
    return value


def _size(value: Any, key: str, origin: str, square: bool) -> int | tuple[int, int] | None:
    """Read a size as (height, width), or as the shorter side alone."""
    if value is None:
        return None
    if isinstance(value, Mapping) and value.keys() == {"shortest_edge"}:
        return _side(value["shortest_edge"], key, origin)
    if isinstance(value, Mapping) and value.keys() == {"height", "width"}:
        value = [value["height"], value["width"]]
    if isinstance(value, list | tuple) and len(value) == 2:
        return _side(value[0], key, origin), _side(value[1], key, origin)
    if isinstance(value, Mapping | list | tuple):
        raise _bad(origin, key, value, "a number, {height, width} or {shortest_edge}")
    side = _side(value, key, origin)
    return (side, side) if square else side


def _positive(value: Any, key: str, origin: str) -> float:
    if not _is_real(value) or value <= 0:
        raise _bad(origin, key, value, "a positive number")
    return value


def _three(value: Any, key: str, origin: str) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(values) != 3 or not all(map(_is_real, values)):
        raise _bad(origin, key, value, "three numbers, of red, green and blue")
    return values


def _is_real(value: Any) -> bool:
    """Tell whether it is a number, and one that float32 holds: JSON's may have any size."""
    return type(value) in (int, float) and abs(value) < 1e30
