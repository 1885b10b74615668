"""MiniLM-L6 on the polarity of movie review sentences with 1,000 labels, by any strategy.

    tljax train --config=configs/sentiment_minilm.py:lora --workdir=runs/movies-lora

Needs `make assets NAMES="minilm vader"`.  Other domains: --config.data.name=sentiment/amazon
(or nyt, tweets).  `make demo` measures these settings: see the README.
"""

from ml_collections import ConfigDict

DENSE = ("query", "key", "value", "out", "up", "down")
LORA = {"name": "lora", "head_rate": 3.0, "targets": tuple(f"params/**/{name}" for name in DENSE)}
CHOICES = {  # word -> peak learning rate, strategy; a new head learns at about 1e-2, as in a probe
    "scratch": (1e-3, {"name": "scratch"}),
    "probe": (1e-2, {"name": "probe"}),
    "bitfit": (1e-3, {"name": "bitfit", "head_rate": 3.0}),
    "last_k": (3e-5, {"name": "last_k", "head_rate": 100.0}),
    "full": (1e-4, {"name": "full", "head_rate": 100.0}),
    "lora": (3e-3, LORA),
    # The rates below are not tuned on these data.
    "dora": (3e-3, LORA | {"use_dora": True}),
    "qlora": (3e-3, (LORA, {"name": "quantize", "form": "nf4"})),
    "lora_norm": (3e-3, (LORA, {"name": "norm"})),
    "adapter": (2e-3, {"name": "adapter", "head_rate": 3.0}),
    "ssf": (2e-3, {"name": "ssf", "head_rate": 3.0}),
    "ia3": (1e-2, {"name": "ia3"}),
    "prefix": (1e-2, {"name": "prefix", "count": 10}),
}


def get_config(word: str = "probe") -> ConfigDict:
    """Return the config of a word above, or of any other strategy by its defaults."""
    lr, strategy = CHOICES.get(word, (1e-3, {"name": word}))
    return ConfigDict(
        {
            "data": {"name": "sentiment/movies", "labels": 1000, "validation": 1000, "length": 40},
            "weights": "minilm-l6",
            "model": {"pool": "mean"},
            "strategy": strategy,
            "optim": {"lr": lr, "decay": 0.01, "warmup": 6},
            "run": {"steps": 62, "batch": 16, "eval_every": 31},
        }
    )
