"""Adaptation methods on real data at an equal tuning budget.

    python benchmarks/accuracy.py --job text                    # every method that texts have
    python benchmarks/accuracy.py --job image --methods lora adapter vpt --seeds 3

Every method gets the same trials: `--trials` learning rates, each three times the last, around
what its literature recommends; all of them train in full on seed 0, validation chooses, and the
chosen rate trains the other seeds.  Test is read once a seed.  The interval is Student's t over the
seeds, which draw the order of the examples and what starts at random, but not the labels: they say
how methods compare on these labels.  Needs the assets that the demo fetches.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax import demo
from tljax.build import Experiment, build, open_parts
from tljax.config import Config, parse
from tljax.metrics import mean_interval
from tljax.plan import compile_step
from tljax.train import score

DENSE = tuple(f"params/blocks/**/{name}" for name in demo.DENSE)
LORA = {"name": "lora", "targets": DENSE, "head_rate": 3.0}
Chosen = tuple[dict[str, Any], ...]
METHODS: dict[str, tuple[float, Chosen]] = {  # the middle learning rate, and the strategies
    "probe": (1e-2, ({"name": "probe"},)),
    "full": (5e-5, ({"name": "full", "head_rate": 100.0},)),
    "full, layer decay .8": (1e-4, ({"name": "full", "layer_decay": 0.8, "head_rate": 100.0},)),
    "last 2": (1e-4, ({"name": "last_k", "head_rate": 100.0},)),
    "bitfit": (2e-3, ({"name": "bitfit", "head_rate": 3.0},)),
    "norm": (2e-3, ({"name": "norm", "head_rate": 3.0},)),
    "lora": (2e-3, (LORA,)),
    "rslora": (2e-3, (LORA | {"use_rslora": True},)),
    "lora+": (1e-3, (LORA | {"b_rate": 16.0},)),
    "dora": (2e-3, (LORA | {"use_dora": True},)),
    "pissa": (5e-4, (LORA | {"init": "pissa"},)),
    "olora": (5e-4, (LORA | {"init": "olora"},)),
    "vera": (1e-2, ({"name": "vera", "targets": DENSE},)),
    "qlora int8": (2e-3, (LORA, {"name": "quantize", "form": "int8"})),
    "qlora nf4": (2e-3, (LORA, {"name": "quantize", "form": "nf4"})),
    "ia3": (1e-2, ({"name": "ia3"},)),
    "ssf": (2e-3, ({"name": "ssf", "head_rate": 3.0},)),
    "houlsby": (2e-3, ({"name": "adapter", "head_rate": 3.0},)),
    "pfeiffer": (
        2e-3,
        ({"name": "adapter", "targets": ("mlp",), "activation": "relu", "head_rate": 3.0},),
    ),
    "adaptformer": (
        2e-3,
        ({"name": "adapter", "targets": ("mlp",), "place": "parallel", "width": 64}
         | {"activation": "relu", "scale": 0.1, "head_rate": 3.0},),
    ),
    "vpt deep": (1e-2, ({"name": "vpt"},)),
    "vpt shallow": (1e-2, ({"name": "vpt", "deep": False},)),
    "prompt": (1e-2, ({"name": "prompt"},)),
    "prefix": (1e-2, ({"name": "prefix", "count": 10},)),
    "lora + norm": (2e-3, (LORA, {"name": "norm"})),
}  # fmt: skip
JOBS = dict(zip(("image", "text"), demo.JOBS, strict=True))
OTHERS = {"image": ("prompt",), "text": ("vpt deep", "vpt shallow")}
"""Methods that a job's model cannot have."""


def configure(job: str, chosen: Chosen, steps: int, labels: int) -> Config:
    base = demo.configure(JOBS[job], "probe", fast=False).model_dump()
    base["data"] |= {"labels": labels, "validation": 1000}
    base["run"] |= {"steps": steps}
    return parse(base | {"strategy": chosen, "optim": base["optim"] | {"warmup": steps // 10}})


def train(experiment: Experiment, compiled: Any, rate: float, seed: int) -> Any:
    steps = experiment.config.run.steps
    return next(islice(demo.trees(experiment, compiled, rate, seed), steps - 1, None))


def accuracy(experiment: Experiment, tree: Any, split: str) -> float:
    return score(experiment, tree, split)["accuracy"]


def measure(config: Config, parts: Any, rates: list[float], seeds: int) -> dict[str, Any]:
    """Choose a rate on validation, then read test once a seed."""
    experiment = build(config, parts)
    compiled = compile_step(experiment)
    trees = {rate: train(experiment, compiled, rate, 0) for rate in rates}
    trials = {rate: accuracy(experiment, tree, "validation") for rate, tree in trees.items()}
    best = max(trials, key=lambda rate: trials[rate])
    values = [accuracy(experiment, trees[best], "test")]
    for seed in range(1, seeds):
        values.append(accuracy(experiment, train(experiment, compiled, best, seed), "test"))
    count = sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract[0].params))
    interval = mean_interval(values) if seeds > 1 else None
    found = {"trainable": count, "rate": best, "mean": float(np.mean(values)), "test": values}
    return found | {"interval": interval, "validation": {f"{r:g}": a for r, a in trials.items()}}


def line(name: str, row: dict[str, Any]) -> str:
    low, high = row["interval"] or (row["mean"], row["mean"])
    edge = " (the edge of what was tried)" * (f"{row['rate']:g}" in edges(row["validation"]))
    return (
        f"{name:22} {row['mean']:.3f} [{low:.3f}, {high:.3f}] {row['trainable']:>11,}  "
        f"lr {row['rate']:g}{edge}"
    )


def edges(trials: dict[str, float]) -> list[str]:
    names = list(trials)
    return [names[0], names[-1]] if len(names) > 2 else []


def draw(rows: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Draw means with their intervals, the best on top."""
    import matplotlib.pyplot as plt

    names = sorted(rows, key=lambda name: rows[name]["mean"])
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(names) + 1.2), layout="constrained")
    for place, name in enumerate(names):
        row = rows[name]
        axes.plot(row["interval"] or [row["mean"]] * 2, [place] * 2, color="0.6")
        axes.plot(row["test"], [place] * len(row["test"]), "|", color="0.4")
        axes.plot(row["mean"], place, "o", color="C0")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="test accuracy", title=title)
    figure.savefig(path, dpi=150)


def main() -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--job", choices=JOBS, default="text")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD",
                        help="default: all of " + ", ".join(METHODS))  # fmt: skip
    parser.add_argument("--trials", type=int, default=3, help="learning rates a method")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=125, help="of 16 examples")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="JSON and PNG")
    given = parser.parse_args()
    names = given.methods or [name for name in METHODS if name not in OTHERS[given.job]]
    parts = open_parts(configure(given.job, METHODS["probe"][1], given.steps, given.labels))
    rows: dict[str, dict[str, Any]] = {}
    given.out.mkdir(parents=True, exist_ok=True)
    title = f"{JOBS[given.job]}, {given.labels} labels, {given.steps} steps of {demo.BATCH}"
    print(f"{title}; {given.trials} rates and {given.seeds} seeds a method")
    for name in names:
        middle, chosen = METHODS[name]
        rates = [middle * 3.0 ** (i - (given.trials - 1) / 2) for i in range(given.trials)]
        config = configure(given.job, chosen, given.steps, given.labels)
        rows[name] = measure(config, parts, rates, given.seeds)
        print(line(name, rows[name]), flush=True)
        (given.out / f"{given.job}.json").write_text(json.dumps(rows, indent=2))
        draw(rows, title, given.out / f"{given.job}.png")


if __name__ == "__main__":
    main()
