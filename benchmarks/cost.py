"""What a step of each method costs, from compiling alone: nothing is trained, no data are read.

python benchmarks/cost.py --model vit --size B
python benchmarks/cost.py --model vit --size B --topology v5e:1x1 --compute bfloat16 --batch 64

of full: compiled FLOPs beside full fine-tuning's, with clipping and the gradient norm.  floor: the
same ratio of the matrix products that the method's gradients need (floor.py).  Bytes are those of
one device, in MB.  peak is the compiler's own count; on a CPU it leaves temporaries out.  saved: a
checkpoint, and beside it what a run saves once, the frozen tree.  trained is a share of the model's
own parameters.  With --topology everything is of the step compiled for a TPU that is elsewhere, the
batch spread over its chips.
"""

import argparse
import dataclasses
import os
import time
from functools import partial
from typing import Any, NamedTuple

# Nothing is run: of the CPU's compiler only what decides FLOPs and buffers is wanted.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jax.numpy as jnp
from floor import floor

from tljax import objectives, optim, plan, sharding
from tljax.build import init_model, make_shardings
from tljax.models.bert import Bert
from tljax.models.resnet import ResNet
from tljax.models.vit import ViT
from tljax.state import apply_edits, assign_roles, make_birth
from tljax.step import make_step
from tljax.strategies import STRATEGIES, make
from tljax.tree import Parts, split
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


def vit(width: int, depth: int, heads: int) -> ViT:
    shape = {"width": width, "depth": depth, "heads": heads, "mlp": 4 * width}
    return ViT(**shape, patch=16, grid=(14, 14), num_classes=10)


def bert(width: int, depth: int, heads: int) -> Bert:
    shape = {"width": width, "depth": depth, "heads": heads, "mlp": 4 * width}
    return Bert(**shape, num_classes=2)


MODELS = {
    ("vit", "S"): (vit(384, 12, 6), "ViT-S/16"),
    ("vit", "B"): (vit(768, 12, 12), "ViT-B/16"),
    ("vit", "L"): (vit(1024, 24, 16), "ViT-L/16"),
    ("bert", "S"): (bert(384, 6, 12), "MiniLM-L6"),
    ("bert", "B"): (bert(768, 12, 12), "BERT-base"),
    ("resnet", "50"): (ResNet(num_classes=10), "ResNet-50"),
}


METHODS: dict[str, list[tuple[str, dict]]] = {
    "full": [("full", {})],
    **{name: [(name, {})] for name in STRATEGIES if name not in ("scratch", "full")},
    "qlora": [("lora", {}), ("quantize", {})],
}
"""Strategies alone (from scratch is what full is), and QLoRA; full first, the others beside it."""


class Case(NamedTuple):
    """What is compiled: one model on one batch, and how."""

    model: Any
    batch: Any
    mesh: sharding.Mesh
    clip: float | None


class Step(NamedTuple):
    """A method's compiled step, its abstract (state, frozen), and the FLOPs of its products."""

    cost: plan.Cost
    abstract: tuple[Any, Any]
    floor: float


def compile_step(case: Case, word: str) -> Step:
    model, batch, mesh, clip = case
    key, init = jax.random.key(0), partial(init_model, model, batch)
    strategy = make(jax.eval_shape(init, key), model.read, METHODS[word])
    tree = jax.eval_shape(lambda key: apply_edits(strategy.edits, init(key), key), key)
    objective = sharding.under(mesh, objectives.make_objective("classify", model))
    roles = assign_roles(tree, (), strategy.roles, objective, batch, key).tree
    parts: Parts = split(tree, roles)
    tx = optim.make_tx(parts.train, name="adamw", lr=1e-3, steps=100, decay=0.05, clip=clip)
    birth = make_birth(init, roles, tx, model.dtype)
    abstract = jax.eval_shape(birth, strategy.edits, key)
    shardings = make_shardings(mesh, sharding.specs(tree, mesh), roles, tx, abstract[0])
    lowered = make_step(objective, tx, 0, shardings).lower(*abstract, batch)
    cost = plan.cost_of(plan.compile_lowered(lowered, mesh))
    return Step(cost, abstract, floor(objective, parts, batch, key))


HEADER = (
    f"{'method':9} {'GFLOPs':>9} {'of full':>8} {'floor':>6} {'trained':>8} {'arguments':>9} "
    f"{'temporary':>9} {'peak':>9} {'of full':>8} {'aliased':>9} {'optimizer':>9} {'saved':>9} "
    f"{'once':>9} {'s':>6}"
)


def line(word: str, step: Step, full: Step, devices: int, seconds: float) -> str:
    """Write a method's row; FLOPs are those of all devices, bytes those of one."""
    cost, (state, frozen) = step.cost, step.abstract
    counts = (
        sum(leaf.size for leaf in jax.tree.leaves(run.abstract[0].params)) for run in (step, full)
    )
    trained, whole = counts
    kept = (plan.size(part) for part in (state.opt, state, frozen))
    before = (cost.arguments, cost.temporary, cost.peak)
    mega = lambda sizes: " ".join(f"{size / 1e6:9.1f}" for size in sizes)  # noqa: E731
    return (
        f"{word:9} {cost.flops * devices / 1e9:9.1f} {cost.flops / full.cost.flops:8.3f} "
        f"{step.floor / full.floor:6.3f} {trained / whole:8.2%} {mega(before)} "
        f"{cost.peak / full.cost.peak:8.3f} {mega((cost.aliased, *kept))} {seconds:6.1f}"
    )


def report(title: str, case: Case, words: list[str]) -> None:
    """Print one model's table."""
    kind, devices = case.mesh.devices.flat[0].device_kind, case.mesh.devices.size
    print(f"\n{title} on {devices} {kind}\n{HEADER}")
    full = None
    for word in dict.fromkeys(("full", *words)):
        began = time.perf_counter()
        try:
            step = compile_step(case, word)
        except BadInput as error:
            print(f"{word:9} {error}")
            continue
        full = full or step
        print(line(word, step, full, devices, time.perf_counter() - began), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = sorted({name for name, _ in MODELS})
    parser.add_argument("--model", choices=names, help="one model (default: all of them)")
    parser.add_argument("--size", help="S, B or L of a ViT, S or B of a BERT, 50 of a ResNet")
    parser.add_argument("--batch", type=int, default=2, help="examples, over all devices")
    parser.add_argument("--extent", type=int, help="pixels or tokens (default 224 px, 128 tokens)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--no-clip", action="store_true", help="leave gradient clipping out")
    parser.add_argument("--remat", action="store_true", help="run blocks again")
    parser.add_argument("--compute", default="float32", help="dtype of products (default float32)")
    parser.add_argument("--topology", help="TPUs elsewhere, such as v5e:1x1 (default: one device)")
    given = parser.parse_args()
    devices = plan.devices_of(given.topology) if given.topology else jax.devices()[:1]
    for (name, size), (model, title) in MODELS.items():
        if given.model not in (None, name) or given.size not in (None, size):
            continue
        make, usual, unit = (texts, 128, "tokens") if name == "bert" else (images, 224, "px")
        extent, compute = given.extent or usual, jnp.dtype(given.compute)
        model = dataclasses.replace(model, dtype=compute, remat=given.remat)
        mesh, clip = sharding.make_mesh(devices=devices), None if given.no_clip else 1.0
        title = f"{title}, {extent} {unit}, batch {given.batch}, {compute}, clip {clip}"
        case = Case(model, make(extent, given.batch), mesh, clip)
        report(title + ", remat" * given.remat, case, given.methods)


if __name__ == "__main__":
    main()
