"""The diagonal Fisher: equal to a loop, to a closed form, to torch, and read with care."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file
from test_resume import VIT as SHAPE
from test_resume import train

from tljax.__main__ import main
from tljax.fisher import FISHER, estimate, read_fisher
from tljax.source import open_run
from tljax.tree import flatten
from tljax.types import BadInput, Output

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
ROWS, FEATURES, CLASSES = 7, 6, 3


class Net(nn.Module):
    """Logistic regression, or with a hidden layer."""

    hidden: int = 0

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        x = jnp.tanh(nn.Dense(self.hidden, name="below")(x)) if self.hidden else x
        return Output(x[:, None], x, nn.Dense(CLASSES, name="head")(x))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
    label = rng.integers(0, CLASSES, ROWS).astype(np.int32)
    return {"image": image, "label": label, "valid": np.arange(ROWS) < ROWS - 1}


def variables(model, batch):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, KEY, batch["image"])
    return jax.tree.map(lambda x: rng.normal(0, 0.7, x.shape).astype(np.float32), shapes)


def test_it_is_the_mean_of_squares_of_single_gradients(batch, monkeypatch):
    """Not the square of their mean; a row that is not valid counts for nothing, in any chunks."""
    model = Net(hidden=5)
    tree = variables(model, batch)

    def loss(params, i):
        logits = model.apply({"params": params}, batch["image"][i : i + 1]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"][i : i + 1])[0]

    each = [flatten(jax.grad(loss)(tree["params"], i)) for i in range(ROWS - 1)]
    for memory in (0, 1 << 20):  # one example at a time, then all
        monkeypatch.setattr("tljax.fisher.MEMORY", memory)
        found = estimate(model, tree, [batch], "true", KEY)
        assert {path.removeprefix("params/") for path in found} == set(each[0])
        for path, leaf in found.items():
            squares = [np.square(grads[path.removeprefix("params/")]) for grads in each]
            np.testing.assert_allclose(leaf, np.mean(squares, 0), rtol=1e-5, atol=1e-8)


def test_expected_labels_give_the_closed_form_of_logistic_regression(batch):
    """Of kernel [i, c]: the mean over examples of x_i^2 p_c (1 - p_c)."""
    tree = variables(Net(), batch)
    found = estimate(Net(), tree, [batch], "expected", KEY)
    x, head = np.float64(batch["image"][batch["valid"]]), tree["params"]["head"]
    logits = x @ head["kernel"] + head["bias"][None]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    closed = np.einsum("bi,bc->ic", x**2, p * (1 - p)) / len(x)
    np.testing.assert_allclose(found["params/head/kernel"], closed, rtol=1e-5)
    np.testing.assert_allclose(found["params/head/bias"], (p * (1 - p)).mean(0), rtol=1e-5)


def test_sampled_labels_come_close_to_the_expectation(batch):
    """4,000 draws of one example: within 5 standard errors, and far from what its label gives."""
    tree, copies = variables(Net(), batch), 4000
    many = {
        "image": np.repeat(batch["image"][:1], copies, 0),
        "label": np.repeat(batch["label"][:1], copies),
        "valid": np.ones(copies, bool),
    }
    one = {name: value[:1] for name, value in batch.items()}
    bias = {
        labels: estimate(Net(), tree, [rows], labels, KEY)["params/head/bias"]
        for labels, rows in (("sampled", many), ("expected", one), ("true", one))
    }
    assert np.abs(bias["sampled"] - bias["expected"]).max() < 5 * 0.5 / np.sqrt(copies)
    assert np.abs(bias["sampled"] - bias["true"]).max() > 0.1


class Tagger(nn.Module):
    """A linear model of every token."""

    @nn.compact
    def __call__(self, images):
        return Output(images, images[:, 0], nn.Dense(CLASSES, name="head")(images))


def test_tokens_of_an_example_are_summed_before_the_square(batch):
    rng = np.random.default_rng(2)
    tokens = rng.normal(size=(ROWS, 4, FEATURES)).astype(np.float32)
    label = rng.integers(-1, CLASSES, (ROWS, 4)).astype(np.int32)  # -1: not predicted
    rows = batch | {"image": tokens, "label": label}
    tree = variables(Tagger(), rows)
    found = estimate(Tagger(), tree, [rows], "true", KEY)
    head = tree["params"]["head"]
    logits = np.float64(tokens) @ head["kernel"] + head["bias"][None, None]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    slope = (p - np.eye(CLASSES)[label]) * (label >= 0)[..., None]
    each = np.square(slope.sum(1))[rows["valid"]]
    np.testing.assert_allclose(found["params/head/bias"], each.mean(0), rtol=1e-5)


@pytest.mark.torch
def test_it_equals_torchs_gradients_of_single_examples(batch):
    import torch

    tree = variables(Net(hidden=5), batch)
    found = estimate(Net(hidden=5), tree, [batch], "true", KEY)
    layers = [torch.nn.Linear(FEATURES, 5), torch.nn.Linear(5, CLASSES)]
    with torch.no_grad():
        for layer, name in zip(layers, ("below", "head"), strict=True):
            layer.weight.copy_(torch.tensor(tree["params"][name]["kernel"].T))
            layer.bias.copy_(torch.tensor(tree["params"][name]["bias"]))
    squares = dict.fromkeys(("below", "head"), 0.0)
    for i in np.flatnonzero(batch["valid"]):
        x = torch.tensor(batch["image"][i : i + 1])
        logits = layers[1](torch.tanh(layers[0](x)))
        target = torch.tensor(batch["label"][i : i + 1], dtype=torch.long)
        [layer.zero_grad() for layer in layers]
        torch.nn.functional.cross_entropy(logits, target).backward()
        for layer, name in zip(layers, squares, strict=True):
            squares[name] += layer.weight.grad.numpy().T ** 2 / batch["valid"].sum()
    for name, expected in squares.items():
        np.testing.assert_allclose(found[f"params/{name}/kernel"], expected, rtol=1e-4, atol=1e-8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on digits, with its Fisher information."""
    workdir = tmp_path_factory.mktemp("fisher") / "run"
    data = {"name": "digits", "image_size": 16, "labels": 64, "test": "test[:64]"}
    run = {"steps": 2, "batch": 16}
    train(workdir, data=data, model=SHAPE, strategy={"name": "scratch"}, run=run)
    assert main(["fisher", str(workdir), "--examples=32"]) == 0
    return workdir


@pytest.mark.slow
def test_a_run_writes_it_for_every_parameter_and_ewc_starts_from_it(run, tmp_path):
    source = open_run(run)
    found = read_fisher(source)
    assert set(found) == set(flatten({"params": source.tree["params"]}))
    assert all((leaf >= 0).all() for leaf in found.values())
    assert np.any(found["params/blocks/0/mlp/up/kernel"])
    data = {"name": "digits", "image_size": 16, "labels": 64, "test": "test[:64]"}
    strategy = [{"name": "full"}, {"name": "ewc", "strength": 10.0}]
    settings = {"data": data, "strategy": strategy, "run": {"steps": 2, "batch": 16}}
    result = train(tmp_path / "ewc", weights=str(run), **settings)
    assert result["test"]["n"] == 64
    assert '"anchor"' in (tmp_path / "ewc" / "metrics.jsonl").read_text()


def test_a_file_that_is_missing_damaged_or_of_others_is_refused_with_the_command(run, tmp_path):
    source, good = open_run(run), load_file(run / FISHER)
    tell = rf"tljax fisher {run}"
    with pytest.raises(BadInput, match=rf"no Fisher information in .*none.*{tell}"):
        read_fisher(source, str(tmp_path / "none.safetensors"))
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray((run / FISHER).read_bytes())
    content[-1] ^= 1
    for bad in (b"{}", bytes(content), bytes(content[:-9])):
        damaged.write_bytes(bad)
        with pytest.raises(BadInput, match=rf"damaged.*{tell}"):
            read_fisher(source, str(damaged))
    save_file(good, damaged)  # no record of where it comes from
    with pytest.raises(BadInput, match="damaged"):
        read_fisher(source, str(damaged))
    moved = open_run(run)
    leaf = moved.tree["params"]["head"]["bias"]
    moved.tree["params"]["head"]["bias"] = leaf + 1
    with pytest.raises(BadInput, match=rf"of other weights.*{tell}"):
        read_fisher(moved)


def test_the_command_refuses_what_it_cannot_estimate(run, capsys):
    for words, message in (
        (["--labels=guessed"], "expected one of sampled, true, expected"),
        (["--examples=100000"], "a budget of 100000 examples"),
        (["--examples=0"], "a budget of 0 examples"),
    ):
        assert main(["fisher", str(run), *words]) == 2
        assert message in capsys.readouterr().err
