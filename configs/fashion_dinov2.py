"""DINOv2 ViT-S/14 on Fashion-MNIST with 1,000 labels, by any strategy.

    tljax train --config=configs/fashion_dinov2.py:lora --workdir=runs/fashion-lora

Needs `make assets NAMES="vit fashion"`.  `make demo` measures these settings: see the README.
"""

from ml_collections import ConfigDict

DENSE = ("query", "key", "value", "out", "up", "down")
LORA = {"name": "lora", "targets": tuple(f"params/**/{name}" for name in DENSE)}
CHOICES = {  # word -> peak learning rate, the head's multiple of it (about 1e-2 in all), strategy
    "scratch": (1e-3, 1.0, {"name": "scratch"}),
    "probe": (3e-2, 1.0, {"name": "probe"}),
    "bitfit": (3e-3, 3.0, {"name": "bitfit"}),
    "last_k": (1e-4, 100.0, {"name": "last_k"}),
    "full": (3e-5, 100.0, {"name": "full"}),
    "lora": (1e-3, 3.0, LORA),
    # The rates below are not tuned on these data.
    "dora": (1e-3, 3.0, LORA | {"use_dora": True}),
    "qlora": (1e-3, 3.0, (LORA, {"name": "quantize", "form": "nf4"})),
    "lora_norm": (1e-3, 3.0, (LORA, {"name": "norm"})),
    "adapter": (2e-3, 3.0, {"name": "adapter"}),
    "ssf": (2e-3, 3.0, {"name": "ssf"}),
    "ia3": (1e-2, 1.0, {"name": "ia3"}),
    "vpt": (1e-2, 1.0, {"name": "vpt"}),
}


def get_config(word: str = "probe") -> ConfigDict:
    """Return the config of a word above, or of any other strategy by its defaults."""
    lr, head_rate, strategy = CHOICES.get(word, (1e-3, 1.0, {"name": word}))
    return ConfigDict(
        {
            "data": {"name": "fashion", "labels": 1000, "validation": 2000, "image_size": 98},
            "weights": "dinov2-vits14",
            "model": {"read": "blocks/5", "pool": "cls+mean"},
            "strategy": strategy,
            "optim": {"lr": lr, "head_rate": head_rate, "decay": 0.01, "warmup": 6},
            "run": {"steps": 62, "batch": 16, "eval_every": 31},
        }
    )
