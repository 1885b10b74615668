"""Where a run starts from: named weights, a Hugging Face folder, or a finished run."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tljax.checkpoint import digest_of, read_tree
from tljax.edits.lora import merge
from tljax.types import BadInput, Tree
from tljax.weights import Source, open_weights

RECORD, RESULT = "run.json", "result.json"


def read_record(workdir: str | Path) -> dict[str, Any]:
    """Read what a run wrote about itself.

    Raises: BadInput if the folder is no run or its record is damaged.
    """
    path = Path(workdir) / RECORD
    if not path.is_file():
        raise BadInput(f"{workdir} is not a run folder: it has no {RECORD}")
    try:
        record = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from None
    if absent := [key for key in ("config", "model", "digest") if key not in record]:
        raise BadInput(f"{path} is not the record of a run: it has no {absent[0]!r}")
    return dict(record)


def plain(tree: Tree) -> Tree:
    """Reduce a trained tree to a model's own variables, for another run to start from.

    Averages take the place of parameters, LoRA is folded into its kernels, and fixed statistics
    are statistics again: `{params, ema, fixed_stats}  ->  {params, batch_stats}`.
    """
    # In float32, whatever the run computed in: a fold into bfloat16 rounds small updates away.
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree.get("ema", tree)["params"])
    found = {"params": jax.device_get(merge(params))}
    for name in ("batch_stats", "fixed_stats"):
        found |= {"batch_stats": tree[name]} if tree.get(name) else {}
    return found


def as_fields(stored: dict[str, Any]) -> dict[str, Any]:
    """Return model fields as JSON kept them: its lists were tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}


def open_run(workdir: str | Path) -> Source:
    """Open a finished run as a source of weights, with its preprocessing and labels."""
    record = read_record(workdir)
    facts = record["model"]
    if not (Path(workdir) / RESULT).is_file():
        raise BadInput(f"the run in {workdir} is not finished: go on with it first")
    tokenizer = Path(workdir) / facts["tokenizer"] if facts["tokenizer"] else None
    tree = plain(read_tree(workdir))
    return Source(
        arch=facts["name"],
        fields=as_fields(facts["fields"]),
        tree=tree,
        preprocess=facts["preprocess"],
        tokenizer=tokenizer,
        labels=tuple(facts["labels"]) if facts["labels"] else None,
        origin=str(workdir),
        digest=digest_of(tree),
        ignored={},
    )


def open_source(name: str) -> Source:
    """Open weights by name or path; a folder with a run record is a finished run."""
    return open_run(name) if (Path(name) / RECORD).is_file() else open_weights(name)
