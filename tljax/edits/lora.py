"""LoRA as a tree edit: graft low-rank factors beside kernels, and fold them back."""

import jax
import jax.numpy as jnp
from flax import struct

from tljax.tree import edit, flatten, matches, nearest
from tljax.types import BadInput, Key, Tree


def targets_of(tree: Tree, globs: tuple[str, ...]) -> list[str]:
    """List the modules (subtrees holding a 2-D `kernel`) that the globs name.

    Raises: BadInput for a glob that names no such module, with the nearest that exist.
    """
    leaves = flatten(tree).items()
    dense = [p.removesuffix("/kernel") for p, x in leaves if p.endswith("/kernel") and x.ndim == 2]
    for glob in globs:
        if not any(matches(glob, path) for path in dense):
            raise BadInput(
                f"LoRA target {glob!r} names no dense layer; nearest: {nearest(glob, dense)}"
            )
    return [path for path in dense if any(matches(glob, path) for glob in globs)]


@struct.dataclass
class Graft:
    """Add LoRA factors at `targets`.

    `{query: {kernel}}  ->  {query: {kernel, lora: {a, b, scale, rate}}}`

    b = 0, scale = alpha / rank, and a is kaiming uniform as in loralib and PEFT.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1 (which draws a from a Gaussian).
    """

    targets: tuple[str, ...] = struct.field(pytree_node=False)
    rank: int = struct.field(pytree_node=False)
    alpha: float = struct.field(pytree_node=False)
    rate: float = struct.field(pytree_node=False)

    def __call__(self, tree: Tree, key: Key) -> Tree:
        """Return the tree with the factors grafted.

        Raises: BadInput for a rank above the smaller side of a target's kernel.
        """
        keys = iter(jax.random.split(key, len(self.targets)))

        def graft(module: Tree) -> Tree:
            rows, columns = module["kernel"].shape
            if self.rank > min(rows, columns):
                raise BadInput(
                    f"LoRA rank {self.rank} exceeds the smaller side of a {rows} x {columns} kernel"
                )
            bound = rows**-0.5  # kaiming uniform with slope sqrt(5)
            a = jax.random.uniform(next(keys), (rows, self.rank), minval=-bound, maxval=bound)
            factors = {
                "a": a,
                "b": jnp.zeros((self.rank, columns)),
                "scale": jnp.asarray(self.alpha / self.rank),
                "rate": jnp.asarray(self.rate),
            }
            return module | {"lora": factors}

        return edit(tree, [(target, graft) for target in self.targets])


def merge(tree: Tree) -> Tree:
    """Fold every LoRA into its kernel: kernel + scale * a @ b, summed in float32.

    Where there is a magnitude (DoRA), every column of the sum gets this length.
    `{kernel, lora: {a, b, scale, rate}}  ->  {kernel}`
    """
    if not isinstance(tree, dict):
        return tree
    if "lora" not in tree:
        return {name: merge(child) for name, child in tree.items()}
    kernel, lora = tree["kernel"], tree["lora"]
    a, b = lora["a"].astype(jnp.float32), lora["b"].astype(jnp.float32)
    low_rank = jnp.matmul(a, b, precision="highest")
    folded = kernel.astype(jnp.float32) + lora["scale"] * low_rank
    if "magnitude" in lora:
        length = jnp.sqrt(jnp.square(folded).sum(0, keepdims=True))
        folded *= lora["magnitude"][None].astype(jnp.float32) / length
    rest = {name: leaf for name, leaf in tree.items() if name != "lora"}
    return rest | {"kernel": folded.astype(kernel.dtype)}
