"""Birth of a run: edits, roles, parts, and a state that is born sharded."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tljax.tree import flatten, label, map_with_path, require_live, split, unread
from tljax.types import BadInput, Batch, Edit, Key, Objective, Role, Rules, Tree


@struct.dataclass
class State:
    """Everything a step changes, and everything a checkpoint holds.

    skipped: the steps whose loss or gradient was not finite, which moved nothing; in_a_row: of
    them, those since the last that did.  data_offset: the batch is that of step + data_offset.
    """

    step: jax.Array
    params: Tree
    track: Tree
    opt: Any
    skipped: jax.Array
    in_a_row: jax.Array
    data_offset: jax.Array

    def next(self, params: Tree, track: Tree, opt: Any, good: jax.Array) -> "State":
        """Return the state after a step; if that was not good, its results are thrown away."""
        new, old = (params, track, opt), (self.params, self.track, self.opt)
        params, track, opt = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
        counts = {"skipped": self.skipped + ~good, "in_a_row": (self.in_a_row + 1) * ~good}
        return replace(self, step=self.step + 1, params=params, track=track, opt=opt, **counts)


def first_state(params: Tree, track: Tree, opt: Any) -> State:
    """Return the state before the first step."""
    step, skipped, row, offset = (jnp.zeros((), jnp.int32) for _ in range(4))
    return State(step, params, track, opt, skipped, row, offset)


class Roles(NamedTuple):
    """The role of every leaf, and the leaves that stay frozen because nothing reads them."""

    tree: Tree
    unread: list[str]


def apply_edits(edits: Sequence[Edit], tree: Tree, key: Key) -> Tree:
    """Run edits in order, each with its own key."""
    for number, edit in enumerate(edits):
        tree = edit(tree, jax.random.fold_in(key, number))
    return tree


def assign_roles(
    tree: Tree, user: Rules, own: Rules, objective: Objective, batch: Batch, key: Key
) -> Roles:
    """Label every leaf of an abstract tree; the user's rules come before the strategy's own.

    A leaf that nothing reads and that a user's rule made trainable is an error; one that the
    strategy's default made trainable is frozen and listed.

    Raises: BadInput for a dead user rule or an unread trainable leaf the user named.
    """
    require_live(user, flatten(tree))
    roles = label(tree, (*user, *own), "freeze")
    asked = flatten(label(tree, user, "unasked"))
    idle = unread(objective, split(tree, roles), batch, key)
    mine = [path for path in idle if asked[path] == "train"]
    if mine:
        raise BadInput(
            f"{mine[0]} is to be trained, but the loss does not read it"
            f" ({len(mine)} such leaves): drop the rule, or read a later layer"
        )
    roles = map_with_path(lambda path, role: "freeze" if path in idle else role, roles)
    leaves, role_of = flatten(tree), flatten(roles)
    whole = [p for p, x in leaves.items() if not jnp.issubdtype(x.dtype, jnp.floating)]
    if fixed := [path for path in whole if role_of[path] == "train"]:
        raise BadInput(
            f"{fixed[0]} is to be trained, but is stored as {leaves[fixed[0]].dtype}: a quantised "
            "kernel stays frozen; train other leaves, or quantise other layers"
        )
    moved = flatten(jax.eval_shape(objective, tree, batch, key)[1].track)
    if odd := [path for path in moved if flatten(roles)[path] != "track"]:
        raise BadInput(f"{odd[0]} is moved by the forward pass: its role can only be track")
    if "train" not in flatten(roles).values():
        raise BadInput("nothing is trainable: every leaf is frozen, tracked or unread")
    return Roles(roles, idle)


def keep_beside(tree: Tree, roles: Roles, edit: Edit, role: Role, key: Key) -> tuple[Tree, Roles]:
    """Apply an edit to an abstract tree whose roles are settled; all that it adds has one role."""
    grown = jax.eval_shape(lambda tree, key: edit(tree, key), tree, key)
    added = {name: part for name, part in grown.items() if name not in tree}
    return grown, roles._replace(tree=roles.tree | map_with_path(lambda *_: role, added))


def to_compute_dtype(frozen: Tree, dtype: Any) -> Tree:
    """Cast frozen float32 parameters to the compute dtype; statistics and anchors keep theirs.

    So do the scales of quantised kernels, which lie below `kernel`.
    """

    def cast(path: str, leaf: Any) -> Any:
        exact = {"batch_stats", "fixed_stats", "anchor", "kernel"} & set(path.split("/")[:-1])
        return leaf.astype(dtype) if not exact and leaf.dtype == jnp.float32 else leaf

    return map_with_path(cast, frozen)


def make_birth(
    init: Callable[[Key], Tree], roles: Tree, tx: optax.GradientTransformation, dtype: Any
) -> Callable[[Sequence[Edit], Key], tuple[State, Tree]]:
    """Return the function that builds (state, frozen) from edits and a key.

    Run it under `jit` with `out_shardings`: loaded arrays are arguments, not constants, and no
    leaf ever exists unsharded.
    """

    def birth(edits: Sequence[Edit], key: Key) -> tuple[State, Tree]:
        init_key, edit_key = jax.random.split(key)
        parts = split(apply_edits(edits, init(init_key), edit_key), roles)
        state = first_state(parts.train, parts.track, tx.init(parts.train))
        return state, to_compute_dtype(parts.freeze, dtype)

    return birth


def optimizer_specs(tx: optax.GradientTransformation, opt: Any, specs: Tree, scalar: Any) -> Any:
    """Give every optimizer leaf the spec of the parameter it belongs to, else `scalar`."""
    return optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, opt, specs, transform_non_params=lambda _: scalar
    )
