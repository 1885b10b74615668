"""DINOv2 ViT-S/14 on Fashion-MNIST with 1,000 labels, by any strategy.

    tljax train --config=configs/fashion_dinov2.py:lora --workdir=runs/fashion-lora

Needs `make assets NAMES="vit fashion"`.  `make demo` measures these settings: see the README.
"""

from ml_collections import ConfigDict

RATES = {"scratch": 1e-3, "probe": 3e-2, "bitfit": 3e-3, "last_k": 1e-4, "lora": 1e-3, "full": 3e-5}
DENSE = ("query", "key", "value", "out", "up", "down")
OPTIONS = {  # a new head learns at about 1e-2, as a probe does
    "bitfit": {"head_rate": 3.0},
    "lora": {"head_rate": 3.0, "targets": tuple(f"params/**/{name}" for name in DENSE)},
    "last_k": {"head_rate": 100.0},
    "full": {"head_rate": 100.0},
}


def get_config(strategy: str = "probe") -> ConfigDict:
    """Return the config of one strategy."""
    return ConfigDict(
        {
            "data": {"name": "fashion", "labels": 1000, "validation": 2000, "image_size": 98},
            "weights": "dinov2-vits14",
            "model": {"read": "blocks/5", "pool": "cls+mean"},
            "strategy": {"name": strategy} | OPTIONS.get(strategy, {}),
            "optim": {"lr": RATES.get(strategy, 1e-3), "decay": 0.01, "warmup": 6},
            "run": {"steps": 62, "batch": 16, "eval_every": 31},
        }
    )
