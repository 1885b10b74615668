"""Strategies against forgetting: they keep some of what a run starts from beside the tree."""

from collections.abc import Sequence

from tljax.config import Above
from tljax.edits.anchor import Anchor, Teach
from tljax.objectives import distill, quadratic
from tljax.strategies.strategy import HEADS, Start, Strategy, rules
from tljax.types import BadInput, Edit, Tree


def l2_sp(
    tree: Tree, last_read: str | None, source: Start, alpha: float = 0.1, beta: float = 0.01
) -> Strategy:
    """Add alpha / 2 x squared distance from the start, and beta / 2 x that of new leaves.

    A new head is pulled to zero, what is grafted to where it begins.  Both are over the leaves that
    the strategies beside it train; in place of weight decay.
    Source: Li et al. 2018, arXiv 1802.01483, eq. 4, with the rates of its section 4.
    """

    def anchor(trained: Sequence[str]) -> Edit:
        rates = {path: alpha if path in source.loaded else beta for path in trained}
        heads = [p for p in trained if p not in source.loaded and p.startswith(HEADS)]
        return Anchor(rates, tuple(heads))

    return Strategy(terms=(quadratic,), anchor=anchor)


def ewc(
    tree: Tree, last_read: str | None, source: Start, strength: float = 1.0,
    fisher: str | None = None,
) -> Strategy:  # fmt: skip
    """Add strength / 2 x squared distance from the start, each number by its Fisher information.

    strength: the paper's lambda.  fisher: a run's folder or a file; by default the start's own.
    Source: Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3.
    Raises: BadInput if there is no such file, or none of the trained leaves was loaded.
    """
    information = source.fisher(fisher)

    def anchor(trained: Sequence[str]) -> Edit:
        if not (kept := [path for path in trained if path in source.loaded]):
            raise BadInput("ewc holds trained leaves at their start, and all of them are new")
        return Anchor({path: strength * information[path] for path in kept})

    return Strategy(terms=(quadratic,), anchor=anchor)


def lwf(
    tree: Tree, last_read: str | None, source: Start, weight: float = 1.0, temperature: Above = 2.0
) -> Strategy:
    """Keep what the start's own head says of the new data, by distillation from a frozen copy.

    The old head is trained too, as `old/head`; where the labels are the start's, it is the model's.
    Source: Li and Hoiem 2016, arXiv 1606.09282.
    Raises: BadInput if the start has no head, or one of other features than the model's.
    """
    below, own = tuple(f"{path}/" for path in HEADS), source.head()
    if own is None and not any(path.startswith(below) for path in source.loaded):
        raise BadInput(
            f"lwf keeps what the start's head says of an input, and {source.origin} has no such "
            "head: start from a run with labels, or take l2_sp"
        )
    roles = rules(["old/**"]) if own else ()
    reads = (distill(weight, temperature),)
    return Strategy(copies=(Teach(own),), roles=roles, readings=reads)
