"""MiniLM-L6 on the polarity of movie review sentences with 1,000 labels, by any strategy.

    tljax train --config=configs/sentiment_minilm.py:lora --workdir=runs/movies-lora

Needs `make assets NAMES="minilm vader"`.  Other domains: --config.data.name=sentiment/amazon
(or nyt, tweets).  `make demo` measures these settings: see the README.
"""

from ml_collections import ConfigDict

RATES = {"scratch": 1e-3, "probe": 1e-2, "bitfit": 1e-3, "last_k": 3e-5, "lora": 3e-3, "full": 1e-4}
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
            "data": {"name": "sentiment/movies", "labels": 1000, "validation": 1000, "length": 40},
            "weights": "minilm-l6",
            "model": {"pool": "mean"},
            "strategy": {"name": strategy} | OPTIONS.get(strategy, {}),
            "optim": {"lr": RATES.get(strategy, 1e-3), "decay": 0.01, "warmup": 6},
            "run": {"steps": 62, "batch": 16, "eval_every": 31},
        }
    )
