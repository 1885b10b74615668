"""What transfer is made of: a strategy is edits that build the tree and roles for its leaves.

Every strategy is a function of the (abstract) tree it will be applied to, so its own rules are
never dead; several are composed into one.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tljax.strategies import grafted, kept, partial
from tljax.strategies.strategy import Start, Strategy, compose
from tljax.types import BadInput, Tree

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "scratch": partial.scratch,
    "probe": partial.probe,
    "attentive": partial.attentive,
    "bitfit": partial.bitfit,
    "norm": partial.norm,
    "last_k": partial.last_k,
    "surgical": partial.surgical,
    "lora": grafted.lora,
    "vera": grafted.vera,
    "ia3": grafted.ia3,
    "ssf": grafted.ssf,
    "adapter": grafted.adapter,
    "vpt": grafted.vpt,
    "prompt": grafted.prompt,
    "prefix": grafted.prefix,
    "full": partial.full,
    "batch_norm": partial.batch_norm,
    "quantize": grafted.quantize,
    "l2_sp": kept.l2_sp,
    "ewc": kept.ewc,
    "lwf": kept.lwf,
}


def make(
    tree: Tree,
    last_read: str | None,
    chosen: Sequence[tuple[str, Mapping[str, Any]]],
    start: Start | None = None,
) -> Strategy:
    """Apply named strategies with their options to a tree, and compose them.

    Raises: BadInput if one keeps what a run starts from, and it starts from nothing.
    """
    parts, keeping = [], []
    for name, options in chosen:
        keeps = "source" in inspect.signature(STRATEGIES[name]).parameters
        if keeps and start is None:
            raise BadInput(f"{name} keeps what a run starts from: give it weights")
        keeping += [name] * keeps
        given = dict(options) | ({"source": start} if keeps else {})
        parts.append(STRATEGIES[name](tree, last_read, **given))
    composed = compose(tree, parts)
    if keeping and not composed.loads:
        raise BadInput(f"{keeping[0]} keeps what a run starts from, and scratch loads nothing")
    return composed
