"""Adaptation methods on real data at an equal tuning budget.

    python benchmarks/accuracy.py --job text                    # all below that texts can have
    python benchmarks/accuracy.py --job image --methods lora houlsby --seeds 3

Every method gets the same trials: `--trials` learning rates, each three times the last, around a
middle; all of them train in full on seed 0, validation chooses, and the chosen rate trains the
other seeds.  Test is read once a seed.  The middle rates, and the heads' multiples of them, are set
by hand after the methods' literature and first trials; that is outside the budget that is counted,
and a row that says "the edge of what was tried" may have deserved another middle.  The interval is
Student's t over the seeds, which draw the order of the examples and what starts at random, but not
the labels: they say how methods compare on these labels.  Needs the assets that the demo fetches.

Left out: ewc and lwf, whose start must bring a Fisher information or a head, which the demo's
weights do not (forgetting.py has both); LP-FT, which is two runs, the second from the first one's
folder; surgical, whose globs are a choice for one shift of the data; attentive, which needs a model
that pools by attention; frozen statistics, as neither model has BatchNorm.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from methods import METHODS, Parts, methods_of

from tljax import demo
from tljax.build import Experiment, build, open_parts
from tljax.config import Config, parse
from tljax.metrics import mean_interval
from tljax.plan import compile_step
from tljax.train import score

RATES: dict[str, tuple[float, float]] = {  # the middle learning rate, and the head's multiple of it
    "probe": (1e-2, 1.0),
    "full": (5e-5, 100.0),
    "full, layer decay .8": (1e-4, 100.0),
    "full, l2_sp": (5e-5, 100.0),
    "last 2": (1e-4, 100.0),
    "bitfit": (2e-3, 3.0),
    "norm": (2e-3, 3.0),
    "lora": (2e-3, 3.0),
    "rslora": (2e-3, 3.0),
    "lora+": (1e-3, 3.0),
    "dora": (2e-3, 3.0),
    "pissa": (5e-4, 3.0),
    "olora": (5e-4, 3.0),
    "vera": (1e-2, 1.0),
    "qlora int8": (2e-3, 3.0),
    "qlora": (2e-3, 3.0),
    "ia3": (1e-2, 1.0),
    "ssf": (2e-3, 3.0),
    "houlsby": (2e-3, 3.0),
    "pfeiffer": (2e-3, 3.0),
    "adaptformer": (2e-3, 3.0),
    "vpt deep": (1e-2, 1.0),
    "vpt shallow": (1e-2, 1.0),
    "prompt": (1e-2, 1.0),
    "prefix": (1e-2, 1.0),
    "lora + norm": (2e-3, 3.0),
}
JOBS = dict(zip(("image", "text"), demo.JOBS, strict=True))
KINDS = {"image": "vit", "text": "bert"}


def strategies(name: str) -> Parts:
    """Return a method's strategies as they are compared here: factors on every dense kernel."""
    factors = {"lora": {"targets": demo.TARGETS}, "vera": {"targets": demo.TARGETS}}
    return tuple(part | factors.get(part["name"], {}) for part in METHODS[name])


def configure(job: str, name: str, steps: int, labels: int) -> Config:
    base = demo.configure(JOBS[job], "probe", fast=False).model_dump()
    base["data"] |= {"labels": labels, "validation": 1000}
    base["run"] |= {"steps": steps}
    _, head_rate = RATES[name]
    optim = base["optim"] | {"warmup": steps // 10, "head_rate": head_rate}
    return parse(base | {"strategy": strategies(name), "optim": optim})


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
    parser.add_argument("--methods", nargs="+", choices=RATES, metavar="METHOD",
                        help="default: all of " + ", ".join(RATES))  # fmt: skip
    parser.add_argument("--trials", type=int, default=3, help="learning rates a method")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=125, help="of 16 examples")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="JSON and PNG")
    given = parser.parse_args()
    names = given.methods or [name for name in methods_of(KINDS[given.job]) if name in RATES]
    parts = open_parts(configure(given.job, "probe", given.steps, given.labels))
    rows: dict[str, dict[str, Any]] = {}
    given.out.mkdir(parents=True, exist_ok=True)
    title = f"{JOBS[given.job]}, {given.labels} labels, {given.steps} steps of {demo.BATCH}"
    print(f"{title}; {given.trials} rates and {given.seeds} seeds a method")
    for name in names:
        middle, _ = RATES[name]
        rates = [middle * 3.0 ** (i - (given.trials - 1) / 2) for i in range(given.trials)]
        config = configure(given.job, name, given.steps, given.labels)
        rows[name] = measure(config, parts, rates, given.seeds)
        print(line(name, rows[name]), flush=True)
        (given.out / f"{given.job}.json").write_text(json.dumps(rows, indent=2))
        draw(rows, title, given.out / f"{given.job}.png")


if __name__ == "__main__":
    main()
