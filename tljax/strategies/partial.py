"""Strategies that train leaves the model has: all of them, some, or the head alone."""

from typing import Literal

from tljax.edits.targets import kinds_of
from tljax.optim import Group
from tljax.strategies.strategy import (
    Globs,
    Statistics,
    Strategy,
    blocks_read,
    head,
    rules,
    with_head,
)
from tljax.tree import flatten, require_live
from tljax.types import BadInput, Rules, Tree


def scratch(tree: Tree, last_read: str | None) -> Strategy:
    """Train everything from random initialisation: pretraining, and the baseline of transfer."""
    return Strategy(roles=rules(["params/**"]), statistics="tracked", loads=False)


def full(tree: Tree, last_read: str | None, layer_decay: float = 1.0) -> Strategy:
    """Fine-tune everything from the pretrained weights; BatchNorm statistics are tracked.

    layer_decay: what a block's rate is multiplied by from each block to the one below; head and
    final norm keep the whole rate.
    Source: Bao et al. 2021, arXiv 2106.08254, appendix (layer_decay; as MAE counts layers).
    """
    groups = layered(tree, last_read, layer_decay)
    return Strategy(roles=rules(["params/**"]), groups=groups, statistics="tracked")


def layered(tree: Tree, last_read: str | None, decay: float) -> Rules:
    """Give block i of L the rate decay^(L - i), and what lies below the blocks decay^(L + 1)."""
    if decay == 1.0:
        return ()
    blocks = blocks_read(tree, last_read)
    below = [f"params/{name}/**" for name in ("embed", "stem") if name in tree["params"]]
    groups = [(glob, Group(lr=decay ** (len(blocks) + 1))) for glob in below]
    numbered = enumerate(blocks)
    groups += [(f"{path}/**", Group(lr=decay ** (len(blocks) - i))) for i, path in numbered]
    return tuple(groups)


def probe(tree: Tree, last_read: str | None) -> Strategy:
    """Train a linear head on frozen features."""
    return Strategy(roles=head(tree))


def attentive(tree: Tree, last_read: str | None) -> Strategy:
    """Train a head and the attention that pools for it, on frozen features.

    Source: Zhai et al. 2021, arXiv 2106.04560, section 3.2 (the MAP head that pools); trained as a
    probe by Bardes et al. 2024, arXiv 2404.08471, section 5, whose own pooling differs from it.
    Raises: BadInput if the model does not pool by attention.
    """
    if "map" not in tree["params"]:
        raise BadInput('attentive trains the attention that pools: set model.pool to "map"')
    return Strategy(roles=(*rules(["params/map/**"]), *head(tree)))


def bitfit(tree: Tree, last_read: str | None) -> Strategy:
    """Train biases and the head.  Source: Ben Zaken et al. 2021, arXiv 2106.10199."""
    biases = [path for path in flatten(tree) if path.endswith("/bias")]
    return with_head(tree, biases)


def norm(tree: Tree, last_read: str | None) -> Strategy:
    """Train the scales and biases of norms, and the head.


    Source: Frankle et al. 2020, arXiv 2003.00152 (BatchNorm); Qi et al. 2022, arXiv 2211.08682.
    """
    norms = [f"{path}/**" for path, kind in kinds_of(tree).items() if kind == "norm"]
    return with_head(tree, norms)


def surgical(tree: Tree, last_read: str | None, leaves: Globs = ("params/**",)) -> Strategy:
    """Train the leaves that these globs name, and the head.


    Source: Lee et al. 2022, arXiv 2210.11466.
    Raises: BadInput for a glob that names no leaf.
    """
    require_live(rules(leaves), flatten(tree))
    return with_head(tree, leaves)


def batch_norm(
    tree: Tree, last_read: str | None, policy: Literal["frozen", "tracked", "trained"] = "frozen"
) -> Strategy:
    """Say what BatchNorm does, whatever the strategies beside it say.

    frozen: statistics, scales and biases stay.  tracked: statistics follow the batches.  trained:
    scales and biases are trained as well.
    Raises: BadInput for a model without BatchNorm.
    """
    if "batch_stats" not in tree:
        raise BadInput("batch_norm is for models with BatchNorm: this one has no batch_stats")
    norms = dict.fromkeys(path.rpartition("/")[0] for path in flatten(tree["batch_stats"]))
    mine = [f"params/{path}/*" for path in norms]
    roles = {"frozen": rules(mine, "freeze"), "tracked": (), "trained": rules(mine)}[policy]
    statistics: Statistics = "frozen" if policy == "frozen" else "tracked"
    return Strategy(roles=roles, statistics=statistics, policy=True)


def last_k(tree: Tree, last_read: str | None, k: int = 2) -> Strategy:
    """Train the last k blocks that are read, the final norm and the head.


    Raises: BadInput if k is more than the blocks there are.
    """
    blocks = blocks_read(tree, last_read)
    if k > len(blocks):
        raise BadInput(f"last_k: k={k} exceeds the {len(blocks)} blocks that are read")
    top = [f"{block}/**" for block in blocks[len(blocks) - k :]]
    return with_head(tree, [*top, *["params/norm/**"] * ("norm" in tree["params"])])
