"""What transfer is made of: a strategy is edits that build the tree and roles for its leaves.

Every strategy is a function of the (abstract) tree it will be applied to, so its own rules are
never dead.  `source` is the edit that loads pretrained weights, or nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flax import struct

from tljax.edits.lora import Graft, targets_of
from tljax.optim import Group
from tljax.tree import flatten, subtrees, unflatten
from tljax.types import BadInput, Edit, Key, Objective, Rules, Tree

HEADS = ("params/head", "params/head_dist", "params/mlm")


@dataclass(frozen=True)
class Strategy:
    """Edits in order, roles by rule, optimizer groups by rule, and loss terms to add."""

    edits: tuple[Edit, ...]
    roles: Rules
    groups: Rules = ()
    terms: tuple[Objective, ...] = ()


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


def _rules(tree: Tree, globs: Sequence[str], role: str = "train") -> Rules:
    present = [name.partition("/**")[0] for name in globs]
    paths = subtrees(tree)
    return tuple((g, role) for g, p in zip(globs, present, strict=True) if p in paths)


def _head(tree: Tree) -> Rules:
    return _rules(tree, [f"{path}/**" for path in HEADS])


def _statistics(tree: Tree) -> Rules:
    return _rules(tree, ["batch_stats/**"], "track")


def _fixed(tree: Tree) -> tuple[Edit, ...]:
    return (FixStatistics(),) if "batch_stats" in tree else ()


def scratch(tree: Tree, source: tuple[Edit, ...], last_read: str | None) -> Strategy:
    """Train everything from random initialisation: pretraining, and the baseline of transfer."""
    return Strategy((), (("params/**", "train"), *_statistics(tree)))


def _faster(tree: Tree, factor: float) -> Rules:
    """Give a new head a multiple of the learning rate, since it starts from nothing.

    Source: Howard and Ruder 2018, arXiv 1801.06146, section 3.2 (discriminative fine-tuning).
    """
    return tuple((glob, Group(lr=factor)) for glob, _ in _head(tree)) if factor != 1.0 else ()


def full(
    tree: Tree, source: tuple[Edit, ...], last_read: str | None, head_rate: float = 1.0
) -> Strategy:
    """Fine-tune everything from the pretrained weights; BatchNorm statistics are tracked.

    head_rate: the head's multiple of the learning rate.
    """
    roles = (("params/**", "train"), *_statistics(tree))
    return Strategy(source, roles, _faster(tree, head_rate))


def probe(tree: Tree, source: tuple[Edit, ...], last_read: str | None) -> Strategy:
    """Train a linear head on frozen features."""
    return Strategy((*source, *_fixed(tree)), _head(tree))


def bitfit(
    tree: Tree, source: tuple[Edit, ...], last_read: str | None, head_rate: float = 1.0
) -> Strategy:
    """Train biases and the head.  Source: Ben Zaken et al. 2021, arXiv 2106.10199.

    head_rate: the head's multiple of the learning rate.
    """
    biases = [(path, "train") for path in flatten(tree) if path.endswith("/bias")]
    rules = (*biases, *_head(tree))
    return Strategy((*source, *_fixed(tree)), rules, _faster(tree, head_rate))


def blocks_read(tree: Tree, read: str | None) -> list[str]:
    """List the addresses of the blocks up to and including `read`, in order."""
    numbers = sorted(int(name) for name in tree["params"]["blocks"])
    if read is not None:
        numbers = numbers[: numbers.index(int(read.rsplit("/", 1)[-1])) + 1]
    return [f"params/blocks/{number}" for number in numbers]


def last_k(
    tree: Tree, source: tuple[Edit, ...], last_read: str | None, k: int = 2, head_rate: float = 1.0
) -> Strategy:
    """Train the last k blocks that are read, the final norm and the head.

    head_rate: the head's multiple of the learning rate.
    Raises: BadInput if k is more than the blocks there are.
    """
    blocks = blocks_read(tree, last_read)
    if k > len(blocks):
        raise BadInput(f"last_k: k={k} exceeds the {len(blocks)} blocks that are read")
    top = [f"{block}/**" for block in blocks[len(blocks) - k :]]
    rules = (*_rules(tree, [*top, "params/norm/**"]), *_head(tree))
    return Strategy((*source, *_fixed(tree)), rules, _faster(tree, head_rate))


def lora(
    tree: Tree,
    source: tuple[Edit, ...],
    last_read: str | None,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("params/**/query", "params/**/value"),
    head_rate: float = 1.0,
) -> Strategy:
    """Train low-rank updates of the target kernels, and the head.

    Heads, and blocks above the last one read, are not grafted.
    head_rate: the head's multiple of the learning rate.
    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    below = tuple(f"{block}/" for block in blocks_read(tree, last_read))
    chosen = [
        path
        for path in targets_of(tree, targets)
        if path.startswith(below) or not path.startswith(("params/blocks/", *HEADS))
    ]
    if not chosen:
        raise BadInput(f"no LoRA target of {targets} lies at or below read={last_read!r}")
    factors = [(f"{path}/lora/{name}", "train") for path in chosen for name in "ab"]
    graft = Graft(tuple(chosen), rank, alpha, dropout)
    rules = (*factors, *_head(tree))
    return Strategy((*source, *_fixed(tree), graft), rules, _faster(tree, head_rate))


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "scratch": scratch,
    "probe": probe,
    "bitfit": bitfit,
    "last_k": last_k,
    "lora": lora,
    "full": full,
}
