"""What computing features once saves: a step, a run of many epochs, and a sweep of many heads.

python benchmarks/features.py --images 512 --batch 64
python benchmarks/features.py --images 1281167 --batch 1024 --bfloat16    (an accelerator)

A linear probe of a ViT with random weights on synthetic images, which the device makes from their
numbers, so that no disk or decoder is measured.  On the fly a step runs the whole model; from
features what remains is the loader, the gather and the head.  Times are of whole loops.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.build import Experiment, build
from tljax.config import parse
from tljax.data.loader import Loader
from tljax.data.pipeline import Pipeline
from tljax.data.sources import Info, Source, Splits
from tljax.plan import compile_step, cost_of, describe
from tljax.sharding import put_batch
from tljax.sweep import train_heads
from tljax.train import advance, from_features
from tljax.tree import join

SIZE, CLASSES, EPOCHS, HEADS = 224, 100, 100, 50
MODELS = {  # width, depth, heads
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
}


class Numbers(Source):
    """Rows of a number each in place of an image, and a label."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def stack(self, indices: Any) -> dict[str, np.ndarray]:
        rows = np.asarray(indices, np.int32)
        return {"image": rows, "label": rows % CLASSES}


class Blank(Numbers):
    """Rows of the shape that the model reads: what an experiment is built from."""

    def stack(self, indices: Any) -> dict[str, np.ndarray]:
        rows = super().stack(indices)
        return rows | {"image": np.zeros((len(indices), SIZE, SIZE, 3), np.float32)}


def pipeline(kind: type[Numbers], images: int, batch: int) -> Pipeline:
    info = Info("image", "classify", tuple(map(str, range(CLASSES))))
    train = kind(images)
    return Pipeline(
        task="classify",
        loader=Loader(batch),
        eval_transform=None,
        preprocess={},
        splits=Splits(train, kind(batch), kind(batch), info),
        seed=0,
        train_transform=None,
        versions=train,
    )


def experiment_of(given: argparse.Namespace, features: str) -> Experiment:
    width, depth, heads = MODELS[given.model]
    model = {"name": "vit", "width": width, "depth": depth, "heads": heads, "mlp": 4 * width}
    steps = max(EPOCHS * given.images // given.batch, 1)
    values = {
        "data": {"name": "synthetic", "image_size": SIZE},
        "model": model | {"patch": 16},
        "strategy": {"name": "probe"},
        "optim": {"lr": 1e-2},
        "run": {"steps": steps, "batch": given.batch, "features": features},
        "precision": {"compute": "bfloat16" if given.bfloat16 else "float32"},
    }
    built = build(parse(values), (None, pipeline(Blank, given.images, given.batch)))
    draw = jax.jit(make_images, out_shardings=built.shardings.batch)

    def put(batch: Any) -> Any:
        placed = dict(put_batch(batch, built.mesh))
        return placed | ({"image": draw(placed["image"])} if "image" in placed else {})

    return replace(built, data=pipeline(Numbers, given.images, given.batch), put=put)


def make_images(rows: jax.Array) -> jax.Array:
    pixels = jnp.arange(SIZE * SIZE * 3, dtype=jnp.float32).reshape(1, SIZE, SIZE, 3)
    return jnp.sin(pixels * (1 + rows[:, None, None, None].astype(jnp.float32) % 977))


def now() -> np.ndarray:
    """Return the time on the wall, and that of this process on all cores."""
    return np.array([time.perf_counter(), time.process_time()])


def seconds(function: Callable[[], Any]) -> np.ndarray:
    began = now()
    jax.block_until_ready(function())
    return now() - began


def both(values: np.ndarray, unit: str = "s") -> str:
    return f"{values[0]:,.4g} {unit} (CPU {values[1]:,.4g})"


def run_steps(experiment: Experiment, step: Any, begun: Any, count: int) -> np.ndarray:
    """Return the seconds a step of the loop takes, loader included, without the first two."""
    loop = advance(experiment, step, begun)
    jax.block_until_ready([values for *_, values in islice(loop, 2)])
    return seconds(lambda: [values for *_, values in islice(loop, count)]) / count


def same_batch(experiment: Experiment, step: Any, begun: Any, count: int) -> np.ndarray:
    """Return the seconds of a step on one batch that stays on the device: training and no more."""
    (state, frozen), batch = begun, experiment.put(next(experiment.data.train_batches()))
    began = now()
    for _ in range(count):
        state, values = step(state, frozen, batch)
    jax.block_until_ready(values)
    return (now() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="s", choices=list(MODELS), help="ViT-?/16 (default s)")
    parser.add_argument("--images", type=int, default=512, help="training images (default 512)")
    parser.add_argument("--batch", type=int, default=64, help="examples a step (default 64)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps on the fly (default 3)")
    parser.add_argument("--rounds", type=int, default=3, help="of features (default 3)")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    given = parser.parse_args()
    whole, once = experiment_of(given, "off"), experiment_of(given, "on")
    born = lambda: once.birth(jax.random.key(0))  # noqa: E731
    state, frozen = born()
    tree, steps = join(state.params, state.track, frozen), once.config.run.steps
    rows = given.images + 2 * given.batch
    load, cores = ", ".join(f"{value:.1f}" for value in os.getloadavg()), os.cpu_count()
    print(f"ViT-{given.model}/16, {given.images:,} images, {cores} cores, load {load}")

    compiled = compile_step(whole)
    slow = run_steps(whole, compiled, whole.birth(jax.random.key(0)), given.steps)
    print(f"{describe(whole, cost_of(compiled))}\na step on the fly: {both(slow)}")
    batch = whole.put(next(whole.data.eval_batches("test")))
    jax.block_until_ready(whole.predict(tree, batch))
    predict = lambda: [whole.predict(tree, batch) for _ in range(given.steps)]  # noqa: E731
    rounds = []
    for _ in range(given.rounds):
        before, began = seconds(predict), now()
        [ready] = from_features([once], [tree])
        extraction = now() - began
        # A pass before and after, and the round in the middle: a machine's speed changes.
        forward = (before + seconds(predict)) / 2 / given.steps * rows / given.batch
        rounds.append((extraction, forward))
    rounds.sort(key=lambda times: times[0][0] / times[1][0])
    extraction, forward = rounds[len(rounds) // 2]
    print(f"a forward pass over {rows:,} images (training, validation, test): {both(forward)}")
    print(
        f"features, compiling included: {both(extraction)}; {both(extraction / forward, 'passes')} "
        f"({', '.join(f'{one[0] / other[0]:.3f}' for one, other in rounds)})"
    )

    compiled = compile_step(ready)
    print(describe(ready, cost_of(compiled)))
    few = min(steps, 1000) - 2
    fast, head = (each(ready, compiled, born(), few) for each in (run_steps, same_batch))
    print(f"a step on features: {both(fast * 1e3, 'ms')}, cheaper by {both(slow / fast, 'times')}")
    print(f"the head's own step: {both(head * 1e3, 'ms')}")
    ratio = (extraction + steps * fast) / (forward + steps * head)
    print(f"{EPOCHS} epochs: {both(extraction + steps * fast)}, on the fly {both(steps * slow)}")
    print(f"beside one forward pass and the head's own steps: {both(ratio, 'times')}")
    one = np.ones(2)
    for count in (1, HEADS):
        pairs = [(rate, 0.0) for rate in np.geomspace(1e-4, 1e-1, count).tolist()]
        took = seconds(lambda p=pairs: [each.state for each in train_heads(ready, *born(), p)])
        one = extraction + took if count == 1 else one
        total = both((extraction + took) / one, "times one head")
        print(f"a sweep of {count} heads: {both(took)}; with features {total}", flush=True)


if __name__ == "__main__":
    main()
