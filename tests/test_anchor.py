"""Against forgetting: what is anchored, what it costs, and the values of the terms."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_strategies import having
from tiny import (
    BERT,
    MLM,
    VIT,
    assemble,
    compiled,
    image_batch,
    one_device,
    random_tree,
    text_batch,
)

from tljax import objectives
from tljax.edits.load import Load
from tljax.sharding import put_batch
from tljax.source import require_same_body
from tljax.strategies import make
from tljax.strategies.strategy import Start
from tljax.tree import flatten, join, unflatten
from tljax.types import BadInput

pytestmark = pytest.mark.once

IMAGES, TEXTS = image_batch(), text_batch()
SMALL = dataclasses.replace(VIT, depth=1)
SHORT = dataclasses.replace(MLM, depth=1)
KEY = jax.random.key(0)
HEAD = {"params/head/kernel", "params/head/bias"}


def start(model, batch, *, without=HEAD, head=None, fisher=None):
    """Return the edit that loads random weights, and what a strategy is told about them."""
    leaves = flatten(random_tree(model, batch))
    loaded = {path: np.asarray(leaf) for path, leaf in leaves.items() if path not in without}
    rng = np.random.default_rng(2)
    found = {path: rng.gamma(1.0, 1.0, leaf.shape) for path, leaf in loaded.items()}
    read = fisher or (lambda _: found)
    return Load(loaded), Start("somewhere", frozenset(loaded), lambda: head, read), found


def begin(model, batch, chosen, **options):
    source, told, fisher = start(model, batch, **options.pop("told", {}))
    run = assemble(model, batch, chosen, source=(source,), start=told, **options)
    state, frozen = run.birth(KEY)
    return run, state, frozen, fisher


def moved(leaves, by=0.01):
    """Move every leaf by a known amount that differs between numbers."""
    rng = np.random.default_rng(3)
    return {k: leaf + by * rng.normal(size=leaf.shape).astype("f") for k, leaf in leaves.items()}


def pull(tree, params):
    """Return the term of the anchors for other parameters."""
    return objectives.quadratic(join(unflatten(params), tree), {}, KEY)[0]["anchor"]


def anchored(strategy, **options):
    """Return a whole tree with anchors on every parameter, those parameters, and the Fisher."""
    tree = random_tree(SMALL, IMAGES)
    _, told, fisher = start(SMALL, IMAGES)
    edit = make(tree, None, [(strategy, options)], told).anchor(list(flatten(tree)))
    return edit(tree, KEY), jax.device_get(flatten(tree)), fisher


def distilled(run, state, frozen, params):
    """Return the term of the teacher for other parameters."""
    tree = join(unflatten(params), state.track, frozen)
    batch = {name: jnp.asarray(value) for name, value in IMAGES.items()}
    return jax.jit(run.objective)(tree, batch, KEY)[0]["distill"]


def test_l2_sp_is_the_papers_sum_over_loaded_and_new_leaves():
    tree, begun, _ = anchored("l2_sp", alpha=0.3, beta=0.02)
    now = moved(begun)
    pulls = [np.square(np.float64(x - begun[k])).sum() for k, x in now.items() if k not in HEAD]
    sizes = [np.square(np.float64(now[path])).sum() for path in HEAD]
    found = pull(tree, now)
    # 1e-5: float32 sums over ten thousand numbers.
    np.testing.assert_allclose(found.sum, 0.15 * sum(pulls) + 0.01 * sum(sizes), rtol=1e-5)
    assert (found.weight, float(found.count)) == (1.0, 1.0)


def test_ewc_weighs_every_number_by_its_information_and_leaves_new_ones_alone():
    tree, begun, fisher = anchored("ewc", strength=5.0)
    now = moved(begun)
    kept = set(begun) - HEAD
    assert set(flatten(tree["anchor"]["mean"])) == set(flatten(tree["anchor"]["weight"])) == kept
    expected = sum((2.5 * fisher[p] * np.square(np.float64(now[p] - begun[p]))).sum() for p in kept)
    np.testing.assert_allclose(pull(tree, now).sum, expected, rtol=1e-5)


def test_at_the_start_nothing_pulls():
    tree, begun, _ = anchored("ewc", strength=1e3)
    value, grads = jax.value_and_grad(lambda params: pull(tree, params).sum)(begun)
    assert value == 0
    assert not any(np.any(grad) for grad in grads.values())


@pytest.mark.parametrize(("beside", "options"), [("last_k", {"k": 1}), ("lora", {})])
def test_only_what_is_trained_has_an_anchor(beside, options):
    run, *_ = begin(SMALL, IMAGES, [(beside, options), ("l2_sp", {})])
    anchored = {p.removeprefix("anchor/mean/") for p in flatten(run.tree) if "anchor/mean/" in p}
    assert anchored == having(run, "train")
    assert {p for p in flatten(run.tree) if p.startswith("anchor/")} <= having(run, "freeze")


def test_an_anchor_does_not_make_an_unread_leaf_read():
    run, *_ = begin(BERT, TEXTS, [("full", {}), ("l2_sp", {})])
    assert run.roles.unread == ["params/pooler/bias", "params/pooler/kernel"]


def test_anchors_stay_float32_whatever_a_run_computes_in():
    _, state, frozen, _ = begin(SMALL, IMAGES, [("full", {}), ("l2_sp", {})], dtype=jnp.bfloat16)
    begun = jax.device_get(flatten(state.params))
    means = flatten(frozen["anchor"]["mean"])
    assert {leaf.dtype for leaf in flatten(frozen).values()} == {jnp.dtype("float32")}
    assert all(
        np.array_equal(begun[path], leaf) for path, leaf in means.items() if path not in HEAD
    )


@pytest.mark.slow
def test_microbatches_are_exact_with_an_anchor_and_uneven_masks():
    """Masked language modelling with L2-SP: equal after 3 steps in 1 and 4 parts."""
    batch, results = text_batch(mlm=True), []
    for parts in (1, 4):
        chosen = [("full", {}), ("l2_sp", {"alpha": 10.0})]
        sgd = {"name": "sgd", "lr": 0.1, "decay": 0.0, "clip": None}
        told = {"without": set()}
        run, state, frozen, _ = begin(
            SHORT, batch, chosen, task="mlm", microbatches=parts, told=told, **sgd
        )
        step = compiled(run, batch)
        for _ in range(3):
            state, metrics = step(state, frozen, put_batch(batch, one_device()))
        results.append((jax.device_get(flatten(state.params)), float(metrics["anchor"])))
    largest = max(np.abs(leaf).max() for leaf in results[0][0].values())
    for path, leaf in results[0][0].items():
        # 1e-6 of the largest value: the same sums in another order.
        np.testing.assert_allclose(leaf, results[1][0][path], rtol=0, atol=1e-6 * largest)
    assert results[0][1] > 0
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)


def test_lwf_is_the_softened_cross_entropy_to_the_start():
    rng = np.random.default_rng(4)
    old = {"kernel": rng.normal(size=(32, 5)).astype("f"), "bias": rng.normal(size=5).astype("f")}
    chosen = [("full", {}), ("lwf", {"temperature": 3.0, "weight": 0.5})]
    run, state, frozen, _ = begin(SMALL, IMAGES, chosen, told={"head": old})
    assert {"old/head/kernel", "old/head/bias"} <= having(run, "train")
    assert {p for p in flatten(run.tree) if p.startswith("teacher/")} <= having(run, "freeze")
    now = moved(flatten(state.params), by=0.1)
    found = distilled(run, state, frozen, now)
    image = jnp.asarray(IMAGES["image"])
    trees = frozen["teacher"], unflatten(now)
    body = SMALL.clone(num_classes=None)
    pooled = [body.apply({"params": tree["params"]}, image).pooled for tree in trees]
    teacher = np.float64(pooled[0]) @ old["kernel"] + old["bias"][None]
    student = np.asarray(pooled[1]) @ now["old/head/kernel"] + now["old/head/bias"][None]
    log_odds = [x / 3 - np.log(np.exp(x / 3).sum(-1, keepdims=True)) for x in (teacher, student)]
    expected = -(np.exp(log_odds[0]) * log_odds[1]).sum()
    np.testing.assert_allclose(found.sum, expected, rtol=1e-5)
    assert (found.weight, float(found.count)) == (0.5, len(IMAGES["label"]))


def test_lwf_on_the_same_labels_distils_the_models_own_head():
    run, state, frozen, _ = begin(
        SMALL, IMAGES, [("full", {}), ("lwf", {})], told={"without": set()}
    )
    assert not any(path.startswith("old/") for path in flatten(run.tree))
    found = distilled(run, state, frozen, flatten(state.params))
    logits = (
        np.float64(
            SMALL.apply({"params": state.params["params"]}, jnp.asarray(IMAGES["image"])).logits
        )
        / 2
    )
    odds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found.sum, -(odds * np.log(odds)).sum(), rtol=1e-5)  # its entropy


@pytest.mark.parametrize("grafted", [("vpt", {}), ("lora", {"init": "pissa", "rank": 2})])
def test_the_teacher_is_the_start_whatever_is_grafted_before_it(grafted):
    """Prompts change outputs as soon as they are there, PiSSA the kernels."""
    _, _, frozen, _ = begin(SMALL, IMAGES, [grafted, ("lwf", {})], told={"without": set()})
    image, started = jnp.asarray(IMAGES["image"]), random_tree(SMALL, IMAGES)
    teacher = SMALL.apply(frozen["teacher"], image).logits
    np.testing.assert_array_equal(teacher, SMALL.apply(started, image).logits)


def test_a_head_is_given_features_of_its_own_kind_alone():
    fields = {"width": 32, "depth": 2, "num_classes": 3}
    same = fields | {"num_classes": 5, "drop_path": 0.1, "read": None}
    require_same_body("vit", same, fields, "old")
    for change in ({"read": "blocks/0"}, {"pool": "cls+mean"}, {"depth": 3}):
        [(name, value)] = change.items()
        message = rf"head of old reads a model with {name}=.*{re.escape(repr(value))}"
        with pytest.raises(BadInput, match=message):
            require_same_body("vit", fields | change, fields, "old")


def test_lwf_runs_the_student_once():
    """Its cost over the plain step is the teacher's forward pass: a third of the step."""
    flops = []
    old = {"kernel": np.ones((32, 5), "f"), "bias": np.ones(5, "f")}
    for chosen in ([("full", {})], [("full", {}), ("lwf", {})]):
        run, *_ = begin(SMALL, IMAGES, chosen, told={"head": old})
        flops.append(compiled(run, IMAGES).cost_analysis()["flops"])
    # Another forward and backward pass of the student would make it 2.3.
    assert 1.25 < flops[1] / flops[0] < 1.45


def test_l2_sp_pulls_what_is_grafted_to_where_it_begins():
    """(IA)3 starts at one: pulled to zero it would switch the layer off; a new head is."""
    _, _, frozen, _ = begin(SMALL, IMAGES, [("ia3", {}), ("l2_sp", {})])
    means = flatten(frozen["anchor"]["mean"])
    vectors = [path for path in means if "/rescale/" in path]
    assert vectors and all(np.all(means[path] == 1) for path in vectors)
    assert not np.any(means["params/head/kernel"])


def test_a_term_that_stands_twice_is_refused():
    with pytest.raises(BadInput, match="two terms 'distill'"):
        begin(SMALL, IMAGES, [("full", {}), ("lwf", {}), ("lwf", {})], told={"without": set()})


def test_two_anchors_or_nothing_to_keep_are_refused():
    tree = random_tree(SMALL, IMAGES)
    _, told, _ = start(SMALL, IMAGES)
    for chosen, source, message in (
        (["l2_sp", "ewc"], told, "choose one of l2_sp and ewc"),
        (["full", "l2_sp"], None, "l2_sp keeps what a run starts from: give it weights"),
        (["scratch", "ewc"], told, "ewc keeps what a run starts from, and scratch loads nothing"),
        (["full", "lwf"], told, "lwf keeps what the start's head says"),
    ):
        with pytest.raises(BadInput, match=message):
            make(tree, None, [(name, {}) for name in chosen], source)
    with pytest.raises(BadInput, match="all of them are new"):
        begin(SMALL, IMAGES, [("probe", {}), ("ewc", {})])


def test_without_an_anchor_the_quadratic_term_is_not_there():
    assert objectives.quadratic({"params": {}}, {}, KEY)[0] == {}
