"""What a run must not forget, kept beside the tree that moves: its start, or a frozen teacher."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import struct

from tljax.tree import flatten, unflatten
from tljax.types import Key, Tree


@struct.dataclass
class Anchor:
    """Keep where leaves are, with a weight: `{params}  ->  {params, anchor: {mean, weight}}`.

    weights: path -> scalar, or one weight a number; they are leaves of this pytree.  zero: paths
    that are pulled to zero, not to where they start.
    """

    weights: Mapping[str, Any]
    zero: tuple[str, ...] = struct.field(pytree_node=False, default=())

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with float32 copies of the weighted leaves below `anchor/mean`."""
        leaves = flatten(tree)
        start = {
            path: jnp.zeros_like(leaves[path], jnp.float32)
            if path in self.zero
            else jnp.asarray(leaves[path], jnp.float32)
            for path in self.weights
        }
        weight = {path: jnp.asarray(w, jnp.float32) for path, w in self.weights.items()}
        return tree | {"anchor": {"mean": unflatten(start), "weight": unflatten(weight)}}


@struct.dataclass
class Teach:
    """Set a frozen copy of the start beside the model: `{params}  ->  {params, teacher, old}`.

    head: the start's own head, which the teacher keeps; the student's copy `old/head` is trained.
    Without it (the model's head is the start's) the teacher has that one, and `old` is not made.
    """

    head: Mapping[str, Any] | None = None

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with the teacher's variables and, for a new task, the old head."""
        kept = {name: tree[name] for name in ("params", "batch_stats") if name in tree}
        copied = {path: jnp.asarray(leaf) for path, leaf in flatten(kept).items()}
        teacher = unflatten(copied)
        if self.head is None:
            return tree | {"teacher": teacher}
        own = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in self.head.items()}
        teacher["params"] = teacher["params"] | {"head": own}
        return tree | {"teacher": teacher, "old": {"head": dict(own)}}
