"""Hugging Face's config.json <-> the fields of tljax's models, in one table."""

import json
import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from tljax.types import BadInput
from tljax.weights.hf import ARCHS, expand, file_of

KEYS = """
VIT,DINO,bert,roberta,IMAGE  width             hidden_size                768                  size
TEXT                         width             hidden_size                512                  size
distilbert                   width             dim                        768                  size
VIT,DINO,bert,roberta,CLIP   depth             num_hidden_layers          12                   depth
distilbert                   depth             n_layers                   6                    depth
VIT,DINO,bert,roberta,IMAGE  heads             num_attention_heads        12                   size
TEXT                         heads             num_attention_heads        8                    size
distilbert                   heads             n_heads                    12                   size
VIT,bert,roberta,IMAGE       mlp               intermediate_size          3072                 size
TEXT                         mlp               intermediate_size          2048                 size
distilbert                   mlp               hidden_dim                 3072                 size
DINO                         mlp               mlp_ratio                  4                    ratio
VIT,bert,roberta             eps               layer_norm_eps             1e-12                eps
DINO                         eps               layer_norm_eps             1e-6                 eps
CLIP                         eps               layer_norm_eps             1e-5                 eps
VIT,DINO,bert,roberta        activation        hidden_act                 "gelu"               act
distilbert                   activation        activation                 "gelu"               act
CLIP                         activation        hidden_act                 "quick_gelu"         act
VIT,DINO                     qkv_bias          qkv_bias                   true                 flag
VIT,REG                      patch             patch_size                 16                   pair
dinov2                       patch             patch_size                 14                   pair
IMAGE                        patch             patch_size                 32                   pair
VIT,DINO,IMAGE               grid              image_size                 224                  pair
VIT                          pooler            pooler_output_size         null                 width
DINO                         layer_scale       layerscale_value           1.0                  real
REG                          registers         num_register_tokens        4                    count
bert,distilbert              vocab             vocab_size                 30522                size
roberta                      vocab             vocab_size                 50265                size
TEXT                         vocab             vocab_size                 49408                size
BERT                         positions         max_position_embeddings    512                  size
TEXT                         positions         max_position_embeddings    77                   size
bert,roberta                 types             type_vocab_size            2                    size
roberta                      pad               pad_token_id               1                    count
CLIP                         projection        projection_dim             512                  size
TEXT                         eot               eos_token_id               49407                eot
resnet                       stages            depths                     [3,4,6,3]            sizes
resnet                       width             embedding_size             64                   size
resnet                       widths            hidden_sizes               [256,512,1024,2048]  sizes
resnet                       bottleneck        layer_type                 "bottleneck"         layer
resnet                       stride_first      downsample_in_bottleneck   false                flag
resnet                       downsample_first  downsample_in_first_stage  false                flag
"""
"""Kinds, field, key, what transformers takes where it is left out, and what it may be."""
MAX_SIZE, MAX_COUNT, MAX_DEPTH = 1 << 24, 1 << 16, 256
ACTIVATIONS = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
    "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh",
}  # fmt: skip
"""Foreign name -> tljax's; of several the first is written."""
LAYERS = {"bottleneck": True, "basic": False}
EOT = 2  # CLIP's first configurations say so: the text ends at its largest id


class Check(NamedTuple):
    """What a value may be: in words, as a test, and how it is read and written."""

    words: str
    test: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


def _whole(low: int, high: int) -> Check:
    words = f"a whole number from {low} to {high:,}"
    return Check(words, lambda value: type(value) is int and low <= value <= high)


def _real(words: str, low: float, high: float) -> Check:
    return Check(words, lambda value: type(value) in (int, float) and low < value < high)


def _one_of(names: Mapping[str, Any]) -> Check:
    words = f"one of {', '.join(names)}"
    back = {own: name for name, own in reversed(list(names.items()))}
    return Check(words, lambda v: isinstance(v, str) and v in names, names.get, back.get)


def _list_of(item: Check, low: int, high: int) -> Check:
    def test(value: Any) -> bool:
        return type(value) is list and low <= len(value) <= high and all(map(item.test, value))

    return Check(f"a list of {low} to {high} sizes", test, tuple, list)


_SIZE = _whole(1, MAX_SIZE)
_PAIR = _list_of(_SIZE, 2, 2)
CHECKS = {
    "size": _SIZE,
    "depth": _whole(1, MAX_DEPTH),
    "width": Check(f"{_SIZE.words}, or null", lambda value: value is None or _SIZE.test(value)),
    "count": _whole(0, MAX_COUNT),
    "ratio": _real("a number between 0 and 1,000", 0, 1000),
    "eps": _real("a number between 0 and 1", 0, 1),
    "real": _real("a number that float32 holds", -1e30, 1e30),
    "flag": Check("true or false", lambda value: type(value) is bool),
    "act": _one_of(ACTIVATIONS),
    "layer": _one_of(LAYERS),
    "sizes": _list_of(_SIZE, 1, 16),
    "eot": Check(
        f"a whole number from 0 to {MAX_SIZE:,}",
        lambda value: type(value) is int and 0 <= value <= MAX_SIZE,
        lambda value: None if value == EOT else value,
        lambda value: EOT if value is None else value,
    ),
    "pair": Check(
        "a size, or height and width",
        lambda value: _SIZE.test(value) or _PAIR.test(value),
        lambda value: (value, value) if type(value) is int else tuple(value),
        lambda value: value[0] if value[0] == value[1] else list(value),
    ),
}

REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "": {
        "is_decoder": False, "add_cross_attention": False, "pruned_heads": {}, "auto_map": None,
        "quantization_config": None, "head_dim": None,
    },
    "VIT": {"pooler_act": "tanh"},
    "DINO": {"use_swiglu_ffn": False},
    "bert,roberta": {"position_embedding_type": "absolute"},
    "resnet": {"hidden_act": "relu"},
}  # fmt: skip
"""What a configuration must say, if it says anything about it: tljax has nothing else."""
IMPLIED: Mapping[str, Mapping[str, Any]] = {
    "deit": {"distilled": True},
    "dinov2_with_registers": {"resample": "bicubic_antialias"},
    "distilbert": {"types": 0, "eps": 1e-12, "pooler_activation": "relu"},
    "clip_vision_model": {"patch_bias": False, "embed_norm": True, "norm_pooled": True},
}
"""Fields that the type of model fixes."""
PLAIN: Mapping[str, Mapping[str, Any]] = {
    "vit": {
        "class_token": True, "distilled": False, "prefix_positions": True, "registers": 0,
        "patch_bias": True, "embed_norm": False, "qkv_bias": True, "qk_norm": None,
        "layer_scale": None, "norm_pooled": False, "map_head": False, "projection": None,
        "read": None,
    },
    "bert": {"pad": None, "pooler_activation": "tanh", "read": None},
    "clip_text": {"read": None},
    "resnet": {"norm": "batch", "stem": "imagenet", "shortcut": "conv", "eps": 1e-5, "read": None},
}  # fmt: skip
"""The value of a field in every type of model whose configuration says nothing of it."""
SILENT = (
    "dropout", "drop_path", "momentum", "dtype", "remat", "resample", "num_classes", "mlm",
    "tokens", "pool", "pooler", "distilled_head",
)  # fmt: skip
"""Fields that do not change the outputs at the stored sizes, or are those of heads."""


def _of(kind: str, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kinds, entry in table.items():
        found |= entry if not kinds or kind in expand(kinds).split(",") else {}
    return found


def _keys(kind: str) -> list[tuple[str, str, Any, Check]]:
    rows = [line.split() for line in expand(KEYS).strip().split("\n")]
    return [
        (field, name, json.loads(default), CHECKS[check])
        for kinds, field, name, default, check in rows
        if kind in kinds.split(",")
    ]


def read_fields(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Translate a config.json to the fields of tljax's model, without its heads.

    Raises: BadInput for a model type, an option or a size that tljax does not have.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHS:
        given = reprlib.repr(kind)
        raise BadInput(f"{origin}: model_type {given} is not one of clip, {', '.join(ARCHS)}")
    for name, value in _of(kind, REQUIRED).items():
        if config.get(name, value) != value:
            given = reprlib.repr(config[name])
            raise BadInput(f"{origin}: {name}={given}; tljax has {value!r} only")
    fields = dict(IMPLIED.get(kind, {}))
    for field, name, default, check in _keys(kind):
        value = config.get(name, default)
        if not check.test(value):
            given = reprlib.repr(value)
            raise BadInput(f"{origin}: {name}={given}; expected {check.words}")
        fields[field] = check.read(value)
    return _derived(fields, config, kind, origin)


def _derived(
    fields: dict[str, Any], config: Mapping[str, Any], kind: str, origin: str
) -> dict[str, Any]:
    """Compute what follows from several keys, and check that they fit together."""
    fits = True
    if "pooler" in fields:
        fields["pooler"] = fields["pooler"] or fields["width"]
    if "heads" in fields:
        about = [name for field, name, *_ in _keys(kind) if field in ("width", "heads")]
        fits = fields["width"] % fields["heads"] == 0
    if kind in expand("DINO").split(","):
        fields["mlp"] = int(fields["width"] * fields["mlp"])
    if "grid" in fields and fits:
        about, patch = ["image_size", "patch_size"], fields["patch"]
        fields["grid"] = tuple(i // p for i, p in zip(fields["grid"], patch, strict=True))
        fields["patch"] = patch[0] if patch[0] == patch[1] else patch
        fits = 0 < math.prod(fields["grid"]) <= MAX_SIZE
    if "stages" in fields:
        about = ["depths", "hidden_sizes"]
        fits = len(fields["stages"]) == len(fields["widths"])
        fits = fits and sum(fields["stages"]) <= MAX_DEPTH
    if not fits:
        given = ", ".join(f"{name}={config.get(name, 'the default')}" for name in about)
        raise BadInput(f"{origin}: {given} do not go together")
    return fields


def read_labels(
    config: Mapping[str, Any], classes: int | None, origin: str
) -> tuple[str, ...] | None:
    """Return the names of the classes in the order of their numbers, None if there are none.

    Raises: BadInput for anything but a name for each class of the head.
    """
    names = config.get("id2label") or None
    if names is None:
        return None
    try:
        found = [(int(number), name) for number, name in names.items()]
    except (AttributeError, ValueError, TypeError):
        found = []
    found.sort(key=lambda entry: entry[0])
    order = [number for number, _ in found] == list(range(len(found)))
    if not found or not order or not all(isinstance(name, str) for _, name in found):
        raise BadInput(f"{origin}: id2label={reprlib.repr(names)}; expected a name for 0, 1, ..")
    if classes not in (None, len(found)):
        raise BadInput(f"{origin}: id2label names {len(found)} classes, the head has {classes}")
    return tuple(name for _, name in found)


def choose_tower(config: Mapping[str, Any], tower: str | None, origin: str) -> Mapping[str, Any]:
    """Return the configuration of a tower of CLIP; any other configuration is its own.

    Raises: BadInput if the tower is to be named and is not, or is named and not there.
    """
    kind = config.get("model_type")
    if kind != "clip":
        if tower is not None and kind != f"clip_{tower}_model":
            raise BadInput(f"{origin}: a {reprlib.repr(kind)} has no tower {tower!r}")
        return config
    if tower not in ("vision", "text"):
        given = "" if tower is None else f", not {tower!r}"
        raise BadInput(f"{origin}: CLIP has two towers: say tower='vision' or tower='text'{given}")
    # transformers lets the older key win, with its defaults.
    both = [config.get(f"{tower}_config{end}") for end in ("_dict", "")]
    own = next((entry for entry in both if entry is not None), {})
    if not isinstance(own, dict):
        raise BadInput(f"{origin}: {tower}_config={reprlib.repr(own)}; expected an object")
    shared = {"projection_dim": config.get("projection_dim", 512)}
    shared |= {key: config[key] for key in ("auto_map", "quantization_config") if key in config}
    return own | shared | {"model_type": f"clip_{tower}_model"}


def kind_of(arch: str, fields: Mapping[str, Any], heads: Collection[str] = ()) -> str:
    """Choose the Hugging Face type of model that has such fields and heads."""
    given = {"distilled": "head_dist" in heads, "projection": "projection" in heads} | dict(fields)
    signs = {
        "vit": {
            "distilled": "deit", "registers": "dinov2_with_registers", "layer_scale": "dinov2",
            "embed_norm": "clip_vision_model", "projection": "clip_vision_model",
        },
    }.get(arch, {})  # fmt: skip
    if arch == "bert":
        no_types = "distilbert" if given.get("types") == 0 else "bert"
        return "roberta" if given.get("pad") is not None else no_types
    found = (kind for sign, kind in signs.items() if given.get(sign) not in (None, False, 0))
    return next(found, {"clip_text": "clip_text_model"}.get(arch, arch))


def to_config(
    arch: str,
    fields: Mapping[str, Any],
    labels: tuple[str, ...] | None,
    kind: str | None = None,
    channels: int = 3,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Return the config.json with which transformers rebuilds a model of these fields.

    fields: all of the model's, heads included.  kind: the type of model, chosen by `kind_of` if
    None.  channels: of its images.

    Raises: BadInput naming a field that this type cannot express.
    """
    kind = kind_of(arch, fields) if kind is None else kind
    if ARCHS.get(kind) != arch:
        raise BadInput(f"transformers has no {arch} of type {kind!r}: {', '.join(ARCHS)}")
    fields = _normal(arch, fields)
    config: dict[str, Any] = {"model_type": kind, "dtype": dtype}
    config |= {"num_channels": channels} if arch in ("vit", "resnet") else {}
    for field, name, _, check in _keys(kind):
        value = _raw(field, kind, fields)
        # A tower without a projection does not read its width.
        if (field, value) != ("projection", None):
            config[name] = check.write(value)
    read = {**PLAIN[arch], **read_fields(config, f"as a {kind}")}
    read |= {"projection": None} if fields.get("projection") is None else {}
    for name, value in fields.items():
        if name not in SILENT and (name not in read or read[name] != value):
            has = f": it has {read[name]!r} only" if name in read else ""
            raise BadInput(f"transformers' {kind} cannot express {name}={value!r}{has}")
    return config | _text_ids(kind) | _classes(kind, fields, labels)


def _normal(arch: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Spell fields in the one way in which `read_fields` does."""
    found = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    patch = found.get("patch")
    if isinstance(patch, tuple) and patch[0] == patch[1]:
        found["patch"] = patch[0]
    if arch == "resnet" and found.get("widths") is None:
        first = found["width"] * (4 if found["bottleneck"] else 1)
        found["widths"] = tuple(first * 2**stage for stage in range(len(found["stages"])))
    return found


def _raw(field: str, kind: str, fields: Mapping[str, Any]) -> Any:
    """Return what a key says of a field.

    Raises: BadInput for a field that is not given, or has no such value.
    """
    if field not in fields:
        raise BadInput(f"transformers' {kind} needs the field {field}")
    value = fields[field]
    if field == "mlp" and kind in expand("DINO").split(","):
        if value % fields["width"]:
            raise BadInput(f"transformers' {kind} cannot express mlp={value}: it has multiples of "
                           f"width={fields['width']} only")  # fmt: skip
        return value // fields["width"]
    if field in ("grid", "patch"):
        patch = (fields["patch"],) * 2 if isinstance(fields["patch"], int) else fields["patch"]
        return patch if field == "patch" else tuple(np.multiply(value, patch).tolist())
    return value


def _text_ids(kind: str) -> dict[str, None]:
    """Leave out ids of tokens that a small vocabulary has not: no output depends on them."""
    return {"bos_token_id": None, "pad_token_id": None} if kind == "clip_text_model" else {}


def _classes(kind: str, fields: Mapping[str, Any], labels: Any) -> dict[str, Any]:
    """Name the class that opens the file, and its labels.

    Raises: BadInput if there is not one label for every class.
    """
    found: dict[str, Any] = {"architectures": [file_of(kind, fields).cls]}
    count = fields.get("num_classes")
    if count is None and found["architectures"][0].endswith("ForImageClassification"):
        count, labels = 0, ()  # a body alone is a classifier without its head
    if count is None:
        return found
    labels = tuple(f"LABEL_{i}" for i in range(count)) if labels is None else tuple(labels)
    if len(labels) != count:
        raise BadInput(f"there are {len(labels)} labels for num_classes={count}")
    found["id2label"] = {str(number): name for number, name in enumerate(labels)}
    return found | {"label2id": {name: number for number, name in enumerate(labels)}}
