"""The loop: restore, step, log, evaluate, save; and what a run writes about itself."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tljax import features
from tljax.build import Experiment
from tljax.checkpoint import Checkpoints, digest_of, write_json, write_text
from tljax.data.loader import prefetch_to_device
from tljax.data.sources import identity
from tljax.evaluate import evaluate
from tljax.layers import last_block
from tljax.metrics import Logger, accumulate, averages, parameter_table, role_counts
from tljax.objectives import passing
from tljax.plan import compile_step, cost_of, describe
from tljax.sharding import under
from tljax.source import RECORD, RESULT, read_record
from tljax.state import State
from tljax.tree import flatten, join, unflatten
from tljax.types import BadInput, Batch, Tree

PACKAGES = ("tljax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
METRICS, TABLES = "metrics.jsonl", "tables.txt"
FREE = ("run/threads", "run/keep", "run/log_every")  # a run may go on with others: no bit changes


def tables(experiment: Experiment) -> str:
    """Describe the tree: what was loaded, and every leaf with its role and place."""
    loaded = f"{experiment.report.table()}\n\n" if experiment.report else ""
    roles = experiment.roles
    return loaded + parameter_table(experiment.tree, roles.tree, experiment.specs, roles.unread)


def summary(experiment: Experiment) -> str:
    """Describe the tree in a few lines: what was loaded, and how much has each role."""
    loaded = f"weights: {experiment.report.totals()}\n" if experiment.report else ""
    role_of = flatten(experiment.roles.tree)
    frozen = [p for p, role in role_of.items() if role == "freeze"]
    if not loaded and len(frozen) > len(experiment.roles.unread):
        loaded = "no weights are loaded: what is frozen stays at random initialisation\n"
    return loaded + role_counts(experiment.tree, experiment.roles.tree, experiment.roles.unread)


def begin(experiment: Experiment, checkpoints: Checkpoints) -> tuple[State, Tree]:
    """Go on from the run's own newest checkpoint, else be born (from weights or at random).

    The frozen tree is rebuilt from its sources and must have the digest the run was saved with.
    """
    state, frozen = experiment.birth(jax.random.key(experiment.config.seed))
    checkpoints.save_frozen(frozen)
    if checkpoints.latest() is None:
        return state, frozen
    return checkpoints.restore(experiment.abstract[0]), frozen


def activations(
    experiments: Sequence[Experiment],
) -> Callable[[Sequence[Tree], Batch], features.Columns]:
    """Return what computes the columns of a table that serves experiments, from their trees.

    They differ at most in the block they read: the deepest model runs, and of the others what
    lies above the blocks alone, on what it passed.  Number i's column is `i/cut/..`.
    """
    lasts = [last_block(e.model.read, len(e.tree["params"]["blocks"])) for e in experiments]
    deepest = int(np.argmax(lasts))
    kept = dict.fromkeys(name for each in experiments for name in each.cut.batch if name != "cut")
    names = [[f"cut/{name}" for name in each.cut.names] for each in experiments]

    def values(trees: Sequence[Tree], batch: Batch) -> features.Columns:
        passed = passing(experiments[deepest].model, trees[deepest], batch)
        columns = {name: batch[name] for name in kept}
        for number, (each, last) in enumerate(zip(experiments, lasts, strict=True)):
            shared = unflatten(in_common(passed, last, lasts[deepest]))
            above = dict(batch) | ({"cut": shared} if shared else {})
            found = flatten({"cut": unflatten(passing(each.model, trees[number], above))})
            columns |= {f"{number}/{name}": found[name] for name in names[number]}
        return columns

    return under(experiments[0].mesh, values)


def in_common(passed: Mapping[str, jax.Array], last: int, deepest: int) -> dict[str, jax.Array]:
    """Choose, of what a model passed, what one that ends with block `last` passes as well."""
    end = "end" if last == deepest else f"before_{last + 1}"
    theirs = {f"before_{i}": f"before_{i}" for i in range(1, last + 1)} | {"end": end}
    places = {f"blocks/{own}": f"blocks/{other}" for own, other in theirs.items()}
    return {own: passed[other] for own, other in places.items() if other in passed}


def from_features(experiments: Sequence[Experiment], trees: Sequence[Tree]) -> list[Experiment]:
    """Compute what passes the cuts of experiments, in one pass, and let each read its own.

    Raises: BadInput if they are too large together.
    """
    first = experiments[0]
    rows, mesh = features.padded(first.data), first.mesh
    sizes = [features.size_of(each.cut.batch, rows) for each in experiments]
    if why := features.too_large(sum(sizes), mesh):
        raise BadInput(f"the features of {len(sizes)} depths are too large, as {why}")
    jitted = jax.jit(activations(experiments), out_shardings=first.shardings.batch)
    described = lambda: [made_of(*one) for one in zip(experiments, trees, strict=True)]  # noqa: E731
    table = features.compute(partial(jitted, trees), first.data, first.put, described, mesh)
    ready = []
    for number, each in enumerate(experiments):
        mine = flatten(each.cut.batch)
        renamed = [
            {name.removeprefix(f"{number}/"): column for name, column in columns.items()}
            for columns in table
        ]
        own = [{name: x for name, x in columns.items() if name in mine} for columns in renamed]
        data, put = features.serve(features.Table(*own), each.data, mesh)
        ready.append(replace(each, data=data, put=put))
    return ready


def made_of(experiment: Experiment, tree: Tree) -> dict[str, Any]:
    """Describe everything that features depend on: equal descriptions, equal features."""
    leaves = {path: leaf for path, leaf in flatten(tree).items() if path in experiment.cut.below}
    tokenizer, config = experiment.data.tokenizer, experiment.config
    return {
        "leaves": digest_of(multihost_utils.process_allgather(leaves, tiled=True)),
        "model": [experiment.facts[name] for name in ("name", "fields", "task", "preprocess")],
        "cut": experiment.cut.names,
        "data": identity(config.data),
        "tokenizer": tokenizer.inner.to_str() if tokenizer else None,
        "seed": config.seed if config.data.augment.views else None,
        "precision": config.precision.model_dump(),
        "device": jax.devices()[0].device_kind,
        "versions": {package: version(package) for package in PACKAGES},
    }


def advance(
    experiment: Experiment, compiled: Callable[..., Any], born: tuple[State, Tree], start: int = 0
) -> Iterator[tuple[int, State, dict[str, jax.Array]]]:
    """Yield (step, state, metrics) after every step; nothing waits for the device.

    The state is donated to the following step: keep what you need of it before asking for more.
    """
    state, frozen = born
    host = experiment.data.train_batches(start)
    batches = prefetch_to_device(host, experiment.put)
    for step in range(start + 1, experiment.config.run.steps + 1):
        state, metrics = compiled(state, frozen, next(batches))
        yield step, state, metrics


def score(experiment: Experiment, tree: Tree, split: str) -> dict[str, float]:
    """Evaluate a whole tree on the validation or test split, exactly."""
    put = map(experiment.put, experiment.data.eval_batches(split))
    names = experiment.data.labels
    return evaluate(experiment.predict, (tree,), put, experiment.data.task, names)


class Intervals:
    """Averages over intervals of steps; nothing waits for the device before it must."""

    def __init__(self, logger: Logger, every: int, total: int):
        """Log every so many steps, and at the last one."""
        self.logger, self.every, self.total = logger, every, total
        self.running: Any = None
        self.due: tuple[int, Any] | None = None

    def add(self, step: int, metrics: dict[str, jax.Array], saved: bool) -> None:
        """Take one step's metrics, and log the interval that ended before it.

        An interval ends at a save too: averages do not depend on where a run was interrupted.
        """
        self.flush()
        self.running = accumulate(self.running, metrics)
        self.logger.advance(step)
        if step % self.every == 0 or step == self.total or saved:
            self.due, self.running = (step, self.running), None

    def flush(self) -> None:
        """Log the interval that is due."""
        if self.due:
            self.logger.write(self.due[0], averages(self.due[1]))
            self.due = None


def train(experiment: Experiment, workdir: Path, command: str = "") -> dict[str, Any]:
    """Run an experiment in a folder, from its last checkpoint if there is one.

    Returns the result that is also written to result.json: validation and test metrics.
    Raises: BadInput if the folder holds a run of another config.
    """
    run = experiment.config.run
    claim(experiment, workdir, command)
    if (workdir / RESULT).exists():
        print(f"{workdir} is finished")
        return dict(json.loads((workdir / RESULT).read_text()))
    write_text(workdir / TABLES, tables(experiment) + "\n")
    print(f"{summary(experiment)}\nevery leaf: {workdir / TABLES}")
    began = time.perf_counter()
    with ExitStack() as stack:
        checkpoints = stack.enter_context(closing(Checkpoints(workdir / "checkpoints", run.keep)))
        born, frozen = begin(experiment, checkpoints)
        if experiment.cut:
            print(f"features {experiment.features}", flush=True)
            [experiment] = from_features([experiment], [join(born.params, born.track, frozen)])
        compiled = compile_step(experiment)
        print(describe(experiment, cost_of(compiled, run.microbatches)), flush=True)
        start, state = int(born.step), born
        logger = stack.enter_context(closing(Logger(workdir, run.steps, resumed=start or None)))
        intervals = Intervals(logger, run.log_every, run.steps)
        for step, state, metrics in advance(experiment, compiled, (born, frozen), start):
            evaluates = run.eval_every and step % run.eval_every == 0
            saves = run.save_every and step % run.save_every == 0
            intervals.add(step, metrics, saved=bool(saves))
            if step == run.steps or evaluates or saves:
                intervals.flush()  # before the save: what a later kill would lose is logged again
            if evaluates and step < run.steps:
                scores = score(experiment, join(state.params, state.track, frozen), "validation")
                logger.write(step, prefixed("validation", scores))
            if saves and step < run.steps:
                checkpoints.save(step, state)
        checkpoints.save(run.steps, state)
        result = finish(experiment, join(state.params, state.track, frozen), logger)
    write_json(workdir / RESULT, result | {"seconds": time.perf_counter() - began})
    return result


def finish(experiment: Experiment, tree: Tree, logger: Logger) -> dict[str, dict[str, float]]:
    """Evaluate the end of a run on validation and, once, on test."""
    result = {split: score(experiment, tree, split) for split in ("validation", "test")}
    for split, scores in result.items():
        logger.write(experiment.config.run.steps, prefixed(split, scores))
    return result


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """Put a split's name before the names of its metrics."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


def git_state() -> str:
    """Return the commit of the working directory, "+" if it has changes, "" outside git."""
    if shutil.which("git") is None:
        return ""
    commands = ["git rev-parse HEAD", "git status --porcelain"]
    runs = [subprocess.run(c.split(), capture_output=True, text=True) for c in commands]
    return runs[0].stdout.strip() + ("+" if runs[1].stdout else "")


def claim(experiment: Experiment, workdir: Path, command: str) -> None:
    """Write the run's record, or check that the folder's record is of the same run.

    Raises: BadInput naming the keys that differ; nothing in the folder is changed then.
    """
    config = experiment.config.model_dump(mode="json")
    if (workdir / RECORD).exists():
        before = read_record(workdir)
        old, new = flatten(before["config"]), flatten(config)
        differs = sorted(
            k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and k not in FREE
        )
        differs += ["weights (content)"] if before["digest"] != experiment.digest else []
        if differs:
            shown = ", ".join(f"{k} ({old.get(k)} -> {new.get(k)})" for k in differs[:4])
            raise BadInput(
                f"{workdir} holds a run of another config; it differs in {shown}\n"
                "give another --workdir, or the same config to go on"
            )
        return
    if found := [name for name in (METRICS, "checkpoints") if (workdir / name).exists()]:
        raise BadInput(f"{workdir} has {found[0]} but no {RECORD}; give another --workdir")
    if workdir.exists() and not workdir.is_dir():
        raise BadInput(f"{workdir} is a file; --workdir names a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    record = {
        "config": config,
        "model": experiment.facts | {"tokenizer": experiment.data.save_tokenizer(workdir)},
        "digest": experiment.digest,
        "versions": {package: version(package) for package in PACKAGES},
        "git": git_state(),
        "command": command,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }
    write_json(workdir / RECORD, record)
