"""Evaluation: exact, whatever the batch size, the padding and the number of devices."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import CollectingMetric
from jax.experimental import multihost_utils

from tljax import metrics
from tljax.metrics import Rows
from tljax.types import BadInput, Batch

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

    Raises: BadInput if no row is valid, or an output is missing.
    """
    collected = [_fetch(rows) for rows in _run_ahead(predict, args, batches, task)]
    rows = _concatenate(collected)
    names, n = names or (), len(next(iter(rows.values()), ()))
    if n == 0:
        raise BadInput(
            f"nothing to evaluate: {len(collected)} batches with no valid row;"
            " check the split's name and that `valid` marks the real examples"
        )
    scores = metrics.score(task, rows, names)
    name, _ = metrics.primary(task, scores)
    low, high = interval(task, rows, names)
    return scores | {"n": n, f"{name}/low": low, f"{name}/high": high}


def interval(
    task: str, rows: Rows, names: Sequence[str] = (), seed: int = 0
) -> tuple[float, float]:
    """Bound the primary metric; where tokens are scored, the sample is sentences, not tokens."""
    # n resamples cost n times the statistic, so large arrays get fewer.
    n = int(np.clip(2e7 // sum(array.size for array in rows.values()), 100, 2000))

    def bound(statistic: Callable[..., float], *sample: np.ndarray) -> tuple[float, float]:
        return metrics.bootstrap(sample, statistic, seed, n)

    if task == "classify":
        right = rows["logits"].argmax(-1) == rows["label"]
        return metrics.wilson(int(right.sum()), len(right))
    if task == "mlm":
        return bound(metrics.ratio, np.stack([rows["loss"], rows["count"]], -1))
    if task == "tag":
        counts = metrics.entity_counts if metrics.is_bio(names) else metrics.token_counts
        return bound(metrics.ratio, counts(rows, names))
    statistic = {"multilabel": metrics.mean_average_precision, "regress": metrics.spearman}[task]
    return bound(statistic, rows["logits"], rows["label"])


def _run_ahead(
    predict: Predict, args: Sequence[Any], batches: Iterable[Batch], task: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of batch n after batch n + 1 is dispatched: the device never waits."""
    waiting: list[dict[str, Any]] = []
    for batch in batches:
        waiting.append(_rows(predict(*args, batch), batch, task))
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def _rows(outputs: Mapping[str, Any], batch: Batch, task: str) -> dict[str, Any]:
    """Select what the task's metrics read, small enough to keep for every example."""
    wanted = ("loss", "correct", "count") if task == "mlm" else ("logits",)
    missing = [name for name in wanted if outputs.get(name) is None]
    if missing:
        raise BadInput(
            f"task {task!r} needs the output {missing[0]!r}; there are {sorted(outputs)}:"
            " does the model have a head (num_classes), and is the task the one it was built for?"
        )
    rows = {name: outputs[name] for name in wanted}
    if task == "tag":  # [b, l, c] logits of every sentence would not fit
        rows = {"prediction": jnp.argmax(rows["logits"], -1)}
    if task == "regress":
        rows["logits"] = jnp.reshape(rows["logits"], batch["label"].shape)
    if task != "mlm":
        rows["label"] = batch["label"]
    size = next(iter(rows.values())).shape[0]
    return rows | {"valid": batch.get("valid", np.ones(size, bool))}


def _fetch(rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copy one batch's valid rows to the host, from all processes."""
    if jax.process_count() > 1:
        host = {k: multihost_utils.process_allgather(x, tiled=True) for k, x in rows.items()}
    else:
        host = jax.device_get(dict(rows))
    valid = np.asarray(host.pop("valid"), bool)
    return {name: np.asarray(value)[valid] for name, value in host.items()}


def _concatenate(collected: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join batches; token rows of unequal length are padded with the ignored label -1."""
    if not collected:
        return {}
    columns = {name: [rows[name] for rows in collected] for name in collected[0]}
    for name in columns.keys() & {"prediction"}:
        longest = max(array.shape[1] for array in columns[name])
        for key in (name, "label"):
            columns[key] = [
                np.pad(x, ((0, 0), (0, longest - x.shape[1])), constant_values=-1)
                for x in columns[key]
            ]
    return CollectingMetric({name: tuple(arrays) for name, arrays in columns.items()}).compute()
