"""The words everything else is written in.

Axis letters: b batch, l tokens, d width, h heads, k head size, f mlp width, c classes,
i/o in/out, p patch, r rank.  Leaf names: kernel, bias, scale, embedding, gamma (LayerScale),
mean and var (normalisation statistics); what edits graft is listed in `tljax.ports`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from flax import struct
from jaxtyping import Array, Float

Tree = Any
"""Nested dicts of arrays: Linen's variables dict.  None is a hole."""

Role = Literal["train", "track", "freeze"]
"""Moved by the optimizer, moved by the forward pass, or never moved."""

Rules = Sequence[tuple[str, Any]]
"""(glob, value) pairs: the first match wins and every rule must match something."""

Batch = Mapping[str, Any]
Key = Array


class RunFailed(Exception):
    """A run cannot go on; what it had saved is still there."""


class BadInput(ValueError):
    """An input a person gave is wrong; the message says what was expected and what exists."""


@struct.dataclass
class Output:
    """What every model returns, so that later work can read any of it."""

    tokens: Float[Array, "b l d"]
    pooled: Float[Array, "b d"]
    logits: Float[Array, "b *c"] | None = None


class Term(NamedTuple):
    """One term of a loss: weight x sum / count; count may depend on the batch only."""

    weight: float | Array
    sum: Float[Array, ""]
    count: Float[Array, ""]  # type: ignore[assignment]  # a tuple has a method of this name


Loss = dict[str, Term]


@struct.dataclass
class Aux:
    """What an objective reports besides its loss.

    metrics: name -> (sum, count), each summed over examples.  track: new values of tracked leaves,
    a tree with the structure of `Parts.track` or a part of it.
    """

    metrics: dict[str, tuple[Array, Array]]
    track: Tree


Objective = Callable[[Tree, Batch, Key], tuple[Loss, Aux]]
Reading = Callable[[Any, Output, Tree, Batch], Loss]
"""(model, what its forward pass gave, tree, batch) -> terms to add to a task's loss."""
Edit = Callable[[Tree, Key], Tree]
"""A pure function on trees that is also a pytree: the arrays it holds are jit arguments."""
