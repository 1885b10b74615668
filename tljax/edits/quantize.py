"""Quantisation as a tree edit: kernels that stay frozen, in 8 or 4 bits."""

from collections.abc import Callable
from typing import Any, Literal

from flax import struct
from jaxtyping import Array

from tljax.edits.targets import kernel_of
from tljax.quantized import to_int8, to_nf4
from tljax.tree import edit, subtrees
from tljax.types import Key, Tree

FORMS: dict[str, Callable[[Array], dict[str, Any]]] = {"int8": to_int8, "nf4": to_nf4}
Form = Literal["int8", "nf4"]


@struct.dataclass
class Quantize:
    """Store the kernels of the targets in fewer bits.

    `{kernel: [i, o]}  ->  {kernel: {int8, scale}}` or `{kernel: {nf4, block, step, mean}}`
    """

    targets: tuple[str, ...] = struct.field(pytree_node=False)
    form: Form = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with the kernels quantised.

        Raises: BadInput for one that is quantised already.
        """
        nodes = subtrees(tree)
        for path in self.targets:
            kernel_of(nodes, path)
        return edit(tree, [(f"{path}/kernel", FORMS[self.form]) for path in self.targets])
