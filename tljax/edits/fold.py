"""Merging: what is grafted beside kernels is folded into them, in float32."""

from collections.abc import Mapping

import jax.numpy as jnp

from tljax.edits.targets import GRAFTED
from tljax.ports import along_last, folded, lengths
from tljax.quantized import read
from tljax.tree import flatten
from tljax.types import BadInput, Tree


def is_grafted(tree: Tree) -> bool:
    """Tell whether a model's variables hold anything that merging would fold or refuse."""
    return any(grafts(path) for path in flatten(tree))


def grafts(path: str) -> bool:
    """Tell whether a leaf was grafted, or lies in a quantised kernel."""
    *parents, _ = path.split("/")
    return bool(GRAFTED & set(path.split("/"))) or "kernel" in parents


def merge(tree: Tree) -> Tree:
    """Fold LoRA and its relatives, (IA)3, SSF and quantised kernels into plain kernels and biases.

    `{kernel, bias, lora, rescale}  ->  {kernel, bias}`, computed in float32 and stored in the
    kernel's dtype.

    Raises: BadInput for what changes activations in no way that a kernel could: adapters, prompts
    and prefixes.
    """
    left = [
        p for p in flatten(tree) if {"serial", "parallel", "prefix", "prompt"} & set(p.split("/"))
    ]
    if left:
        raise BadInput(
            f"{left[0]} cannot be folded into kernels: adapters, prompts and prefixes stay apart "
            "(mergeable: lora with its relatives, (IA)3, SSF, quantised kernels)"
        )
    return _merged(tree)


def _merged(node: Tree) -> Tree:
    if not isinstance(node, Mapping):
        return node
    if not node.keys() & {"lora", "rescale"} and not isinstance(node.get("kernel"), Mapping):
        return {name: _merged(child) for name, child in node.items()}
    own = {name: leaf for name, leaf in node.items() if name not in ("lora", "rescale")}
    name = next(name for name in ("kernel", "embedding", "scale") if name in own)
    weight = own[name]
    quantised = isinstance(weight, Mapping)
    dtype = jnp.float32 if quantised else weight.dtype
    weight = (read(weight) if quantised else weight).astype(jnp.float32)
    if lora := node.get("lora"):
        weight = folded(weight, lora)
        if "magnitude" in lora:
            weight *= along_last(lora["magnitude"] / lengths(weight), weight)
    bias, rescale = own.get("bias"), node.get("rescale", {})
    if "in" in rescale:
        weight *= rescale["in"].reshape((1,) * (weight.ndim - 2) + (-1, 1))
    if "out" in rescale:
        weight *= along_last(rescale["out"], weight)
        bias = bias if bias is None else bias * rescale["out"]
    bias = bias + rescale["shift"] if "shift" in rescale else bias
    return own | {name: weight.astype(dtype)} | ({} if bias is None else {"bias": bias})
