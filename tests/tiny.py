"""Tiny models with every kind of leaf, their batches, and a run of a strategy on any mesh."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import assembly, sharding
from tljax.assembly import Assembled, init_model
from tljax.models.bert import Bert
from tljax.models.resnet import ResNet
from tljax.models.vit import ViT
from tljax.strategies.strategy import Start
from tljax.tree import map_with_path

VIT = ViT(width=32, depth=4, heads=2, mlp=64, patch=4, grid=(2, 2), layer_scale=0.5, num_classes=3)
BERT = Bert(vocab=40, width=32, depth=2, heads=2, mlp=64, positions=8, num_classes=3)
MLM = dataclasses.replace(BERT, num_classes=None, mlm=True)
RESNET = ResNet(stages=(1, 1), width=8, stem="small", num_classes=3)


def image_batch(examples: int = 16, size: int = 8, classes: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(examples, size, size, 3)).astype(np.float32)
    return {"image": image, "label": np.arange(examples, dtype=np.int32) % classes}


def text_batch(examples: int = 16, length: int = 8, mlm: bool = False) -> dict[str, np.ndarray]:
    """Texts of unequal length; for mlm, microbatches of every fourth row predict unequal shares."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, BERT.vocab, (examples, length)).astype(np.int32)
    mask = np.arange(length) < rng.integers(2, length + 1, (examples, 1))
    share = np.linspace(0.1, 0.9, 4)[np.arange(examples) % 4]
    predicted = mask & (rng.random(ids.shape) < share[:, None])
    return {
        "input_ids": ids,
        "attention_mask": mask.astype(np.int32),
        "token_type_ids": (np.arange(length) >= 4).astype(np.int32) + 0 * ids,
        "label": np.where(predicted, ids, -1) if mlm else np.arange(examples, dtype=np.int32) % 3,
    }


QUICK = {"xla_backend_optimization_level": 0}


def one_device() -> sharding.Mesh:
    kinds = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=kinds, devices=jax.devices()[:1])


def random_tree(model: Any, batch: Any, seed: int = 1) -> Any:
    """Give every leaf random values of a sensible size, so that no zero hides an error."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> jax.Array:
        near = 1.0 if path.rsplit("/", 1)[-1] in ("scale", "gamma", "var") else 0.0
        return jnp.asarray(near + rng.normal(0, 0.1, leaf.shape), jnp.float32)

    return map_with_path(draw, abstract_tree(model, batch))


def abstract_tree(model: Any, batch: Any) -> Any:
    return jax.eval_shape(partial(init_model, model, batch), jax.random.key(0))


def assemble(
    model: Any,
    batch: Any,
    chosen: Any,
    *,
    mesh: sharding.Mesh | None = None,
    source: tuple = (),
    user: tuple = (),
    options: dict[str, Any] | None = None,
    extra: tuple = (),
    task: str = "classify",
    start: Start | None = None,
    microbatches: int = 1,
    dtype: Any = jnp.float32,
    **optimizer: Any,
) -> Assembled:
    """Assemble a run as `build` does, from plain values; by default of AdamW on one device."""
    settings = {"name": "adamw", "lr": 1e-3, "steps": 10, "clip": 1.0, "decay": 0.05}
    return assembly.assemble(
        model,
        batch,
        [(chosen, options or {})] if isinstance(chosen, str) else chosen,
        mesh=mesh or one_device(),
        optimizer=settings | optimizer,
        task=task,
        source=source,
        start=start,
        user=user,
        terms=extra,
        microbatches=microbatches,
        dtype=dtype,
    )


def compiled(run: Assembled, batch: Any) -> Any:
    """Compile a step ahead of time, quickly: compiling is all that tests of tiny models take."""

    def place(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=run.shardings.batch)

    return run.step.lower(*run.abstract, jax.tree.map(place, batch)).compile(QUICK)
