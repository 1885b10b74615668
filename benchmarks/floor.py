"""The FLOPs that a method cannot do without: a count of matrix products, from shapes alone."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from tljax.tree import Parts, join
from tljax.types import Batch, Key, Objective, Tree


def floor(objective: Objective, parts: Parts, batch: Batch, key: Key) -> float:
    """Count the FLOPs that no step can save: the matrix products that gradients need.

    A product costs its forward pass, and as much again for each operand that depends on a trainable
    leaf: activations down to the lowest of them, and the kernels that move.  On shapes alone.
    """

    def total(train: Tree, rest: Tree, batch: Batch, key: Key) -> Any:
        terms, _ = objective(join(train, rest), batch, key)
        return [term.sum for term in terms.values()]

    inputs = parts.train, join(parts.track, parts.freeze), batch, key
    traced = jax.make_jaxpr(total)(*inputs).jaxpr
    count = len(jax.tree.leaves(parts.train))
    moves = [index < count for index in range(len(traced.invars))]
    return products(traced, moves)[0]


def products(jaxpr: Jaxpr, moves: Sequence[bool]) -> tuple[float, list[bool]]:
    """Return the FLOPs of a program's products, and which of its results depend on what moves.

    Raises: ValueError for a loop: a program does not say how often a `while` runs.
    """
    moved = {x for x, flag in zip(jaxpr.invars, moves, strict=True) if flag}
    depends = lambda x: not isinstance(x, Literal) and x in moved  # noqa: E731 - a literal has no hash
    flops = 0.0
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, [depends(x) for x in equation.invars]
        own = [any(given) and name != "stop_gradient"] * len(equation.outvars)
        if name in ("scan", "while"):
            raise ValueError(f"a {name} in the forward pass: its rounds cannot be counted")
        if name in ("dot_general", "conv_general_dilated"):
            flops += product(equation) * (1 + sum(given))
        elif inner := [x for x in jax.tree.leaves(list(equation.params.values())) if is_program(x)]:
            # Those of a conditional do not see its first operand, which chooses between them.
            bodies = [getattr(x, "jaxpr", x) for x in inner]
            found = [products(body, given[len(given) - len(body.invars) :]) for body in bodies]
            flops += max(count for count, _ in found)
            own = [any(flags) for flags in zip(*(flags for _, flags in found), strict=True)]
        pairs = zip(equation.outvars, own, strict=True)
        moved |= {x for x, flag in pairs if flag and is_real(x.aval)}
    return flops, [depends(x) for x in jaxpr.outvars]


def is_real(aval: Any) -> bool:
    """Tell whether values of a shape have gradients at all: not integers, nor keys."""
    return bool(jnp.issubdtype(aval.dtype, jnp.inexact))


def is_program(value: Any) -> bool:
    """Tell whether a parameter of an equation is a program of its own."""
    return isinstance(value, Jaxpr | ClosedJaxpr)


def product(equation: JaxprEqn) -> float:
    """Count multiplications and additions of a matrix product or a convolution, borders whole."""
    shapes: list[Any] = [x.aval for x in (*equation.invars, *equation.outvars)]
    left, right, out = shapes
    numbers = equation.params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        depth = np.prod([left.shape[axis] for axis in numbers[0][0]])
    else:
        depth = right.size / right.shape[numbers.rhs_spec[0]]
    return float(2 * out.size * depth)
