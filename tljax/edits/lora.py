"""The LoRA family as tree edits: low-rank factors beside kernels."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from tljax.edits.targets import graft, kernel_of
from tljax.ports import lengths
from tljax.tree import subtrees
from tljax.types import BadInput, Key, Tree

SERVES = ("dense", "conv", "standardised conv", "embed")
Init = Literal["zero", "pissa", "olora"]
Factors = tuple[Float[Array, "*i r"], Float[Array, "r o"]]


class Target(NamedTuple):
    """A module, and the rank and scale of its factors."""

    path: str
    rank: int
    scale: float


def kaiming(key: Key, shape: tuple[int, ...], fan: int, slope: float = 0.0) -> Array:
    """Draw from kaiming's uniform distribution.  Source: He et al. 2015, arXiv 1502.01852."""
    bound = math.sqrt(6 / ((1 + slope**2) * fan))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def zero(key: Key, kernel: Float[Array, "*k o"], target: Target) -> Factors:
    """Start b at zero, and a as PEFT does: kaiming uniform with slope sqrt(5)."""
    shape = (*kernel.shape[:-1], target.rank)
    a = kaiming(key, shape, math.prod(kernel.shape[:-1]), 5**0.5)
    return a, jnp.zeros((target.rank, kernel.shape[-1]))


def pissa(key: Key, kernel: Float[Array, "i o"], target: Target) -> Factors:
    """Take the largest singular values and their vectors, shared evenly."""
    left, values, right = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(values[: target.rank] / target.scale)
    return left[:, : target.rank] * root[None], right[: target.rank] * root[:, None]


def olora(key: Key, kernel: Float[Array, "i o"], target: Target) -> Factors:
    """Take the first columns and rows of the QR decomposition of the (output by input) weight."""
    q, r = jnp.linalg.qr(kernel.T)
    return r[: target.rank].T, q[:, : target.rank].T


STARTS: dict[str, Callable[[Key, Array, Target], Factors]] = {
    "zero": zero,
    "pissa": pissa,
    "olora": olora,
}


def constants(scale: float, rate: float) -> dict[str, Array]:
    """Return the leaves that nothing trains; a rate of zero is none, so that no mask is kept."""
    return {"scale": jnp.asarray(scale)} | ({"rate": jnp.asarray(rate)} if rate else {})


@struct.dataclass
class Graft:
    """Add low-rank factors at the targets.

    `{query: {kernel}}  ->  {query: {kernel, lora: {a, b, scale}}}`

    rate: of dropout on the factors' input, a leaf beside them unless it is zero.
    init="zero" starts the update at zero.  "pissa" and "olora" start it at a part of the kernel,
    from which it is taken.  magnitude: learn the length of every column, from the kernel's (DoRA).
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1 (which draws a from a Gaussian); Meng et
    al. 2024, arXiv 2404.02948, eq. 2 to 4; Büyükakyüz 2024, arXiv 2406.01775, algorithm 1, scaled
    as PEFT does; Liu et al. 2024, arXiv 2402.09353, section 4.1.
    """

    targets: tuple[Target, ...] = struct.field(pytree_node=False)
    rate: float = struct.field(pytree_node=False, default=0.0)
    init: Init = struct.field(pytree_node=False, default="zero")
    magnitude: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with the factors grafted.

        Raises: BadInput for a rank above the smaller side of a target's kernel, or a target that
        the start, or a magnitude, is not defined for.
        """
        nodes, leaves = subtrees(tree), {}
        for target, own in zip(self.targets, jax.random.split(key, len(self.targets)), strict=True):
            node = nodes[target.path]
            grafted = self.embedded if "embedding" in node else self.beside
            leaves[target.path] = grafted(own, node, target)
        return graft(tree, leaves)

    def beside(self, key: Key, node: Tree, target: Target) -> dict[str, Any]:
        """Make the factors of a kernel, and what they leave of it."""
        kernel = plain_kernel(node, target)
        if kernel.ndim > 2 and self.init != "zero":
            raise BadInput(f"init={self.init!r} decomposes dense kernels; {target.path} is conv")
        a, b = STARTS[self.init](key, kernel, target)
        new = {"lora": {"a": a, "b": b} | constants(target.scale, self.rate)}
        if self.magnitude:
            new["lora"]["magnitude"] = lengths(kernel)
        if self.init == "zero":
            return new
        update = target.scale * jnp.matmul(a, b, precision="highest")
        return new | {"kernel": (kernel - update).astype(node["kernel"].dtype)}

    def embedded(self, key: Key, node: Tree, target: Target) -> dict[str, Any]:
        """Make the factors of a table: a = 0 and b is normal, as in PEFT."""
        rows, width = node["embedding"].shape
        require_rank(target, (rows, width))
        if self.magnitude or self.init != "zero":
            what = "DoRA" if self.magnitude else f"init={self.init!r}"
            raise BadInput(f"{what} serves kernels, but {target.path} is an embed layer")
        b = jax.random.normal(key, (target.rank, width))
        a = jnp.zeros((rows, target.rank))
        return {"lora": {"a": a, "b": b} | constants(target.scale, self.rate)}


def plain_kernel(node: Tree, target: Target) -> Float[Array, "*k o"]:
    """Return a target's kernel in float32.

    Raises: BadInput if it is quantised, or smaller than the rank.
    """
    kernel = kernel_of({target.path: node}, target.path)
    require_rank(target, kernel.shape)
    return jnp.asarray(kernel, jnp.float32)


def require_rank(target: Target, shape: tuple[int, ...]) -> None:
    """Raise BadInput for a rank above the smaller side of a kernel."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if target.rank > min(rows, columns):
        raise BadInput(
            f"rank {target.rank} exceeds the smaller side of a {rows} x {columns} kernel at "
            f"{target.path}: the largest that fits is {min(rows, columns)}"
        )


@struct.dataclass
class GraftVectors:
    """Add VeRA at the targets: factors that stay random and are alike, and two vectors that learn.

    `{kernel}  ->  {kernel, lora: {a, b, inner, outer, scale}}`, and `rate` as above

    a and b are cut out of one pair that is as large as the largest target.  outer = 0 and
    inner = start, as in PEFT.  Every layer holds its own copy of a and b.  A rank above the sides
    of a kernel is no mistake: the paper takes 1024 where the width is 768.
    Source: Kopiczko et al. 2023, arXiv 2310.11454, section 3.2.
    """

    targets: tuple[Target, ...] = struct.field(pytree_node=False)
    rate: float = struct.field(pytree_node=False)
    start: float = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with factors and vectors grafted."""
        nodes, leaves = subtrees(tree), {}
        shapes = [kernel_of(nodes, target.path).shape for target in self.targets]
        rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
        rank, (first, second) = self.targets[0].rank, jax.random.split(key)
        a = kaiming(first, (rows, rank), rows)
        b = kaiming(second, (rank, columns), rank)
        for target, (i, o) in zip(self.targets, shapes, strict=True):
            vectors = {"inner": jnp.full(rank, self.start), "outer": jnp.zeros(o)}
            still = constants(target.scale, self.rate)
            leaves[target.path] = {"lora": {"a": a[:i], "b": b[:, :o]} | vectors | still}
        return graft(tree, leaves)
