"""Hugging Face files <-> tljax trees: one table, read in both directions.

A row: formats, section, foreign module, tljax module, kind.  Section `body` must be there, whole;
of others all or nothing.  Rows with {block} repeat for every block, number {i}; those with {a} for
query, key and value; those with {k} for every convolution, which is our number {n} = {k} + 1.
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tljax.tree import flatten, nearest, unflatten
from tljax.types import BadInput, Tree

Axes = tuple[int, ...] | None
_DENSE, _CONV = (1, 0), (2, 3, 1, 0)  # foreign axes in tljax's order: (o, i), OIHW
_BIAS = (".bias", "params", "/bias", None)
_NORM = ((".weight", "params", "/scale", None), _BIAS)
_MEAN = (".running_mean", "batch_stats", "/mean", None)
_VAR = (".running_var", "batch_stats", "/var", None)
KINDS: Mapping[str, tuple[tuple[str, str, str, Axes], ...]] = {
    "leaf": (("", "params", "", None),),
    "table": ((".weight", "params", "/embedding", None),),
    "dense": ((".weight", "params", "/kernel", _DENSE), _BIAS),
    "conv": ((".weight", "params", "/kernel", _CONV),),
    "conv+bias": ((".weight", "params", "/kernel", _CONV), _BIAS),
    "norm": _NORM,
    "batchnorm": (*_NORM, _MEAN, _VAR),
}
"""Foreign suffix, collection, tljax suffix and axes of each leaf."""

TABLE = """
vit,dinov2  body         embeddings.cls_token                    embed/cls                 leaf
vit,dinov2  body         embeddings.position_embeddings          embed/pos                 leaf
vit,dinov2  body         embeddings.patch_embeddings.projection  embed/patch               conv+bias
vit,dinov2  body         {block}.attention.attention.{a}         blocks/{i}/attention/{a}  dense
vit,dinov2  body         {block}.attention.output.dense          blocks/{i}/attention/out  dense
vit,dinov2  body         layernorm                               norm                      norm
vit         body         {block}.layernorm_before                blocks/{i}/norm1          norm
vit         body         {block}.layernorm_after                 blocks/{i}/norm2          norm
dinov2      body         {block}.norm1                           blocks/{i}/norm1          norm
dinov2      body         {block}.layer_scale1.lambda1            blocks/{i}/scale1/gamma   leaf
dinov2      body         {block}.norm2                           blocks/{i}/norm2          norm
dinov2      body         {block}.mlp.fc1                         blocks/{i}/mlp/up         dense
dinov2      body         {block}.mlp.fc2                         blocks/{i}/mlp/down       dense
dinov2      body         {block}.layer_scale2.lambda1            blocks/{i}/scale2/gamma   leaf
dinov2      head         classifier                              head                      dense
bert        body         embeddings.word_embeddings              embed/word                table
bert        body         embeddings.position_embeddings          embed/position            table
bert        body         embeddings.token_type_embeddings        embed/type                table
bert        body         embeddings.LayerNorm                    embed/norm                norm
bert        body         {block}.attention.self.{a}              blocks/{i}/attention/{a}  dense
bert        body         {block}.attention.output.dense          blocks/{i}/attention/out  dense
bert        body         {block}.attention.output.LayerNorm      blocks/{i}/norm1          norm
bert        body         {block}.output.LayerNorm                blocks/{i}/norm2          norm
bert        pooler       pooler.dense                            pooler                    dense
bert        mlm          cls.predictions.transform.dense         mlm/dense                 dense
bert        mlm          cls.predictions.transform.LayerNorm     mlm/norm                  norm
bert        mlm          cls.predictions.bias                    mlm/bias                  leaf
vit,bert    body         {block}.intermediate.dense              blocks/{i}/mlp/up         dense
vit,bert    body         {block}.output.dense                    blocks/{i}/mlp/down       dense
vit,bert    head         classifier                              head                      dense
resnet      body         embedder.embedder.convolution           stem/conv                 conv
resnet      body         embedder.embedder.normalization         stem/norm                 batchnorm
resnet      body         {block}.layer.{k}.convolution           blocks/{i}/conv{n}        conv
resnet      body         {block}.layer.{k}.normalization         blocks/{i}/norm{n}        batchnorm
resnet      shortcut{i}  {block}.shortcut.convolution            blocks/{i}/shortcut/conv  conv
resnet      shortcut{i}  {block}.shortcut.normalization          blocks/{i}/shortcut/norm  batchnorm
resnet      head         classifier.1                            head                      dense
"""
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
    """One tensor on both sides; `axes` are the foreign ones in our order, None if all the same."""

    section: str
    foreign: str
    ours: str
    axes: Axes


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file.

    Raises: BadInput for a damaged file, or a type of number that numpy does not have.
    """
    try:
        state = load_file(path)
    except (SafetensorError, AttributeError) as error:
        raise BadInput(f"{path} is damaged ({error}): copy or download it again") from None
    # The names that BERT's authors gave, still found in its oldest files.
    old = (("Norm.gamma", "Norm.weight"), ("Norm.beta", "Norm.bias"))
    return {name.replace(*old[0]).replace(*old[1]): tensor for name, tensor in state.items()}


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
    if kind == "resnet":
        stages = enumerate(fields["stages"])
        blocks = [f"encoder.stages.{s}.layers.{j}" for s, count in stages for j in range(count)]
        parts = [{"k": str(k), "n": str(k + 1)} for k in range(3 if fields["bottleneck"] else 2)]
    else:
        blocks = [f"encoder.layer.{i}" for i in range(fields["depth"])]
        parts = [{"a": name} for name in ("query", "key", "value")]
    rows = [row for row in TABLE.strip().split("\n") if kind in row.split()[0].split(",")]
    found = []
    for row, (i, block), part in product(rows, enumerate(blocks), parts):
        _, section, foreign, ours, module = row.format(i=i, block=block, **part).split()
        start = "" if section in ("head", "mlm") else prefix
        for suffix, collection, own, axes in KINDS[module]:
            names = (f"{start}{foreign}{suffix}", f"{collection}/{ours}{own}")
            found.append(Leaf(section, *names, axes))
    return tuple(dict.fromkeys(found))


def to_tljax(
    state: Mapping[str, np.ndarray], table: tuple[Leaf, ...], origin: str = "state"
) -> tuple[Tree, dict[str, str]]:
    """Rename and lay out foreign tensors as float32; also return what was left out, and why.

    Raises: BadInput naming `origin` and a tensor that is unknown, missing, of another rank or
    type than its place asks, or not finite.
    """
    by_name = {leaf.foreign: leaf for leaf in table}
    reasons = {name: _reason(name, state, origin) for name in state.keys() - by_name.keys()}
    ignored = {name: reason for name, reason in reasons.items() if reason}
    leaves = _account(origin, state.keys() - ignored.keys(), by_name)
    tree = {}
    for leaf in leaves:
        tensor, where = state[leaf.foreign], f"{origin}: tensor {leaf.foreign}"
        if leaf.axes and tensor.ndim != len(leaf.axes):
            raise BadInput(f"{where} has shape {tensor.shape}, expected {len(leaf.axes)} axes")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise BadInput(f"{where} holds {tensor.dtype}, expected floating point")
        if not np.isfinite(tensor).all():
            raise BadInput(f"{where} holds NaN or infinity: the file is damaged")
        tree[leaf.ours] = _lay_out(tensor, leaf.axes).astype(np.float32, copy=False)
    return unflatten(tree), ignored


def to_foreign(tree: Tree, table: tuple[Leaf, ...]) -> dict[str, np.ndarray]:
    """Name and lay out a tljax tree as the foreign format does: the inverse of `to_tljax`.

    Raises: BadInput naming a leaf that the format has no place for, or lacks.
    """
    values = flatten(tree)
    leaves = _account("tree", values.keys(), {leaf.ours: leaf for leaf in table})
    back = {x.foreign: x.axes and tuple(np.argsort(x.axes)) for x in leaves}
    return {x.foreign: _lay_out(np.asarray(values[x.ours]), back[x.foreign]) for x in leaves}


def _lay_out(tensor: np.ndarray, axes: Axes) -> np.ndarray:
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
