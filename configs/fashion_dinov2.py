"""DINOv2 ViT-S/14 on Fashion-MNIST with 1,000 labels, by any strategy.

    tljax train --config=configs/fashion_dinov2.py:lora --workdir=runs/fashion-lora

Needs `make assets NAMES="vit fashion"`.
"""

from ml_collections import ConfigDict

RATES = {"scratch": 3e-4, "probe": 1e-2, "bitfit": 3e-3, "last_k": 1e-4, "lora": 3e-3, "full": 3e-5}
HEAD = {"last_k": {"head_rate": 30.0}, "full": {"head_rate": 100.0}}  # a new head learns faster


def get_config(strategy: str = "probe") -> ConfigDict:
    """Return the config of one strategy."""
    return ConfigDict(
        {
            "data": {"name": "fashion", "labels": 1000, "validation": 2000, "image_size": 98},
            "weights": "dinov2-vits14",
            "model": {"read": "blocks/5", "pool": "cls+mean"},
            "strategy": {"name": strategy} | HEAD.get(strategy, {}),
            "optim": {"lr": RATES.get(strategy, 1e-3), "decay": 0.05, "warmup": 10},
            "run": {"steps": 100, "batch": 32, "eval_every": 50},
        }
    )
