"""The loop: restore, step, log, evaluate, save; and what a run writes about itself."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    nullcontext,
    suppress,
)
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tljax import features
from tljax.build import Experiment
from tljax.checkpoint import Checkpoints, digest_of, refusing
from tljax.config import parse
from tljax.data.loader import prefetch_to_device
from tljax.data.sources import identity
from tljax.evaluate import evaluate
from tljax.intervals import Intervals, NotFinite, Spiked
from tljax.layers import last_block
from tljax.lock import locked
from tljax.meeting import agreeing, as_first, meet
from tljax.metrics import METRICS, Logger, parameter_table, role_counts, worth
from tljax.objectives import passing
from tljax.plan import compile_step, cost_of, describe, require_room
from tljax.preemption import Preempted, Signals
from tljax.sharding import under
from tljax.source import RECORD, RESULT, read_record
from tljax.state import State
from tljax.storage import (
    Name,
    Place,
    in_store,
    make_folder,
    run_folder,
    there,
    write_json,
    write_text,
)
from tljax.tree import flatten, join, unflatten
from tljax.types import BadInput, Batch, RunFailed, Tree

PACKAGES = ("tljax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
TABLES, SKIPPED = "tables.txt", "skipped.json"
REWINDS = 5  # returns of a run, before a sudden rise of its loss, at most
FREE = ("run/threads", "run/max_skipped", "run/keep", "run/keep_best", "run/log_every")
"""A run may go on with others: no bit changes; with `run.spike` those after the second decide."""
MESH = ("mesh/data", "mesh/fsdp", "mesh/tensor")
"""With these too, but sums in another order change the last bits."""


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
    """Go on from the run's own newest whole checkpoint, else be born (from weights or at random).

    The frozen tree is rebuilt from its sources and must have the digest the run was saved with.
    """
    state, frozen = experiment.birth(jax.random.key(experiment.config.seed))
    checkpoints.save_frozen(frozen)
    if checkpoints.latest() is None:
        checkpoints.require_new()
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
    experiment: Experiment,
    compiled: Callable[..., Any],
    born: tuple[State, Tree],
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[tuple[int, State, dict[str, jax.Array]]]:
    """Yield (step, state, metrics) after every step; nothing waits for the device.

    The state is donated to the following step: keep what you need of it before asking for more.
    interruptible: what to wait for data in.
    """
    state, frozen = born
    start, offset = (int(np.max(jax.device_get(x))) for x in (state.step, state.data_offset))
    host = experiment.data.train_batches(start + offset)
    batches = prefetch_to_device(host, experiment.put)
    for step in range(start + 1, experiment.config.run.steps + 1):
        with interruptible():
            batch = next(batches)
        state, metrics = compiled(state, frozen, batch)
        yield step, state, metrics


def score(experiment: Experiment, tree: Tree, split: str) -> dict[str, float]:
    """Evaluate a whole tree on the validation or test split, exactly."""
    put = map(experiment.put, experiment.data.eval_batches(split))
    names = experiment.data.labels
    return evaluate(experiment.predict, (tree,), put, experiment.data.task, names)


def train(
    experiment: Experiment,
    workdir: Name,
    command: str = "",
    signals: Signals | None = None,
) -> dict[str, Any]:
    """Run an experiment in a folder, from its last whole checkpoint if there is one.

    Returns the result that is also written to result.json: validation and test metrics.
    Raises: BadInput if the folder holds a run of another config, or is in use; RunFailed if the run
    cannot go on; Preempted, after a save, if a signal came.
    """
    run, signals, folder = experiment.config.run, signals or Signals(), run_folder(workdir)
    began = time.perf_counter()
    with ExitStack() as stack:
        if jax.process_count() > 1:
            signals.share(stack.enter_context(closing(meet())))
        require_room(experiment)
        finished, odd = False, (ValueError,) if in_store(folder) else ()  # gcsfs: no such name
        with agreeing(BadInput, RunFailed), refusing(f"{folder} cannot be used", *odd):
            if jax.process_index() == 0:
                if not there(folder / RESULT):
                    stack.enter_context(locked(folder))
                finished = there(folder / RESULT)
                claim(experiment, folder, command)
        if any(as_first([finished])):
            print(f"{folder} is finished")
            return dict(json.loads((folder / RESULT).read_text()))
        every_leaf = tables(experiment) + "\n"
        with agreeing(RunFailed), refusing(f"{folder} cannot be written"):
            write_text(folder / TABLES, every_leaf)
        print(f"{summary(experiment)}\nevery leaf: {folder / TABLES}")
        checkpoints = Checkpoints(folder / "checkpoints", run.keep, run.keep_best)
        stack.enter_context(closing(checkpoints))
        born, frozen = begin(experiment, checkpoints)
        signals.poll()
        if experiment.cut:
            print(f"features {experiment.features}", flush=True)
            with signals.interruptible():
                tree = join(born.params, born.track, frozen)
                [experiment] = from_features([experiment], [tree])
        compiled = compile_step(experiment)
        signals.poll()
        print(describe(experiment, cost_of(compiled, run.microbatches)), flush=True)
        for _ in range(REWINDS):
            try:
                begun = (born, frozen)
                result = go_on(experiment, compiled, begun, checkpoints, folder, signals)
                break
            except Spiked as spike:
                born = rewind(experiment, checkpoints, spike)
        else:
            raise RunFailed(f"the loss rose suddenly {REWINDS} times: lower optim.lr")
        checkpoints.wait()  # all is on the disk before the result says that the run is finished
        write_json(folder / RESULT, result | {"seconds": time.perf_counter() - began})
    return result


def go_on(
    experiment: Experiment,
    compiled: Callable[..., Any],
    begun: tuple[State, Tree],
    checkpoints: Checkpoints,
    workdir: Place,
    signals: Signals,
) -> dict[str, Any]:
    """Make the steps that are left, with their logs and saves; returns the end's metrics."""
    run, (state, frozen) = experiment.config.run, begun
    step, evaluated = int(state.step), True
    with agreeing(RunFailed), refusing(f"step {step} of {workdir} cannot be read"):
        notes = checkpoints.told(step).get("notes", {}) if step else {}

    def validate() -> float:
        with signals.interruptible():
            scores = score(experiment, join(state.params, state.track, frozen), "validation")
        logger.write(step, prefixed("validation", scores))
        name = next(iter(scores))
        return worth(name, scores[name])

    def flush() -> None:
        with agreeing(RunFailed), refusing(f"the log of {workdir} cannot be written"):
            logger.flush()

    again = not notes.get("evaluated", True)  # a signal came in the middle of it
    with agreeing(RunFailed), refusing(f"the log of {workdir} cannot be opened"):
        logger = Logger(workdir, run.steps, step or None, again)
    with closing(logger):
        intervals = Intervals(logger, run, notes)
        try:
            if again:
                evaluated = False
                validate()
                evaluated = True
            for step, state, metrics in advance(experiment, compiled, begun, signals.interruptible):
                intervals.add(step, metrics)
                evaluates, saves = (
                    bool(every) and step % every == 0 and step < run.steps
                    for every in (run.eval_every, run.save_every)
                )
                if evaluates or saves or step == run.steps:
                    intervals.flush()  # before the save: what a later kill would lose
                evaluated = not evaluates
                value = validate() if evaluates else None
                evaluated = True
                if saves:
                    flush()
                    checkpoints.save(step, state, value, intervals.notes())
                signals.poll()
            flush()
            checkpoints.save(run.steps, state, None, intervals.notes())
            with signals.interruptible():
                tree = join(state.params, state.track, frozen)
                result = finish(experiment, tree, logger)
            flush()
        except Preempted:
            with suppress(Spiked):  # which is seen again when the run goes on, as NotFinite is
                with suppress(NotFinite):
                    intervals.flush()
                try:
                    flush()
                except RunFailed as error:  # the state is worth more
                    print(f"tljax: {error}", file=sys.stderr)
                checkpoints.save(step, state, None, intervals.notes() | {"evaluated": evaluated})
            checkpoints.wait()
            raise
        except NotFinite as end:
            first = end.step - end.count + int(state.data_offset)
            raise give_up(experiment, workdir, end, first) from None
        if skipped := int(state.skipped):
            print(f"{skipped} steps were skipped: their loss or gradient was not finite")
    return result


def rewind(experiment: Experiment, checkpoints: Checkpoints, spike: Spiked) -> State:
    """Go back to the last save before a spike of the loss, and skip the batches since then."""
    checkpoints.wait()
    steps = checkpoints.agreed_steps()
    if not any(step <= spike.good for step in steps):
        raise RunFailed(
            f"the loss rose suddenly by step {spike.step}, and nothing that was saved before is "
            "left: in another folder, save more often (run.save_every), keep more (run.keep), "
            "lower optim.lr, or leave out run.spike"
        )
    for step in steps:
        if step > spike.good:
            checkpoints.set_aside(step, f"the loss had risen suddenly by step {spike.step}")
    state = checkpoints.restore(experiment.abstract[0])
    count = spike.step - int(state.step)
    print(f"the loss rose suddenly by step {spike.step}: on from step {int(state.step)}, without "
          f"the {count} batches since")  # fmt: skip
    offset = jax.device_put(state.data_offset + count, experiment.shardings.scalar)
    return state.replace(data_offset=offset)


def give_up(experiment: Experiment, workdir: Place, end: NotFinite, first: int) -> RunFailed:
    """Write down the examples of the last steps, from batch `first`; returns what to raise."""
    steps = range(end.step - end.count + 1, end.step + 1)
    batches = {str(step): experiment.data.train_ids(first + i) for i, step in enumerate(steps)}
    write_json(workdir / SKIPPED, {"examples by step": batches})
    return RunFailed(
        f"loss or gradient was not finite in {end.count} steps in a row, up to step {end.step}; "
        f"nothing has moved since step {steps[0] - 1}, and the examples are in {workdir / SKIPPED}"
    )


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


def claim(experiment: Experiment, workdir: Place, command: str) -> None:
    """Write the run's record, or check that the folder's record is of the same run.

    Raises: BadInput naming the keys that differ; nothing in the folder is changed then.
    """
    config = experiment.config.model_dump(mode="json")
    if there(workdir / RECORD):
        before = read_record(workdir)
        with suppress(BadInput):  # what was not yet a key had its default
            before["config"] = parse(before["config"]).model_dump(mode="json")
        old, new = flatten(before["config"]), flatten(config)
        free = FREE if experiment.config.run.spike is None else FREE[:2]
        changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
        differs = sorted(changed.difference(free, MESH))
        differs += ["weights (content)"] if before["digest"] != experiment.digest else []
        if differs:
            shown = ", ".join(f"{k} ({old.get(k)} -> {new.get(k)})" for k in differs[:4])
            raise BadInput(
                f"{workdir} holds a run of another config; it differs in {shown}\n"
                "give another --workdir, or the same config to go on"
            )
        if changed.intersection(MESH) or before["device"] != devices():
            print(f"begun on {before['device']}, on another mesh or number of devices than "
                  f"{devices()} now: the same to about 1e-5, not to the bit")  # fmt: skip
        return
    if found := [name for name in (METRICS, "checkpoints") if there(workdir / name)]:
        raise BadInput(f"{workdir} has {found[0]} but no {RECORD}; give another --workdir")
    make_folder(workdir)
    record = {
        "config": config,
        "model": experiment.facts | {"tokenizer": experiment.data.save_tokenizer(workdir)},
        "digest": experiment.digest,
        "versions": {package: version(package) for package in PACKAGES},
        "git": git_state(),
        "command": command,
        "device": devices(),
    }
    write_json(workdir / RECORD, record)


def devices() -> str:
    """Say what the run is on."""
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind} ({device.platform})"
