"""What a network forgets of its first task while it learns a second one, and what helps.

    python benchmarks/forgetting.py runs/forgetting      # about 15 minutes of CPU time

Two tasks: a small ViT learns Fashion-MNIST (10,000 labels), then digits, under a head of their own;
the first task is read by its own head, as `tljax eval RUN --data=SOURCE` does.  Every setting stops
as soon as validation on digits reaches LEVEL, so that all are compared at equal accuracy there.
New classes: the ViT learns five garments, then the other five, under one head over all ten.

Every seed has a source of its own.  The interval is Student's t over the paired differences from
plain fine-tuning.  Strengths and rates were settled on another seed.  Needs the asset `fashion`.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.build import Experiment, build
from tljax.config import parse
from tljax.fisher import FISHER, fisher_run
from tljax.inference import Finished, evaluate_on
from tljax.metrics import mean_interval
from tljax.train import advance, compile_step, score, train
from tljax.tree import join

VIT = {"name": "vit", "width": 64, "depth": 3, "heads": 4, "mlp": 128, "patch": 4}
FASHION = {"name": "fashion", "image_size": 28, "labels": 10_000, "test": "test[:2000]"}
DIGITS = {"name": "digits", "image_size": 28, "validation": 300}
GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat")
OTHERS = ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
LEVEL, EVERY, LONGEST = 0.85, 10, 1200  # accuracy; steps
EXAMPLES = 1000  # that the Fisher information is estimated on
TASKS: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "l2_sp .1": [{"name": "l2_sp"}],
    "ewc 30": [{"name": "ewc", "strength": 30.0}],
    "ewc 100": [{"name": "ewc", "strength": 100.0}],
    "lwf": [{"name": "lwf"}],
}
CLASSES: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "ewc 100": [{"name": "ewc", "strength": 100.0}],
    "ewc 1000": [{"name": "ewc", "strength": 1000.0}],
    "replay": [],
}


def source(folder: Path, data: dict[str, Any], seed: int) -> Path:
    """Train a first task and estimate its Fisher information, unless the folder has them."""
    config = {
        "data": data,
        "model": VIT,
        "strategy": {"name": "scratch"},
        "optim": {"lr": 2e-3, "warmup": 20, "decay": 0.05},
        "run": {"steps": 400, "batch": 64, "log_every": 400},
        "seed": seed,
    }
    train(build(parse(config)), folder)
    if not (folder / FISHER).exists():
        print(fisher_run(folder, EXAMPLES), flush=True)
    return folder


def second(first: Path, data: dict[str, Any], beside: list[dict[str, Any]], seed: int) -> Any:
    """Build the second task's experiment, and a function that evaluates a tree on the first."""
    config = {
        "data": data,
        "weights": str(first),
        "strategy": [{"name": "full"}, *beside],
        "optim": {"lr": 1e-3, "warmup": 10, "fall": "constant"},
        "run": {"steps": LONGEST, "batch": 32},
        "seed": seed,
    }
    experiment = build(parse(config))
    facts = experiment.facts | {"tokenizer": None}
    reads = {"preprocess": facts["preprocess"], "tokenizer": None, "batch": 250, "threads": 2}

    def remembered(tree: Any) -> float:
        run = Finished(experiment.config, tree, facts, reads, experiment.predict, experiment.mesh)
        return evaluate_on(run, "the second task's run", "test", str(first))["accuracy"]

    return experiment, remembered


def trees(experiment: Experiment) -> Iterator[tuple[int, Any]]:
    """Train; yields (step, whole tree) every so many steps."""
    born = experiment.birth(jax.random.key(experiment.config.seed))
    steps = advance(experiment, compile_step(experiment), born)
    for step, state, _ in islice(steps, EVERY - 1, None, EVERY):
        yield step, join(state.params, state.track, born[1])


def tasks(out: Path, seed: int) -> dict[str, tuple[float, float, float]]:
    """Return (first task, second task, steps) at equal validation of the second, by setting."""
    first, found = source(out / f"fashion-{seed}", FASHION, seed), {}
    for name, beside in TASKS.items():
        experiment, remembered = second(first, DIGITS, beside, seed)

        def good(tree: Any, experiment: Experiment = experiment) -> bool:
            return score(experiment, tree, "validation")["accuracy"] >= LEVEL

        step, tree = next((one for one in trees(experiment) if good(one[1])), (0, None))
        if tree is None:
            raise SystemExit(f"{name} does not reach {LEVEL} in {LONGEST} steps")
        own = score(experiment, tree, "test")["accuracy"]
        found[name] = (remembered(tree), own, float(step))
        print(f"seed {seed}  {name:9}", *(f"{x:.4g}" for x in found[name]), flush=True)
    return found


def classes(out: Path, seed: int) -> dict[str, tuple[float, float, float]]:
    """Return (old classes, new classes, steps) after equally many steps, by setting."""
    first = source(out / f"garments-{seed}", FASHION | {"classes": GARMENTS, "labels": 5000}, seed)
    new, found = FASHION | {"classes": OTHERS, "labels": 5000}, {}
    older = {"name": "fashion", "classes": GARMENTS, "labels": 500, "share": 0.5}
    for name, beside in CLASSES.items():
        data = new | ({"replay": older} if name == "replay" else {})
        experiment, remembered = second(first, data, beside, seed)
        step, tree = next(islice(trees(experiment), 200 // EVERY - 1, None))
        own = score(experiment, tree, "test")["accuracy"]
        found[name] = (remembered(tree), own, float(step))
        print(f"seed {seed}  {name:9}", *(f"{x:.4g}" for x in found[name]), flush=True)
    return found


def table(title: str, found: list[dict[str, tuple[float, float, float]]]) -> None:
    """Print the means, and what each setting differs from plain fine-tuning in, with intervals."""
    print(f"\n{title}\n{'':9} {'first':>6} {'second':>6} {'steps':>6}  minus plain: first, second")
    for name in found[0]:
        values = np.asarray([each[name] for each in found])
        paired = values - np.asarray([each["plain"] for each in found])
        first, second = (difference(paired[:, column]) for column in (0, 1))
        mean = values.mean(0)
        line = f"{name:9} {mean[0]:6.3f} {mean[1]:6.3f} {mean[2]:6.0f}  {first}  {second}"
        print(line, flush=True)


def difference(paired: np.ndarray) -> str:
    """Write the mean of paired differences with its 95 % interval."""
    low, high = mean_interval(list(paired))
    return f"{paired.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the first tasks' runs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", choices=("tasks", "classes"))
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    parts = {
        "tasks": ("two tasks, a head each", tasks),
        "classes": ("new classes, one head", classes),
    }
    for title, run in [parts[arguments.only]] if arguments.only else parts.values():
        table(title, [run(arguments.out, seed) for seed in seeds])


if __name__ == "__main__":
    main()
