"""Tiny models with every kind of leaf, their batches, and a run of a strategy on any mesh."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import objectives, optim, sharding
from tljax.build import init_model, make_shardings
from tljax.models.bert import Bert
from tljax.models.resnet import ResNet
from tljax.models.vit import ViT
from tljax.state import Roles, State, apply_edits, assign_roles, keep_beside, make_birth
from tljax.step import make_step
from tljax.strategies import Start, make
from tljax.tree import flatten, map_with_path, split

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


class Run(NamedTuple):
    """A strategy applied to a model: what `build` decides, from plain values."""

    roles: Roles
    specs: Any
    shardings: Any
    birth: Any
    abstract: tuple[State, Any]
    step: Any
    objective: Any
    tree: Any


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
    task: str = "classify",
    mesh: sharding.Mesh | None = None,
    source: tuple = (),
    user: tuple = (),
    options: dict[str, Any] | None = None,
    extra: tuple = (),
    microbatches: int = 1,
    ambient: bool = True,
    start: Start | None = None,
    dtype: Any = jnp.float32,
    **optimizer: Any,
) -> Run:
    key, mesh = jax.random.key(0), mesh or one_device()
    init = partial(init_model, model, batch)
    chosen = [(chosen, options or {})] if isinstance(chosen, str) else chosen
    strategy = make(jax.eval_shape(init, key), model.read, chosen, start)
    edits = (*source, *strategy.edits) if strategy.loads else strategy.edits
    tree = jax.eval_shape(lambda key: apply_edits(edits, init(key), key), key)
    objective = objectives.make_objective(task, model, strategy.readings)
    objective = objectives.add(objective, *strategy.terms, *extra)
    objective = sharding.under(mesh, objective) if ambient else objective
    roles = assign_roles(tree, user, strategy.roles, objective, batch, key)
    if strategy.anchor:
        trained = [path for path, role in flatten(roles.tree).items() if role == "train"]
        edits = (*edits, strategy.anchor(trained))
        tree, roles = keep_beside(tree, roles, edits[-1], "freeze", key)
    settings = {"name": "adamw", "lr": 1e-3, "steps": 10, "clip": 1.0, "decay": 0.05}
    settings |= {"groups": strategy.groups}
    tx = optim.make_tx(split(tree, roles.tree).train, **(settings | optimizer))
    birth = make_birth(init, roles.tree, tx, dtype)
    abstract = jax.eval_shape(birth, edits, key)
    specs = sharding.specs(tree, mesh)
    shardings = make_shardings(mesh, specs, roles.tree, tx, abstract[0])
    born = jax.jit(birth, out_shardings=(shardings.state, shardings.frozen))
    step = make_step(objective, tx, 0, shardings, microbatches)
    return Run(roles, specs, shardings, partial(born, edits), abstract, step, objective, tree)


def compiled(run: Run, batch: Any) -> Any:
    """Compile a step ahead of time, quickly: compiling is all that tests of tiny models take."""

    def place(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=run.shardings.batch)

    return run.step.lower(*run.abstract, jax.tree.map(place, batch)).compile(QUICK)
