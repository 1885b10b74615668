"""Loading as a tree edit: every leaf of both sides is loaded, fresh or ignored."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct

from tljax.tree import flatten, label, nearest, unflatten
from tljax.types import BadInput, Edit, Key, Rules, Tree


@struct.dataclass
class Load:
    """Fill leaves with pretrained values: `{kernel: random}  ->  {kernel: pretrained}`.

    The values are leaves of this pytree, so that under jit they are arguments, not constants.
    """

    values: Mapping[str, Any]

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with its leaves replaced, each cast to the dtype it had.

        Raises: BadInput if the tree lacks a leaf that is to be filled.
        """
        leaves = flatten(tree)
        if absent := sorted(self.values.keys() - leaves.keys()):
            near = nearest(absent[0], leaves)
            raise BadInput(f"{absent[0]} is to be loaded, but is not in the tree (nearest: {near})")
        new = {path: jnp.asarray(x, leaves[path].dtype) for path, x in self.values.items()}
        return unflatten(leaves | new)


class Row(NamedTuple):
    """What became of one leaf."""

    path: str
    status: str  # "loaded", "adapted", "fresh" or "ignored"
    detail: str  # the shape; how, or why


class Report(NamedTuple):
    """The account of a load: target leaves in order, then ignored source leaves."""

    rows: tuple[Row, ...]
    share: float  # fraction of the source's numbers that were used

    def counts(self) -> Counter[str]:
        """Return how many leaves have each status."""
        return Counter(row.status for row in self.rows)

    def table(self) -> str:
        """Return the account as text, one leaf a line, the totals last."""
        width = max((len(row.path) for row in self.rows), default=0)
        lines = [f"{row.path:{width}}  {row.status:7}  {row.detail}" for row in self.rows]
        return "\n".join([*lines, self.totals()])

    def totals(self) -> str:
        """Return the account in one line."""
        totals = ", ".join(f"{count} {status}" for status, count in self.counts().items())
        return f"{totals}; {self.share:.1%} of the pretrained numbers used"


def load(
    source: Tree, target: Tree, *, fresh: Rules = (), adapted: Rules = (), ignored: Rules = ()
) -> tuple[Edit, Report]:
    """Match pretrained leaves as `match` does, and read them into an edit."""
    values, report = match(source, target, fresh=fresh, adapted=adapted, ignored=ignored)
    return Load({path: np.asarray(leaf) for path, leaf in values.items()}), report


def match(
    source: Tree, target: Tree, *, fresh: Rules = (), adapted: Rules = (), ignored: Rules = ()
) -> tuple[dict[str, Any], Report]:
    """Match pretrained leaves to those of an abstract tree, strictly, by path; none is read.

    `fresh`: (glob, why) of target leaves that keep their initial values.  `adapted`: (glob, how) of
    those that the model changes as it reads them.  `ignored`: (glob, why) of source leaves to leave
    out.

    Raises: BadInput for a rule that matches nothing, a target leaf without source, a source leaf
    without target, or a shape that differs, unless a rule names it.
    """
    given, wanted = flatten(source), flatten(target)
    why_fresh = flatten(label(target, fresh, None))
    why_ignored = flatten(label(source, ignored, None))
    usable = given.keys() - why_ignored.keys()
    if lacking := [path for path in wanted if path not in usable | why_fresh.keys()]:
        raise BadInput(
            f"the source has no {lacking[0]} (nearest there: {nearest(lacking[0], usable)})\n"
            "are the weights of this architecture?  From Python, `fresh` rules name exceptions"
        )
    if extra := sorted(usable - wanted.keys()):
        raise BadInput(
            f"the model has no {extra[0]} (nearest there: {nearest(extra[0], wanted)})\n"
            "are the weights of this architecture?  From Python, `ignored` rules name exceptions"
        )
    values = {path: given[path] for path in wanted if path not in why_fresh}
    for path, leaf in values.items():
        if leaf.shape != wanted[path].shape:
            foreign = f" (tensor {leaf.name})" if getattr(leaf, "name", "") else ""
            raise BadInput(
                f"{path}{foreign}: the source gives shape {leaf.shape}, the model expects "
                f"{wanted[path].shape}\ndoes the config override a size that the weights fix?"
            )
    how_adapted = flatten(label(target, adapted, None))
    status = {path: ("loaded", str(leaf.shape)) for path, leaf in values.items()}
    status |= {path: ("adapted", how) for path, how in how_adapted.items()}
    status |= {path: ("fresh", why) for path, why in why_fresh.items()}
    why = why_fresh | why_ignored
    rows = [Row(path, *status[path]) for path in wanted]
    rows += [Row(path, "ignored", why[path]) for path in given if path not in values]
    used = sum(leaf.size for leaf in values.values()) / sum(leaf.size for leaf in given.values())
    return values, Report(tuple(rows), used)
