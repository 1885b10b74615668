"""Bottleneck adapters as a tree edit."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from tljax.edits.lora import kaiming
from tljax.edits.targets import graft
from tljax.tree import subtrees
from tljax.types import BadInput, Key, Tree

LAST = {"attention": "out", "mlp": "down"}
"""Module that an adapter is for -> the layer that ends it, which is as wide as its input."""


@struct.dataclass
class Adapters:
    """Add a bottleneck to the target modules (attention, mlp), behind or beside them.

    `{up, down}  ->  {up, down, serial: {relu: {down, up, scale}}}`

    The last kernel starts at zero, so that the model starts as it was.
    Source: Houlsby et al. 2019, arXiv 1902.00751, section 2.1; He et al. 2021, arXiv 2110.04366,
    section 3.3; Chen et al. 2022, arXiv 2205.13535, eq. 4.
    """

    targets: tuple[str, ...] = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)
    place: Literal["serial", "parallel"] = struct.field(pytree_node=False)
    activation: Literal["relu", "swish"] = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with the adapters grafted.

        Raises: BadInput for a bottleneck that is wider than what it is for.
        """
        nodes, leaves = subtrees(tree), {}
        for path, own in zip(self.targets, jax.random.split(key, len(self.targets)), strict=True):
            (d,) = nodes[f"{path}/{LAST[path.rsplit('/', 1)[-1]]}/bias"].shape
            if self.width > d:
                raise BadInput(f"an adapter of width {self.width} is no bottleneck: {path} has {d}")
            a = kaiming(own, (d, self.width), d, 5**0.5)
            down = {"kernel": a, "bias": jnp.zeros(self.width)}
            up = {"kernel": jnp.zeros((self.width, d)), "bias": jnp.zeros(d)}
            new = {"down": down, "up": up, "scale": jnp.asarray(self.scale)}
            leaves[path] = {self.place: {self.activation: new}}
        return graft(tree, leaves)
