"""One order decides every split and every label budget."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int, Num


def stratified_order(
    labels: Num[np.ndarray, " n"] | None, seed: int, size: int | None = None
) -> Int[np.ndarray, " n"]:
    """Order examples so that every prefix holds each class in its share, to within one example.

    The k-th example (in a seeded order) of a class of N stands at (k + 1/2) / N, ties broken by
    chance: prefixes are nested by construction.  labels=None gives a plain permutation of `size`.
    """
    rng = np.random.default_rng([0x5711, seed])
    count = len(labels) if labels is not None else size
    shuffled = rng.permutation(count)
    if labels is None:
        return shuffled
    place = np.empty(count)
    for value in np.unique(labels):
        members = shuffled[labels[shuffled] == value]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place[shuffled], kind="stable")]


def hold_out(keys: Sequence[Hashable], labels: Sequence[int], fraction: float) -> set[Hashable]:
    """Choose the keys of a test part: stratified, the same on every machine, a key never split.

    A key that carries several labels is counted under the first.
    """
    first: dict[Hashable, int] = {}
    for key, label in zip(keys, labels, strict=True):
        first.setdefault(key, label)
    unique = sorted(first)
    order = stratified_order(np.array([first[key] for key in unique]), seed=0)
    return {unique[i] for i in order[: round(fraction * len(unique))]}
