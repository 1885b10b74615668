"""What one choice is worth on real data: both settings over the same seeds, and their difference.

    python benchmarks/paired.py precision                        # bfloat16 compute against float32
    python benchmarks/paired.py quantization                     # QLoRA against LoRA
    python benchmarks/paired.py pretraining runs/pretrain-bert   # a masked language model's weights
                                                                 # against random initialisation

`precision` and `quantization` adapt the demo's two models by LoRA; the latter says how far int8
and nf4 move what the pretrained models compute.  `pretraining` first compares the held-out loss
with the entropy of the held-out tokens' own frequencies, below which no model that ignores context
can go; then each setting gets the better of two learning rates on validation (seed 0).  Test is
read once a seed; the interval is Student's t over the paired differences.  Needs the assets that
the demo fetches, and `wordnet`.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from tljax import demo, objectives
from tljax.build import Experiment, build, open_parts
from tljax.config import parse
from tljax.data.pipeline import open_pipeline
from tljax.data.sources import Source
from tljax.inference import open_finished
from tljax.metrics import mean_interval
from tljax.models import MODELS
from tljax.plan import compile_step
from tljax.source import RESULT
from tljax.state import apply_edits
from tljax.strategies import make
from tljax.train import score
from tljax.tree import join

Settings = dict[str, tuple[dict[str, Any], tuple[float, ...]]]
"""name -> (config, the learning rates to choose from)."""


def accuracies(config: dict[str, Any], rates: tuple[float, ...], seeds: int) -> list[float]:
    """Return the test accuracy of every seed, at the better rate on validation of seed 0."""
    parsed = parse(config)
    experiment = build(parsed, open_parts(parsed))
    compiled = compile_step(experiment)

    def train(rate: float, seed: int) -> Any:
        return next(
            islice(demo.trees(experiment, compiled, rate, seed), parsed.run.steps - 1, None)
        )

    trees = {rate: train(rate, 0) for rate in rates}
    validation = {rate: accuracy(experiment, tree, "validation") for rate, tree in trees.items()}
    best = max(validation, key=lambda rate: validation[rate])
    others = (train(best, seed) for seed in range(1, seeds))
    return [accuracy(experiment, tree, "test") for tree in (trees[best], *others)]


def accuracy(experiment: Experiment, tree: Any, split: str) -> float:
    """Return the accuracy of a tree on a split."""
    return score(experiment, tree, split)["accuracy"]


def compare(title: str, settings: Settings, seeds: int) -> None:
    """Print the accuracies of two settings, the second minus the first with its interval."""
    found = {name: accuracies(*setting, seeds) for name, setting in settings.items()}
    for name, values in found.items():
        each = " ".join(f"{value:.4f}" for value in values)
        print(f"{title:28} {name:12} mean {np.mean(values):.4f}  seeds {each}", flush=True)
    first, second = found.values()
    difference = np.subtract(second, first)
    low, high = mean_interval(difference)
    print(f"{title:28} difference   {np.mean(difference):+.4f}  [{low:+.4f}, {high:+.4f}]")


def precision(seeds: int) -> None:
    """Compare compute dtypes on the demo's two jobs; frozen weights are stored in them too."""
    for title in demo.JOBS:
        config = demo.configure(title, "lora", fast=False).model_dump()
        settings = {
            dtype: (config | {"precision": {"compute": dtype}}, demo.RATES["lora"][-1:])
            for dtype in ("float32", "bfloat16")
        }
        compare(f"{config['weights']} lora", settings, seeds)


def drift(experiment: Experiment, forms: tuple[str, ...]) -> None:
    """Print how far quantised kernels move the pretrained model's features, on validation."""
    model = MODELS[experiment.facts["name"]](**experiment.facts["fields"])
    batch = next(experiment.data.eval_batches("validation"))
    state, frozen = experiment.birth(jax.random.key(0))
    tree = join(state.params, state.track, frozen)
    features = jax.jit(lambda tree, batch: objectives.infer(model, tree, batch).pooled)
    before = features(tree, batch)
    for form in forms:
        edits = make(tree, model.read, [("quantize", {"form": form})]).edits
        after = features(apply_edits(edits, tree, jax.random.key(0)), batch)
        moved = jnp.linalg.norm(after - before) / jnp.linalg.norm(before)
        title = f"{experiment.config.weights:28} {form:12}"
        print(f"{title} moves the features by {moved:.4f} of their norm", flush=True)


def quantization(seeds: int) -> None:
    """Compare LoRA on float32 kernels with LoRA on kernels of 8 and 4 bits."""
    for title in demo.JOBS:
        config = demo.configure(title, "lora", fast=False).model_dump()
        probe = parse(config | {"strategy": {"name": "probe"}})
        drift(build(probe, open_parts(probe)), ("int8", "nf4"))
        for form in ("int8", "nf4"):
            chosen = (*config["strategy"], {"name": "quantize", "form": form})
            rates = demo.RATES["lora"][:1]
            settings = {"lora": (config, rates), form: (config | {"strategy": chosen}, rates)}
            compare(config["weights"], settings, seeds)


def unigram_entropy(source: Source, special: list[int]) -> float:
    """Return the entropy of token frequencies (nats a token), special tokens left out."""
    rows = source.__getitems__(range(len(source)))
    counts = np.bincount(np.concatenate([row["input_ids"] for row in rows]))
    counts[special] = 0
    return float(stats.entropy(counts))


def pretraining(run: Path, seeds: int) -> None:
    """Compare a masked language model's weights with random ones of the same architecture."""
    finished = open_finished(run)
    data = open_pipeline(finished.config.data, "mlm", seed=finished.config.seed, **finished.reads)
    nll = json.loads((run / RESULT).read_text())["test"]["nll"]
    entropy = unigram_entropy(data.splits.test, data.tokenizer.special)
    print(f"held-out loss {nll:.3f} nats a masked token; unigram entropy {entropy:.3f}")
    for name in ("wordnet", "sentiment/movies"):
        base = {
            "data": {"name": name, "labels": 1000, "validation": 500, "length": 32},
            "weights": str(run),
            "model": {"pool": "mean"},
            "optim": {"decay": 0.01, "warmup": 20},
            "run": {"steps": 200, "batch": 32},
        }
        base["data"] |= {"test": "test[:2000]"}
        tuned = base | {"optim": base["optim"] | {"head_rate": 10.0}}
        settings = {
            "random": (base | {"strategy": {"name": "scratch"}}, (3e-4, 1e-3)),
            "pretrained": (tuned | {"strategy": {"name": "full"}}, (1e-4, 3e-4)),
        }
        compare(name, settings, seeds)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("choice", choices=("precision", "quantization", "pretraining"))
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished MLM run")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.choice in ("precision", "quantization"):
        {"precision": precision, "quantization": quantization}[arguments.choice](arguments.seeds)
    elif arguments.run is None:
        parser.error("pretraining needs the folder of a finished MLM run")
    else:
        pretraining(arguments.run, arguments.seeds)


if __name__ == "__main__":
    main()
