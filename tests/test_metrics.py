"""Scores against scikit-learn and scipy, intervals, and what a run writes about itself."""

import io
import json
import math
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
from jax.sharding import PartitionSpec as P

from tljax import metrics
from tljax.metrics import Logger, entities, score

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture
def numbers():
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_classify_agrees_with_sklearn(numbers, dtype):
    logits = numbers.normal(size=(200, 8)).astype(dtype)
    label = numbers.integers(0, 8, 200).astype(np.int32)
    found = score("classify", {"logits": logits, "label": label})
    guess, every = logits.argmax(-1), np.arange(8)
    probs = scipy.special.softmax(logits.astype(np.float64), -1)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(label, guess),
        "macro_f1": sklearn.metrics.f1_score(label, guess, average="macro"),
        "nll": sklearn.metrics.log_loss(label, probs, labels=every),
        "top5": sklearn.metrics.top_k_accuracy_score(label, logits, k=5, labels=every),
    }
    assert found == pytest.approx(expected, rel=1e-12)  # float64 on both sides
    assert next(iter(found)) == "accuracy"  # the primary one


def test_top5_needs_more_than_five_classes(numbers):
    rows = {"logits": numbers.normal(size=(9, 5)), "label": np.zeros(9, np.int32)}
    assert "top5" not in score("classify", rows)


def test_multilabel_agrees_with_sklearn(numbers):
    logits = np.round(numbers.normal(size=(300, 6)), 1).astype(np.float32)  # with ties
    label = (numbers.random((300, 6)) < 0.2).astype(np.float32)
    found = score("multilabel", {"logits": logits, "label": label})
    guess = logits > 0

    def f1(average):
        return sklearn.metrics.f1_score(label, guess, average=average, zero_division=0)

    precision = sklearn.metrics.average_precision_score(label, logits, average="macro")
    expected = {"mAP": precision, "micro_f1": f1("micro"), "macro_f1": f1("macro")}
    assert found == pytest.approx(expected, rel=1e-12)


def test_average_precision_of_wholly_tied_scores_is_the_rate():
    label = np.array([[1], [0], [0], [1], [0]])
    assert metrics.mean_average_precision(np.zeros((5, 1)), label) == pytest.approx(0.4)


def test_a_class_without_a_positive_has_no_average_precision():
    rows = {"logits": np.array([[1.0, -1.0], [-1.0, -1.0]]), "label": np.array([[1, 0], [0, 0]])}
    assert score("multilabel", rows)["mAP"] == 1.0
    rows["label"] = np.zeros((2, 2))
    assert math.isnan(score("multilabel", rows)["mAP"])


def test_regress_agrees_with_scipy(numbers):
    label = np.round(numbers.random(100) * 5, 1).astype(np.float32)
    logits = (label + numbers.normal(size=100)).astype(np.float32)
    found = score("regress", {"logits": logits, "label": label})
    a, b = logits.astype(np.float64), label.astype(np.float64)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(a, b).statistic, rel=1e-12)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(a, b).statistic, rel=1e-12)
    assert found["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(a, b), rel=1e-12)


def test_the_correlation_of_a_constant_is_undefined():
    found = score("regress", {"logits": np.zeros(5), "label": np.arange(5.0)})
    assert math.isnan(found["pearson"]) and math.isnan(found["spearman"]) and found["mse"] == 6.0


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", set()),
        ("B-PER I-PER O", {("PER", 0, 1)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("I-PER I-PER", {("PER", 0, 1)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2)}),
        ("O I-LOC B-LOC I-LOC", {("LOC", 1, 1), ("LOC", 2, 3)}),
        ("B-LOC O I-LOC", {("LOC", 0, 0), ("LOC", 2, 2)}),
    ],
)
def test_spans_are_those_of_conlleval(tags, spans):
    assert entities(tags.split()) == spans


def test_entity_f1_counts_exact_spans_only():
    ids = {name: i for i, name in enumerate(NAMES)}

    def rows(*sentences):
        return np.array([[ids.get(tag, -1) for tag in line.split()] for line in sentences])

    # true: PER(0-1), LOC(3), LOC(1-2); predicted: PER(0) with a wrong end, LOC(3), LOC(1-2).
    label = rows("B-PER I-PER O B-LOC", "O B-LOC I-LOC O")
    guess = rows("B-PER O O B-LOC", "O B-LOC I-LOC O")
    found = score("tag", {"prediction": guess, "label": label}, NAMES)
    assert found == {"entity_f1": pytest.approx(2 / 3), "token_accuracy": 7 / 8}
    # A word's later pieces carry -1: whatever is predicted there does not cut the span.
    label, guess = rows("B-PER - I-PER O"), rows("B-PER B-LOC I-PER O")
    found = score("tag", {"prediction": guess, "label": label}, NAMES)
    assert found == {"entity_f1": 1.0, "token_accuracy": 1.0}
    assert next(iter(found)) == "entity_f1"  # the primary one


def test_tags_that_are_not_bio_have_no_entities():
    rows = {"prediction": np.array([[0, 1]]), "label": np.array([[0, -1]])}
    assert score("tag", rows, ["NOUN", "VERB"]) == {"token_accuracy": 1.0}
    assert score("tag", rows) == {"token_accuracy": 1.0}


def test_mlm_divides_sums_by_masked_tokens():
    rows = {
        k: np.array(v, np.float32)
        for k, v in {"loss": [6.0, 0.0, 2.0], "correct": [1, 0, 2], "count": [2, 0, 2]}.items()
    }
    found = score("mlm", rows)
    assert found == {"nll": 2.0, "accuracy": 0.75, "perplexity": pytest.approx(math.exp(2))}
    assert next(iter(found)) == "nll"  # the primary one
    rows["loss"] = np.array([1e6, 0, 0], np.float32)
    assert score("mlm", rows)["perplexity"] == math.inf


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (37, 50), (9870, 10000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_solves_the_score_equation(successes, trials, level):
    z2 = scipy.stats.norm.ppf((1 + level) / 2) ** 2
    rate = successes / trials
    # The bounds are the p where (rate - p)^2 = z^2 p (1 - p) / n.
    roots = np.roots([1 + z2 / trials, -2 * rate - z2 / trials, rate**2])
    expected = np.sort(np.clip(roots.real, 0, 1))
    # np.roots loses half the digits where both roots meet the edge of [0, 1].
    np.testing.assert_allclose(metrics.wilson(successes, trials, level), expected, atol=1e-7)


def test_bootstrap_agrees_with_scipy_and_depends_on_the_seed_alone(numbers):
    def correlate(one, other):
        return np.corrcoef(one, other)[0, 1]

    pair = tuple(numbers.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 150).T)
    ours = metrics.bootstrap(pair, correlate, seed=1)
    how = {"paired": True, "vectorized": False, "method": "percentile", "n_resamples": 2000}
    theirs = scipy.stats.bootstrap(pair, correlate, **how, rng=1).confidence_interval
    # Two sets of 2000 resamples: the Monte Carlo error of a 2.5 % quantile is about 0.005.
    np.testing.assert_allclose(ours, theirs, atol=0.02)
    assert ours == metrics.bootstrap(pair, correlate, seed=1)
    assert ours != metrics.bootstrap(pair, correlate, seed=2)


def test_bootstrap_covers_as_often_as_it_says(numbers):
    samples = [[numbers.normal(size=60)] for _ in range(300)]
    means = [metrics.bootstrap(x, np.mean, seed=i, n=400) for i, x in enumerate(samples)]
    covered = np.mean([low < 0 < high for low, high in means])
    assert 0.90 < covered < 0.98  # 95 %, three standard errors of 300 trials are 3.8 %


def test_undefined_resamples_drop_out():
    low, high = metrics.bootstrap((np.zeros(4), np.arange(4.0)), metrics.spearman, seed=0, n=20)
    assert math.isnan(low) and math.isnan(high)


def test_mean_interval_is_students(numbers):
    values = list(numbers.normal(size=5))
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(metrics.mean_interval(values), expected, rtol=1e-12)
    assert all(map(math.isnan, metrics.mean_interval([1.0])))


def test_running_averages_stay_on_the_device_until_asked():
    running = None
    with jax.transfer_guard_device_to_host("disallow"):
        for value in (1.0, 2.0, np.nan, 6.0):
            values = {"loss": jnp.float32(value), "n": jnp.int32(2)}
            running = metrics.accumulate(running, values, jnp.isfinite(values["loss"]))
    assert metrics.averages(running) == {"loss": 3.0, "n": 2.0}  # a bad step counts for nothing


def test_importing_metrics_imports_no_tensorflow_and_no_torch():
    code = (
        "import sys, tljax.metrics; print({'tensorflow', 'tensorboard', 'torch'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def event_scalars(folder):
    """Read TensorBoard's event files with a decoder of TFRecord framing of our own."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "events").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


def test_scalars_go_to_json_lines_event_files_and_plain_lines(tmp_path, capsys):
    logger = Logger(tmp_path, 10)
    logger.write(1, {"loss": jnp.float32(0.5), "examples/s": 100.0})
    logger.advance(2)
    logger.write(2, {"loss": np.float64("nan")})
    logger.close()
    logger.close()
    first, second = records(tmp_path)
    assert (first["step"], first["loss"], first["examples/s"]) == (1, 0.5, 100.0)
    assert second["loss"] is None and second["time"] >= first["time"]
    assert event_scalars(tmp_path)[:2] == [(1, "loss", 0.5), (1, "examples/s", 100.0)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("step 1/10  loss 0.5  examples/s 100  eta 00:0")


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", out)
    logger = Logger(tmp_path, 10, resumed=3)
    logger.advance(4)
    logger.write(5, {"loss": 0.5, "examples/s": 70.0})
    logger.close()
    text = out.getvalue()
    assert "5/10" in text and "loss 0.5  examples/s 70" in text and "step 5/10" not in text


def test_resuming_leaves_every_step_once(tmp_path):
    logger = Logger(tmp_path, 10)
    for step in (2, 4, 6):
        logger.write(step, {"loss": 1.0 / step})
    logger.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # cut off by a kill
    logger = Logger(tmp_path, 10, resumed=4)
    for step in (6, 8):
        logger.write(step, {"loss": 2.0})
    logger.close()
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [
        (2, 0.5), (4, 0.25), (6, 2.0), (8, 2.0)]  # fmt: skip
    Logger(tmp_path, 10).close()
    assert records(tmp_path) == []


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    logger = Logger(tmp_path / "run", 10)
    logger.write(1, {"loss": 1.0})
    logger.advance(2)
    logger.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_the_table_shows_every_leaf_and_its_role():
    tree = {
        "params": {
            "head": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
            "pooler": jnp.ones(5),
        },
        "batch_stats": {"mean": jax.ShapeDtypeStruct((7,), jnp.bfloat16)},
    }
    roles = {
        "params": {"head": {"kernel": "train", "bias": "train"}, "pooler": "freeze"},
        "batch_stats": {"mean": "track"},
    }
    specs = jax.tree.map(lambda x: P(), tree)
    specs["params"]["head"]["kernel"] = P("fsdp", None)
    lines = metrics.parameter_table(tree, roles, specs, unread=["params/pooler"]).splitlines()
    [kernel] = [line for line in lines if "params/head/kernel" in line]
    assert [cell.strip() for cell in kernel.strip("|").split("|")] == [
        "params/head/kernel", "(4, 3)", "float32", "train", "fsdp, None"]  # fmt: skip
    assert lines[-4:] == [
        "train: 15 parameters, 60 bytes, 2 leaves",
        "track: 7 parameters, 14 bytes, 1 leaves",
        "unread: 5 parameters, 20 bytes, 1 leaves",
        "BatchNorm: statistics tracked, 0 of 1 norms trained",
    ]
    assert "train" in metrics.parameter_table(tree, roles)
