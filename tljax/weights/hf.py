"""Hugging Face files <-> tljax trees: one table a format, read in both directions.

A row: section, foreign module, tljax module, kind, shape of the kind's first tensor in words that
the model's fields give a size.  Section `body` must be there, whole; of others all or nothing.
Rows with {i} repeat for every block, rows with {a} for query, key and value.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize

from tljax.tree import flatten, nearest, unflatten
from tljax.types import BadInput, Tree

LAYOUTS = {"same": None, "dense": (1, 0), "conv": (2, 3, 1, 0)}
"""Axes of the foreign tensor in tljax's order: (o, i) -> (i, o), OIHW -> HWIO."""

_BIAS = (".bias", "params", "/bias", "same")
_NORM = ((".weight", "params", "/scale", "same"), _BIAS)
_MEAN = (".running_mean", "batch_stats", "/mean", "same")
_VAR = (".running_var", "batch_stats", "/var", "same")
KINDS = {
    "leaf": (("", "params", "", "same"),),
    "table": ((".weight", "params", "/embedding", "same"),),
    "dense": ((".weight", "params", "/kernel", "dense"), _BIAS),
    "conv": ((".weight", "params", "/kernel", "conv"),),
    "conv+bias": ((".weight", "params", "/kernel", "conv"), _BIAS),
    "norm": _NORM,
    "batchnorm": (*_NORM, _MEAN, _VAR),
}
"""Foreign suffix, collection, tljax suffix, layout of each leaf; all but the first are vectors."""

_VIT_COMMON = """
body embeddings.cls_token embed/cls leaf 1 1 width
body embeddings.position_embeddings embed/pos leaf 1 tokens width
body embeddings.patch_embeddings.projection embed/patch conv+bias width channels patch patch
body layernorm norm norm width
body encoder.layer.{i}.attention.attention.{a} blocks/{i}/attention/{a} dense width width
body encoder.layer.{i}.attention.output.dense blocks/{i}/attention/out dense width width
"""
_VIT = """
body encoder.layer.{i}.layernorm_before blocks/{i}/norm1 norm width
body encoder.layer.{i}.layernorm_after blocks/{i}/norm2 norm width
body encoder.layer.{i}.intermediate.dense blocks/{i}/mlp/up dense mlp width
body encoder.layer.{i}.output.dense blocks/{i}/mlp/down dense width mlp
head classifier head dense classes width
"""
_DINOV2 = """
body encoder.layer.{i}.norm1 blocks/{i}/norm1 norm width
body encoder.layer.{i}.layer_scale1.lambda1 blocks/{i}/scale1/gamma leaf width
body encoder.layer.{i}.norm2 blocks/{i}/norm2 norm width
body encoder.layer.{i}.mlp.fc1 blocks/{i}/mlp/up dense mlp width
body encoder.layer.{i}.mlp.fc2 blocks/{i}/mlp/down dense width mlp
body encoder.layer.{i}.layer_scale2.lambda1 blocks/{i}/scale2/gamma leaf width
head classifier head dense classes features
"""
_BERT = """
body embeddings.word_embeddings embed/word table vocab width
body embeddings.position_embeddings embed/position table positions width
body embeddings.token_type_embeddings embed/type table types width
body embeddings.LayerNorm embed/norm norm width
body encoder.layer.{i}.attention.self.{a} blocks/{i}/attention/{a} dense width width
body encoder.layer.{i}.attention.output.dense blocks/{i}/attention/out dense width width
body encoder.layer.{i}.attention.output.LayerNorm blocks/{i}/norm1 norm width
body encoder.layer.{i}.intermediate.dense blocks/{i}/mlp/up dense mlp width
body encoder.layer.{i}.output.dense blocks/{i}/mlp/down dense width mlp
body encoder.layer.{i}.output.LayerNorm blocks/{i}/norm2 norm width
pooler pooler.dense pooler dense width width
head classifier head dense classes width
mlm cls.predictions.transform.dense mlm/dense dense width width
mlm cls.predictions.transform.LayerNorm mlm/norm norm width
mlm cls.predictions.bias mlm/bias leaf vocab
"""
_RESNET = """
body embedder.embedder.convolution stem/conv conv width channels 7 7
body embedder.embedder.normalization stem/norm batchnorm width
head classifier.1 head dense classes features
"""
_RESNET_CONV = """
body {block}.layer.{k}.convolution blocks/{i}/conv{n} conv {out} {into} {size} {size}
body {block}.layer.{k}.normalization blocks/{i}/norm{n} batchnorm {out}
"""
_RESNET_SHORTCUT = """
body {block}.shortcut.convolution blocks/{i}/shortcut/conv conv {out} {into} 1 1
body {block}.shortcut.normalization blocks/{i}/shortcut/norm batchnorm {out}
"""
TABLES = {"vit": _VIT_COMMON + _VIT, "dinov2": _VIT_COMMON + _DINOV2, "bert": _BERT}
ARCHS = {"vit": "vit", "dinov2": "vit", "bert": "bert", "resnet": "resnet"}
"""Foreign model type -> tljax model."""
IGNORED = {
    "embeddings.mask_token": "for masked image pretraining only",
    "embeddings.position_ids": "0, 1, 2, .. made in the call",
    "num_batches_tracked": "a counter that inference does not read",
    "cls.seq_relationship": "next-sentence head: tljax's BERT has none",
    "pooler.dense": "tanh layer on the class token: tljax's ViT has none",
}
"""A tensor, or a module with its weight and bias, at the end of a name -> why it is left out."""
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": jnp.bfloat16, "I64": "i8", "I32": "i4"}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_ENCODER = {
    "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "eps": "layer_norm_eps",
}  # fmt: skip
FIELDS = {
    "vit": _ENCODER | {"mlp": "intermediate_size"},
    "dinov2": _ENCODER | {"layer_scale": "layerscale_value"},
    "bert": _ENCODER | {
        "mlp": "intermediate_size", "vocab": "vocab_size", "types": "type_vocab_size",
        "positions": "max_position_embeddings",
    },
    "resnet": {"width": "embedding_size"},
}  # fmt: skip
REQUIRED = {
    "qkv_bias": True, "use_swiglu_ffn": False, "position_embedding_type": "absolute",
    "is_decoder": False, "downsample_in_bottleneck": False, "downsample_in_first_stage": False,
}  # fmt: skip
"""What a configuration must say, if it says anything about it."""


class Leaf(NamedTuple):
    """One tensor on both sides, and its foreign shape."""

    section: str
    foreign: str
    ours: str
    layout: str
    shape: tuple[int | str, ...]


def read_safetensors(data: bytes, origin: str) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file.

    Raises: BadInput for a damaged file, or a type of number other than those of `DTYPES`.
    """
    try:
        return {
            # The names that BERT's authors gave, still found in its oldest files.
            name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias"):
                np.frombuffer(view["data"], DTYPES[view["dtype"]]).reshape(view["shape"])
            for name, view in deserialize(data)
        }  # fmt: skip
    except SafetensorError as error:
        raise BadInput(f"{origin} is damaged ({error}): copy or download it again") from None
    except KeyError as error:
        raise BadInput(f"{origin}: no tensors of type {error}, only {', '.join(DTYPES)}") from None


def read_fields(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Translate a config.json to the fields of tljax's model.

    Raises: BadInput for a model type or an option that tljax does not have.
    """
    kind = config.get("model_type")
    if kind not in ARCHS:
        raise BadInput(f"{origin}: model_type {kind!r} is not one of {', '.join(ARCHS)}")
    for name, value in (REQUIRED | ({"hidden_act": "relu"} if kind == "resnet" else {})).items():
        if config.get(name, value) != value:
            raise BadInput(f"{origin}: {name}={config[name]!r}; tljax has {value!r} only")
    try:
        fields = {own: config[name] for own, name in FIELDS[kind].items()}
        if odd := [name for name, value in fields.items() if not isinstance(value, int | float)]:
            raise TypeError(f"{odd[0]!r}")
        if kind == "resnet":
            bottleneck = config["layer_type"] == "bottleneck"
            return fields | {"stages": tuple(config["depths"]), "bottleneck": bottleneck}
        fields["activation"] = ACTIVATIONS[config["hidden_act"]]
        if kind == "dinov2":
            fields["mlp"] = fields["width"] * config["mlp_ratio"]
        if ARCHS[kind] == "vit":
            side = config["image_size"] // config["patch_size"]
            fields |= {"patch": config["patch_size"], "grid": (side, side)}
    except (KeyError, TypeError) as error:
        raise BadInput(f"{origin}: no or no usable value for {error}") from None
    return fields


def make_table(kind: str, fields: Mapping[str, Any], prefix: str = "") -> tuple[Leaf, ...]:
    """Spell out the rows of a format (`ARCHS`) for a model of these fields.

    `prefix` starts the foreign names of all but heads: "bert." if the model has a head, else "".
    """
    sizes = {name: value for name, value in fields.items() if isinstance(value, int)}
    if kind == "resnet":
        text, sizes["features"] = _spell_resnet(**fields)
    else:
        text, sizes["features"] = _spell(TABLES[kind], fields["depth"]), 2 * fields["width"]
    if "grid" in fields:
        sizes["tokens"] = fields["grid"][0] * fields["grid"][1] + 1
    found = []
    for section, foreign, ours, module, *words in map(str.split, text.split("\n")):
        shape = tuple(int(word) if word.isdigit() else sizes.get(word, word) for word in words)
        start = "" if section in ("head", "mlm") else prefix
        for suffix, collection, own, layout in KINDS[module]:
            names = (f"{start}{foreign}{suffix}", f"{collection}/{ours}{own}")
            found.append(Leaf(section, *names, layout, shape))
            shape = shape[:1]
    return tuple(found)


def _spell(text: str, depth: int) -> str:
    def repeat(row: str) -> dict[str, None]:
        names = ("query", "key", "value")
        return dict.fromkeys(row.format(i=i, a=a) for i in range(depth) for a in names)

    return "\n".join(line for row in text.split("\n") if row for line in repeat(row))


def _spell_resnet(
    stages: tuple[int, ...], width: int, bottleneck: bool, **_: Any
) -> tuple[str, int]:
    text, into = _RESNET, width
    places = [(stage, j) for stage, count in enumerate(stages) for j in range(count)]
    for index, (s, j) in enumerate(places):
        middle = width * 2**s
        convs = [(middle, 1), (middle, 3), (middle * 4, 1)] if bottleneck else [(middle, 3)] * 2
        names = {"block": f"encoder.stages.{s}.layers.{j}", "i": index}
        if into != convs[-1][0] or (s > 0 and j == 0):
            text += _RESNET_SHORTCUT.format(**names, into=into, out=convs[-1][0])
        for k, (out, size) in enumerate(convs):
            text += _RESNET_CONV.format(**names, into=into, out=out, size=size, k=k, n=k + 1)
            into = out
    return text.strip().replace("\n\n", "\n"), into


def to_tljax(
    state: Mapping[str, np.ndarray], table: tuple[Leaf, ...], origin: str = "state"
) -> tuple[Tree, dict[str, str]]:
    """Rename and lay out foreign tensors as float32; also return what was left out, and why.

    Raises: BadInput naming `origin` and a tensor that is unknown, missing, of another shape or
    type than the fields ask, or not finite.
    """
    by_name = {leaf.foreign: leaf for leaf in table}
    reasons = {name: _reason(name, state, origin) for name in state.keys() - by_name.keys()}
    ignored = {name: reason for name, reason in reasons.items() if reason}
    leaves = _account(origin, state.keys() - ignored.keys(), by_name)
    _check(state, leaves, origin)
    tree = {x.ours: _lay_out(state[x.foreign], LAYOUTS[x.layout]) for x in leaves}
    return unflatten({name: x.astype(np.float32, copy=False) for name, x in tree.items()}), ignored


def to_foreign(tree: Tree, table: tuple[Leaf, ...]) -> dict[str, np.ndarray]:
    """Name and lay out a tljax tree as the foreign format does: the inverse of `to_tljax`.

    Raises: BadInput naming a leaf that the format has no place for, or lacks.
    """
    values = flatten(tree)
    leaves = _account("tree", values.keys(), {leaf.ours: leaf for leaf in table})
    back = {name: axes and np.argsort(axes) for name, axes in LAYOUTS.items()}
    return {x.foreign: _lay_out(np.asarray(values[x.ours]), back[x.layout]) for x in leaves}


def _lay_out(tensor: np.ndarray, axes: Any) -> np.ndarray:
    return tensor if axes is None else np.ascontiguousarray(tensor.transpose(axes))


def _account(origin: str, given: Any, expected: Mapping[str, Leaf]) -> list[Leaf]:
    """Return the leaves of the sections that are there; raise unless `given` is just these."""
    sections = {"body"} | {leaf.section for name, leaf in expected.items() if name in given}
    wanted = {name: leaf for name, leaf in expected.items() if leaf.section in sections}
    lines = [
        f"{what}: {', '.join(names[:3])} ({len(names)} in all; nearest: {nearest(names[0], pool)})"
        for what, names, pool in (
            ("unknown", sorted(given - expected.keys()), expected),
            ("missing", sorted(wanted.keys() - given), given),
        )
        if names
    ]
    if lines:
        lines.append("the weights and their configuration must be of one model")
        raise BadInput("\n".join([f"{origin}: these are not the tensors of the format", *lines]))
    return list(wanted.values())


def _reason(name: str, state: Mapping[str, np.ndarray], origin: str) -> str | None:
    """Say why a tensor is left out; None for one that is not known."""
    if name not in TIED:
        stem = f".{name}".removesuffix(".weight").removesuffix(".bias")
        return next((why for end, why in IGNORED.items() if stem.endswith(f".{end}")), None)
    if TIED[name] not in state or not np.array_equal(state[name], state[TIED[name]]):
        raise BadInput(f"{origin}: {name} differs from {TIED[name]}; tljax's BERT ties the two")
    return f"tied to {TIED[name]}"


def _check(state: Mapping[str, np.ndarray], leaves: list[Leaf], origin: str) -> None:
    sizes: dict[int | str, int] = {}
    for leaf in leaves:
        tensor, where = state[leaf.foreign], f"{origin}: tensor {leaf.foreign}"
        # A size that no field fixes (classes, channels) is fixed by the first tensor that has it.
        for word, size in zip(leaf.shape, tensor.shape, strict=False):
            sizes.setdefault(word, word if isinstance(word, int) else size)
        expected = tuple(sizes.get(word, word) for word in leaf.shape)
        if tensor.shape != expected:
            raise BadInput(f"{where} has shape {tensor.shape}, expected {expected}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise BadInput(f"{where} holds {tensor.dtype}, expected floating point")
        if not np.isfinite(tensor).all():
            raise BadInput(f"{where} holds NaN or infinity: the file is damaged")
