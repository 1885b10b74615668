"""What a step of each strategy costs: FLOPs, optimizer state and temporaries, from compiling alone.

python benchmarks/cost.py --model vit

Nothing is trained and no weights or data are read.  `floor` is the ratio that theory allows, of the
matmuls alone: forward 1/3, backward through activations 1/3, gradients of kernels 1/3.  XLA's count
of temporaries on CPU is an upper bound of what an accelerator keeps.
"""

import argparse
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tljax import objectives, optim, sharding
from tljax.build import init_model, make_shardings
from tljax.models.bert import Bert
from tljax.models.resnet import ResNet
from tljax.models.vit import ViT
from tljax.state import apply_edits, assign_roles, make_birth
from tljax.step import make_step
from tljax.strategies import STRATEGIES, make
from tljax.tree import split
from tljax.types import BadInput


def images(size: int, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }


def texts(length: int, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return dict.fromkeys(objectives.TEXT, ids) | {
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32)
    }


MODELS = {
    "vit": (ViT(layer_scale=1e-5, num_classes=10), images, 98, "ViT-S/14, images of {} px"),
    "bert": (Bert(num_classes=2), texts, 128, "MiniLM-L6 (BERT), texts of {} tokens"),
    "resnet": (ResNet(num_classes=10), images, 98, "ResNet-50, images of {} px"),
}


def compile_step(model: Any, batch: Any, word: str, clip: float | None) -> tuple[Any, Any]:
    """Return the compiled step on one device, and its abstract (state, frozen)."""
    key, mesh = jax.random.key(0), sharding.make_mesh()
    init = partial(init_model, model, batch)
    strategy = make(jax.eval_shape(init, key), model.read, [(word, {})])
    tree = jax.eval_shape(lambda key: apply_edits(strategy.edits, init(key), key), key)
    objective = sharding.under(mesh, objectives.make_objective("classify", model))
    roles = assign_roles(tree, (), strategy.roles, objective, batch, key).tree
    trainable = split(tree, roles).train
    tx = optim.make_tx(trainable, name="adamw", lr=1e-3, steps=100, decay=0.05, clip=clip)
    abstract = jax.eval_shape(make_birth(init, roles, tx, jnp.float32), strategy.edits, key)
    shardings = make_shardings(mesh, sharding.specs(tree, mesh), roles, tx, abstract[0])
    step = make_step(objective, tx, 0, shardings)
    return step.lower(*abstract, batch).compile(), abstract


def floor(word: str, model: Any) -> str:
    depth = sum(model.stages) if isinstance(model, ResNet) else model.depth
    ratios = {"probe": 1 / 3, "bitfit": 2 / 3, "lora": 2 / 3, "last_k": (1 + 2 * 2 / depth) / 3}
    # A ResNet's blocks differ in cost, so that the share of its last two is not 2 of 16.
    uneven = word == "last_k" and isinstance(model, ResNet)
    return "-" if uneven else f"{ratios.get(word, 1.0):.3f}"


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def report(name: str, extent: int | None, examples: int, clip: float | None) -> None:
    """Print one model's table."""
    model, make_batch, usual, title = MODELS[name]
    extent = extent or usual
    batch = make_batch(extent, examples)
    print(f"\n{title.format(extent)}, batch {examples}, clip {clip}")
    print(f"{'strategy':9} {'GFLOPs':>8} {'of full':>8} {'floor':>6} {'trainable':>11} "
          f"{'optimizer MB':>12} {'temporary MB':>12} {'compile s':>9}")  # fmt: skip
    whole = 0.0
    for word in sorted(STRATEGIES, key=lambda word: word != "full"):
        began = time.perf_counter()
        try:
            compiled, (state, _) = compile_step(model, batch, word, clip)
        except BadInput as error:
            print(f"{word:9} {error}")
            continue
        flops = compiled.cost_analysis()["flops"]
        whole = whole or flops
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        temporary = compiled.memory_analysis().temp_size_in_bytes
        cells = f"{flops / 1e9:8.2f} {flops / whole:8.3f} {floor(word, model):>6} {count:11,}"
        sizes = f"{size(state.opt) / 1e6:12.2f} {temporary / 1e6:12.1f}"
        print(f"{word:9} {cells} {sizes} {time.perf_counter() - began:9.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, help="one model (default: all of them)")
    parser.add_argument("--batch", type=int, default=2, help="examples (default 2)")
    parser.add_argument("--extent", type=int, help="pixels or tokens (default 98 px, 128 tokens)")
    parser.add_argument("--no-clip", action="store_true", help="leave gradient clipping out")
    given = parser.parse_args()
    for name in [given.model] if given.model else MODELS:
        report(name, given.extent, given.batch, None if given.no_clip else 1.0)


if __name__ == "__main__":
    main()
