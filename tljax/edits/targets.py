"""Which modules an edit is for: by glob, among those it can serve."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tljax.tree import edit, flatten, matches, nearest, subtrees
from tljax.types import BadInput, Tree


def kinds_of(tree: Tree) -> dict[str, str]:
    """Map every module that holds weights of its own to what it is.

    A convolution of a ResNet without BatchNorm is standardised: it takes out again what scales its
    kernel.
    """
    normed = {"batch_stats", "fixed_stats"} & tree.keys() or "stem" not in tree["params"]
    conv, found = "conv" if normed else "standardised conv", {}
    for path, leaf in flatten(tree).items():
        parent, _, name = path.rpartition("/")
        if GRAFTED & set(path.split("/")):
            continue
        if parent.endswith("/kernel"):  # quantised
            found[parent.removesuffix("/kernel")] = "dense"
        elif name == "kernel":
            found[parent] = "dense" if leaf.ndim == 2 else conv
        elif name in ("embedding", "scale"):
            found[parent] = "embed" if name == "embedding" else "norm"
    return found


GRAFTED = {"lora", "rescale", "serial", "parallel", "prefix", "prompt", "skipped"}
"""Names of what edits add: no target of another edit."""


def targets_of(tree: Tree, globs: Sequence[str], method: str, serves: Sequence[str]) -> list[str]:
    """List the modules that the globs name, of the kinds that the method serves.

    Raises: BadInput for a glob that names none of these, with what it names, or the nearest.
    """
    kinds = kinds_of(tree)
    served = [path for path, kind in kinds.items() if kind in serves]
    for glob in globs:
        if any(matches(glob, path) for path in served):
            continue
        what = " and ".join((", ".join(serves[:-1]), serves[-1])) if serves[1:] else serves[0]
        other = next((path for path in kinds if matches(glob, path)), None)
        if other:
            raise BadInput(
                f"{method} target {glob!r}: {other} is a {kinds[other]} layer, but {method} serves "
                f"{what} layers (nearest: {nearest(glob, served)})"
            )
        raise BadInput(
            f"{method} target {glob!r} names no {what} layer; nearest: {nearest(glob, served)}"
        )
    return [path for path in served if any(matches(glob, path) for glob in globs)]


def kernel_of(nodes: Mapping[str, Tree], path: str) -> Any:
    """Return a module's kernel.

    Raises: BadInput if it is quantised: it has no shape, and could not be changed.
    """
    kernel = nodes[path]["kernel"]
    if isinstance(kernel, Mapping):
        raise BadInput(f"{path} is quantised already: graft first, then quantize")
    return kernel


def modules_of(tree: Tree, names: Sequence[str], method: str, where: Sequence[str]) -> list[str]:
    """List the subtrees whose last name is one of `names` and that hold all of `where`.

    Raises: BadInput if there are none.
    """
    found = [
        path
        for path, node in subtrees(tree).items()
        if path.rsplit("/", 1)[-1] in names
        and isinstance(node, Mapping)
        and set(where) <= set(node)
    ]
    if not found:
        raise BadInput(f"{method} is for models with {' or '.join(names)} modules: there are none")
    return found


def graft(tree: Tree, leaves: Mapping[str, Tree]) -> Tree:
    """Add subtrees to modules, or put kernels in place of theirs: `{module: {port: leaves}}`.

    Raises: BadInput if a module has something at that port.
    """

    def add(path: str) -> Callable[[Tree], Tree]:
        def one(module: Tree) -> Tree:
            if taken := sorted(leaves[path].keys() & module.keys() & GRAFTED):
                raise BadInput(
                    f"{path} has {taken[0]} already: two methods are grafted at the same port; "
                    "give them different targets, or merge the first"
                )
            return module | dict(leaves[path])

        return one

    return edit(tree, [(path, add(path)) for path in leaves])
