"""The named methods that the benchmarks compare: each a list of strategies with their options."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tljax.strategies.strategy import Start
from tljax.tree import flatten
from tljax.types import Tree

Parts = tuple[dict[str, Any], ...]
LORA = {"name": "lora"}
MLP = {"name": "adapter", "targets": ("mlp",), "activation": "relu"}
METHODS: dict[str, Parts] = {
    "full": ({"name": "full"},),
    "full, layer decay .8": ({"name": "full", "layer_decay": 0.8},),
    "full, l2_sp": ({"name": "full"}, {"name": "l2_sp"}),
    "full, ewc": ({"name": "full"}, {"name": "ewc"}),
    "full, lwf": ({"name": "full"}, {"name": "lwf"}),
    "full, frozen statistics": ({"name": "batch_norm"}, {"name": "full"}),
    "probe": ({"name": "probe"},),
    "attentive": ({"name": "attentive"},),
    "last 2": ({"name": "last_k"},),
    "surgical": ({"name": "surgical", "leaves": ("params/blocks/0/**",)},),  # the first block
    "bitfit": ({"name": "bitfit"},),
    "norm": ({"name": "norm"},),
    "lora": (LORA,),
    "rslora": (LORA | {"use_rslora": True},),
    "lora+": (LORA | {"b_rate": 16.0},),
    "dora": (LORA | {"use_dora": True},),
    "pissa": (LORA | {"init": "pissa"},),
    "olora": (LORA | {"init": "olora"},),
    "lora + norm": (LORA, {"name": "norm"}),
    "qlora": (LORA, {"name": "quantize", "form": "nf4"}),
    "qlora int8": (LORA, {"name": "quantize", "form": "int8"}),
    "vera": ({"name": "vera"},),
    "ia3": ({"name": "ia3"},),
    "ssf": ({"name": "ssf"},),
    "houlsby": ({"name": "adapter"},),
    "pfeiffer": (MLP,),
    "adaptformer": (MLP | {"place": "parallel", "width": 64, "scale": 0.1},),
    "vpt deep": ({"name": "vpt"},),
    "vpt shallow": ({"name": "vpt", "deep": False},),
    "prompt": ({"name": "prompt"},),
    "prefix": ({"name": "prefix", "count": 10},),
}
IN_BLOCKS = {"qlora", "qlora int8", "vera", "ia3", "houlsby", "pfeiffer", "adaptformer", "prefix"}
IMAGES = {"vpt deep", "vpt shallow", "attentive"}
CANNOT: Mapping[str, set[str]] = {
    "vit": {"prompt", "full, frozen statistics"},
    "bert": {"full, frozen statistics", *IMAGES},
    "resnet": {"prompt", "pissa", "olora", *IMAGES, *IN_BLOCKS},
}
"""What a kind of model has no port for: words, patches, BatchNorm, dense layers in its blocks."""
AS_LORA = {"rslora", "lora+", "pissa", "olora"}
"""Methods whose step is LoRA's: another scale, rate or start."""
FIELDS: Mapping[str, dict[str, Any]] = {"attentive": {"pool": "map"}}
"""Fields of the model that a method needs: attention that pools."""


def methods_of(kind: str) -> list[str]:
    """List the methods that a kind of model (vit, bert, resnet) can have."""
    return [name for name in METHODS if name not in CANNOT[kind]]


def chosen(parts: Parts) -> list[tuple[str, dict[str, Any]]]:
    """Turn strategies as a config has them into names and their options."""
    return [(part["name"], {k: v for k, v in part.items() if k != "name"}) for part in parts]


def start_of(tree: Tree) -> Start:
    """Return a start whose head is of other labels, as most are; ones are its Fisher information.

    It gives shapes for `l2_sp`, `ewc` and `lwf`: the cost of a step depends on nothing else.
    """
    leaves = flatten(tree)
    loaded = [path for path in leaves if not path.startswith("params/head/")]
    ones = lambda _: {path: np.ones(leaves[path].shape, np.float32) for path in loaded}  # noqa: E731
    head = {name: np.zeros(leaf.shape) for name, leaf in tree["params"]["head"].items()}
    return Start("nowhere", frozenset(loaded), lambda: head, ones)
