"""The main job in one command: real weights, real data, every strategy, what each bought."""

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.build import Experiment, build, open_parts
from tljax.config import Config, parse
from tljax.metrics import mean_interval, wilson
from tljax.optim import with_lr
from tljax.plan import compile_step, human
from tljax.storage import write_json
from tljax.train import advance, score
from tljax.tree import join
from tljax.types import BadInput, Tree

RATES = {
    "scratch": (3e-4, 1e-3),
    "probe": (1e-2, 3e-2),
    "bitfit": (1e-3, 3e-3),
    "lora": (1e-3, 3e-3),
    "last_k": (3e-5, 1e-4),
    "full": (3e-5, 1e-4),
}
"""Two learning rates to choose from on validation: the same number of trials for every strategy.

These pairs, and the heads' rates below, were settled on 1,000 validation examples of each job.
"""
TARGETS = tuple(f"params/**/{name}" for name in ("query", "key", "value", "out", "up", "down"))
OPTIONS = {"lora": {"targets": TARGETS}}
HEAD_RATES = {"bitfit": 3.0, "lora": 3.0, "last_k": 100.0, "full": 100.0}
"""Multiples of the learning rate: a new head learns at about 1e-2, as a probe does."""
STEPS, TRIAL_STEPS, BATCH = 62, 16, 16  # an epoch of the 1,000 labels; the better trial goes on
QUICK = ("probe",)  # strategies cheap enough for three seeds
LONGEST = ("probe", "scratch", "full", "lora", "bitfit", "last_k")  # first, so that all end at once
WORKERS = 2  # cells side by side on a CPU: two of one core do more than one of two

JOBS: dict[str, dict[str, Any]] = {
    "DINOv2 ViT-S/14 on Fashion-MNIST": {
        "data": {"name": "fashion", "labels": 1000, "validation": 192, "test": "test[:2000]"}
        | {"image_size": 98},
        "weights": "dinov2-vits14",
        "model": {"read": "blocks/5", "pool": "cls+mean"},
    },
    "MiniLM-L6 on movie sentiment": {
        "data": {"name": "sentiment/movies", "labels": 1000, "validation": 192, "length": 40},
        "weights": "minilm-l6",
        "model": {"pool": "mean"},
    },
}
FALLBACK: dict[str, dict[str, Any]] = {
    "a small ViT on digits, from scratch only: the weights are not here": {
        "data": {"name": "digits", "image_size": 16, "validation": 192},
        "model": {"name": "vit", "width": 64, "depth": 4, "heads": 4, "mlp": 256, "patch": 4},
    },
}
HEADER = (
    f"{'strategy':8} {'accuracy':>8} {'95 % interval':16} {'seeds':>5} "
    f"{'trainable':>12} {'share':>7} {'FLOPs':>8}  {'s':>6}  lr"
)


def configure(title: str, strategy: str, fast: bool) -> Config:
    """Return the config of one cell: its job's, with the strategy's options."""
    base, steps = (JOBS | FALLBACK)[title], 4 if fast else STEPS
    # The cost of every strategy is compared: off, for each step to compute all that it reads.
    run = {"steps": steps, "batch": BATCH, "features": "off"}
    head_rate = HEAD_RATES.get(strategy, 1.0)
    optim = {"decay": 0.01, "warmup": steps // 10, "head_rate": head_rate}
    chosen = {"name": strategy} | OPTIONS.get(strategy, {})
    data = base["data"] | ({"test": "test[:256]", "validation": 64} if fast else {})
    return parse({**base, "data": data, "strategy": chosen, "run": run, "optim": optim})


@cache
def parts_of(title: str, fast: bool) -> Any:
    """Open a job's weights and data, once a process."""
    return open_parts(configure(title, "scratch", fast))


def trees(
    experiment: Experiment, compiled: jax.stages.Compiled, lr: float, seed: int = 0
) -> Iterator[Tree]:
    """Begin a run at one learning rate; yields the whole tree after every step."""
    experiment = replace(experiment, data=replace(experiment.data, seed=seed))
    born, frozen = experiment.birth(jax.random.key(seed))
    born = replace(born, opt=with_lr(born.opt, lr))
    steps = advance(experiment, compiled, (born, frozen))
    return (join(state.params, state.track, frozen) for _, state, _ in steps)


def after(run: Iterator[Tree], steps: int) -> tuple[Tree, float]:
    """Go on with a run for some steps; returns its tree and the seconds they took."""
    began = time.perf_counter()
    tree = jax.block_until_ready(next(islice(run, steps - 1, None)))
    return tree, time.perf_counter() - began


def cell(title: str, strategy: str, fast: bool) -> dict[str, Any]:
    """Try two learning rates for some steps, let the better on validation go on, and read test."""
    config = configure(title, strategy, fast)
    experiment = build(config, parts_of(title, fast))
    compiled = compile_step(experiment)
    steps, first = config.run.steps, 2 if fast else TRIAL_STEPS
    runs = {lr: trees(experiment, compiled, lr) for lr in RATES[strategy]}
    tried = {lr: after(run, first) for lr, run in runs.items()}
    trials = {lr: score(experiment, t, "validation")["accuracy"] for lr, (t, _) in tried.items()}
    best = max(trials, key=lambda lr: trials[lr])
    last, seconds = after(runs[best], steps - first)
    tests = [score(experiment, last, "test")]
    for seed in (1, 2) if strategy in QUICK and not fast else ():
        last, _ = after(trees(experiment, compiled, best, seed), steps)
        tests.append(score(experiment, last, "test"))
    state, frozen = experiment.abstract
    values, n = [test["accuracy"] for test in tests], int(tests[0]["n"])
    low, high = wilson(round(float(np.mean(values)) * n), n)
    parameters = [sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (state.params, frozen)]
    return {
        "strategy": strategy,
        "accuracy": float(np.mean(values)),
        "low": low,
        "high": high,
        "seeds": len(values),
        "seed_interval": mean_interval(values) if len(values) > 1 else None,
        "n": n,
        "lr": best,
        "trials": {str(lr): value for lr, value in trials.items()},
        "trainable": parameters[0],
        "share": parameters[0] / sum(parameters),
        "flops": compiled.cost_analysis()["flops"],
        "seconds": tried[best][1] + seconds,
    }


def line(row: Mapping[str, Any]) -> str:
    """Write a row of the table."""
    interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
    seeds = "  mean of seeds in [{:.3f}, {:.3f}]".format(*row["seed_interval"] or (0, 0))
    return (
        f"{row['strategy']:8} {row['accuracy']:8.3f} {interval:16} {row['seeds']:5} "
        f"{row['trainable']:>12,} {row['share']:7.2%} {human(row['flops']):>8}  "
        f"{row['seconds']:6.1f}  {row['lr']:g}" + seeds * bool(row["seed_interval"])
    )


def _take_cores(places: Any) -> None:
    if mine := places.get():
        os.sched_setaffinity(0, mine)


def workers() -> ProcessPoolExecutor:
    """Start processes for the cells: on a CPU each with its own cores, else a single one."""
    count = WORKERS if jax.default_backend() == "cpu" else 1
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    places = context.Queue()
    for number in range(count):
        places.put(cores[number::count])
    return ProcessPoolExecutor(count, context, _take_cores, (places,))


def opens(title: str, fast: bool) -> None:
    """Prepare a job's data and read its weights; raises BadInput for what is missing."""
    parts_of(title, fast)


def open_jobs(pool: ProcessPoolExecutor, fast: bool) -> Iterator[tuple[str, str]]:
    """Yield the (title, strategy) of every cell that this machine has the files for."""
    there = []
    for title, opening in {title: pool.submit(opens, title, fast) for title in JOBS}.items():
        try:
            opening.result()
            there.append(title)
        except BadInput as error:
            print(f"left out: {title}: {error}")
    for title in there:
        yield from ((title, strategy) for strategy in RATES)
    if len(there) < len(JOBS):
        yield from ((title, "scratch") for title in FALLBACK)


def run(out: Path, fast: bool = False) -> None:
    """Run every job that this machine has the files for; write results.json and results.png."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    began = time.perf_counter()
    with workers() as pool:
        try:
            cells = list(open_jobs(pool, fast))
            queue = sorted(cells, key=lambda one: LONGEST.index(one[1]))
            waiting = {pool.submit(cell, *one, fast): one for one in queue}
            for done in as_completed(waiting):
                title, strategy = waiting[done]
                found[title, strategy] = row = done.result()
                passed = f"accuracy {row['accuracy']:.3f}, {time.perf_counter() - began:.0f} s"
                print(f"{len(found)}/{len(cells)}  {title}: {strategy}  {passed}", flush=True)
        except BaseException:  # a cell that failed, or Ctrl-C: nothing waits for the others
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    results: dict[str, list[dict[str, Any]]] = {}
    for one in cells:
        results.setdefault(one[0], []).append(found[one])
    for title, rows in results.items():
        labels = (JOBS | FALLBACK)[title]["data"].get("labels", "all")
        print(f"\n{title}; {labels} labels\n{HEADER}", *map(line, rows), sep="\n")
    write_json(out / "results.json", results)
    plot(results, out / "results.png")
    print(
        "\naccuracy is of the test part, its interval Wilson's; the learning rate is the better of "
        f"{len(RATES['full'])} on validation; s: training one seed; {out / 'results.png'}"
    )


def plot(results: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw accuracy against trainable parameters, FLOPs and seconds, one row of panels a job."""
    # Imported late: only the demo draws.
    from matplotlib.figure import Figure

    axes_of = {"trainable": "trainable parameters", "flops": "FLOPs a step", "seconds": "seconds"}
    figure = Figure(figsize=(13, 4 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), len(axes_of), squeeze=False)
    for line, (title, rows) in zip(panels, results.items(), strict=True):
        for panel, (key, label) in zip(line, axes_of.items(), strict=True):
            for row in rows:
                error = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
                panel.errorbar(row[key], row["accuracy"], error, fmt="o", capsize=3)
                panel.annotate(
                    row["strategy"], (row[key], row["accuracy"]), (6, 4), textcoords="offset points"
                )
            panel.margins(x=0.3, y=0.15)
            panel.set(xlabel=label, ylabel="test accuracy", title=title)
            panel.set_xscale("log" if key == "trainable" else "linear")
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
