"""Where a run starts from: named weights, a Hugging Face folder, or a finished run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import storage
from tljax.checkpoint import digest_of, read_tree
from tljax.edits.fold import is_grafted, merge
from tljax.layers import choose
from tljax.models import MODELS
from tljax.storage import Name, place
from tljax.tree import join, map_with_path
from tljax.types import BadInput, Tree
from tljax.weights import Source, open_weights
from tljax.weights.files import read_json
from tljax.weights.hf import complete
from tljax.weights.peft import base_of, class_of, graft_adapter, read_adapter

RECORD, RESULT, ADAPTER = "run.json", "result.json", "adapter_model.safetensors"
ABOVE = {"num_classes", "mlm", "dropout", "drop_path", "dtype", "remat"}
"""Fields that change nothing of what a head reads."""


def read_record(workdir: Name) -> dict[str, Any]:
    """Read what a run wrote about itself, with tuples and paths as they were.

    Raises: BadInput if the folder is no run or its record is damaged.
    """
    path = place(workdir) / RECORD
    if not path.is_file():
        raise BadInput(f"{workdir} is not a run folder: it has no {RECORD}")
    try:
        record = json.loads(path.read_text(encoding="utf8"))
        facts = {key: record[key] for key in ("model", "config", "digest")}["model"]
        sections = facts, facts["fields"], facts["preprocess"]
        found = {key: facts[key] for key in ("name", "task", "labels", "tokenizer")}
        for name, kinds, given in (
            ("name", str, found["name"]),
            ("fields", dict, facts["fields"]),
            ("preprocess", dict, facts["preprocess"]),
            ("labels", list | None, found["labels"]),
            ("tokenizer", str | None, found["tokenizer"]),
        ):
            if not isinstance(given, kinds):
                raise TypeError(f"{name}={given!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not the record of a run: {error!r}") from None
    for section in sections:
        section.update({k: tuple(v) for k, v in section.items() if isinstance(v, list)})
    if found["tokenizer"]:  # and beside it what names its tokens
        local = storage.fetched(path.parent, found["tokenizer"], "tokenizer_config.json")
        facts["tokenizer"] = local / found["tokenizer"]
    return dict(record)


def is_run(name: str) -> bool:
    """Tell a run's folder from other names of weights or data."""
    return (Path(name) / RECORD).is_file() or (
        name.startswith(storage.STORE) and storage.there(place(name) / RECORD)
    )


def require_same_body(
    arch: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], origin: str
) -> None:
    """Raise BadInput unless two models of an architecture differ in head and dropout alone."""
    model = MODELS[arch]
    for field in sorted((ours.keys() | theirs.keys()) - ABOVE):
        own, other = (each.get(field, getattr(model, field, None)) for each in (ours, theirs))
        if own != other:
            raise BadInput(
                f"the head of {origin} reads a model with {field}={other!r}, this one has "
                f"{field}={own!r}: its head does not fit such features; set model.{field} as there"
            )


def plain(tree: Tree) -> Tree:
    """Reduce a trained tree to a model's own variables, and what is grafted onto them, in float32.

    Averages take the place of parameters, and fixed statistics are statistics again:
    `{params, ema, fixed_stats}  ->  {params, batch_stats}`.
    """
    exact = lambda _, x: x if x.dtype.kind in "iu" else np.asarray(x, np.float32)  # noqa: E731
    params = map_with_path(exact, join(tree.get("ema"), tree)["params"])
    statistics = tree.get("fixed_stats") or tree.get("batch_stats")
    return {"params": params} | ({"batch_stats": statistics} if statistics else {})


def open_run(workdir: Name) -> Source:
    """Open a finished run as a source of weights, with its preprocessing and labels."""
    record = read_record(workdir)
    facts, result = record["model"], storage.fetched(place(workdir), RESULT) / RESULT
    if not result.is_file():
        raise BadInput(f"the run in {workdir} is not finished: go on with it first")
    if not isinstance((scores := read_json(result)).get("test"), dict):
        raise BadInput(f"{RESULT} of {workdir} is damaged: it has no test metrics")
    tree = plain(read_tree(workdir))
    choose(MODELS, facts["name"], f"{workdir}: model.name")
    return Source(
        arch=facts["name"],
        fields=facts["fields"],
        tree=tree,
        preprocess=facts["preprocess"],
        tokenizer=facts["tokenizer"],
        labels=facts["labels"],
        digest=partial(digest_of, tree),
        ignored={},
        format="run",
        kind="",
        config=record | {"result": scores},
        origin=str(workdir),
    )


def open_source(
    name: str, tower: str | None = None, given: Mapping[str, Any] | None = None
) -> Source:
    """Open weights by name or path; a folder with a run record is a finished run.

    What is grafted onto the weights, such as LoRA, stays beside them.  given: fields of the model
    that a caller decides, and nothing need be assumed about.
    """
    if is_run(name):
        return open_run(name)
    if (Path(name) / "adapter_config.json").is_file() or Path(name).name == ADAPTER:
        return open_adapter(Path(name).parent if Path(name).is_file() else Path(name), tower)
    return open_weights(name, tower, given)


def open_adapter(folder: Path, tower: str | None) -> Source:
    """Open a PEFT adapter with the base model that it names: a name, or a path, also from it.

    Raises: BadInput if the base is not there, or is not what the adapter was trained on.
    """
    adapter = read_adapter(folder)
    if not (named := base_of(adapter)):
        raise BadInput(f"{adapter.origin} names no base model: set base_model_name_or_path")
    beside = folder / named
    if (beside / "adapter_config.json").is_file():
        raise BadInput(f"{adapter.origin}: its base {named!r} is an adapter, expected a model")
    try:
        base = open_source(str(beside) if beside.exists() else named, tower)
    except BadInput as error:
        raise BadInput(f"{adapter.origin} asks for its base {named!r}: {error}") from None
    if base.format not in ("hf", "onnx"):
        raise BadInput(f"the base of {folder} is {named}, of format {base.format}: expected hf")
    tree = graft_adapter(base.tree, adapter, base.kind, base.fields)
    config = dict(base.config) | {"architectures": class_of(adapter), "base": named}
    joint = lambda: hashlib.sha256((base.digest() + adapter.digest()).encode()).hexdigest()  # noqa: E731
    return replace(
        base,
        fields=complete(base.fields, tree["params"], config),
        tree=tree,
        digest=joint,
        config=config,
        origin=adapter.origin,
        format="peft",
    )


def merged(source: Source) -> Source:
    """Fold what is grafted onto a source into its kernels, for a run to start from.

    In float32, whatever a run computed in: a fold into bfloat16 rounds small updates away.
    """
    if not is_grafted(source.tree):
        return source
    print(f"{source.origin}: what is grafted is folded into its kernels, in float32")
    tree = jax.device_get(merge(jax.tree.map(jnp.asarray, source.tree)))
    return replace(source, tree=tree, digest=partial(digest_of, tree))
