"""What loading costs: a ViT-L of 1.2 GB by `tljax.load`, beside the official safetensors library.

python benchmarks/loading.py

Writes random weights to a temporary folder, then reads them in fresh processes, in turn.  Seconds
are those of the one call, after imports; memory is the peak of the process above what it held
before the call.  `mesh` spreads the leaves over eight simulated devices.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CONFIG = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 1024,
    "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "num_channels": 3, "qkv_bias": True,
}  # fmt: skip
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
MODES = {"official": {}, "tljax": {}, "mesh": EIGHT}
WRITE = "write"  # also in a process of its own: a child inherits the peak of its parent


def write(folder: Path, depth: int) -> None:
    """Write a random ViT-L in float32."""
    import safetensors.numpy

    from tljax.models.vit import ViT
    from tljax.pretrained import target_of
    from tljax.tree import map_with_path
    from tljax.weights.hf import HF
    from tljax.weights.hf_config import read_fields
    from tljax.weights.table import to_foreign

    config = CONFIG | {"num_hidden_layers": depth, "id2label": {"0": "a", "1": "b"}}
    fields = read_fields(config, "config") | {"num_classes": 2}
    rng = np.random.default_rng(0)
    draw = lambda _, x: rng.standard_normal(x.shape, np.float32)  # noqa: E731
    tree = map_with_path(draw, target_of(ViT(**fields), {}))
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(to_foreign(tree, HF.spell("vit", fields, "vit."), fields), path)
    (folder / "config.json").write_text(json.dumps(config))


def held() -> float:
    """Return the most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def measure(mode: str, folder: Path) -> None:
    """Load once in this process, and print seconds and bytes."""
    import jax
    import safetensors.numpy

    from tljax.pretrained import load
    from tljax.sharding import make_mesh

    jax.block_until_ready(jax.numpy.zeros(1))  # the backend is up
    path = folder / "model.safetensors"
    calls = {
        "official": lambda: safetensors.numpy.load_file(path),
        "tljax": lambda: load(folder).variables,
        "mesh": lambda: load(folder, mesh=make_mesh(1, -1)).variables,
    }
    before, began = held(), time.perf_counter()
    calls[mode]()
    print(json.dumps({"seconds": time.perf_counter() - began, "bytes": held() - before}))


def main() -> None:
    """Measure every mode in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=24, help="blocks: 24 make 1.2 GB")
    parser.add_argument("--measure", choices=(*MODES, WRITE), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure == WRITE:
        write(options.folder, options.depth)
        return
    if options.measure:
        measure(options.measure, options.folder)
        return
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, __file__, f"--folder={place}", f"--depth={options.depth}"]
        subprocess.run([*words, f"--measure={WRITE}"], check=True)
        size = Path(place, "model.safetensors").stat().st_size
        found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for _ in range(options.rounds):
            for mode, extra in MODES.items():
                done = subprocess.run(
                    [*words, f"--measure={mode}"],
                    env=os.environ | extra, stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
                found[mode].append(json.loads(done.stdout))
    print(f"file: {size / 1e9:.2f} GB; medians of {options.rounds}")
    base = statistics.median(run["seconds"] for run in found["official"])
    for mode, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        most = max(run["bytes"] for run in runs)
        print(
            f"{mode:9} {seconds:6.2f} s  {seconds / base:5.2f} x official   "
            f"peak {most / 1e9:5.2f} GB = {most / size:4.2f} x the file"
        )


if __name__ == "__main__":
    main()
