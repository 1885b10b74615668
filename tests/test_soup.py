"""Averages of weights: exact as tree operations, and a run's folder like any other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_resume import DIGITS, VIT, result_of, train

from tljax.__main__ import main
from tljax.inference import evaluate_run
from tljax.metrics import worth
from tljax.soup import first_run, greedy_soup, weighted
from tljax.source import open_source
from tljax.tree import flatten
from tljax.types import BadInput
from tljax.weights import Source

pytestmark = pytest.mark.once


def tree(value, **more):
    return {
        "params": {"a": np.full((2, 3), value, np.float32), "b": {"c": np.float32(value)}} | more
    }


def test_an_average_is_a_sum_of_weighted_leaves():
    rng = np.random.default_rng(0)
    trees = [{"x": {"y": rng.normal(size=(4, 5)).astype(np.float32)}} for _ in range(3)]
    found = weighted(trees, (0.2, 0.3, 0.5))["x"]["y"]
    expected = np.einsum("n,nij->ij", (0.2, 0.3, 0.5), [np.float64(t["x"]["y"]) for t in trees])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert found.dtype == np.float32
    # The ends of the line are the trees themselves, bit for bit.
    np.testing.assert_array_equal(weighted(trees[:2], (0.0, 1.0))["x"]["y"], trees[1]["x"]["y"])


def test_what_has_no_weight_is_not_read():
    trees = [{"x": np.ones(3, np.float32)}, {"x": np.full(3, np.nan, np.float32)}]
    np.testing.assert_array_equal(weighted(trees, (1.0, 0.0))["x"], 1)


def test_half_precision_is_averaged_in_float32():
    ones = {"x": np.ones(3, np.float16)}
    tiny = {"x": np.full(3, 1 + 2**-10, np.float16)}
    np.testing.assert_array_equal(weighted([ones, tiny], (0.5, 0.5))["x"], np.float32(1 + 2**-11))


def test_trees_of_another_structure_are_refused_by_leaf():
    with pytest.raises(BadInput, match="params/d is in tree 2, not in 1"):
        weighted([tree(1), tree(2, d=np.zeros(1))], (0.5, 0.5))
    with pytest.raises(BadInput, match=r"params/a is \(2, 3\) in tree 1, \(4,\) in tree 2"):
        weighted([tree(1), tree(1, a=np.zeros(4))], (0.5, 0.5))


def test_a_greedy_soup_starts_at_the_best_and_adds_what_does_not_harm():
    """Scored by the closeness to 5."""
    trees = [tree(value) for value in (20.0, 6.5, 4.0, 5.5)]
    close = lambda t: -abs(float(t["params"]["b"]["c"]) - 5)  # noqa: E731
    # 5.5 (.5) first, then 4 (mean 4.75: .25), then 6.5 (mean 5.33: worse), then 20 (worse).
    assert greedy_soup(trees, close) == [0.0, 0.0, 0.5, 0.5]
    assert greedy_soup([tree(5.0), tree(9.0)], close) == [1.0, 0.0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A probe's run, and the run of everything that goes on from it: LP-FT."""
    top = tmp_path_factory.mktemp("soup")
    common = {"data": DIGITS, "optim": {"lr": 1e-2}}
    short = {"steps": 4, "batch": 16}
    train(top / "probe", model=VIT, strategy={"name": "probe"}, run=short, **common)
    full = {"weights": str(top / "probe"), "strategy": {"name": "full"}}
    train(top / "full", run=short | {"steps": 1}, **full, **common)
    return top


def test_lp_ft_goes_on_with_the_probes_head(runs):
    tables = (runs / "full" / "tables.txt").read_text().splitlines()
    heads = [line.split()[:2] for line in tables if line.startswith("params/head/")][:2]
    assert sorted(heads) == [["params/head/bias", "loaded"], ["params/head/kernel", "loaded"]]
    probe, full = (open_source(str(runs / name)).tree["params"] for name in ("probe", "full"))
    assert np.any(probe["head"]["kernel"])
    # One Adam step moves no number by more than its rate, 1e-2.
    assert np.abs(full["head"]["kernel"] - probe["head"]["kernel"]).max() < 1.01e-2


def test_a_soup_is_a_finished_run_that_everything_accepts(runs, tmp_path, capsys):
    out = tmp_path / "soup"
    pair = [str(runs / name) for name in ("probe", "full")]
    assert main(["soup", str(out), *pair, "--weights=.25,.75"]) == 0
    probe, full, made = (flatten(open_source(p).tree) for p in (*pair, str(out)))
    for path, leaf in made.items():
        np.testing.assert_allclose(leaf, 0.25 * probe[path] + 0.75 * full[path], atol=1e-6)
    for split in ("validation", "test"):
        assert evaluate_run(out, split) == result_of(out)[split]
    assert json.loads((out / "soup.json").read_text())["weights"] == [0.25, 0.75]
    assert main(["export", str(out), str(tmp_path / "exported"), "--to=timm"]) == 0
    assert main(["soup", str(out), *pair]) == 2
    assert "name a new folder" in capsys.readouterr().err


def test_wise_ft_takes_the_best_point_of_the_line_on_validation(runs, tmp_path):
    out = tmp_path / "wise"
    pair = [str(runs / name) for name in ("probe", "full")]
    assert main(["soup", str(out), *pair, "--alphas=0,.5,1"]) == 0
    found = json.loads((out / "soup.json").read_text())
    curve = {point["alpha"]: point for point in found["curve"]}
    for alpha, name in ((0.0, "probe"), (1.0, "full")):
        for split in ("validation", "test"):
            assert curve[alpha][split] == result_of(runs / name)[split]["accuracy"]
    best = max(curve.values(), key=lambda point: point["validation"])
    assert found["weights"] == [1 - best["alpha"], best["alpha"]]
    assert result_of(out)["test"]["accuracy"] == best["test"]
    assert (out / "soup.png").stat().st_size > 1000


def test_a_greedy_soup_of_runs_is_no_worse_than_its_best_one(runs, tmp_path):
    out = tmp_path / "greedy"
    pair = [str(runs / name) for name in ("probe", "full")]
    assert main(["soup", str(out), *pair, "--greedy"]) == 0
    alone = [result_of(Path(run))["validation"]["accuracy"] for run in pair]
    assert result_of(out)["validation"]["accuracy"] >= max(alone)
    weights = json.loads((out / "soup.json").read_text())["weights"]
    assert weights[int(np.argmax(alone))] > 0 and sum(weights) == 1


def test_less_of_a_loss_is_worth_more():
    assert worth("nll", 1.0) > worth("nll", 2.0) and worth("accuracy", 0.2) > worth("accuracy", 0.1)
    assert worth("spearman", float("nan")) < worth("spearman", -1.0)


def test_runs_of_other_labels_are_no_soup():
    one = Source(
        arch="vit", fields={}, tree={}, preprocess=None, tokenizer=None, labels=("a", "b"),
        digest=lambda: "", ignored={}, format="run", kind="", config={}, origin="one",
    )  # fmt: skip
    other = replace(one, labels=("a", "c"), origin="other")
    with pytest.raises(BadInput, match=r"other is a vit with the labels \('a', 'c'\), one a vit"):
        first_run([one, other])
    assert first_run([one, replace(one, origin="two")]) == Path("one")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe"], "1 runs: expected two or more"),
        (["probe", "full", "--weights=.5,.6"], "expected 2 that add up to 1"),
        (["probe", "full", "--weights=.5,.5", "--greedy"], "choose one of"),
        (["probe", "full", "--weights=nan,.5"], "expected 2 that add up to 1"),
        (["probe", "full", "--weights=inf,-inf"], "expected 2 that add up to 1"),
        (["probe", "full", "--alphas=0,nan"], "expected numbers"),
        (["probe", "full", "probe", "--alphas=0,1"], "3 runs: expected two"),
        (["probe", "nowhere"], "nowhere"),
    ],
)
def test_a_soup_that_makes_no_sense_is_refused(runs, tmp_path, capsys, words, message):
    words = [w if w.startswith("--") else str(runs / w) for w in words]
    assert main(["soup", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
