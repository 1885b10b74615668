"""A small BERT by masked language modelling on plain text (Brown, GCIDE, fortunes, glosses).

    tljax train --config=configs/pretrain_bert.py --workdir=runs/pretrain-bert

Needs `make assets NAMES="brown gcide fortunes wordnet"`.  Measured: held-out loss 3.77 nats a
masked token after 4,000 steps (unigram entropy of the same text: 6.44), about 65 minutes of one CPU
core.  What it is worth: `python benchmarks/paired.py pretraining runs/pretrain-bert`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config."""
    model = {"name": "bert", "width": 192, "depth": 4, "heads": 4, "mlp": 768, "positions": 128}
    return ConfigDict(
        {
            "data": {"name": "plaintext", "length": 64, "vocab": 4096, "validation": 0.02},
            "task": "mlm",
            "model": model,
            "strategy": {"name": "scratch"},
            "optim": {"lr": 1e-3, "decay": 0.01, "warmup": 300, "beta2": 0.98},
            "run": {"steps": 4000, "batch": 64, "eval_every": 1000, "save_every": 1000},
        }
    )
