"""Loading as a tree edit: every leaf of both sides is loaded, adapted, fresh or ignored."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct

from tljax.tree import flatten, map_with_path, matches, nearest, require_live
from tljax.types import BadInput, Edit, Key, Rules, Tree

Adapt = tuple[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]]
"""How, in words, and the function (leaf, target shape) -> leaf that does it."""


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
        if absent := sorted(self.values.keys() - flatten(tree).keys()):
            near = nearest(absent[0], flatten(tree))
            raise BadInput(f"{absent[0]} is to be loaded, but is not in the tree (nearest: {near})")

        def fill(path: str, leaf: Any) -> Any:
            return jnp.asarray(self.values[path], leaf.dtype) if path in self.values else leaf

        return map_with_path(fill, tree)


class Row(NamedTuple):
    """What became of one leaf."""

    path: str
    status: str  # "loaded", "adapted", "fresh" or "ignored"
    detail: str  # the shape; how, or why
    size: int


@dataclass(frozen=True)
class Report:
    """The account of a load: target leaves in order, then ignored source leaves."""

    rows: tuple[Row, ...]
    share: float  # fraction of the source's numbers that were used
    ignored: Mapping[str, str]  # source leaf -> why it was not used

    def counts(self) -> dict[str, int]:
        """Return how many leaves have each status."""
        statuses = [row.status for row in self.rows]
        return {status: statuses.count(status) for status in dict.fromkeys(statuses)}

    def table(self) -> str:
        """Return the account as text, one leaf a line, the totals last."""
        width = max((len(row.path) for row in self.rows), default=0)
        lines = [f"{row.path:{width}}  {row.status:7}  {row.detail}" for row in self.rows]
        totals = ", ".join(f"{count} {status}" for status, count in self.counts().items())
        return "\n".join([*lines, f"{totals}; {self.share:.1%} of the pretrained numbers used"])


def crop(leaf: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Keep the leading part of every axis: how a position table is cut to a shorter length."""
    return leaf[tuple(slice(size) for size in shape)]


def keep(leaf: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Keep the leaf as it is: for what the model adapts in its call, such as a position table."""
    return leaf


def load(
    source: Tree, target: Tree, *, fresh: Rules = (), adapt: Rules = (), ignored: Rules = ()
) -> tuple[Edit, Report]:
    """Match pretrained leaves to those of an abstract tree, strictly, by path.

    `fresh`: (glob, why) of target leaves that keep their initial values.  `adapt`: (glob, `Adapt`)
    of leaves to change on the way.  `ignored`: (glob, why) of source leaves to leave out.

    Raises: BadInput for a rule that matches nothing, a target leaf without source, a source leaf
    without target, or a shape that differs, unless a rule names it.
    """
    given, wanted = flatten(source), flatten(target)
    for rules, paths in ((fresh, wanted), (ignored, given), (adapt, given)):
        require_live(rules, paths)
    why_fresh = {path: _first(fresh, path) for path in wanted}
    why_ignored = {path: _first(ignored, path) for path in given}
    _require_all_named(given, wanted, why_fresh, why_ignored)
    values, rows = {}, []
    for path, leaf in wanted.items():
        if why_fresh[path] is not None:
            rows.append(Row(path, "fresh", why_fresh[path], leaf.size))
            continue
        values[path], how = _fit(path, given[path], leaf.shape, _first(adapt, path))
        status, detail = "adapted" if how else "loaded", f"{tuple(leaf.shape)} {how}".rstrip()
        rows.append(Row(path, status, detail, leaf.size))
    unused = {path: why_ignored[path] or why_fresh[path] for path in given if path not in values}
    rows += [Row(path, "ignored", why, given[path].size) for path, why in unused.items()]
    used = sum(given[path].size for path in values) / sum(leaf.size for leaf in given.values())
    return Load(values), Report(tuple(rows), used, unused)


def _first(rules: Rules, path: str) -> Any:
    return next((value for glob, value in rules if matches(glob, path)), None)


def _require_all_named(
    given: Mapping[str, Any],
    wanted: Mapping[str, Any],
    why_fresh: Mapping[str, str | None],
    why_ignored: Mapping[str, str | None],
) -> None:
    usable = {path for path in given if why_ignored[path] is None}
    for path in wanted:
        if why_fresh[path] is None and path not in usable:
            raise BadInput(
                f"the source has no {path} (nearest there: {nearest(path, usable)})\n"
                f"to keep its initial value, name it in a `fresh` rule with the reason"
            )
    for path in sorted(usable):
        if path not in wanted:
            raise BadInput(
                f"the model has no {path} (nearest there: {nearest(path, wanted)})\n"
                f"to leave it out, name it in an `ignored` rule with the reason"
            )


def _fit(
    path: str, leaf: np.ndarray, shape: tuple[int, ...], adapt: Adapt | None
) -> tuple[np.ndarray, str]:
    how, change = adapt or ("", keep)
    fitted = change(leaf, shape)
    if fitted.shape != tuple(shape):
        raise BadInput(
            f"{path}: the source gives shape {leaf.shape}, the model expects {tuple(shape)}\n"
            f"name it in a `fresh` rule to start it anew, or in an `adapt` rule to change it"
        )
    return fitted, how


def digest_tree(tree: Tree) -> str:
    """Return the SHA-256 of a tree's paths, shapes, dtypes and bytes, whatever its order."""
    total = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        array = np.asarray(leaf)
        total.update(f"{path} {array.shape} {array.dtype}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()
