"""What a strategy is, how several make one, and what the methods share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from flax import struct

from tljax.edits.targets import targets_of
from tljax.optim import Group
from tljax.tree import flatten, subtrees, unflatten
from tljax.types import BadInput, Edit, Key, Objective, Reading, Rules, Tree

HEADS = ("params/head", "params/head_dist", "params/mlm")
Globs = tuple[str, ...]
Statistics = Literal["frozen", "tracked"]


class Start(NamedTuple):
    """What a run starts from, for the strategies that keep some of it.

    loaded: the paths of its leaves that the model has.  head: returns its own one where the model
    has another, else None.  fisher: reads its Fisher information, by path, from a file or from
    beside it.
    """

    origin: str
    loaded: frozenset[str]
    head: Callable[[], Mapping[str, Any] | None]
    fisher: Callable[[str | None], Mapping[str, Any]]


@dataclass(frozen=True)
class Strategy:
    """Edits in order, roles by rule, optimizer groups by rule, and loss terms to add.

    copies: edits that copy what was loaded, and so come before all others.  readings: terms that
    read the model's own forward pass.  anchor: makes an edit of the paths that are trained; what it
    adds is frozen.  statistics: whether BatchNorm goes on learning them; None leaves it to those it
    is composed with.  policy: whether it comes before the others, wherever it is listed.  loads:
    whether it starts from the pretrained weights.
    """

    edits: tuple[Edit, ...] = ()
    copies: tuple[Edit, ...] = ()
    roles: Rules = ()
    groups: Rules = ()
    terms: tuple[Objective, ...] = ()
    readings: tuple[Reading, ...] = ()
    anchor: Callable[[Sequence[str]], Edit] | None = None
    statistics: Statistics | None = None
    policy: bool = False
    loads: bool = True


@struct.dataclass
class FixStatistics:
    """Stop BatchNorm from learning statistics: `{batch_stats}  ->  {fixed_stats}`."""

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with its statistics in the collection that norms only read."""
        return {("fixed_stats" if k == "batch_stats" else k): leaf for k, leaf in tree.items()}


@struct.dataclass
class Average:
    """Start an exponential moving average of the trained leaves: `{a, b}  ->  {a, b, ema: {a}}`."""

    paths: tuple[str, ...] = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with a copy of the leaves at `paths` below `ema`."""
        leaves = flatten(tree)
        return tree | {"ema": unflatten({path: leaves[path] for path in self.paths})}


def compose(tree: Tree, parts: Sequence[Strategy]) -> Strategy:
    """Make one strategy of several, in order: of their rules the first that matches decides.

    Rules that freeze come first: they are for leaves that are no parameters, or that someone asked
    for.  BatchNorm's statistics are frozen unless a strategy says otherwise, the first that does.

    Raises: BadInput if two of them anchor the weights.
    """
    parts = sorted(parts, key=lambda part: not part.policy)
    told = [part.statistics for part in parts if part.statistics]
    statistics: Statistics = told[0] if told else "frozen"
    edits = [edit for part in parts for edit in part.copies]
    edits += [edit for part in parts for edit in part.edits]
    roles = [rule for part in parts for rule in part.roles]
    if len(anchors := [part.anchor for part in parts if part.anchor]) > 1:
        raise BadInput("two strategies anchor the weights: choose one of l2_sp and ewc")
    if "batch_stats" in tree:
        edits += [FixStatistics()] if statistics == "frozen" else []
        roles += [("batch_stats/**", "track")] if statistics == "tracked" else []
    return Strategy(
        edits=tuple(edits),
        roles=tuple(sorted(roles, key=lambda rule: rule[1] != "freeze")),
        groups=tuple(rule for part in parts for rule in part.groups),
        terms=tuple(term for part in parts for term in part.terms),
        readings=tuple(reading for part in parts for reading in part.readings),
        anchor=anchors[0] if anchors else None,
        statistics=statistics if "batch_stats" in tree else None,
        loads=all(part.loads for part in parts),
    )


def rules(paths: Sequence[str], role: str = "train") -> Rules:
    """Give every path, or all below a path that ends in /**, a role."""
    return tuple((path, role) for path in paths)


def head(tree: Tree) -> Rules:
    """Train the heads there are."""
    paths = subtrees(tree)
    return rules([f"{path}/**" for path in HEADS if path in paths])


def faster(tree: Tree, factor: float) -> Rules:
    """Give the heads a multiple of the learning rate: a new one starts from nothing.

    Source: Howard and Ruder 2018, arXiv 1801.06146, section 3.2 (discriminative fine-tuning).
    """
    return tuple((glob, Group(lr=factor)) for glob, _ in head(tree)) if factor != 1.0 else ()


def with_head(
    tree: Tree,
    trained: Sequence[str],
    edits: Sequence[Edit] = (),
    constants: Sequence[str] = (),
    groups: Rules = (),
) -> Strategy:
    """Train these leaves and the head; what the edits add as `constants` stays."""
    roles = (*rules(constants, "freeze"), *rules(trained), *head(tree))
    return Strategy(tuple(edits), roles=roles, groups=groups)


def blocks_read(tree: Tree, last_read: str | None) -> list[str]:
    """List the addresses of the blocks up to and including `read`, in order."""
    numbers = sorted(int(name) for name in tree["params"]["blocks"])
    if last_read is not None:
        numbers = numbers[: numbers.index(int(last_read.rsplit("/", 1)[-1])) + 1]
    return [f"params/blocks/{number}" for number in numbers]


def is_read(path: str, tree: Tree, last_read: str | None) -> bool:
    """Tell whether a module is no head and lies in no block above `read`."""
    below = tuple(f"{block}/" for block in blocks_read(tree, last_read))
    return path.startswith(below) or not path.startswith(("params/blocks/", *HEADS))


def in_blocks(tree: Tree, last_read: str | None, found: Sequence[str]) -> list[str]:
    """Keep the modules of the blocks that are read."""
    below = tuple(f"{block}/" for block in blocks_read(tree, last_read))
    return [path for path in found if path.startswith(below)]


def chosen(
    tree: Tree, last_read: str | None, globs: Globs, method: str, serves: Sequence[str]
) -> list[str]:
    """List the targets that are read.

    Raises: BadInput for a glob that names nothing the method serves, or if none is read.
    """
    found = targets_of(tree, globs, method, serves)
    if all(path.startswith(HEADS) for path in found):
        raise BadInput(f"{method} target {globs} names heads alone, which are trained whole")
    if not (mine := [path for path in found if is_read(path, tree, last_read)]):
        raise BadInput(f"no {method} target of {globs} lies at or below read={last_read!r}")
    return mine
