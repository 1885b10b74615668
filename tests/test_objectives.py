"""Losses against torch and scipy; float32 whatever the compute dtype; exact in microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import special, stats
from tiny import (
    BERT,
    MLM,
    RESNET,
    VIT,
    assemble,
    compiled,
    image_batch,
    one_device,
    random_tree,
    text_batch,
)

from tljax import objectives
from tljax.objectives import LOSSES, cross_entropy, make_objective, make_predict
from tljax.sharding import put_batch
from tljax.tree import flatten
from tljax.types import Aux, Output, Term

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.normal(size=(8, 5)).astype(np.float32)
LABELS = (np.arange(8) % 5).astype(np.int32)
# Float32 rounding of a logarithm and a sum of five.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


class Echo(nn.Module):
    """Give the batch's own logits back, so that a loss is seen alone."""

    @nn.compact
    def __call__(self, images):
        return Output(images, images, images + self.param("shift", nn.initializers.zeros, ()))


def loss_of(task, logits, label):
    """Return (mean loss, terms, metrics) of given logits through the whole objective."""
    batch = {"image": jnp.asarray(logits), "label": jnp.asarray(label)}
    loss, aux = make_objective(task, Echo())({"params": {"shift": jnp.zeros(())}}, batch, KEY)
    (term,) = loss.values()
    return float(term.weight * term.sum / term.count), loss, aux.metrics


def test_cross_entropy_equals_scipy():
    value, loss, metrics = loss_of("classify", LOGITS, LABELS)
    picked = special.log_softmax(LOGITS.astype(np.float64), -1)[np.arange(8), LABELS]
    np.testing.assert_allclose(value, -picked.mean(), **CLOSE)
    assert list(loss) == ["classify"] and float(loss["classify"].count) == 8
    right, count = metrics["accuracy"]
    assert (float(right), float(count)) == ((LOGITS.argmax(-1) == LABELS).sum(), 8)


def test_cross_entropy_stays_finite_far_out():
    far = np.array([[1e4, 0, -1e4]] * 2, np.float32)
    value, _, _ = loss_of("classify", far, np.array([0, 2], np.int32))
    np.testing.assert_allclose(value, 1e4)  # (0 + 2e4) / 2 nats


@pytest.mark.torch
def test_soft_labels_equal_torch():
    import torch

    soft = special.softmax(RNG.normal(size=LOGITS.shape), -1).astype(np.float32)
    reference = torch.nn.functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(soft))
    np.testing.assert_allclose(loss_of("classify", LOGITS, soft)[0], float(reference), **CLOSE)


@pytest.mark.torch
def test_smoothed_labels_equal_torchs_label_smoothing():
    import torch

    smooth = 0.9 * np.eye(5, dtype=np.float32)[LABELS] + 0.1 / 5
    reference = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS), torch.tensor(LABELS).long(), label_smoothing=0.1
    )
    np.testing.assert_allclose(loss_of("classify", LOGITS, smooth)[0], float(reference), **CLOSE)


def test_soft_labels_are_divergence_plus_entropy():
    soft = special.softmax(RNG.normal(size=LOGITS.shape), -1)
    values = cross_entropy(jnp.asarray(LOGITS), jnp.float32(soft))
    model = special.softmax(LOGITS.astype(np.float64), -1)
    expected = stats.entropy(soft, model, axis=-1) + stats.entropy(soft, axis=-1)
    np.testing.assert_allclose(values, expected, rtol=2e-6)


@pytest.mark.torch
def test_multilabel_equals_torch():
    import torch

    labels = (RNG.random(LOGITS.shape) < 0.4).astype(np.float32)
    reference = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(LOGITS), torch.tensor(labels)
    )
    np.testing.assert_allclose(loss_of("multilabel", LOGITS, labels)[0], float(reference), **CLOSE)


@pytest.mark.torch
def test_regression_equals_torch():
    import torch

    labels = RNG.normal(size=8).astype(np.float32)
    reference = torch.nn.functional.mse_loss(torch.tensor(LOGITS[:, 0]), torch.tensor(labels))
    value, _, _ = loss_of("regress", LOGITS[:, :1], labels)
    np.testing.assert_allclose(value, float(reference), **CLOSE)


@pytest.mark.torch
@pytest.mark.parametrize("task", ["tag", "mlm"])
def test_token_losses_skip_what_is_not_labelled(task):
    import torch

    logits = 3 * RNG.normal(size=(4, 6, 5)).astype(np.float32)
    labels = np.where(RNG.random((4, 6)) < 0.5, RNG.integers(0, 5, (4, 6)), -1).astype(np.int32)
    flat = torch.tensor(logits).reshape(-1, 5), torch.tensor(labels).long().reshape(-1)
    reference = torch.nn.functional.cross_entropy(*flat, ignore_index=-1)
    value, loss, metrics = loss_of(task, logits, labels)
    np.testing.assert_allclose(value, float(reference), **CLOSE)
    assert float(loss[task].count) == (labels >= 0).sum()
    right, count = metrics["accuracy"]
    assert float(right) == ((logits.argmax(-1) == labels) & (labels >= 0)).sum()
    assert float(count) == (labels >= 0).sum()


def test_nothing_labelled_gives_zero_not_nan():
    labels = np.full((4, 6), -1, np.int32)
    logits = jnp.asarray(RNG.normal(size=(4, 6, 5)), jnp.float32)
    batch = {"image": logits, "label": labels}
    loss, _ = make_objective("mlm", Echo())({"params": {"shift": jnp.zeros(())}}, batch, KEY)
    assert (float(loss["mlm"].sum), float(loss["mlm"].count)) == (0.0, 0.0)


HALF = jnp.bfloat16
MODELS = {
    "classify": (VIT, image_batch(4)),
    "resnet": (RESNET, image_batch(4)),
    "tag": (dataclasses.replace(BERT, tokens=True), text_batch(4, mlm=True)),
    "mlm": (MLM, text_batch(4, mlm=True)),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.few(2)
def test_bfloat16_compute_gives_float32_losses(name):
    model, batch = MODELS[name]
    task = name if name in LOSSES else "classify"
    batch = dict(batch, label=np.where(batch["label"] > 2, 0, batch["label"]))
    tree = random_tree(model, batch)
    losses = []
    for dtype in (jnp.float32, HALF):
        objective = jax.jit(make_objective(task, dataclasses.replace(model, dtype=dtype)))
        loss, aux = objective(tree, batch, KEY)
        leaves = jax.tree.leaves((loss, aux))
        assert {jnp.asarray(leaf).dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
        losses.append(float(loss[task].sum / loss[task].count))
    # bfloat16 keeps 8 bits: half a percent of the logits, which are of the size of the loss.
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.03)
    outputs = jax.jit(make_predict(task, dataclasses.replace(model, dtype=HALF)))(tree, batch)
    assert {leaf.dtype for leaf in outputs.values()} == {jnp.dtype(jnp.float32)}


def pull(tree, batch, key):
    """L2-SP towards one: a quadratic term that no example counts."""
    leaves = [v for k, v in flatten(tree["params"]).items() if k.endswith("kernel")]
    total = sum(jnp.sum(jnp.square(leaf - 1)) for leaf in leaves)
    return {"pull": Term(1e-3, total, jnp.ones(()))}, Aux({}, {})


def test_microbatches_of_uneven_masks_with_a_quadratic_term_are_exact():
    model, batch = dataclasses.replace(MLM, depth=1), text_batch(mlm=True)
    counts = (batch["label"] >= 0).sum(-1).reshape(-1, 4).sum(0)
    assert len(set(counts)) == 4  # a mean of means would be wrong
    results = []
    for microbatches in (1, 4):
        run = assemble(model, batch, "full", task="mlm", extra=(pull,), microbatches=microbatches,
                       name="sgd", lr=0.1, clip=None)  # fmt: skip
        state, frozen = run.birth(KEY)
        state, metrics = compiled(run, batch)(state, frozen, put_batch(batch, one_device()))
        results.append((jax.device_get(state.params), jax.device_get(metrics)))
    (whole, one), (parts, four) = results
    assert set(one) >= {"loss", "mlm", "pull", "accuracy", "grad_norm"}
    # 1e-6 of the largest value: the same sums in another order.
    for name, value in one.items():
        np.testing.assert_allclose(four[name], value, rtol=1e-6, err_msg=name)
    for path, leaf in flatten(whole).items():
        bound = 1e-6 * max(np.abs(leaf).max(), 1e-2)
        np.testing.assert_allclose(flatten(parts)[path], leaf, rtol=0, atol=bound, err_msg=path)


def test_predictions_of_masked_words_are_sums_per_text():
    batch = text_batch(4, mlm=True)
    tree = random_tree(MLM, batch)
    sums = jax.jit(make_predict("mlm", MLM))(tree, batch)
    loss, aux = jax.jit(make_objective("mlm", MLM))(tree, batch, KEY)
    np.testing.assert_allclose(sums["loss"].sum(), loss["mlm"].sum, rtol=1e-6)
    np.testing.assert_array_equal(sums["count"], (batch["label"] >= 0).sum(-1))
    assert float(sums["correct"].sum()) == float(aux.metrics["accuracy"][0])


def test_inputs_are_found_by_name():
    texts = text_batch(2)
    assert len(objectives.inputs_of(image_batch(2))) == 1
    found = objectives.inputs_of(texts)
    assert all(a is texts[k] for a, k in zip(found, objectives.TEXT, strict=True))
