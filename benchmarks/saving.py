"""What checkpoints cost a run: hashes, manifests and saving behind the steps.

    launch/local.sh python benchmarks/saving.py                  # ViT-S/16 in full, 8 images
    launch/local.sh python benchmarks/saving.py --width 64 --depth 2 --every 100

One run, cut into intervals of `--every` steps, in turns with a save at their beginning and without;
an interval with a save ends when the save is complete, too.  Printed: seconds of both, medians and
extremes, the share that a save adds, and what it wrote.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import jax

from tljax import manifest
from tljax.build import build
from tljax.checkpoint import Checkpoints
from tljax.config import parse
from tljax.plan import compile_step
from tljax.train import advance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=384, help="of a ViT (default 384)")
    parser.add_argument("--depth", type=int, default=12, help="blocks (default 12)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--every", type=int, default=50, help="steps between saves (default 50)")
    parser.add_argument("--rounds", type=int, default=3, help="of both kinds (default 3)")
    given = parser.parse_args()
    model = {"name": "vit", "width": given.width, "depth": given.depth, "patch": 16}
    model |= {"heads": given.width // 64, "mlp": 4 * given.width}
    order = ["without", "with", "with", "without"] * -(-given.rounds // 2)
    config = parse({
        "data": {"name": "digits", "image_size": given.image_size},
        "model": model,
        "strategy": {"name": "scratch"},
        "run": {"steps": given.every * (len(order) + 1), "batch": given.batch},
    })  # fmt: skip
    experiment = build(config)
    compiled = compile_step(experiment)
    born = experiment.birth(jax.random.key(0))
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "checkpoints"
        with closing(Checkpoints(folder, keep=2)) as checkpoints:
            began = time.perf_counter()
            for step, state, _ in advance(experiment, compiled, born):
                number, rest = divmod(step, given.every)
                if rest:
                    continue
                jax.block_until_ready(state)
                if number > 1:
                    checkpoints.wait()
                    seconds[order[number - 2]].append(time.perf_counter() - began)
                else:  # orbax starts, and the hashes are compiled
                    checkpoints.save(step, state)
                    checkpoints.wait()
                began = time.perf_counter()
                if order[number - 1 : number] == ["with"]:
                    checkpoints.save(step, state)
            size = sum(manifest.sizes(folder / str(checkpoints.latest())).values())
    for name, values in seconds.items():
        print(f"{name:8} a save  {statistics.median(values):8.3f} s an interval "
              f"({min(values):.3f} to {max(values):.3f})")  # fmt: skip
    added = statistics.median(seconds["with"]) / statistics.median(seconds["without"]) - 1
    print(f"a save of {size / 1e6:.1f} MB every {given.every} steps adds {added:.2%}")


if __name__ == "__main__":
    main()
