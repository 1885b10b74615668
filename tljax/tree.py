"""One path language over nested dicts: label, split, join, edit, unread, reads.

A path joins the keys from the root to a leaf or subtree with "/".  A glob is a path in which `*`
stands for anything within one segment and `**` for any number of whole segments:
`params/blocks/*/attention/query/kernel`, `**/lora/a`, `params/head/**`.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.interpreters import partial_eval

from tljax.types import BadInput, Batch, Key, Objective, Rules, Tree


class Parts(NamedTuple):
    """A tree split by role: same structure three times, None where a leaf is absent."""

    train: Tree
    track: Tree
    freeze: Tree


def _below(path: str, name: Any) -> str:
    return f"{path}/{name}" if path else str(name)


def subtrees(tree: Tree, path: str = "") -> dict[str, Tree]:
    """Map the path of every subtree and leaf below the root to it."""
    found = {path: tree} if path else {}
    for name, child in tree.items() if isinstance(tree, Mapping) else ():
        found |= subtrees(child, _below(path, name))
    return found


def flatten(tree: Tree) -> dict[str, Any]:
    """Map the path of every leaf to the leaf; holes (None) are left out."""
    nodes = subtrees(tree).items()
    return {path: x for path, x in nodes if x is not None and not isinstance(x, Mapping)}


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """Build nested dicts from a mapping of paths: the inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Tree, path: str = "") -> Tree:
    """Apply `function(path, leaf)` to every leaf; holes stay holes."""
    if isinstance(tree, Mapping):
        return {k: map_with_path(function, x, _below(path, k)) for k, x in tree.items()}
    return None if tree is None else function(path, tree)


@functools.cache
def _pattern(glob: str) -> re.Pattern[str]:
    def translate(segment: str) -> str:
        return ".+" if segment == "**" else re.escape(segment).replace(r"\*", "[^/]*")

    # Only a whole segment gives a bare ".+"; before others it may also be absent.
    return re.compile("/".join(map(translate, glob.split("/"))).replace(".+/", "(?:.+/)?"))


def matches(glob: str, path: str) -> bool:
    """Tell whether the whole of `path` is matched by `glob`."""
    return _pattern(glob).fullmatch(path) is not None


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return the candidates closest to `name`, for error messages."""
    candidates = list(dict.fromkeys(candidates))
    close = difflib.get_close_matches(name, candidates, n=count, cutoff=0.3)
    return ", ".join(close or candidates[:count]) or "nothing"


def require_live(rules: Rules, paths: Iterable[str], what: str = "rule") -> None:
    """Raise BadInput if a rule matches none of `paths`; `what` names it in the message.

    A dead rule is how a misspelt layer trains, or freezes, without anybody noticing.
    """
    paths = list(paths)
    for glob, _ in rules:
        if not any(matches(glob, path) for path in paths):
            raise BadInput(
                f"{what} {glob!r} matches nothing; nearest paths: {nearest(glob, paths)}"
            )


def label(tree: Tree, rules: Rules, default: Any) -> Tree:
    """Give every leaf the value of the first rule that matches its path.

    Raises: BadInput for a rule that matches no leaf.
    """
    require_live(rules, flatten(tree))

    def value(path: str, _: Any) -> Any:
        return next((value for glob, value in rules if matches(glob, path)), default)

    return map_with_path(value, tree)


def split(tree: Tree, roles: Tree) -> Parts:
    """Separate a tree by role: `{a, b}  ->  {a, None}, {None, None}, {None, b}`."""

    def keep(role: str) -> Tree:
        return jax.tree.map(lambda leaf, own: leaf if own == role else None, tree, roles)

    return Parts(keep("train"), keep("track"), keep("freeze"))


def join(*trees: Tree) -> Tree:
    """Fill the holes of the first tree from the following ones, left to right."""
    present = [tree for tree in trees if tree is not None]
    if not present:
        return None
    if not isinstance(present[0], Mapping):
        return present[0]
    names = dict.fromkeys(name for tree in present for name in tree)
    return {name: join(*(tree.get(name) for tree in present)) for name in names}


def edit(tree: Tree, rules: Sequence[tuple[str, Callable[[Tree], Tree]]]) -> Tree:
    """Replace every subtree (or leaf) whose path matches a glob by `function(subtree)`.

    Raises: BadInput for a rule that matches no subtree.
    """
    require_live(rules, subtrees(tree))

    def walk(node: Tree, path: str) -> Tree:
        for glob, function in rules:
            if path and matches(glob, path):
                return function(node)
        if not isinstance(node, Mapping):
            return node
        return {name: walk(child, _below(path, name)) for name, child in node.items()}

    return walk(tree, "")


def unread(objective: Objective, parts: Parts, batch: Batch, key: Key) -> list[str]:
    """List the trainable leaves that cannot affect the loss.

    Works on shapes alone (arrays or ShapeDtypeStructs).  A leaf is unread when dead-code
    elimination of the traced loss drops it; a zero gradient is not enough to be unread.
    """

    def total(train: Tree, track: Tree, freeze: Tree, batch: Batch, key: Key) -> Any:
        terms, _ = objective(join(train, track, freeze), batch, key)
        return sum(term.weight * term.sum / term.count for term in terms.values())

    train, *_ = reads(total, *parts, batch, key)
    return [path for path, is_read in flatten(train).items() if not is_read]


def reads(function: Callable[..., Any], *args: Any) -> Tree:
    """Tell for every output of a function which leaves of its arguments it depends on.

    Returns the structure of the output, in place of each leaf the structure of `args`, of bools.
    Works on shapes alone; what dead-code elimination leaves in place counts as read.
    """
    traced, output = jax.make_jaxpr(function, return_shape=True)(*args)
    inputs, count = jax.tree.structure(args), len(jax.tree.leaves(output))

    def read_by(index: int) -> Tree:
        wanted = [index == other for other in range(count)]
        # dce_jaxpr is semi-public: this is the only place that knows it.
        _, used = partial_eval.dce_jaxpr(traced.jaxpr, wanted)
        return jax.tree.unflatten(inputs, used)

    return jax.tree.unflatten(jax.tree.structure(output), map(read_by, range(count)))
