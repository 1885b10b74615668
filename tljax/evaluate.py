"""Evaluation: exact, whatever the batch size, the padding and the number of devices."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tljax import metrics
from tljax.data.loader import prefetch_to_device
from tljax.metrics import Rows
from tljax.types import Batch

Predict = Callable[..., Mapping[str, Any]]
"""(*args, batch) -> logits per example; for mlm the sums per example loss, correct, count."""


def evaluate(
    predict: Predict,
    args: Sequence[Any],
    batches: Iterable[Batch],
    task: str,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Score `predict(*args, batch)` on the valid rows of all batches, each counted once.

    Adds `n` (examples) and the 95 % interval of the primary metric, `<name>/low` and `<name>/high`.
    Every process must see equally many batches: the last ones are padded with invalid rows.
    """
    rows = collect(predict, args, batches, task)
    scores = metrics.score(task, rows, names or ())
    name = next(iter(scores))
    low, high = interval(task, rows, names or ())
    return scores | {"n": len(next(iter(rows.values()))), f"{name}/low": low, f"{name}/high": high}


def collect(
    predict: Predict, args: Sequence[Any], batches: Iterable[Batch], task: str
) -> dict[str, np.ndarray]:
    """Return what the task's metrics read of the valid rows of all batches."""
    # Batch n is fetched after batch n + 1 is dispatched: the device never waits.
    ahead = prefetch_to_device(batches, lambda batch: _rows(predict(*args, batch), batch, task))
    collected = [_fetch(rows) for rows in ahead]
    return {name: np.concatenate([part[name] for part in collected]) for name in collected[0]}


def interval(task: str, rows: Rows, names: Sequence[str]) -> tuple[float, float]:
    """Bound the primary metric; where tokens are scored, the sample is sentences, not tokens."""
    statistic: Callable[..., float] = metrics.ratio
    if task == "classify":
        right = rows["logits"].argmax(-1) == rows["label"]
        return metrics.wilson(int(right.sum()), len(right))
    if task == "mlm":
        sample = [np.stack([rows["loss"], rows["count"]], -1)]
    elif task == "tag":
        counts = metrics.entity_counts if metrics.is_bio(names) else metrics.token_counts
        sample = [counts(rows, names)]
    else:
        sample = [rows["logits"], rows["label"]]
        by_task = {"multilabel": metrics.mean_average_precision, "regress": metrics.spearman}
        statistic = by_task[task]
    # n resamples cost n times the statistic, so large arrays get fewer.
    n = int(np.clip(2e7 // sum(array.size for array in rows.values()), 100, 2000))
    return metrics.bootstrap(sample, statistic, n=n)


def _rows(outputs: Mapping[str, Any], batch: Batch, task: str) -> dict[str, Any]:
    """Select what the task's metrics read, small enough to keep for every example."""
    rows = dict(outputs) | ({} if task == "mlm" else {"label": batch["label"]})
    if task == "tag":  # [b, l, c] logits of every sentence would not fit
        rows["prediction"] = jnp.argmax(rows.pop("logits"), -1)
    if task == "regress":
        rows["logits"] = rows["logits"][:, 0]
    return rows | {"valid": batch["valid"]}


def _fetch(rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copy one batch's valid rows to the host, from all processes."""
    host = multihost_utils.process_allgather(dict(rows), tiled=True)
    valid = host.pop("valid")
    return {name: value[valid] for name, value in host.items()}
