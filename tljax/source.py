"""Where a run starts from: named weights, a Hugging Face folder, or a finished run."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checkpoint import digest_of, read_tree
from tljax.edits.lora import merge
from tljax.tree import flatten, join, map_with_path
from tljax.types import BadInput, Tree
from tljax.weights import Source, open_weights

RECORD, RESULT = "run.json", "result.json"


def read_record(workdir: str | Path) -> dict[str, Any]:
    """Read what a run wrote about itself, with tuples and paths as they were.

    Raises: BadInput if the folder is no run or its record is damaged.
    """
    path = Path(workdir) / RECORD
    if not path.is_file():
        raise BadInput(f"{workdir} is not a run folder: it has no {RECORD}")
    try:
        record = json.loads(path.read_text(encoding="utf8"))
        facts = {key: record[key] for key in ("model", "config", "digest")}["model"]
        sections = facts, facts["fields"], facts["preprocess"]
        found = {key: facts[key] for key in ("name", "task", "labels", "tokenizer")}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not the record of a run: {error!r}") from None
    for section in sections:
        section.update({k: tuple(v) for k, v in section.items() if isinstance(v, list)})
    facts["tokenizer"] = path.with_name(found["tokenizer"]) if found["tokenizer"] else None
    return dict(record)


def plain(tree: Tree) -> Tree:
    """Reduce a trained tree to a model's own variables, and what is grafted onto them, in float32.

    Averages take the place of parameters, and fixed statistics are statistics again:
    `{params, ema, fixed_stats}  ->  {params, batch_stats}`.
    """
    params = map_with_path(
        lambda _, x: np.asarray(x, np.float32), join(tree.get("ema"), tree)["params"]
    )
    statistics = tree.get("fixed_stats") or tree.get("batch_stats")
    return {"params": params} | ({"batch_stats": statistics} if statistics else {})


def open_run(workdir: str | Path) -> Source:
    """Open a finished run as a source of weights, with its preprocessing and labels."""
    record = read_record(workdir)
    facts, result = record["model"], Path(workdir) / RESULT
    if not result.is_file():
        raise BadInput(f"the run in {workdir} is not finished: go on with it first")
    tree = plain(read_tree(workdir))
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
        config=record | {"result": json.loads(result.read_text(encoding="utf8"))},
        origin=str(workdir),
    )


def open_source(name: str, tower: str | None = None) -> Source:
    """Open weights by name or path; a folder with a run record is a finished run.

    What is grafted onto the weights, such as LoRA, stays beside them.
    """
    return open_run(name) if (Path(name) / RECORD).is_file() else open_weights(name, tower)


def merged(source: Source) -> Source:
    """Fold what is grafted onto a source into its kernels, for a run to start from.

    In float32, whatever a run computed in: a fold into bfloat16 rounds small updates away.
    """
    if not any("/lora/" in path for path in flatten(source.tree)):
        return source
    read = map_with_path(lambda _, leaf: jnp.asarray(np.asarray(leaf), jnp.float32), source.tree)
    tree = jax.device_get(read | {"params": merge(read["params"])})
    return replace(source, tree=tree, digest=partial(digest_of, tree))
