"""Replay and classes: a fixed share of every batch, exact from any step, and whose labels count."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from test_cli import digits
from test_resume import DIGITS, VIT, result_of, train

from tljax.__main__ import main
from tljax.config import parse
from tljax.data.loader import Loader
from tljax.data.pipeline import open_pipeline
from tljax.data.sources import Rows
from tljax.inference import evaluate_run, open_finished, with_head_of
from tljax.types import BadInput

SPLITS = {"validation": 2}


def rows(count, label):
    return Rows([{"n": np.int32(i), "old": np.int32(label)} for i in range(count)])


NEW, OLD = rows(10, 0), rows(3, 1)


def batches(share=0.25, start=0, size=8, count=6, seed=0, **processes):
    loader = Loader(size, threads=1, **processes)
    mixed = loader.train(NEW, None, seed, start=start, replay=OLD, share=share)
    return list(islice(mixed, count))


def test_every_batch_has_its_share_of_rows():
    for share, expected in ((0.25, 2), (0.5, 4), (0.7, 6), (0.1, 1)):
        assert {int(batch["old"].sum()) for batch in batches(share)} == {expected}


def test_both_sources_are_read_in_epochs_of_their_own():
    found = batches(count=5)
    for kind, source in ((0, NEW), (1, OLD)):
        seen = np.concatenate([batch["n"][batch["old"] == kind] for batch in found])
        epochs = len(seen) // len(source)
        assert epochs >= 3
        parts = np.split(seen[: epochs * len(source)], epochs)
        assert all(sorted(part) == list(range(len(source))) for part in parts)


def test_a_batch_is_a_function_of_seed_and_step_on_any_number_of_processes():
    whole = batches()
    for later, again in zip(whole[4:], batches(start=4, count=2), strict=True):
        assert all(np.array_equal(later[name], again[name]) for name in later)
    shares = [batches(process=i, processes=2) for i in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for name in batch:
            assert np.array_equal(batch[name], np.concatenate([part[name] for part in parts]))
    others = batches(seed=1)
    assert not all(np.array_equal(a["n"], b["n"]) for a, b in zip(whole, others, strict=True))


def test_without_replay_the_order_is_what_it_was():
    plain = list(islice(Loader(8, threads=1).train(NEW, None, 0), 5))
    seen = np.concatenate([batch["n"] for batch in plain])
    mixed = np.concatenate([batch["n"][batch["old"] == 0] for batch in batches(count=6)])
    assert np.array_equal(seen[: len(mixed)], mixed[: len(seen)])


def test_a_share_of_no_whole_row_is_refused():
    for share in (0.01, 0.99):
        with pytest.raises(BadInput, match="of 8 rows is none, or all of them"):
            batches(share)


def opened(data, size=4):
    config = parse({"data": data | {"image_size": 8}, "model": {"name": "vit"}})
    given = {"preprocess": None, "tokenizer": None, "batch": size, "threads": 1, "seed": 0}
    return open_pipeline(config.data, None, **given)


def test_the_names_are_the_datas_own_then_the_others_of_the_replay(tmp_path):
    new, old = digits(tmp_path / "new", classes=2), digits(tmp_path / "old", classes=3)
    (new / "class0").rename(new / "class9")  # class1 and class9 beside class0, class1 and class2
    replay = {"name": str(old), "share": 0.5}
    pipeline = opened({"name": str(new), "replay": replay} | SPLITS)
    assert pipeline.labels == ("class1", "class9", "class0", "class2")
    grey = {"class0": 50, "class1": 120, "class2": 190, "class9": 50}  # digits' mean grey levels
    for batch in islice(pipeline.train_batches(), 10):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            expected = (grey[pipeline.labels[label]] / 255 - 0.45) / 0.225  # about ImageNet's norm
            assert abs(float(np.mean(image)) - expected) < 0.3
    tests = np.concatenate(
        [batch["label"][batch["valid"]] for batch in pipeline.eval_batches("test")]
    )
    assert set(tests) <= {0, 1}  # the data's own alone


def test_classes_keep_the_names_and_lose_the_examples():
    pipeline = opened({"name": "digits", "classes": ("3", "7"), "validation": 20})
    assert pipeline.labels == tuple("0123456789")
    for split in ("validation", "test"):
        labels = [batch["label"][batch["valid"]] for batch in pipeline.eval_batches(split)]
        assert set(np.concatenate(labels)) == {3, 7}
    with pytest.raises(BadInput, match="no class '11'"):
        opened({"name": "digits", "classes": ("11",)})


def test_replay_of_another_kind_is_refused(tmp_path):
    table = tmp_path / "texts.csv"
    table.write_text("text,label\n" + "".join(f"words {i},{'ab'[i % 2]}\n" for i in range(40)))
    with pytest.raises(BadInput, match=r"replay of .*texts.csv \(text, classify\) beside digits"):
        opened({"name": "digits", "replay": {"name": str(table)}})


@pytest.mark.slow
def test_a_run_is_read_by_the_head_of_the_one_that_it_started_from(tmp_path, capsys):
    """Two tasks with other labels: `eval NEW --data=OLD` takes OLD's data, and its head."""
    run = {"steps": 2, "batch": 16}
    first = tmp_path / "first"
    train(first, data=DIGITS, model=VIT, strategy={"name": "scratch"}, run=run)
    data = DIGITS | {"name": str(digits(tmp_path / "grey", classes=3)), "labels": 8, "test": "test"}
    chosen = [{"name": "probe"}, {"name": "lwf"}]
    data["validation"] = 4
    second = tmp_path / "second"
    train(second, data=data, weights=str(first), strategy=chosen[:1], run=run)
    # A probe leaves the body alone, so that nothing at all is forgotten.
    assert evaluate_run(second, "test", str(first)) == result_of(first)["test"]
    kept = tmp_path / "kept"
    train(kept, data=data, weights=str(first), strategy=chosen, run=run, optim={"lr": 1.0})
    assert evaluate_run(kept, "test", str(first)) != result_of(first)["test"]  # its old head moved
    assert main(["eval", str(first), f"--data={second}"]) == 2
    assert "a run can only be read by the head of the one" in capsys.readouterr().err
    other = replace(open_finished(second), facts=open_finished(second).facts | {"task": "mlm"})
    with pytest.raises(BadInput, match="is of task classify, the run of mlm"):
        with_head_of(other, first)
    lower = tmp_path / "lower"
    below = {"weights": str(first), "model": {"read": "blocks/0"}}
    train(lower, data=data, **below, strategy=chosen[:1], run=run)
    with pytest.raises(BadInput, match=r"set model\.read as there"):
        evaluate_run(lower, "test", str(first))
    with pytest.raises(AssertionError, match="2 == 0"):
        train(tmp_path / "taught", data=data, **below, strategy=chosen, run=run)
    assert "set model.read as there" in capsys.readouterr().err
