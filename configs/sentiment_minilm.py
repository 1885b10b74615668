"""MiniLM-L6 on the polarity of movie review sentences with 1,000 labels, by any strategy.

    tljax train --config=configs/sentiment_minilm.py:lora --workdir=runs/movies-lora

Needs `make assets NAMES="minilm vader"`.  Other domains: --config.data.name=sentiment/amazon
(or nyt, tweets).
"""

from ml_collections import ConfigDict

RATES = {"scratch": 3e-4, "probe": 1e-2, "bitfit": 3e-3, "last_k": 1e-4, "lora": 3e-3, "full": 3e-5}
HEAD = {"last_k": {"head_rate": 30.0}, "full": {"head_rate": 100.0}}  # a new head learns faster


def get_config(strategy: str = "probe") -> ConfigDict:
    """Return the config of one strategy."""
    return ConfigDict(
        {
            "data": {"name": "sentiment/movies", "labels": 1000, "validation": 1000, "length": 48},
            "weights": "minilm-l6",
            "model": {"pool": "mean"},
            "strategy": {"name": strategy} | HEAD.get(strategy, {}),
            "optim": {"lr": RATES.get(strategy, 1e-3), "decay": 0.01, "warmup": 10},
            "run": {"steps": 100, "batch": 32, "eval_every": 50},
        }
    )
