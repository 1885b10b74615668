"""What is done with a finished run: evaluate it again, or let it predict."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from tljax import objectives, sharding
from tljax.build import precision
from tljax.checkpoint import read_tree
from tljax.config import Config, parse
from tljax.data.pipeline import Pipeline, open_inputs, open_pipeline, unlabelled
from tljax.data.sources import PICTURES
from tljax.data.tables import TABLES, read_table
from tljax.evaluate import evaluate
from tljax.models import MODELS
from tljax.source import is_run, plain, read_record, require_same_body
from tljax.storage import Name, Place, place, write_text
from tljax.tree import join
from tljax.types import BadInput, Batch, Tree

PER_TOKEN = ("mlm", "tag")
"""Tasks whose head reads every token."""


@dataclass(frozen=True)
class Finished:
    """A run as its folder tells it: everything a prediction needs; `reads` opens its inputs."""

    config: Config
    tree: Tree
    facts: dict[str, Any]
    reads: dict[str, Any]
    predict: Callable[[Tree, Batch], dict[str, jax.Array]]
    mesh: Any


def open_finished(workdir: Name) -> Finished:
    """Read a run's folder."""
    record = read_record(workdir)
    facts, config = record["model"], parse(record["config"])
    try:
        mesh, rules = sharding.make_mesh(**config.mesh.model_dump()), config.specs
    except BadInput:  # other devices than the run's: data parallel
        mesh, rules = sharding.make_mesh(), ()
    reads = {
        "preprocess": facts["preprocess"],
        "tokenizer": facts["tokenizer"],
        "batch": -(-config.run.batch // sharding.ways(mesh)) * sharding.ways(mesh),
        "threads": config.run.threads,
    }
    tree = read_tree(workdir)
    # Placed as in training, so that sums have the same order and metrics the same last digit.
    tree = jax.device_put(tree, sharding.on(mesh, sharding.specs(tree, mesh, rules)))
    return Finished(config, tree, facts, reads, make_predict(facts, config, mesh), mesh)


def make_predict(facts: dict[str, Any], config: Config, mesh: Any) -> Any:
    """Return the jitted prediction of the model that a record describes."""
    model = MODELS[facts["name"]](**facts["fields"], dtype=jnp.dtype(config.precision.compute))
    predict = sharding.under(mesh, objectives.make_predict(facts["task"], model))
    return jax.jit(predict, out_shardings=sharding.on(mesh, sharding.REPLICATED))


def with_head_of(run: Finished, older: Place) -> Finished:
    """Let a run predict for the task of the run that it started from, by that one's head.

    The head is as it was, or as `lwf` kept it; if the labels are the same, it is the run's own.
    Raises: BadInput if the run did not start from the other, or has a body of another kind.
    """
    facts = read_record(older)["model"]
    if facts["labels"] == run.facts["labels"]:
        return run
    weights = run.config.weights
    if weights is None or os.path.realpath(place(weights)) != os.path.realpath(older):
        raise BadInput(
            f"{older} has other labels, and the run started from {weights}: a run can only be read "
            "by the head of the one that it started from"
        )
    tasks = facts["task"], run.facts["task"]
    if len({task if task in PER_TOKEN else "pooled" for task in tasks}) > 1:
        raise BadInput(
            f"{older} is of task {tasks[0]}, the run of {tasks[1]}: a head of single tokens and "
            "one of what is pooled cannot read for each other"
        )
    require_same_body(facts["name"], run.facts["fields"], facts["fields"], str(older))
    tree = {k: v for k, v in join(run.tree.get("ema"), run.tree).items() if k != "ema"}
    head = tree["old"]["head"] if "old" in tree else plain(read_tree(older))["params"]["head"]
    tree["params"] = dict(tree["params"]) | {"head": head}
    own = {name: facts[name] for name in ("task", "labels")}
    outputs = head["kernel"].shape[-1]
    own["fields"] = run.facts["fields"] | {"num_classes": outputs}
    changed = run.facts | own
    predict = make_predict(changed, run.config, run.mesh)
    return replace(run, tree=tree, facts=changed, predict=predict)


def require_same_kind(pipeline: Pipeline, facts: dict[str, Any], workdir: str, name: str) -> None:
    """Raise BadInput unless data have the run's kind of inputs and its labels."""
    if (pipeline.tokenizer is None) == (facts["tokenizer"] is not None):
        kinds = ("pictures", "texts") if facts["tokenizer"] is None else ("texts", "pictures")
        raise BadInput(f"the run in {workdir} reads {kinds[0]}; {name} has {kinds[1]}")
    theirs, ours = pipeline.labels or (), facts["labels"] or ()
    if theirs != ours:
        raise BadInput(
            f"{name} has the labels {', '.join(theirs[:8])}\n"
            f"the run in {workdir} knows {', '.join(ours[:8])}\n"
            "evaluate on data with the same labels, or train on these with weights=RUN"
        )


def evaluate_run(workdir: Name, split: str, data: str | None = None) -> dict[str, float]:
    """Evaluate a finished run on its own data, or on other data with the same labels.

    data: a name or path as in a config, or the folder of a run, whose data are then read; if this
    run started from that one, their labels may be others (`with_head_of`).
    Raises: BadInput if the labels of the other data are not the run's.
    """
    return evaluate_on(open_finished(workdir), str(workdir), split, data)


def evaluate_on(run: Finished, name: str, split: str, data: str | None) -> dict[str, float]:
    """Evaluate as `evaluate_run` does; `name` is what messages call the run."""
    chosen = None
    if data and is_run(data):
        run, own = with_head_of(run, place(data)), run.config.data
        chosen = parse(read_record(data)["config"]).data
        chosen = chosen.model_copy(update={"image_size": own.image_size, "length": own.length})
    if chosen is None:
        other = {"name": data, "labels": None, "validation": 0.1, "test": "test"}
        other |= {"classes": None, "replay": None}
        chosen = run.config.data.model_copy(update=other if data else {})
    pipeline = open_pipeline(chosen, run.facts["task"], seed=run.config.seed, **run.reads)
    require_same_kind(pipeline, run.facts, name, chosen.name)
    with precision(run.config):
        batches = (sharding.put_batch(batch, run.mesh) for batch in pipeline.eval_batches(split))
        return evaluate(run.predict, (run.tree,), batches, run.facts["task"], run.facts["labels"])


def read_texts(path: Path, columns: dict[str, str]) -> list[dict]:
    """Read the text column of a table, or the lines of any other file."""
    if path.is_dir():
        raise BadInput(f"{path} is a folder: name text files, or tables ({', '.join(TABLES)})")
    if path.suffix in TABLES:
        texts = {name: column for name, column in columns.items() if name != "label"}
        return read_table(path, texts)[0]
    try:
        lines = path.read_text(encoding="utf8").splitlines()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not text in UTF-8: {error}") from None
    return [{"text": line} for line in lines if line.strip()]


def find_inputs(paths: Sequence[Path], images: bool, columns: dict[str, str]) -> list[dict]:
    """List pictures (files, folders searched through) or texts (lines, or a text column).

    Raises: BadInput for a path that is missing or holds nothing to predict.
    """
    rows: list[dict] = []
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path} does not exist")
        if images:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            rows += [{"image": file} for file in files if file.suffix.lower() in PICTURES]
        else:
            rows += read_texts(path, columns)
    if not rows:
        kind = f"pictures ({', '.join(PICTURES)})" if images else "texts"
        raise BadInput(f"no {kind} in {', '.join(map(str, paths))}")
    return rows


def predictions(run: Finished, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what the run says of each input: labels with probabilities, or a number."""
    names, task = run.facts["labels"], run.facts["task"]
    for batch in unlabelled(open_inputs(run.config.data, task, **run.reads), rows):
        output = run.predict(run.tree, sharding.put_batch(batch, run.mesh))
        for number, logits in enumerate(np.asarray(output["logits"])[batch["valid"]]):
            if task == "regress":
                yield {"value": float(logits[0])}
            elif task == "tag":
                begins = batch["label"][number] >= 0  # one label a word, as far as the text is read
                yield {"labels": [names[i] for i in logits.argmax(-1)[begins]]}
            else:
                several = task == "multilabel"
                odds = (special.expit if several else special.softmax)(logits.astype(np.float64))
                chosen = [name for name, p in zip(names, odds, strict=True) if p > 0.5]
                label = {"labels": chosen} if several else {"label": names[int(odds.argmax())]}
                yield label | {"probabilities": dict(zip(names, odds.tolist(), strict=True))}


def predict_run(workdir: Name, paths: Sequence[Path], out: Name) -> int:
    """Write one JSON line per input to `out`; returns how many.

    Raises: BadInput if the run was pretrained without labels.
    """
    run = open_finished(workdir)
    if run.facts["task"] == "mlm":
        raise BadInput(f"the run in {workdir} predicts masked tokens; adapt it to labels first")
    rows = find_inputs(paths, run.facts["tokenizer"] is None, run.config.data.columns)
    lines = []
    with precision(run.config):
        for row, found in zip(rows, predictions(run, rows), strict=True):
            given = {name: str(value) for name, value in row.items()}
            lines.append(json.dumps(given | found, ensure_ascii=False) + "\n")
    write_text(out, "".join(lines))  # at the end and whole: an error leaves an older file alone
    return len(rows)
