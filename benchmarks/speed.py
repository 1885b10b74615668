"""Train steps against torch: transformers, and peft for LoRA, with the same weights and batch.

launch/local.sh python benchmarks/speed.py --model vit-s16 --method full --rounds 5
python benchmarks/speed.py --device gpu --model vit-b16 vit-l16 bert-large --compile

A step is forward, backward and AdamW; dropout is off.  The losses of both sides must agree before
anything is timed.  The sides take turns (A B, A B, ..), so that a busy machine slows both, and
medians and the median ratio of the turns are printed: above 1 tljax is the faster one.  OpenMP
waits for its slowest thread, so that torch suffers more on a busy machine; --one-thread counts the
CPU seconds of one thread on either side, which others hardly change.  On a GPU
products are bfloat16 (torch by autocast), and MFU is the share of what a large matrix product
reaches in the same process; the weights' floating-point operations are counted, 2 to a product.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import tljax
from tljax import objectives, optim, sharding
from tljax.build import init_model, make_shardings
from tljax.edits.load import Load
from tljax.state import apply_edits, assign_roles, make_birth
from tljax.step import make_step
from tljax.strategies import make
from tljax.tree import flatten, split

RATE, DECAY, CLASSES, CHECKED = 1e-4, 0.05, 10, 3
QUERY_VALUE = ["q_proj", "v_proj", "query", "value"]  # ViT's names, and BERT's
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
METHODS = ("full", "lora", "probe")


def build_torch(case: Case) -> Any:
    """Build the model with random weights; its name and no file come from transformers."""
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
    """Leave the method's parameters trainable, by peft for LoRA."""
    if method == "lora":
        import peft

        settings = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": QUERY_VALUE}
        settings |= {"modules_to_save": ["classifier"]}
        return peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = method == "full" or name.startswith("classifier")
    return model.train(method == "full")  # a probe leaves BatchNorm's statistics alone


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


def run_jax(folder: Path, method: str, batch: Mapping[str, np.ndarray], low: bool) -> Run:
    """Return tljax's step, from a folder of transformers or peft."""
    dtype = jnp.dtype(jnp.bfloat16 if low else jnp.float32)
    mesh = sharding.make_mesh()
    found = tljax.load(folder, mesh=mesh, dtype=dtype)
    values = flatten(found.variables)
    grafted = {path: x for path, x in values.items() if "/lora/" in path}
    base = {path: x for path, x in values.items() if path not in grafted}
    key = jax.random.key(0)
    init = partial(init_model, found.model, batch)
    strategy = make(jax.eval_shape(init, key), found.model.read, [(method, {})])
    edits = (Load(base), *strategy.edits, Load(grafted))
    tree = jax.eval_shape(lambda edits, key: apply_edits(edits, init(key), key), edits, key)
    objective = sharding.under(mesh, objectives.make_objective("classify", found.model))
    roles = assign_roles(tree, (), strategy.roles, objective, batch, key).tree
    options = {"lr": RATE, "decay": DECAY, "steps": 1000, "fall": "constant"}
    tx = optim.make_tx(split(tree, roles).train, name="adamw", **options)
    birth = make_birth(init, roles, tx, dtype)
    abstract = jax.eval_shape(birth, edits, key)
    shardings = make_shardings(mesh, sharding.specs(tree, mesh), roles, tx, abstract[0])
    born = jax.jit(birth, out_shardings=(shardings.state, shardings.frozen))
    state, frozen = born(edits, key)
    step, inputs = make_step(objective, tx, 0, shardings), sharding.put_batch(batch, mesh)

    def run(steps: int) -> list[Any]:
        nonlocal state
        losses = []
        for _ in range(steps):
            state, metrics = step(state, frozen, inputs)
            losses.append(metrics["loss"])
        return jax.block_until_ready(losses)

    return run


def pair(
    case: Case, method: str, examples: int, device: str, compiled: bool, low: bool
) -> dict[str, Run]:
    """Return both sides' steps, with the same weights and batch."""
    torch.manual_seed(0)
    batch = draw_batch(case, examples)
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder, "base"), Path(folder, "adapter")
        build_torch(case).save_pretrained(base)
        model = freeze(type(build_torch(case)).from_pretrained(base), method)
        if method == "lora":
            model.save_pretrained(adapter)
        runs = {"tljax": run_jax(adapter if method == "lora" else base, method, batch, low)}
    runs["torch"] = run_torch(model.to(device), batch, device, low)
    if compiled:  # its parameters are the eager one's: the two take turns on them
        runs["torch.compile"] = run_torch(torch.compile(model), batch, device, low)
    return runs


def check(runs: Mapping[str, Run], low: bool) -> dict[str, list[float]]:
    """Return the first losses of both sides; raises AssertionError where they differ.

    Adam turns float32 noise of small gradients into whole steps, so later losses drift apart.
    """
    losses = {name: [float(x) for x in runs[name](CHECKED)] for name in ("tljax", "torch")}
    first, later = (2e-2, 1e-1) if low else (2e-5, 1e-2)
    for index, (ours, theirs) in enumerate(zip(*losses.values(), strict=True)):
        gap = abs(ours - theirs) / max(abs(theirs), 1)
        assert gap <= (later if index else first), f"step {index}: {ours} and {theirs}"
    return losses


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


def flops(case: Case, method: str) -> float:
    """Count a transformer step's floating-point operations for one example, of products alone."""
    width, depth = case.fields["hidden_size"], case.fields["num_hidden_layers"]
    tokens = case.extent if case.kind == "bert" else (case.extent // 16) ** 2 + 1
    forward = depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    return forward * {"full": 3, "lora": 2, "probe": 1}[method]


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


def report(name: str, method: str, given: argparse.Namespace, best: float) -> None:
    """Print one model's and one method's lines."""
    case, gpu = CASES[name], given.device == "gpu"
    runs = pair(case, method, given.batch, "cuda" if gpu else "cpu", given.compile, gpu)
    losses = check(runs, gpu)
    clock = time.process_time if given.one_thread else time.perf_counter
    seconds = interleaved(runs, given.rounds, given.steps, clock)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    shown = " ".join(f"{x:.5f}/{y:.5f}" for x, y in zip(*losses.values(), strict=True))
    print(f"\n{name} {method}, batch {given.batch}, load {load}, first losses {shown}")
    for side, values in seconds.items():
        turns = [value / own for value, own in zip(values, seconds["tljax"], strict=True)]
        middle = statistics.median(values)
        line = f"{side:13} {middle:8.4f} s ({min(values):.4f} to {max(values):.4f})"
        line += f"  {given.batch / middle:8.1f} examples/s"
        line += f"  {statistics.median(turns):.3f} ({min(turns):.3f} to {max(turns):.3f})"
        if gpu and case.kind != "resnet":
            line += f"  MFU {flops(case, method) * given.batch / middle / best:.1%}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=CASES, default=["vit-s16"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--batch", type=int, help="examples (default 8, on a GPU 256)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--steps", type=int, help="steps of a round (default 1, on a GPU 10)")
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
    parser.add_argument("--one-thread", action="store_true", help="CPU seconds of one thread each")
    given = parser.parse_args()
    if given.one_thread:
        os.environ["NPROC"] = "1"  # XLA reads it as its first device is made
        torch.set_num_threads(1)
    gpu = given.device == "gpu"
    given.batch, given.steps = given.batch or (256 if gpu else 8), given.steps or (10 if gpu else 1)
    jax.config.update("jax_platforms", "cuda" if gpu else "cpu")
    best = 0.0
    if gpu:  # torch's memory is on the same device
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        best, copied = ceilings()
        print(f"ceiling: {best / 1e12:.0f} TFLOP/s in bfloat16, copy {copied / 1e12:.2f} TB/s")
    for name in given.model:
        for method in given.method:
            if (CASES[name].kind, method) == ("resnet", "lora"):
                print(f"\n{name} lora: peft's default is dense layers, of which it has none")
                continue
            report(name, method, given, best)


if __name__ == "__main__":
    main()
