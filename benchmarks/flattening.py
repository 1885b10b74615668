"""A full train step of ViT-S/16 on CPU: Dense with and without its flattening, beside torch eager.

python benchmarks/flattening.py --batch 8 --image-size 224 --rounds 5

The three are run in turn (A B C, A B C, ..) so that a busy machine slows all of them, and medians
are printed.  A step is forward, backward and AdamW in float32.  torch is optional.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from tljax import layers
from tljax.models.vit import ViT

PATCH, WIDTH, DEPTH, HEADS, HIDDEN, CLASSES = 16, 384, 12, 6, 1536, 10


class PlainDense(nn.Module):
    """Dense as one would write it: [b, l, d] stays [b, l, d]."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = layers.lecun_normal

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = jnp.matmul(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def jax_step(image: np.ndarray, label: np.ndarray, dense: type[nn.Module]) -> Callable[[], float]:
    """Return a function that makes one step, compiled with `dense` as the dense layer."""
    cells = image.shape[1] // PATCH
    shape = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "mlp": HIDDEN, "patch": PATCH}
    model = ViT(**shape, grid=(cells, cells), num_classes=CLASSES)
    tx = optax.adamw(1e-4)

    def loss(params, image, label):
        logits = model.apply({"params": params}, image).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def step(params, opt, image, label):
        value, grads = jax.value_and_grad(loss)(params, image, label)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    with mock.patch.object(layers, "Dense", dense):
        params = jax.jit(model.init)(jax.random.key(0), image)["params"]
        state = params, jax.jit(tx.init)(params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, image, label).compile()

    def run() -> float:
        nonlocal state
        *state, value = compiled(*state, image, label)
        return float(value)

    return run


def torch_step(image: np.ndarray, label: np.ndarray) -> Callable[[], float] | None:
    """Return the same step in torch eager, or None where torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    functional = torch.nn.functional

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (torch.nn.LayerNorm(WIDTH, 1e-6) for _ in range(2))
            names = ("query", "key", "value", "out")
            self.dense = torch.nn.ModuleDict({n: torch.nn.Linear(WIDTH, WIDTH) for n in names})
            self.up, self.down = torch.nn.Linear(WIDTH, HIDDEN), torch.nn.Linear(HIDDEN, WIDTH)

        def forward(self, x):
            y = self.norm1(x)
            q, k, v = (
                self.dense[name](y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + self.dense["out"](y.transpose(1, 2).flatten(2))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = torch.nn.Conv2d(3, WIDTH, PATCH, PATCH)
            tokens = 1 + (image.shape[1] // PATCH) ** 2
            self.cls = torch.nn.Parameter(torch.zeros(1, 1, WIDTH))
            self.pos = torch.nn.Parameter(0.02 * torch.randn(1, tokens, WIDTH))
            self.blocks = torch.nn.Sequential(*(Block() for _ in range(DEPTH)))
            self.norm, self.head = torch.nn.LayerNorm(WIDTH, 1e-6), torch.nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
            return self.head(self.norm(self.blocks(x))[:, 0])

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    inputs = torch.tensor(image).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(label).long()

    def run() -> float:
        optimizer.zero_grad()
        value = functional.cross_entropy(net(inputs), labels)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return run


def interleaved(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Time every step once a round; one round before them is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="examples (default 8)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    given = parser.parse_args()
    if given.image_size % PATCH:
        parser.error(f"--image-size must be a multiple of {PATCH}")
    rng = np.random.default_rng(0)
    image = rng.normal(size=(given.batch, given.image_size, given.image_size, 3))
    image, label = image.astype(np.float32), np.arange(given.batch, dtype=np.int32) % CLASSES
    steps = {
        "flattened": jax_step(image, label, layers.Dense),
        "unflattened": jax_step(image, label, PlainDense),
    }
    if reference := torch_step(image, label):
        steps["torch eager"] = reference
    else:
        print("torch is not installed: its line is left out")
    seconds = interleaved(steps, given.rounds)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    cores, what = os.cpu_count(), f"batch {given.batch}, {given.image_size} px"
    print(f"ViT-S/16 full step, {what}, {given.rounds} rounds, {cores} cores, load {load}")
    first = statistics.median(seconds["flattened"])
    for name, values in seconds.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        print(f"{name:12} median {middle:6.2f} s ({low:.2f} to {high:.2f}), {middle / first:.2f}")


if __name__ == "__main__":
    main()
