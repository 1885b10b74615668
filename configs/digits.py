"""A small ViT on scikit-learn's digits: the smallest run there is; no assets needed.

tljax train --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict


def get_config(strategy: str = "scratch") -> ConfigDict:
    """Return the config; a strategy other than scratch wants --config.weights=RUN as well."""
    return ConfigDict(
        {
            "data": {"name": "digits", "image_size": 32},
            "model": {"name": "vit", "width": 64, "depth": 4, "heads": 4, "mlp": 256, "patch": 4},
            "strategy": {"name": strategy},
            "optim": {"lr": 1e-3, "decay": 0.05, "warmup": 20},
            "run": {"steps": 300, "batch": 64, "eval_every": 100, "save_every": 100},
        }
    )
