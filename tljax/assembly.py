"""A model and a strategy made into what runs: its tree, roles, birth and step.

Only shapes are computed here; nothing is loaded, placed or compiled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from tljax import features, objectives, optim, sharding, state
from tljax.step import Shardings, make_step
from tljax.strategies import make
from tljax.strategies.strategy import Average, Start, Strategy, faster
from tljax.tree import flatten, matches, split
from tljax.types import Batch, Edit, Key, Objective, Rules, Tree


class Settled(NamedTuple):
    """A strategy on a model's tree: what is edited, what moves, and by which loss."""

    strategy: Strategy
    edits: tuple[Edit, ...]
    tree: Tree
    roles: state.Roles
    objective: Objective


@dataclass(frozen=True)
class Assembled:
    """All of a run but its data; `birth(key)` gives (state, frozen), shaped like `abstract`."""

    strategy: Strategy
    tree: Tree
    roles: state.Roles
    specs: Tree
    shardings: Shardings
    birth: Callable[[Key], tuple[state.State, Tree]]
    abstract: tuple[state.State, Tree]
    objective: Objective
    step: jax.stages.Wrapped


def assemble(
    model: nn.Module, batch: Batch, chosen: Sequence[tuple[str, Mapping[str, Any]]], *,
    mesh: sharding.Mesh, optimizer: Mapping[str, Any], task: str = "classify",
    source: Sequence[Edit] = (), last: Sequence[Edit] = (), start: Start | None = None,
    user: Rules = (), specs: Rules = (), terms: Sequence[Objective] = (), ema: float | None = None,
    microbatches: int = 1, dtype: Any = jnp.float32, seed: int = 0,
) -> Assembled:  # fmt: skip
    """Apply named strategies with their options to a model, and make its birth and its step.

    batch: gives shapes alone.  optimizer: what `optim.make_tx` takes, without groups; `head_rate`
    beside it is the heads' multiple of the learning rate.  source: edits before the strategy's,
    unless it loads nothing; last: edits after them.  start: what the source is.  user: roles that
    come before the strategy's.  terms: of the loss, beside its own.
    Raises: BadInput for whatever does not fit the model's tree.
    """
    key = jax.random.key(seed)
    init = partial(init_model, model, batch)
    tree = jax.eval_shape(init, key)
    strategy = make(tree, getattr(model, "read", None), chosen, start)
    edits = (*(source if strategy.loads else ()), *strategy.edits, *last)
    tree = jax.eval_shape(partial(state.apply_edits, edits), tree, key)
    own = objectives.make_objective(task, model, strategy.readings)
    objective = sharding.under(mesh, objectives.add(own, *strategy.terms, *terms))
    roles = state.assign_roles(tree, user, strategy.roles, objective, batch, key)
    settled = keep(Settled(strategy, edits, tree, roles, objective), ema, microbatches, key)
    trainable = split(settled.tree, settled.roles.tree).train
    moving = flatten(trainable)  # a user's role may have frozen what a group names
    settings = dict(optimizer)
    groups = (*faster(tree, settings.pop("head_rate", 1.0)), *strategy.groups)
    live = [rule for rule in groups if any(matches(rule[0], path) for path in moving)]
    tx = optim.make_tx(trainable, **settings, groups=live)
    birth = state.make_birth(init, settled.roles.tree, tx, dtype)
    return finish(settled, birth, tx, batch, mesh, specs, microbatches, seed)


def keep(settled: Settled, ema: float | None, microbatches: int, key: Key) -> Settled:
    """Set beside the tree what follows from its trained leaves: their anchor, their average."""
    strategy, edits, tree, roles, objective = settled
    trained = tuple(path for path, role in flatten(roles.tree).items() if role == "train")
    if strategy.anchor:
        edits = (*edits, strategy.anchor(trained))
        tree, roles = state.keep_beside(tree, roles, edits[-1], "freeze", key)
    if ema:
        edits = (*edits, Average(trained))
        tree, roles = state.keep_beside(tree, roles, edits[-1], "track", key)
        objective = objectives.average(objective, ema ** (1 / microbatches))
    return Settled(strategy, edits, tree, roles, objective)


def finish(
    settled: Settled, birth: Callable[..., Any], tx: optax.GradientTransformation, batch: Batch,
    mesh: sharding.Mesh, rules: Rules, microbatches: int, seed: int,
) -> Assembled:  # fmt: skip
    """Give every leaf its place, and jit birth and step with these."""
    strategy, edits, tree, roles, objective = settled
    abstract = jax.eval_shape(birth, edits, jax.random.key(seed))
    specs = sharding.specs(tree, mesh, rules)
    shardings = make_shardings(mesh, specs, roles.tree, tx, abstract[0])
    born = jax.jit(birth, out_shardings=(shardings.state, shardings.frozen))
    return Assembled(
        strategy=strategy,
        tree=tree,
        roles=roles,
        specs=specs,
        shardings=shardings,
        birth=partial(born, edits),
        abstract=place(abstract, (shardings.state, shardings.frozen)),
        objective=objective,
        step=make_step(features.filled(objective, batch), tx, seed, shardings, microbatches),
    )


def init_model(model: nn.Module, batch: Any, key: jax.Array) -> Tree:
    """Create the model's variables from a key; `batch` gives shapes alone."""
    like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), objectives.inputs_of(batch))
    return model.init(key, *like)


def make_shardings(
    mesh: sharding.Mesh, specs: Tree, roles: Tree, tx: Any, born: state.State
) -> Shardings:
    """Give state, frozen tree, batch and scalars their places; optimizer leaves follow theirs."""
    scalar = sharding.on(mesh, sharding.REPLICATED)
    parts = split(sharding.on(mesh, specs), roles)
    opt = state.optimizer_specs(tx, born.opt, parts.train, scalar)
    placed = state.State(scalar, parts.train, parts.track, opt, scalar, scalar, scalar)
    return Shardings(placed, parts.freeze, sharding.on(mesh, sharding.BATCH), scalar)


def place(abstract: Any, shardings: Any) -> Any:
    """Attach shardings to shapes, so that a checkpoint can be read onto them."""
    return jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own),
        abstract,
        shardings,
    )
