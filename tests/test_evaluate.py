"""Evaluation is exact: padding, batch size and sharding leave no trace in the scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tljax import metrics
from tljax.evaluate import evaluate

N, C, L = 61, 7, 5
BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]
SHAPES = {"classify": (C,), "multilabel": (C,), "regress": (1,), "tag": (L, C), "mlm": (L, C)}


def make_data(task):
    numbers = np.random.default_rng(3)
    logits = numbers.normal(size=(N, *SHAPES[task])).astype(np.float32)
    label = {
        "classify": numbers.integers(0, C, N).astype(np.int32),
        "multilabel": (numbers.random((N, C)) < 0.3).astype(np.float32),
        "regress": (logits.reshape(N, -1)[:, 0] + numbers.normal(size=N)).astype(np.float32),
        "tag": numbers.integers(-1, C, (N, L)).astype(np.int32),
        "mlm": numbers.integers(-1, C, (N, L)).astype(np.int32),
    }[task]
    return {"image": logits, "label": label}


def batched(data, size):
    """Cut into batches of equal size; the last one is padded with rows that are wrong."""
    for start in range(0, N, size):
        batch = {name: x[start : start + size] for name, x in data.items()}
        short = size - len(batch["label"])
        valid = np.arange(size) < size - short
        padded = {
            name: np.concatenate([x, np.full((short, *x.shape[1:]), 1, x.dtype)])
            for name, x in batch.items()
        }
        yield padded | {"valid": valid}


@jax.jit
def predict_logits(scale, batch):
    return {"logits": batch["image"] * scale}


@jax.jit
def predict_sums(scale, batch):
    label, log_probs = batch["label"], jax.nn.log_softmax(batch["image"] * scale)
    kept = label >= 0
    picked = jnp.take_along_axis(log_probs, jnp.maximum(label, 0)[..., None], -1)[..., 0]
    return {
        "loss": -jnp.sum(picked * kept, -1),
        "correct": jnp.sum((log_probs.argmax(-1) == label) & kept, -1),
        "count": jnp.sum(kept, -1),
    }


def run(task, batches):
    predict = predict_sums if task == "mlm" else predict_logits
    return evaluate(predict, (jnp.float32(2),), batches, task, BIO if task == "tag" else None)


@pytest.mark.parametrize("task", list(SHAPES))
def test_the_batch_size_leaves_no_trace(task):
    data = make_data(task)
    found = [run(task, batched(data, size)) for size in (7, 32, N, 64)]
    assert all(other == found[0] for other in found)  # to the last digit
    assert found[0]["n"] == N


@pytest.mark.parametrize("task", ["classify", "multilabel", "tag"])
def test_scores_are_those_of_the_whole_data(task):
    data = make_data(task)
    rows = {"label": data["label"], "logits": data["image"] * 2}
    if task == "tag":
        rows["prediction"] = data["image"].argmax(-1)
    expected = metrics.score(task, rows, BIO)
    found = run(task, batched(data, 16))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("task", list(SHAPES))
def test_the_primary_metric_lies_in_its_interval(task):
    found = run(task, batched(make_data(task), 32))
    name = next(iter(found))
    assert found[f"{name}/low"] <= found[name] <= found[f"{name}/high"]
    assert found[f"{name}/low"] < found[f"{name}/high"]


def test_the_interval_of_accuracy_is_wilsons():
    found = run("classify", batched(make_data("classify"), 32))
    low, high = metrics.wilson(round(found["accuracy"] * N), N)
    assert (found["accuracy/low"], found["accuracy/high"]) == (low, high)


def test_the_next_batch_is_dispatched_before_the_last_one_is_fetched():
    events = []

    class Watched:
        shape = (2,)

        def __init__(self, number):
            self.number = number

        def __array__(self, *args, **kwargs):
            events.append(("fetch", self.number))
            return np.ones(2, np.float32)

    def predict(batch):
        events.append(("dispatch", batch["number"]))
        return dict.fromkeys(("loss", "correct", "count"), Watched(batch["number"]))

    batches = [{"number": number, "valid": np.ones(2, bool)} for number in range(3)]
    evaluate(predict, (), batches, "mlm")
    assert events.index(("dispatch", 1)) < events.index(("fetch", 0))
    assert events.index(("fetch", 0)) < events.index(("dispatch", 2))  # two batches at most


@pytest.mark.parametrize("task", list(SHAPES))
def test_eight_devices_give_the_same_scores(task):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    host = list(batched(make_data(task), 16))
    assert run(task, [jax.device_put(batch, rows) for batch in host]) == run(task, host)
