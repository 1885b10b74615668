"""A sweep: one pass for all depths, each head as if it were alone, the winner a finished run."""

import json

import jax
import pytest
from tiny import QUICK

from tljax import sweep, train
from tljax.__main__ import main
from tljax.build import build
from tljax.config import parse
from tljax.sharding import put_batch
from tljax.tree import join
from tljax.types import BadInput

pytestmark = pytest.mark.once

DATA = {"name": "digits", "image_size": 8, "labels": 48, "validation": 40, "test": "test[:36]"}
MODEL = {"name": "vit", "width": 32, "depth": 3, "heads": 2, "mlp": 64, "patch": 4}
VALUES = {
    "data": DATA,
    "model": MODEL,
    "strategy": {"name": "probe"},
    "run": {"steps": 12, "batch": 16},
}
LISTS = ["--lr=1e-3,3e-2", "--decay=0,3.0", "--read=blocks/0,blocks/2"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Return the folder of a sweep that the command line ran."""
    folder = tmp_path_factory.mktemp("sweep")
    lines = ["from ml_collections import ConfigDict", "def get_config():"]
    (folder / "config.py").write_text("\n".join([*lines, f"    return ConfigDict({VALUES!r})", ""]))
    words = [f"--config={folder / 'config.py'}", *LISTS, f"--workdir={folder / 'run'}"]
    assert main(["sweep", *words]) == 0
    return folder / "run"


@pytest.mark.slow
def test_each_head_is_trained_as_if_alone(swept, tmp_path):
    found = json.loads((swept / "sweep.json").read_text())
    trials = {(one["read"], one["lr"], one["decay"]): one["scores"] for one in found["trials"]}
    reads, rates, decays = ("blocks/0", "blocks/2"), (1e-3, 3e-2), (0.0, 3.0)
    assert list(trials) == [(r, lr, d) for r in reads for lr in rates for d in decays]
    assert len({scores["nll"] for scores in trials.values()}) == 8, "every number matters"
    for (read, lr, decay), scores in (list(trials.items())[i] for i in (1, 6)):
        alone = VALUES | {"model": MODEL | {"read": read}, "optim": {"lr": lr, "decay": decay}}
        result = train.train(build(parse(alone)), tmp_path / read)
        own = {name: result["validation"][name] for name in scores}
        # 1e-5: one matmul for four heads sums in another order than one for one.
        assert scores == pytest.approx(own, rel=1e-5)


def test_the_best_on_validation_is_a_finished_run(swept, capsys):
    found = json.loads((swept / "sweep.json").read_text())
    name = found["selected_by"].removeprefix("validation/")
    best = max(found["trials"], key=lambda one: one["scores"][name])
    assert found["best"] == best
    config = json.loads((swept / "run.json").read_text())["config"]
    assert (config["model"]["read"], config["optim"]["lr"], config["optim"]["decay"]) == (
        best["read"], best["lr"], best["decay"]
    )  # fmt: skip
    result = json.loads((swept / "result.json").read_text())
    assert {k: result["validation"][k] for k in best["scores"]} == best["scores"]
    capsys.readouterr()
    assert main(["eval", str(swept)]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(result["test"], rel=1e-5)
    assert train.train(build(parse(config)), swept)["test"] == result["test"]
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "strategy, first", [({"name": "probe"}, 0), ({"name": "last_k", "k": 1}, 1)]
)
@pytest.mark.slow
def test_several_depths_cost_one_pass_of_the_deepest(strategy, first):
    """One, two and three frozen blocks: below a head, or below a block that is trained."""
    values = VALUES | {"run": {"steps": 12, "batch": 16, "features": "on"}, "strategy": strategy}
    models = [MODEL | {"depth": 4, "read": f"blocks/{first + i}"} for i in range(3)]
    built = [build(parse(values | {"model": model})) for model in models]
    tree = [jax.eval_shape(lambda k, e=e: e.birth(k), jax.random.key(0)) for e in built]
    trees = [join(state.params, state.track, frozen) for state, frozen in tree]
    batch = put_batch(next(built[0].data.eval_batches("test")), built[0].mesh)

    def flops(*which):
        values = train.activations([built[i] for i in which])
        lowered = jax.jit(values).lower([trees[i] for i in which], batch)
        return lowered.compile(QUICK).cost_analysis()["flops"]

    one, deepest = flops(0), flops(2)
    # A block is at least a quarter of the deepest; what each depth adds is its final norm.
    assert deepest > 2 * one
    assert flops(0, 1, 2) < 1.1 * deepest


@pytest.mark.parametrize(
    "change, lists, message",
    [
        ({}, ([], [0.0], []), "--lr is a list of numbers above 0, given"),
        ({}, ([1e-3], [], []), "--decay is a list of numbers 0 or more, given"),
        ({}, ([0.0], [0.0], []), "--lr is a list of numbers above 0"),
        ({}, ([float("nan")], [0.0], []), "--lr is a list"),
        ({}, ([1e-3], [0.0], ["blocks/7"]), "read='blocks/7' is none of blocks/0, blocks/1"),
        ({"strategy": {"name": "full"}}, ([1e-3], [0.0], []), "is not frozen"),
        ({"run": {"features": "off"}}, ([1e-3], [0.0], []), "leave it out"),
        ({"data": DATA | {"augment": {"flip": True}}}, ([1e-3], [0.0], []), "never repeat"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(change, lists, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        sweep.sweep(parse(VALUES | change), *lists, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(BadInput, match="is not empty"):
        sweep.sweep(parse(VALUES), [1e-3], [0.0], [], tmp_path)


def test_lists_are_read_from_words():
    assert sweep.read_lists("1e-3, 2", "0", None) == ([1e-3, 2.0], [0.0], [])
    assert sweep.read_lists("1", "", "blocks/1,blocks/2")[1:] == ([], ["blocks/1", "blocks/2"])
    with pytest.raises(BadInput, match="--decay is a list such as"):
        sweep.read_lists("1", "none", None)
