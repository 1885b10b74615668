"""Learned scales and shifts of activations, as tree edits: (IA)3 and SSF."""

import jax.numpy as jnp
from flax import struct

from tljax.edits.targets import graft, kernel_of
from tljax.tree import subtrees
from tljax.types import BadInput, Key, Tree


@struct.dataclass
class Rescale:
    """Add a vector of ones that multiplies what enters or leaves the targets: (IA)3.

    `{kernel}  ->  {kernel, rescale: {in}}` or `{kernel, rescale: {out}}`

    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """

    inputs: tuple[str, ...] = struct.field(pytree_node=False)
    outputs: tuple[str, ...] = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with the vectors grafted."""
        nodes = subtrees(tree)
        ends = dict.fromkeys(self.inputs, ("in", -2))
        ends |= dict.fromkeys(self.outputs, ("out", -1))
        kernels = {path: kernel_of(nodes, path).shape for path in ends}
        return graft(
            tree,
            {p: {"rescale": {end: jnp.ones(kernels[p][axis])}} for p, (end, axis) in ends.items()},
        )


@struct.dataclass
class ScaleAndShift:
    """Add a scale of ones and a shift of zeros to what the targets give: SSF.

    `{kernel, bias}  ->  {kernel, bias, rescale: {out, shift}}`

    Source: Lian et al. 2022, arXiv 2210.08823, section 3.2 (which draws both near these values).
    """

    targets: tuple[str, ...] = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with the vectors grafted.

        Raises: BadInput for a layer without bias, which could not take the shift in.
        """
        nodes, leaves = subtrees(tree), {}
        for path in self.targets:
            if "bias" not in nodes[path]:
                raise BadInput(f"SSF target {path} has no bias to fold a shift into: leave it out")
            size = nodes[path]["bias"].shape
            leaves[path] = {"rescale": {"out": jnp.ones(size), "shift": jnp.zeros(size)}}
        return graft(tree, leaves)
