"""A sweep over learning rates, decays and depths: one pass over the data, all heads at once."""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from tljax import metrics
from tljax.build import Experiment, build, open_parts
from tljax.checkpoint import Checkpoints
from tljax.config import Config
from tljax.evaluate import collect
from tljax.lock import NAME as LOCK
from tljax.lock import locked
from tljax.metrics import Logger
from tljax.optim import with_decay, with_lr
from tljax.sharding import stacked
from tljax.source import RESULT
from tljax.state import State
from tljax.storage import Name, Place, names, on_disk, run_folder, write_json, write_text
from tljax.train import TABLES, advance, claim, finish, from_features, tables
from tljax.tree import join
from tljax.types import BadInput, Tree

FOUND = "sweep.json"


class Trial(NamedTuple):
    """One head: what it reads, its optimizer's numbers, and its scores on validation."""

    read: str | None
    lr: float
    decay: float
    scores: dict[str, float]

    @property
    def value(self) -> float:
        """Return what the primary metric is worth."""
        return metrics.worth(*next(iter(self.scores.items())))


class Ended(NamedTuple):
    """A trial with its experiment, its last state and the frozen tree."""

    trial: Trial
    experiment: Experiment
    state: State
    frozen: Tree


def sweep(
    config: Config,
    rates: Sequence[float],
    decays: Sequence[float],
    reads: Sequence[str],
    workdir: Name,
    command: str = "",
) -> dict[str, Any]:
    """Train a head for every (read, rate, decay); the best on validation becomes a finished run.

    The data are read once for all depths.  The winner alone is scored on test.
    reads: blocks such as "blocks/8"; none means the config's own.
    Returns the winner's numbers and result; every trial stands in sweep.json.
    Raises: BadInput for numbers out of range, an unknown block, or a strategy that trains or draws
    below every cut.
    """
    folder = run_folder(workdir)
    refuse(config, rates, decays, folder)
    began = time.perf_counter()
    own = config.model_copy(update={"run": config.run.model_copy(update={"features": "on"})})
    models = [config.model | {"read": read} for read in reads] or [config.model]
    parts = open_parts(config)
    built = [build(own.model_copy(update={"model": model}), parts) for model in models]
    with locked(folder) if jax.process_index() == 0 else nullcontext():
        refuse(config, rates, decays, folder)  # nobody has been faster
        trials, best = train_all(built, list(itertools.product(rates, decays)))
        result = keep(best, folder, command)
        write_json(folder / RESULT, result | {"seconds": time.perf_counter() - began})
        return report(trials, best.trial, folder) | result


def train_all(
    built: Sequence[Experiment], pairs: Sequence[tuple[float, float]]
) -> tuple[list[Trial], Ended]:
    """Train every head of every depth; returns all trials, and the best of them."""
    born = [each.birth(jax.random.key(each.config.seed)) for each in built]
    trees = [join(state.params, state.track, frozen) for state, frozen in born]
    trials: list[Trial] = []
    best: Ended | None = None
    for experiment, begun in zip(from_features(built, trees), born, strict=True):
        for ended in train_heads(experiment, *begun, pairs):
            trials.append(ended.trial)
            best = ended if best is None or ended.trial.value > best.trial.value else best
    return trials, best


def read_lists(lr: str, decay: str, read: str | None) -> tuple[list[float], list[float], list[str]]:
    """Read the lists of a command, separated by commas; raises BadInput for what is no number."""
    found = []
    for name, text in (("lr", lr), ("decay", decay)):
        try:
            found.append([float(word) for word in text.split(",") if word.strip()])
        except ValueError:
            raise BadInput(f"--{name} is a list such as 1e-3,1e-2 (given {text!r})") from None
    rates, decays = found
    return rates, decays, read.split(",") if read else []


def refuse(config: Config, rates: Sequence[float], decays: Sequence[float], workdir: Place) -> None:
    """Raise BadInput for empty lists, numbers out of range, or a folder that is taken."""
    for name, given, least in (("lr", rates, "above 0"), ("decay", decays, "0 or more")):
        fits = [np.isfinite(x) and (x > 0 if name == "lr" else x >= 0) for x in given]
        if not given or not all(fits):
            raise BadInput(f"--{name} is a list of numbers {least}, given {list(given)}")
    if workdir.exists() and (not workdir.is_dir() or names(workdir) - {LOCK}):
        raise BadInput(f"{workdir} is not empty: a sweep wants a new --workdir")
    if config.run.features == "off":
        raise BadInput("run.features='off': a sweep computes features once, leave it out")


def train_heads(
    experiment: Experiment, born: State, frozen: Tree, pairs: Sequence[tuple[float, float]]
) -> Iterator[Ended]:
    """Train one head for every (rate, decay), all in one step; yields each with its scores."""
    count, steps = len(pairs), experiment.config.run.steps
    rates, decays = (jnp.asarray(numbers, jnp.float32) for numbers in zip(*pairs, strict=True))
    states = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, 0), born)
    states = replace(states, opt=with_decay(with_lr(states.opt, rates), decays))
    places = jax.tree.map(stacked, experiment.shardings.state)
    states = jax.device_put(states, places)
    heads = jax.vmap(experiment.step, in_axes=(0, None, None))
    step = jax.jit(heads, out_shardings=(places, experiment.shardings.scalar), donate_argnums=0)
    read = experiment.config.model.get("read")
    what, plain = f"{count} heads at {read or 'the last block'}", not sys.stdout.isatty()
    done = advance(experiment, step, (states, frozen))
    for number, now, values in tqdm(done, what, steps, file=sys.stdout, disable=plain):
        states = now
        if number % experiment.config.run.log_every == 0:
            jax.block_until_ready(values)  # batches that wait for their step take memory
    for index, (lr, decay) in enumerate(pairs):
        state = jax.tree.map(lambda leaf, own=index: leaf[own], states)
        trial = Trial(read, lr, decay, validate(experiment, state, frozen))
        yield Ended(trial, experiment, state, frozen)


def validate(experiment: Experiment, state: State, frozen: Tree) -> dict[str, float]:
    """Score a state on validation, without intervals."""
    data, tree = experiment.data, join(state.params, state.track, frozen)
    batches = map(experiment.put, data.eval_batches("validation"))
    rows = collect(experiment.predict, (tree,), batches, data.task)
    return metrics.score(data.task, rows, data.labels or ())


def keep(best: Ended, workdir: Place, command: str) -> dict[str, Any]:
    """Write the winner as `train` would have, and score it."""
    trial, experiment, state, frozen = best
    numbers = {"lr": trial.lr, "decay": trial.decay}
    optim = experiment.config.optim.model_copy(update=numbers)
    experiment = replace(experiment, config=experiment.config.model_copy(update={"optim": optim}))
    run = experiment.config.run
    claim(experiment, workdir, command)
    write_text(workdir / TABLES, tables(experiment) + "\n")
    with (
        closing(Checkpoints(workdir / "checkpoints", run.keep)) as checkpoints,
        closing(Logger(workdir, run.steps)) as logger,
    ):
        checkpoints.save_frozen(frozen)
        checkpoints.save(run.steps, jax.device_put(state, experiment.shardings.state))
        result = finish(experiment, join(state.params, state.track, frozen), logger)
        logger.flush()
        return result


def report(trials: Sequence[Trial], best: Trial, workdir: Place) -> dict[str, Any]:
    """Print every trial, write them as JSON and draw them; returns what was chosen, and by what."""
    name = next(iter(best.scores))
    rows = [trial._asdict() for trial in trials]
    chosen = {"selected_by": f"validation/{name}", "best": best._asdict()}
    write_json(workdir / FOUND, chosen | {"trials": rows})
    print(f"{'read':12} {'lr':>8} {'decay':>8}  {' '.join(f'{key:>10}' for key in best.scores)}")
    for trial in trials:
        scores = " ".join(f"{value:10.4f}" for value in trial.scores.values())
        mark = " <- best on validation" if trial is best else ""
        print(f"{trial.read or '':12} {trial.lr:8.2g} {trial.decay:8.2g}  {scores}{mark}")
    with on_disk(workdir) as local:
        plot(trials, f"validation {name}", local / "sweep.png")
    return chosen


def plot(trials: Sequence[Trial], title: str, path: Path) -> None:
    """Draw a heat map of rates and decays for every depth, where matplotlib is installed."""
    try:  # imported late: only a sweep and the demo draw
        from matplotlib.figure import Figure
    except ImportError:
        return
    columns = [(trial.read, trial.lr, trial.decay) for trial in trials]
    reads, rates, decays = (list(dict.fromkeys(names)) for names in zip(*columns, strict=True))
    figure = Figure(figsize=(4 * len(reads), 4), layout="constrained")
    shown = [next(iter(trial.scores.values())) for trial in trials]
    values = np.array(shown).reshape(len(reads), len(rates), -1)
    finite = values[np.isfinite(values)]
    least, most = (finite.min(), finite.max()) if finite.size else (None, None)
    panels = figure.subplots(1, len(reads), squeeze=False)[0]
    for panel, read, cells in zip(panels, reads, values, strict=True):
        image = panel.imshow(cells, vmin=least, vmax=most, aspect="auto")
        panel.set(title=read or "", xlabel="decay", ylabel="lr")
        panel.set_xticks(range(len(decays)), [f"{x:g}" for x in decays])
        panel.set_yticks(range(len(rates)), [f"{x:g}" for x in rates])
    figure.colorbar(image, ax=figure.axes, label=title)
    figure.savefig(path, dpi=110)
