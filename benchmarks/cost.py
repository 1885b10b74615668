"""What a step of each method costs, from compiling alone: nothing is trained, no data are read.

python benchmarks/cost.py --model vit --size B
python benchmarks/cost.py --model vit --size B --topology v5e:1x1 --compute bfloat16 --batch 64
launch/local.sh python benchmarks/cost.py --model vit --size S --time --batch 8

of full: compiled FLOPs beside full fine-tuning's, with clipping and the gradient norm.  floor: the
same ratio of the matrix products that the method's gradients need (floor.py).  Sizes are in MB.
arguments, temporary, peak and aliased are those of one device; peak is the compiler's own count,
which on a CPU leaves temporaries out.  optimizer, saved and once are of whole trees, on however
many devices they lie.  saved: a checkpoint, and beside it what a run saves once, the frozen tree.
trained is a share of the model's own parameters.  With --topology everything is of the step
compiled for a TPU that is elsewhere, the batch spread over its chips.

--time runs the steps as well, on this machine, in float32 and without clipping: in turns with
torch (transformers, and peft for lora, dora, ia3 and vera) where that has the method, with the same
weights and batch, by the functions of speed.py.  ratio is torch's time over tljax's, the median of
the turns.  First losses must agree before.  --one-thread counts CPU seconds of one thread.
"""

import argparse
import dataclasses
import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from floor import floor
from methods import AS_LORA, FIELDS, METHODS, chosen, methods_of, start_of

from tljax import objectives, plan, sharding
from tljax.assembly import assemble, init_model
from tljax.models.bert import Bert
from tljax.models.resnet import ResNet
from tljax.models.vit import ViT
from tljax.tree import split

QUICK = {"xla_backend_optimization_level": 0}
"""On a CPU: of its compiler only what decides FLOPs and buffers is wanted."""


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
    ("vit", "S"): (vit(384, 12, 6), "ViT-S/16", "vit-s16"),
    ("vit", "B"): (vit(768, 12, 12), "ViT-B/16", "vit-b16"),
    ("vit", "L"): (vit(1024, 24, 16), "ViT-L/16", "vit-l16"),
    ("bert", "S"): (bert(384, 6, 12), "MiniLM-L6", None),
    ("bert", "B"): (bert(768, 12, 12), "BERT-base", "bert-base"),
    ("resnet", "50"): (ResNet(num_classes=10), "ResNet-50", "resnet50"),
}
"""Models, their titles, and their names in speed.py."""


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
    model = dataclasses.replace(model, **FIELDS.get(word, {}))
    key = jax.random.key(0)
    made = assemble(
        model,
        batch,
        chosen(METHODS[word]),
        mesh=mesh,
        optimizer={"name": "adamw", "lr": 1e-3, "steps": 100, "decay": 0.05, "clip": clip},
        start=start_of(jax.eval_shape(partial(init_model, model, batch), key)),
        dtype=model.dtype,
    )
    options = QUICK if mesh.devices.flat[0].platform == "cpu" else None
    compiled = plan.compile_lowered(made.step.lower(*made.abstract, batch), mesh, options)
    products = floor(made.objective, split(made.tree, made.roles.tree), batch, key)
    return Step(plan.cost_of(compiled), made.abstract, products)


HEADER = (
    f"{'method':23} {'GFLOPs':>9} {'of full':>8} {'floor':>6} {'trained':>8} {'arguments':>9} "
    f"{'temporary':>9} {'peak':>9} {'of full':>8} {'aliased':>9} {'optimizer':>9} {'saved':>9} "
    f"{'once':>9} {'compile s':>9}"
)
TIMES = f" {'tljax s':>9} {'torch s':>9} {'ratio':>6}"


def line(word: str, step: Step, full: Step, devices: int, seconds: float) -> str:
    """Write a method's row; FLOPs are those of all devices."""
    cost, (state, frozen) = step.cost, step.abstract
    counts = (
        sum(leaf.size for leaf in jax.tree.leaves(run.abstract[0].params)) for run in (step, full)
    )
    trained, whole = counts
    kept = (plan.size(part) for part in (state.opt, state, frozen))
    before = (cost.arguments, cost.temporary, cost.peak)
    mega = lambda sizes: " ".join(f"{size / 1e6:9.1f}" for size in sizes)  # noqa: E731
    return (
        f"{word:23} {cost.flops * devices / 1e9:9.1f} {cost.flops / full.cost.flops:8.3f} "
        f"{step.floor / full.floor:6.3f} {trained / whole:8.2%} {mega(before)} "
        f"{cost.peak / full.cost.peak:8.3f} {mega((cost.aliased, *kept))} {seconds:9.1f}"
    )


def report(title: str, case: Case, words: list[str], time_of: Any) -> None:
    """Print one model's table; `time_of(method)` gives the further columns of a row."""
    kind, devices = case.mesh.devices.flat[0].device_kind, case.mesh.devices.size
    print(f"\n{title} on {devices} {kind}\n{HEADER}{TIMES if time_of else ''}")
    full = None
    for word in dict.fromkeys(("full", *words)):
        began = time.perf_counter()
        step = compile_step(case, word)
        full, seconds = full or step, time.perf_counter() - began
        row = line(word, step, full, devices, seconds)
        print(row + (time_of(word) if time_of else ""), flush=True)


def timer(name: str, given: argparse.Namespace) -> Any:
    """Return a function that times a method's step, in turns with torch where that has it."""
    import speed

    case = speed.CASES[name]
    case = case._replace(extent=given.extent or case.extent)

    def times(word: str) -> str:
        runs = speed.pair(case, word, given.batch, "cpu", False, False)
        speed.check(runs, False, word)
        seconds = speed.interleaved(runs, given.rounds, 1, speed.clock(given.one_thread))
        ours = statistics.median(seconds["tljax"])
        if "torch" not in seconds:
            return f" {ours:9.3f} {'-':>9} {'-':>6}"
        theirs, ratio = statistics.median(seconds["torch"]), speed.ratios(seconds)["torch"]
        return f" {ours:9.3f} {theirs:9.3f} {statistics.median(ratio):6.3f}"

    return times


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = sorted({name for name, _ in MODELS})
    parser.add_argument("--model", choices=names, help="one model (default: all of them)")
    parser.add_argument("--size", help="S, B or L of a ViT, S or B of a BERT, 50 of a ResNet")
    parser.add_argument("--batch", type=int, default=2, help="examples, over all devices")
    parser.add_argument("--extent", type=int, help="pixels or tokens (default 224 px, 128 tokens)")
    usual = "default: all that the model can have, but " + ", ".join(sorted(AS_LORA))
    usual += ", whose step is LoRA's"
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=usual)
    parser.add_argument("--no-clip", action="store_true", help="leave gradient clipping out")
    parser.add_argument("--remat", action="store_true", help="run blocks again")
    parser.add_argument("--compute", default="float32", help="dtype of products (default float32)")
    parser.add_argument("--topology", help="TPUs elsewhere, such as v5e:1x1 (default: one device)")
    parser.add_argument("--time", action="store_true", help="run the steps, in turns with torch's")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--one-thread", action="store_true", help="CPU seconds of one thread each")
    given = parser.parse_args()
    if given.time and (given.topology or given.remat or given.compute != "float32"):
        parser.error("--time runs plain float32 steps here: no --topology, --remat or --compute")
    return given


def main() -> None:
    given = parse_arguments()
    if given.time and given.one_thread:
        import speed  # and with it torch, which nothing else here needs

        speed.one_thread()
    devices = plan.devices_of(given.topology) if given.topology else jax.devices()[:1]
    for (kind, size), (model, title, name) in MODELS.items():
        if given.model not in (None, kind) or given.size not in (None, size):
            continue
        make, usual, unit = (texts, 128, "tokens") if kind == "bert" else (images, 224, "px")
        extent, compute = given.extent or usual, jnp.dtype(given.compute)
        model = dataclasses.replace(model, dtype=compute, remat=given.remat)
        mesh, clip = sharding.make_mesh(devices=devices), None if given.no_clip else 1.0
        title = f"{title}, {extent} {unit}, batch {given.batch}, {compute}, clip {clip}"
        case = Case(model, make(extent, given.batch), mesh, clip)
        known = methods_of(kind)
        words = [word for word in given.methods or known if word in known]
        words = [word for word in words if given.methods or word not in AS_LORA]
        if absent := sorted({*(given.methods or ())} - {*known}):
            print(f"\n{title}: a {kind} has no place for {', '.join(absent)}")
        time_of = timer(name, given) if given.time and name else None
        report(title + ", remat" * given.remat, case, words, time_of)


if __name__ == "__main__":
    main()
