"""The main job in one command: real weights, real data, every strategy, what each bought."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.build import Experiment, build, open_parts
from tljax.checkpoint import write_json
from tljax.config import Config, parse
from tljax.metrics import mean_interval, wilson
from tljax.optim import with_lr
from tljax.train import advance, compile_step, human, score
from tljax.tree import join
from tljax.types import BadInput, Tree

RATES = {
    "scratch": (3e-4, 1e-3),
    "probe": (1e-2, 3e-2),
    "bitfit": (1e-3, 3e-3),
    "lora": (3e-3, 1e-2),
    "last_k": (1e-4, 3e-4),
    "full": (3e-5, 1e-4),
}
"""Two learning rates to choose from on validation: the same number of trials for every strategy."""
OPTIONS = {"last_k": {"head_rate": 30.0}, "full": {"head_rate": 100.0}}
STEPS, TRIAL_STEPS = 32, 8  # of 32 examples: an epoch of the 1,000 labels, a quarter for a trial
QUICK = ("probe",)  # strategies cheap enough for three seeds


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


def configure(base: dict[str, Any], strategy: str, fast: bool) -> Config:
    """Return the config of one cell: the base, with the strategy's options."""
    steps = 4 if fast else STEPS
    run = {"steps": steps, "batch": 32}
    optim = {"decay": 0.01, "warmup": steps // 10}
    chosen = {"name": strategy} | OPTIONS.get(strategy, {})
    data = base["data"] | ({"test": "test[:256]", "validation": 64} if fast else {})
    return parse({**base, "data": data, "strategy": chosen, "run": run, "optim": optim})


def fit(
    experiment: Experiment, compiled: jax.stages.Compiled, lr: float, steps: int, seed: int = 0
) -> Tree:
    """Train for some steps at one learning rate and return the whole tree."""
    experiment = replace(experiment, data=replace(experiment.data, seed=seed))
    born, frozen = experiment.birth(jax.random.key(seed))
    state = born = replace(born, opt=with_lr(born.opt, lr))
    for step, state, _ in advance(experiment, compiled, (born, frozen)):  # noqa: B007
        if step == steps:
            break
    return join(state.params, state.track, frozen)


def cell(base: dict[str, Any], strategy: str, parts: Any, fast: bool) -> dict[str, Any]:
    """Choose a learning rate on validation, train with it, and read the test part once a seed."""
    began = time.perf_counter()
    config = configure(base, strategy, fast)
    steps, trial_steps = config.run.steps, 2 if fast else TRIAL_STEPS
    experiment = build(config, parts)
    compiled = compile_step(experiment)
    trials = {
        lr: score(experiment, fit(experiment, compiled, lr, trial_steps), "validation")["accuracy"]
        for lr in RATES[strategy]
    }
    best = max(trials, key=lambda lr: trials[lr])
    tests = []
    for seed in range(3 if strategy in QUICK and not fast else 1):
        tests.append(score(experiment, fit(experiment, compiled, best, steps, seed), "test"))
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
        "seconds": time.perf_counter() - began,
    }


def cells(base: dict[str, Any], fast: bool) -> Iterator[dict[str, Any]]:
    """Yield the row of every strategy; without weights there is only scratch."""
    parts = open_parts(configure(base, "scratch", fast))
    for strategy in RATES if "weights" in base else ("scratch",):
        row = cell(base, strategy, parts, fast)
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        seeds = "  mean of seeds in [{:.3f}, {:.3f}]".format(*row["seed_interval"] or (0, 0))
        print(
            f"{row['strategy']:8} {row['accuracy']:8.3f} {interval:16} {row['seeds']:5} "
            f"{row['trainable']:>12,} {row['share']:7.2%} {human(row['flops']):>8}  "
            f"{row['seconds']:6.1f}  {row['lr']:g}" + seeds * bool(row["seed_interval"]),
            flush=True,
        )
        yield row


def run(out: Path, fast: bool = False) -> None:
    """Run every job that this machine has the files for; write results.json and results.png."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for title, base in (JOBS | FALLBACK).items():
        if title in FALLBACK and len(results) == len(JOBS):
            continue
        print(f"\n{title}; {base['data'].get('labels', 'all')} labels\n{HEADER}")
        try:
            results[title] = list(cells(base, fast))
        except BadInput as error:
            print(f"left out: {error}")
    write_json(out / "results.json", results)
    plot(results, out / "results.png")
    print(
        "\naccuracy is of the test part, its interval Wilson's; the learning rate is the better of "
        f"{len(RATES['full'])} on validation; {out / 'results.png'}"
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


HEADER = (
    f"{'strategy':8} {'accuracy':>8} {'95 % interval':16} {'seeds':>5} "
    f"{'trainable':>12} {'share':>7} {'FLOPs':>8}  {'s':>6}  lr"
)
