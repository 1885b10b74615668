"""The optimizer chain against torch: directions, decay, clipping, schedule, groups."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax.optim import Group, decay_mask, make_tx, schedule, with_decay, with_lr
from tljax.types import BadInput

STEPS, WARMUP, LR = 50, 8, 0.02
SHAPES = {"kernel": (6, 5), "bias": (5,), "scale": (6,), "cls": (1, 1, 6)}


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def gradients(seed=1):
    """Gradients of changing size, so that some are clipped and some are not."""
    rng = np.random.default_rng(seed)
    for step in range(STEPS):
        size = 0.2 * (1 + step % 5)
        yield {name: size * rng.normal(size=shape) for name, shape in SHAPES.items()}


def factor(step):
    """Linear warm-up from 1/WARMUP, then half a cosine, written out."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def ours(**options):
    """Fifty updates of our chain in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start())
        tx = make_tx(params, lr=LR, steps=STEPS, warmup=WARMUP, **options)
        opt, update = tx.init(params), jax.jit(tx.update)
        for grads in gradients():
            updates, opt = update(jax.tree.map(jnp.asarray, grads), opt, params)
            params = optax.apply_updates(params, updates)
        assert params["kernel"].dtype == jnp.float64
        return jax.device_get(params)


def theirs(make, clip=None):
    """Fifty steps of a torch optimizer on the same gradients, its rates set step by step."""
    import torch

    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start().items()}
    optimizer = make(params)
    for step, grads in enumerate(gradients()):
        for name, value in grads.items():
            params[name].grad = torch.tensor(value)
        if clip:
            torch.nn.utils.clip_grad_norm_(params.values(), clip)
        for group in optimizer.param_groups:
            group["lr"] = LR * factor(step) * group.get("share", 1.0)
        optimizer.step()
    return {name: value.detach().numpy() for name, value in params.items()}


def adamw(decay):
    """Torch's AdamW with decay on the kernel alone: not on vectors, not on the class token."""
    import torch

    def make(params):
        plain = [value for name, value in params.items() if name != "kernel"]
        groups = [
            {"params": [params["kernel"]], "weight_decay": decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=LR)

    return make


def assert_equal(mine, reference, tolerance):
    for name, value in mine.items():
        bound = tolerance * np.abs(reference[name]).max()
        np.testing.assert_allclose(value, reference[name], rtol=0, atol=bound, err_msg=name)


# 1e-6 in float64: the schedule and the learning rate are float32, as they are in a run.
FLOAT32_RATE = 1e-6


@pytest.mark.torch
def test_adamw_with_warmup_and_cosine_equals_torch():
    mine = ours(name="adamw", decay=0.3)
    assert_equal(mine, theirs(adamw(0.3)), FLOAT32_RATE)
    other = ours(name="adamw", decay=0.0)
    assert np.abs(mine["kernel"] - other["kernel"]).max() > 1e-3  # decay did something
    np.testing.assert_array_equal(mine["bias"], other["bias"])
    np.testing.assert_array_equal(mine["cls"], other["cls"])


@pytest.mark.torch
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_momentum_equals_torch(momentum):
    import torch

    reference = theirs(lambda params: torch.optim.SGD(params.values(), LR, momentum=momentum))
    assert_equal(ours(name="sgd", momentum=momentum), reference, FLOAT32_RATE)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_clipping_by_the_global_norm_equals_torch(name):
    import torch

    makers = {
        "sgd": lambda params: torch.optim.SGD(params.values(), LR, momentum=0.9),
        "adamw": adamw(0.3),
    }
    clip = 3.0
    norms = [math.sqrt(sum((g**2).sum() for g in grads.values())) for grads in gradients()]
    assert min(norms) < clip < max(norms)
    decay = 0.3 if name == "adamw" else 0.0
    mine = ours(name=name, clip=clip, decay=decay)
    # torch divides by the norm + 1e-6, which is 3e-7 of a norm of 3.
    assert_equal(mine, theirs(makers[name], clip), 2e-6)
    assert np.abs(mine["kernel"] - ours(name=name, decay=decay)["kernel"]).max() > 1e-3


@pytest.mark.torch
def test_groups_scale_rate_and_decay():
    """Layer-wise rates, and a kernel without decay: a torch parameter group each."""
    import torch

    def make(params):
        groups = [
            {"params": [params["kernel"]], "weight_decay": 0.6, "share": 0.5},
            {"params": [params["bias"]], "weight_decay": 0.0, "share": 16.0},
            {"params": [params["scale"], params["cls"]], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=LR)

    groups = (("kernel", Group(lr=0.5, decay=2.0)), ("bias", Group(lr=16.0)))
    assert_equal(ours(name="adamw", decay=0.3, groups=groups), theirs(make), FLOAT32_RATE)


def test_lion_equals_its_paper():
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2, in numpy."""
    params, average = start(), dict.fromkeys(SHAPES, 0.0)
    for step, grads in enumerate(gradients()):
        for name, grad in grads.items():
            direction = np.sign(0.9 * average[name] + 0.1 * grad)
            average[name] = 0.99 * average[name] + 0.01 * grad
            share = 0.3 if name == "kernel" else 0.0
            params[name] = params[name] - LR * factor(step) * (direction + share * params[name])
    mine = ours(name="lion", beta1=0.9, beta2=0.99, decay=0.3)
    assert_equal(mine, params, FLOAT32_RATE)


def test_the_schedule_is_what_it_says():
    cosine = schedule("cosine", STEPS, WARMUP)
    # 1e-6: float32 against float64.
    np.testing.assert_allclose(
        [cosine(step) for step in range(STEPS)], [factor(s) for s in range(STEPS)], atol=1e-6
    )
    linear = [float(schedule("linear", 10, 0)(step)) for step in range(10)]
    np.testing.assert_allclose(linear, np.arange(10, 0, -1) / 10, atol=1e-6)
    constant = [float(schedule("constant", 10, 2)(step)) for step in range(10)]
    np.testing.assert_allclose(constant, [0.5] + [1.0] * 9)
    assert all(schedule(fall, 10, 3)(9) > 0 for fall in ("cosine", "linear", "constant"))
    with pytest.raises(BadInput, match="cosine, linear, constant"):
        schedule("cosinus", 10, 0)


def test_weight_decay_spares_vectors_tokens_and_positions():
    leaf = jax.ShapeDtypeStruct((1, 5, 8), jnp.float32)
    vector = jax.ShapeDtypeStruct((8,), jnp.float32)
    tree = {
        "embed": {"cls": leaf, "pos": leaf, "word": {"embedding": leaf}},
        "dense": {"kernel": leaf, "bias": vector, "lora": {"a": leaf, "b": leaf}},
        "norm": {"scale": vector, "bias": vector},
    }
    assert decay_mask(tree) == {
        "embed": {"cls": 0.0, "pos": 0.0, "word": {"embedding": 1.0}},
        "dense": {"kernel": 1.0, "bias": 0.0, "lora": {"a": 1.0, "b": 1.0}},
        "norm": {"scale": 0.0, "bias": 0.0},
    }


def test_a_dead_group_raises():
    with pytest.raises(BadInput, match="kernal"):
        ours(name="sgd", groups=(("kernal", Group(lr=0.5)),))


def test_trials_of_the_decay_share_one_compilation_with_none():
    params = jax.tree.map(jnp.float32, start())
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = make_tx(params, name="sgd", lr=1.0, steps=10, momentum=0.0, decay=0.5)
    update, opt = jax.jit(tx.update), jax.jit(tx.init)(params)
    moves = [update(grads, with_decay(opt, decay), params)[0] for decay in (0.5, 0.0, 0.1)]
    given, _ = update(grads, opt, params)
    assert update._cache_size() == 1
    for move, decay in zip(moves, (0.5, 0.0, 0.1), strict=True):
        np.testing.assert_allclose(move["kernel"], -decay * params["kernel"], rtol=1e-6)
        assert not np.any(move["bias"]) and not np.any(move["cls"])
    np.testing.assert_array_equal(given["kernel"], moves[0]["kernel"])


def test_trials_of_the_learning_rate_share_one_compilation():
    params = jax.tree.map(jnp.float32, start())
    grads = jax.tree.map(jnp.float32, next(gradients()))
    tx = make_tx(params, name="sgd", lr=1.0, steps=10, momentum=0.0)
    update = jax.jit(tx.update)
    opt = jax.jit(tx.init)(params)
    moves = [update(grads, with_lr(opt, lr), params)[0]["bias"] for lr in (1.0, 0.1)]
    update(grads, opt, params)
    assert update._cache_size() == 1
    np.testing.assert_allclose(moves[1], 0.1 * moves[0], rtol=1e-6)
    np.testing.assert_allclose(moves[0], -grads["bias"], rtol=1e-6)
