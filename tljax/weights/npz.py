"""Arrays of big_vision, vision_transformer and BiT (.npz) <-> tljax trees and fields.

Sizes are read from the arrays, heads included.  What arrays do not show is as in the original code
(tanh GELU, eps, bilinear resampling); every choice is named in `Source.assumed`, and a caller's
fields win over it.
"""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tljax.types import BadInput, Tree
from tljax.weights.files import Tensors, digest_of, open_npz
from tljax.weights.table import (
    Format,
    Leaf,
    Modules,
    Source,
    patch_of,
    rename,
    settle,
    shape_of,
    square,
    to_foreign,
    to_tljax,
)

_BIAS = ("/bias", "params", "/bias", None)
_KERNEL = ("/kernel", "params", "/kernel", None)
_SPLIT = (
    ("/kernel", "params", "/kernel", "d heads k -> d (heads k)"),
    ("/bias", "params", "/bias", "heads k -> (heads k)"),
)
_JOINED = (("/kernel", "params", "/kernel", "heads k d -> (heads k) d"), _BIAS)
_SCALE = ("/scale", "params", "/scale", None)
MODULES: Modules = {
    "leaf": (("", "params", "", None),),
    "conv": (_KERNEL,),
    "dense": (_KERNEL, _BIAS),
    "heads": _SPLIT,
    "out": _JOINED,
    "norm": (_SCALE, _BIAS),
    "wide": (
        ("/scale", "params", "/scale", "1 1 1 c -> c"),
        ("/bias", "params", "/bias", "1 1 1 c -> c"),
    ),
    "tf_norm": (("/gamma", "params", "/scale", None), ("/beta", "params", "/bias", None)),
    "tf_head": (("/kernel", "params", "/kernel", "1 1 i o -> i o"), _BIAS),
}


ROWS = """
vit      body        embedding                                     embed/patch               dense
vit      body        pos_embedding                                 embed/pos                 leaf
vit      cls         cls                                           embed/cls                 leaf
block    body        {block}/LayerNorm_0                           blocks/{i}/norm1          norm
block    body        {block}/MultiHeadDotProductAttention_0/{a}    blocks/{i}/attention/{a}  heads
block    body        {block}/MultiHeadDotProductAttention_0/out    blocks/{i}/attention/out  out
block    body        {block}/LayerNorm_1                           blocks/{i}/norm2          norm
block    body        {block}/MlpBlock_0/Dense_0                    blocks/{i}/mlp/up         dense
block    body        {block}/MlpBlock_0/Dense_1                    blocks/{i}/mlp/down       dense
vit      body        Transformer/encoder_norm                      norm                      norm
vit      map         MAPHead_0/probe                               map/probe                 leaf
vit      map         MAPHead_0/MultiHeadDotProductAttention_0/{a}  map/attention/{a}         heads
vit      map         MAPHead_0/MultiHeadDotProductAttention_0/out  map/attention/out         out
vit      map         MAPHead_0/LayerNorm_0                         map/norm                  norm
vit      map         MAPHead_0/MlpBlock_0/Dense_0                  map/mlp/up                dense
vit      map         MAPHead_0/MlpBlock_0/Dense_1                  map/mlp/down              dense
vit      pooler      pre_logits                                    pooler                    dense
bit      body        root_block/conv_root                          stem/conv                 conv
bit      body        {block}/conv{n}                               blocks/{i}/conv{n}        conv
bit      shortcut{i} {block}/conv_proj                             blocks/{i}/shortcut/conv  conv
wide     body        {block}/gn{n}                                 blocks/{i}/norm{n}        wide
wide     body        norm-pre-head                                 norm                      wide
flat     body        {block}/gn{n}                                 blocks/{i}/norm{n}        norm
flat     body        norm-pre-head                                 norm                      norm
vit,bit  head        head                                          head                      dense
tf       body        resnet/root_block/standardized_conv2d         stem/conv                 conv
tf       body        {block}/{c}/standardized_conv2d               blocks/{i}/conv{n}        conv
tf       body        {block}/{c}/group_norm                        blocks/{i}/norm{n}        tf_norm
tf       shortcut{i} {block}/a/proj/standardized_conv2d            blocks/{i}/shortcut/conv  conv
tf       body        resnet/group_norm                             norm                      tf_norm
tf       head        resnet/head/conv2d                            head                      tf_head
"""
NPZ = Format(
    rows=ROWS,
    modules=MODULES,
    blocks={"vit": "", "block": "Transformer/encoderblock_{i}"}
    | dict.fromkeys(("bit", "wide", "flat"), "block{s1}/unit{j1:02d}")
    | {"tf": "resnet/block{s1}/unit{j1:02d}"},
    ignored={},
    tied={},
    # As vision_transformer and older files of big_vision and big_transfer spell them.
    renamed={
        "Transformer/posembed_input/": "",
        "Transformer/pos_embedding": "pos_embedding",
        "LayerNorm_2/": "LayerNorm_1/",
        "MlpBlock_3/": "MlpBlock_0/",
        "MultiHeadDotProductAttention_1/": "MultiHeadDotProductAttention_0/",
        "conv_head/": "head/",
    },
)


def _stack(kind: str) -> tuple[tuple[str, str, str, str | None], ...]:
    """Let one array hold a leaf of all blocks, as big_vision has it that scans them."""
    axes = {"/kernel": "i o -> i o", "/bias": "o -> o", "/scale": "o -> o"}
    pairs = [(leaf, (leaf[3] or axes[leaf[0]]).split(" -> ")) for leaf in MODULES[kind]]
    return tuple((*leaf[:3], f"n {theirs} -> n {own}") for leaf, (theirs, own) in pairs)


STACKED = replace(
    NPZ,
    modules={kind: _stack(kind) for kind in ("dense", "heads", "out", "norm")},
    blocks={"block": "Transformer/encoderblock"},
)
MAX_DEPTH = 1000  # blocks in one array; each becomes lines of a table
ATTENTION = "MultiHeadDotProductAttention_0"
REFUSED = {
    "gn_root": "a ResNet v1 with GroupNorm, or a hybrid ViT",
    "conv_root": "a hybrid ViT, with convolutions before its patches",
    "img": "the two towers of a contrastive model; save params/img alone",
}
"""First part of a name -> what kind of file has it, and tljax does not read."""


def open_npz_weights(path: Path, given: Mapping[str, Any] | None = None) -> Source:
    """Open an .npz of big_vision, vision_transformer or BiT: a ViT or a BiT ResNet.

    given: fields that win over what is told or assumed, such as pool, or grid of oblong pictures.
    Raises: BadInput for a file that is damaged, or of a model that tljax does not have.
    """
    origin, digest, given = str(path), digest_of(path), given or {}
    state, beside = _parameters(open_npz(path))
    state = _rename(state, origin)
    for name in state:
        if what := REFUSED.get(name.split("/")[0]):
            raise BadInput(f"{origin}: {name} is of {what}")
    bit = any("block1/unit01/" in name for name in state)
    told, assumed = (_read_bit if bit else _read_vit)(state, given, origin)
    fields, lines = settle(told, assumed, given)
    leaves, heads = _spell(state, fields), fields.get("heads")
    tree, ignored = to_tljax(state, leaves, NPZ, origin, heads)
    return Source(
        arch="resnet" if bit else "vit",
        fields=fields,
        tree=tree,
        preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},  # pictures in [-1, 1]
        tokenizer=None,
        labels=None,
        digest=digest,
        ignored=beside | ignored,
        format="npz",
        kind="bit" if bit else "vit",
        config={},
        origin=str(path),
        assumed=lines,
    )


def to_npz(tree: Tree, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Name and lay out a tree as big_vision does (models.vit, models.bit_paper).

    Raises: BadInput for a model that these cannot be.
    """
    bit = "stages" in fields
    tokens = fields.get("class_token", True)
    pools = ("map", "pooler", "cls" if tokens else "mean")
    for name, value in (_BIT_ONLY if bit else _VIT_ONLY).items():
        if fields.get(name, value) != value:
            raise BadInput(f"big_vision has {name}={value!r} only, the model {fields[name]!r}")
    if not bit and fields.get("pool", "cls") not in pools:
        raise BadInput(
            f"big_vision pools by {', '.join(pools)} {'with' if tokens else 'without'} a class"
            f" token, the model by {fields['pool']!r}"
        )
    return to_foreign(tree, _spell({}, fields), fields)


_VIT_ONLY = {
    "eps": 1e-6, "activation": "gelu_tanh", "norm_pooled": False, "embed_norm": False,
    "registers": 0, "distilled": False, "layer_scale": None, "qk_norm": None, "projection": None,
    "qkv_bias": True, "patch_bias": True,
}  # fmt: skip
_BIT_ONLY = {
    "norm": "group", "eps": 1e-5, "bottleneck": True, "stem": "imagenet", "shortcut": "conv",
    "stride_first": False, "downsample_first": False, "pool": "lowest",
}  # fmt: skip


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays without pickles; the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980
            with archive.open(info, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def _spell(state: Tensors, fields: Mapping[str, Any]) -> tuple[Leaf, ...]:
    if "stages" not in fields:
        form = STACKED if _is_stacked(state) else NPZ
        return NPZ.spell("vit", fields) + form.spell("block", fields)
    if any(name.startswith("resnet/") for name in state):
        return NPZ.spell("tf", fields)
    scale = state.get("norm-pre-head/scale")
    norms = "flat" if scale is not None and len(scale.shape) == 1 else "wide"
    return NPZ.spell("bit", fields) + NPZ.spell(norms, fields)


def _is_stacked(state: Tensors) -> bool:
    return any(name.startswith("Transformer/encoderblock/") for name in state)


def _parameters(state: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Take the parameters out of a whole checkpoint; also return what is beside them, and why."""
    for start in ("params/", "opt/target/"):
        if found := {k.removeprefix(start): x for k, x in state.items() if k.startswith(start)}:
            others = [name for name in state if not name.startswith(start)]
            return found, dict.fromkeys(others, f"beside {start}: the state of a training run")
    return state, {}


def _rename(state: Tensors, origin: str) -> Tensors:
    """Spell names as the table does; TensorFlow's dumps number some of their convolutions."""
    parts = {part for name in state for part in name.split("/")}
    start = "standardized_conv2d"
    numbered = {f"/{part}/": f"/{start}/" for part in parts if part.startswith(f"{start}_")}
    return rename(state, numbered | dict(NPZ.renamed), origin)


Facts = dict[str, Any]
Guesses = dict[str, tuple[Any, str]]


def _read_vit(state: Tensors, given: Mapping[str, Any], origin: str) -> tuple[Facts, Guesses]:
    if "pos_embedding" not in state and "embedding/kernel" in state:
        raise BadInput(f"{origin}: missing: pos_embedding; computed (sincos2d) is not supported")
    tall, broad, _, width = shape_of(state, "embedding/kernel", 4, origin)
    rows = shape_of(state, "pos_embedding", 3, origin)[1]
    token, mapped = "cls" in state, "MAPHead_0/probe" in state
    told = _block_shape(state, width, origin)
    told |= {
        "width": width,
        "patch": patch_of(tall, broad, given.get("patch"), origin),
        "class_token": token,
        "map_head": mapped,
        "resample": "bilinear",
    }
    assumed = {
        "eps": (1e-6, "Flax's LayerNorm"),
        "activation": ("gelu_tanh", "Flax's gelu"),
        "pool": ("cls", "there is a class token") if token else ("mean", "no class token"),
    }
    if "pre_logits/kernel" in state:
        if mapped:
            raise BadInput(f"{origin}: pre_logits after MAPHead_0 is not in tljax")
        told["pooler"] = shape_of(state, "pre_logits/kernel", 2, origin)[1]
    if mapped or "pooler" in told:
        told["pool"] = "map" if mapped else "pooler"
        del assumed["pool"]
    facts, guesses = _read_grid(rows, token, given, origin)
    return told | facts, assumed | guesses


def _block_shape(state: Tensors, width: int, origin: str) -> Facts:
    """Return what the arrays of the first block tell, or of all where they are stacked."""
    stacked = _is_stacked(state)
    block = "Transformer/encoderblock" if stacked else "Transformer/encoderblock_0"
    query = shape_of(state, f"{block}/{ATTENTION}/query/kernel", 3 + stacked, origin)
    up = shape_of(state, f"{block}/MlpBlock_0/Dense_0/kernel", 2 + stacked, origin)
    names = {name.split("/")[1] for name in state if name.startswith("Transformer/encoderblock_")}
    depth = query[0] if stacked else len(names)
    if depth > MAX_DEPTH:
        raise BadInput(f"{origin}: {block} holds {depth} blocks, at most {MAX_DEPTH}")
    found = [query[stacked:]]
    if "MAPHead_0/probe" in state:
        found.append(shape_of(state, f"MAPHead_0/{ATTENTION}/query/kernel", 3, origin))
    for shape in found:
        if shape[0] != width or shape[1] * shape[2] != width or shape != found[0]:
            raise BadInput(
                f"{origin}: a query kernel has shape {shape}, expected ({width}, heads, k) with"
                f" heads * k = {width}, the same in blocks and MAPHead_0"
            )
    return {"depth": depth, "heads": query[-2], "mlp": up[-1]}


def _read_grid(
    rows: int, token: bool, given: Mapping[str, Any], origin: str
) -> tuple[Facts, Guesses]:
    """Decide the grid, and whether the class token has a row: before 2022 it had one."""
    asked = tuple(given.get("grid") or ())
    for own in (int(token), 0):
        if asked and math.prod(asked) + own == rows:
            return {"prefix_positions": own == token}, {}
        if not asked and (grid := square(rows - own)):
            return {"prefix_positions": own == token}, {"grid": (grid, "a square")}
    raise BadInput(
        f"{origin}: pos_embedding has {rows} rows, with or without one for the class token no"
        f" {'x'.join(map(str, asked)) or 'square'} grid"
        "\nif the pictures are not square, give the field grid=(rows, columns)"
    )


def _read_bit(state: Tensors, given: Mapping[str, Any], origin: str) -> tuple[Facts, Guesses]:
    tf = any(name.startswith("resnet/") for name in state)
    start, conv = ("resnet/", "/standardized_conv2d/kernel") if tf else ("", "/kernel")
    found = {tuple(name.removeprefix(start).split("/")[:2]) for name in state}
    units = [place for place in found if len(place) == 2 and place[1].startswith("unit")]
    count = len({block for block, _ in units})
    stages = tuple(sum(block == f"block{s + 1}" for block, _ in units) for s in range(count))
    root = "root_block" if tf else "root_block/conv_root"
    width = shape_of(state, f"{start}{root}{conv}", 4, origin)[3]
    last = "c" if tf else "conv3"
    outer = tuple(
        shape_of(state, f"{start}block{s + 1}/unit01/{last}{conv}", 4, origin)[3]
        for s in range(count)
    )
    doubled = tuple(4 * width * 2**s for s in range(count))
    told = {"stages": stages, "width": width, "widths": None if outer == doubled else outer}
    told |= {"bottleneck": True, "norm": "group", "pool": "zero" if tf else "lowest"}
    return told, {"eps": (1e-5, "BiT's GroupNorm"), "stem": ("imagenet", "BiT's")}
