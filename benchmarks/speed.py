"""Train steps against torch: transformers, and peft for LoRA, with the same weights and batch.

launch/local.sh python benchmarks/speed.py --model vit-s16 --method full --rounds 5
python benchmarks/speed.py --device gpu --model vit-b16 vit-l16 bert-large --compile

A step is forward, backward and AdamW; dropout is off.  The losses of both sides must agree before
anything is timed.  The sides take turns (A B, A B, ..), so that a busy machine slows both, and
medians and the median ratio of the turns are printed: above 1 tljax is the faster one.  Below them
stand tljax's own full time over the method's, and for qlora (nf4, on tljax's side alone) LoRA's
time over its own.  OpenMP waits for its slowest thread, so that torch suffers more on a busy
machine; --one-thread counts the CPU seconds of one thread on either side, which others hardly
change.  On a GPU products are bfloat16 (torch by autocast), and MFU is the share of what a large
matrix product reaches in the same process; the weights' floating-point operations are counted, 2
to a product.

Goals on one H200, in bfloat16 and at batch 256; they are no measurements, as nothing here has run
on one: full at least 2,600 images/s on ViT-B/16 and 1,180 on ViT-L/16, 470 sequences/s on
BERT-large at 512 tokens; LoRA at least 1.45 times the speed of tljax's own full (2.0 at batch 8),
probe 2.85 times; QLoRA at least .95 of LoRA's speed.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from methods import CANNOT, FIELDS, METHODS, chosen, start_of
from torchvision_ops import declare_torchvision_ops

import tljax
from tljax import sharding
from tljax.assembly import assemble, init_model
from tljax.edits.load import Load
from tljax.tree import flatten

RATE, DECAY, CLASSES, CHECKED = 1e-4, 0.05, 10, 3
QUERY_VALUE = ["q_proj", "v_proj", "query", "value"]  # ViT's names, and BERT's
DOWN = r".*(fc2|\d\.output\.dense)"  # the second layer of their MLPs
BLOCKS = ("ViTLayer", "BertLayer", "ResNetBasicLayer", "ResNetBottleNeckLayer")
PEFT = ("lora", "dora", "ia3", "vera")
TORCH = ("full", "probe", "bitfit", "norm", "last 2", *PEFT)
"""Methods that torch has as well: what moves is chosen here, or by peft."""
RANDOM = ("vera",)
"""Methods whose random parts differ between the sides, which their first loss does not read."""
Run = Callable[[int], list[Any]]
"""Make this many steps; return their losses, which may still be on their way."""


class Case(NamedTuple):
    """A model of transformers, by its configuration, and the size of an input."""

    kind: str
    fields: Mapping[str, Any]
    extent: int  # pixels or tokens


def transformer(width: int, depth: int) -> dict[str, int]:
    shape = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 4 * width}
    return shape | {"num_attention_heads": width // 64}


CASES = {
    "vit-s16": Case("vit", transformer(384, 12), 224),
    "vit-b16": Case("vit", transformer(768, 12), 224),
    "vit-l16": Case("vit", transformer(1024, 24), 224),
    "bert-base": Case("bert", transformer(768, 12), 128),
    "bert-large": Case("bert", transformer(1024, 24), 512),
    "resnet50": Case("resnet", {}, 224),
}
USUAL = ("full", "lora", "probe")
PASSES = {"full": 3, "lora": 2, "qlora": 2, "probe": 1}
"""Of the forward pass's products, of how many kinds a step has."""


def build_torch(case: Case) -> Any:
    """Build the model with random weights; its name and no file come from transformers."""
    declare_torchvision_ops()
    t = transformers
    kinds = {
        "vit": (t.ViTForImageClassification, t.ViTConfig, {"image_size": case.extent}),
        "bert": (t.BertForSequenceClassification, t.BertConfig, {}),
        "resnet": (t.ResNetForImageClassification, t.ResNetConfig, {}),
    }
    model, config, fields = kinds[case.kind]
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    off = {} if case.kind == "resnet" else off
    return model(config(**fields, **off, **case.fields, num_labels=CLASSES))


def draw_batch(case: Case, examples: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = {"label": np.arange(examples, dtype=np.int32) % CLASSES}
    if case.kind != "bert":
        shape = (examples, case.extent, case.extent, 3)
        return labels | {"image": rng.normal(size=shape).astype(np.float32)}
    vocab = case.fields.get("vocab_size", transformers.BertConfig().vocab_size)
    ids = rng.integers(1, vocab, (examples, case.extent)).astype(np.int32)
    mask, types = np.ones_like(ids), np.zeros_like(ids)
    return labels | {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def freeze(model: Any, method: str) -> Any:
    """Leave the method's parameters trainable, by peft where it has the method."""
    if method in PEFT:
        return graft(model, method)
    kinds = (torch.nn.LayerNorm, torch.nn.BatchNorm2d)
    modules = dict(model.named_modules())
    norms = tuple(f"{name}." for name, module in modules.items() if isinstance(module, kinds))
    blocks = [f"{name}." for name, part in modules.items() if type(part).__name__ in BLOCKS]
    moves = {
        "full": lambda name: True,
        "probe": lambda name: False,
        "bitfit": lambda name: name.endswith(".bias"),
        "norm": lambda name: name.startswith(norms),
        "last 2": lambda name: name.startswith((*blocks[-2:], "vit.layernorm.")),
    }[method]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = moves(name) or name.startswith("classifier")
    return model.train(method == "full")  # the others leave BatchNorm's statistics alone


def graft(model: Any, method: str) -> Any:
    import peft

    settings = {"target_modules": QUERY_VALUE, "modules_to_save": ["classifier"]}
    low_rank = settings | {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
    places = {"target_modules": rf".*(k_proj|v_proj|key|value)|{DOWN}", "feedforward_modules": DOWN}
    config = {
        "lora": lambda: peft.LoraConfig(**low_rank),
        "dora": lambda: peft.LoraConfig(**low_rank, use_dora=True),
        "ia3": lambda: peft.IA3Config(**(settings | places)),
        "vera": lambda: peft.VeraConfig(**settings, r=256, d_initial=0.1),
    }[method]()
    return peft.get_peft_model(model, config)


def run_torch(model: Any, batch: Mapping[str, np.ndarray], device: str, low: bool) -> Run:
    """Return the step in torch; with `low`, products are bfloat16 under autocast."""
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tokens = ("cls_token", "position_embeddings")  # as tljax has it, none of these decays
    decays = {n: p.ndim > 1 and not n.endswith(tokens) for n, p in moving.items()}
    groups = [
        {"params": [moving[n] for n in moving if decays[n] == own], "weight_decay": DECAY * own}
        for own in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    inputs = {name: torch.from_numpy(x) for name, x in batch.items()}
    inputs["labels"] = inputs.pop("label").long()
    if "image" in inputs:
        inputs["pixel_values"] = inputs.pop("image").permute(0, 3, 1, 2).contiguous()
    inputs = {name: x.to(device) for name, x in inputs.items()}

    def run(steps: int) -> list[Any]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=low):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if device == "cuda":
            torch.cuda.synchronize()
        return losses

    return run


def run_jax(
    folder: Path, method: str, batch: Mapping[str, np.ndarray], low: bool
) -> tuple[Run, int]:
    """Return tljax's step, from a folder of transformers or peft, and how much it trains."""
    dtype = jnp.dtype(jnp.bfloat16 if low else jnp.float32)
    mesh = sharding.make_mesh()
    found = tljax.load(folder, mesh=mesh, dtype=dtype)
    model = replace(found.model, **FIELDS.get(method, {}))
    values = flatten(found.variables)
    grafted = {path: x for path, x in values.items() if "/lora/" in path}
    base = {path: x for path, x in values.items() if path not in grafted}
    key = jax.random.key(0)
    made = assemble(
        model,
        batch,
        chosen(METHODS[method]),
        mesh=mesh,
        optimizer={"name": "adamw", "lr": RATE, "decay": DECAY, "steps": 1000, "fall": "constant"},
        source=(Load(base),),
        last=(Load(grafted),),
        start=start_of(jax.eval_shape(partial(init_model, model, batch), key)),
        dtype=dtype,
    )
    state, frozen = made.birth(key)
    inputs = sharding.put_batch(batch, mesh)

    def run(steps: int) -> list[Any]:
        nonlocal state
        losses = []
        for _ in range(steps):
            state, metrics = made.step(state, frozen, inputs)
            losses.append(metrics["loss"])
        return jax.block_until_ready(losses)

    return run, sum(leaf.size for leaf in jax.tree.leaves(state.params))


def pair(
    case: Case, method: str, examples: int, device: str, compiled: bool, low: bool
) -> dict[str, Run]:
    """Return both sides' steps, with the same weights and batch; tljax's where torch has none.

    Raises: AssertionError where they do not train as many numbers.
    """
    torch.manual_seed(0)
    batch = draw_batch(case, examples)
    has = method in TORCH and not (case.kind == "resnet" and method in PEFT)
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder, "base"), Path(folder, "adapter")
        build_torch(case).save_pretrained(base)
        model = freeze(type(build_torch(case)).from_pretrained(base), method) if has else None
        if reads := has and method in ("lora", "dora"):  # its factors start at random
            model.save_pretrained(adapter)
        run, ours = run_jax(adapter if reads else base, method, batch, low)
    runs = {"tljax": run}
    if has:
        theirs = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert ours == theirs, f"{method}: tljax trains {ours} numbers, torch {theirs}"
        runs["torch"] = run_torch(model.to(device), batch, device, low)
    if has and compiled:  # its parameters are the eager one's: the two take turns on them
        runs["torch.compile"] = run_torch(torch.compile(model), batch, device, low)
    return runs


def check(runs: Mapping[str, Run], low: bool, method: str = "full") -> dict[str, list[float]]:
    """Return the first losses of both sides; raises AssertionError where they differ.

    Adam turns float32 noise of small gradients into whole steps, so later losses drift apart; where
    random parts differ, only the first ones are compared.
    """
    sides = [name for name in ("tljax", "torch") if name in runs]
    losses = {name: [float(x) for x in runs[name](CHECKED)] for name in sides}
    first, later = (2e-2, 1e-1) if low else (2e-5, 1e-2)
    compared = 1 if method in RANDOM else CHECKED
    for index, (ours, *others) in enumerate(list(zip(*losses.values(), strict=True))[:compared]):
        for theirs in others:
            gap = abs(ours - theirs) / max(abs(theirs), 1)
            assert gap <= (later if index else first), f"step {index}: {ours} and {theirs}"
    return losses


def one_thread() -> None:
    """Give either side one thread; call it before jax has made its devices."""
    os.environ["NPROC"] = "1"
    torch.set_num_threads(1)


def clock(cpu: bool) -> Callable[[], float]:
    return time.process_time if cpu else time.perf_counter


def interleaved(
    runs: Mapping[str, Run], rounds: int, steps: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return seconds a step, once a round for every side; one round before them is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = clock()
            run(steps)
            if number:
                seconds[name].append((clock() - began) / steps)
    return seconds


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Return every side's time over tljax's, turn by turn."""
    own = seconds["tljax"]
    return {
        side: [value / mine for value, mine in zip(values, own, strict=True)]
        for side, values in seconds.items()
    }


def flops(case: Case, method: str) -> float:
    """Count a transformer step's floating-point operations for one example, of products alone."""
    width, depth = case.fields["hidden_size"], case.fields["num_hidden_layers"]
    tokens = case.extent if case.kind == "bert" else (case.extent // 16) ** 2 + 1
    forward = depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    return forward * PASSES[method]


def ceilings(side: int = 8192, repeats: int = 20) -> tuple[float, float]:
    """Measure operations a second of a bfloat16 product and bytes a second of a copy."""
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)

    def rate(function: Callable[[jax.Array], jax.Array], work: float) -> float:
        jax.block_until_ready(function(a))
        began = time.perf_counter()
        jax.block_until_ready([function(a) for _ in range(repeats)])
        return work * repeats / (time.perf_counter() - began)

    # A number is read and written; 1.5 is no identity that could be left out.
    copied = rate(jax.jit(lambda x: x * jnp.bfloat16(1.5)), 2 * a.nbytes)
    return rate(jax.jit(lambda x: x @ x), 2 * side**3), copied


def report(
    name: str, method: str, given: argparse.Namespace, best: float, own: dict[str, float]
) -> None:
    """Print one model's and one method's lines; `own` gathers tljax's times by method."""
    case, gpu = CASES[name], given.device == "gpu"
    runs = pair(case, method, given.batch, "cuda" if gpu else "cpu", given.compile, gpu)
    losses = check(runs, gpu, method)
    seconds = interleaved(runs, given.rounds, given.steps, clock(given.one_thread))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    shown = " ".join(
        "/".join(f"{x:.5f}" for x in row) for row in zip(*losses.values(), strict=True)
    )
    print(f"\n{name} {method}, batch {given.batch}, load {load}, first losses {shown}")
    for side, turns in ratios(seconds).items():
        values = seconds[side]
        middle = statistics.median(values)
        line = f"{side:13} {middle:8.4f} s ({min(values):.4f} to {max(values):.4f})"
        line += f"  {given.batch / middle:8.1f} examples/s"
        line += f"  {statistics.median(turns):.3f} ({min(turns):.3f} to {max(turns):.3f})"
        if gpu and case.kind != "resnet" and method in PASSES:
            line += f"  MFU {flops(case, method) * given.batch / middle / best:.1%}"
        print(line, flush=True)
    own[method] = statistics.median(seconds["tljax"])
    for line in beside(method, own):
        print(line, flush=True)


def beside(method: str, own: Mapping[str, float]) -> list[str]:
    """Compare a method's time with those of tljax's other methods, as far as they were taken."""
    others = {"full": "full", **({"lora": "LoRA"} if method == "qlora" else {})}
    return [
        f"{'':13} {own[other] / own[method]:.3f} x the speed of tljax's own {title}"
        for other, title in others.items()
        if other in own and other != method
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=CASES, default=["vit-s16"])
    usual = f"default: {', '.join(USUAL)}, and qlora on a GPU; any of {', '.join(METHODS)}"
    parser.add_argument("--method", nargs="+", choices=METHODS, metavar="METHOD", help=usual)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--batch", type=int, help="examples (default 8, on a GPU 256)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--steps", type=int, help="steps of a round (default 1, on a GPU 10)")
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
    parser.add_argument("--one-thread", action="store_true", help="CPU seconds of one thread each")
    given = parser.parse_args()
    if given.one_thread:
        one_thread()
    gpu = given.device == "gpu"
    given.batch, given.steps = given.batch or (256 if gpu else 8), given.steps or (10 if gpu else 1)
    jax.config.update("jax_platforms", "cuda" if gpu else "cpu")
    best = 0.0
    if gpu:  # torch's memory is on the same device
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        best, copied = ceilings()
        print(f"ceiling: {best / 1e12:.0f} TFLOP/s in bfloat16, copy {copied / 1e12:.2f} TB/s")
    for name in given.model:
        own: dict[str, float] = {}
        for method in given.method or (*USUAL, *["qlora"] * gpu):
            if method in CANNOT[CASES[name].kind]:
                print(f"\n{name} has no place for {method}")
                continue
            report(name, method, given, best, own)


if __name__ == "__main__":
    main()
