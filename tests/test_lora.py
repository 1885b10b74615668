"""LoRA as an edit: it starts as the identity, learns as loralib's does, and folds back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import BERT, VIT, abstract_tree, assemble, image_batch, random_tree, text_batch

from tljax.edits.fold import merge
from tljax.edits.lora import SERVES, Graft, Target
from tljax.edits.targets import targets_of
from tljax.layers import Dense
from tljax.objectives import inputs_of
from tljax.tree import flatten, map_with_path
from tljax.types import BadInput

KEY = jax.random.key(0)
CASES = [(VIT, image_batch(4)), (BERT, text_batch(4))]
IDS = ["vit", "bert"]


def grafted(tree, globs=("params/**/query", "params/**/value"), rank=4, alpha=8.0, rate=0.0):
    paths = targets_of(tree, globs, "LoRA", ("dense",))
    return Graft(tuple(Target(path, rank, alpha / rank) for path in paths), rate)(tree, KEY)


def logits_of(model, batch):
    jitted = jax.jit(lambda tree, inputs, rngs: model.apply(tree, *inputs, rngs=rngs).logits)
    return lambda tree, **rngs: jitted(tree, inputs_of(batch), rngs)


def with_b(tree, seed=2):
    """Move every b away from its zero."""
    rng = np.random.default_rng(seed)
    move = lambda path, leaf: (  # noqa: E731
        jnp.float32(rng.normal(0, 0.3, leaf.shape)) if path.endswith("lora/b") else leaf
    )
    return map_with_path(move, tree)


@pytest.mark.parametrize(("model", "batch"), CASES, ids=IDS)
def test_a_graft_starts_as_the_identity(model, batch):
    tree = random_tree(model, batch)
    apply = logits_of(model, batch)
    # Bitwise: what is added is scale * x @ a @ 0.
    np.testing.assert_array_equal(apply(tree), apply(grafted(tree)))


@pytest.mark.parametrize(("model", "batch"), CASES, ids=IDS)
def test_the_merged_tree_gives_the_unmerged_outputs(model, batch):
    tree = with_b(grafted(random_tree(model, batch), ("params/blocks/**",)))
    folded = merge(tree)
    apply = logits_of(model, batch)
    base = apply(random_tree(model, batch))
    unmerged, merged = apply(tree), apply(folded)
    scale = np.abs(unmerged).max()
    assert np.abs(unmerged - base).max() > 0.01 * scale  # the factors do something
    # 1e-6 of the largest is the rounding of one product; four blocks of six layers add up.
    np.testing.assert_allclose(merged, unmerged, rtol=0, atol=5e-6 * scale)
    assert set(flatten(folded)) == set(flatten(abstract_tree(model, batch)))


def test_one_merged_layer_is_exact_to_rounding():
    layer, x = Dense(24), jnp.float32(np.random.default_rng(0).normal(size=(5, 7, 16)))
    tree = with_b(grafted({"params": {"only": layer.init(KEY, x)["params"]}}, ("params/only",)))
    unmerged = layer.apply({"params": tree["params"]["only"]}, x)
    merged = layer.apply({"params": merge(tree)["params"]["only"]}, x)
    np.testing.assert_allclose(merged, unmerged, rtol=0, atol=1e-6 * np.abs(unmerged).max())


def test_a_merged_magnitude_gives_the_unmerged_outputs():
    layer, rng = Dense(24), np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(5, 7, 16)))
    tree = with_b(grafted({"params": {"only": layer.init(KEY, x)["params"]}}, ("params/only",)))
    only = tree["params"]["only"]
    lora = only["lora"] | {"magnitude": jnp.float32(rng.uniform(0.5, 1.5, 24))}
    tree = {"params": {"only": only | {"lora": lora}}}
    unmerged = layer.apply({"params": tree["params"]["only"]}, x)
    merged = merge(tree)["params"]["only"]
    assert set(merged) == {"kernel", "bias"}
    ours = layer.apply({"params": merged}, x)
    np.testing.assert_allclose(ours, unmerged, rtol=0, atol=1e-6 * np.abs(unmerged).max())
    lengths = np.linalg.norm(merged["kernel"], axis=0)
    np.testing.assert_allclose(lengths, lora["magnitude"], rtol=1e-6)


def test_merging_into_bfloat16_rounds_once():
    """Folded in float32: kernel + scale * a @ b, then one rounding to the kernel's dtype."""
    tree = with_b(grafted({"params": {"only": {"kernel": jnp.ones((16, 16))}}}, ("params/only",)))
    exact = merge(tree)["params"]["only"]["kernel"]
    half = {"only": tree["params"]["only"] | {"kernel": jnp.ones((16, 16), jnp.bfloat16)}}
    folded = merge(half)["only"]["kernel"]
    assert folded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(folded, exact.astype(jnp.bfloat16))


def torch_lora(x, target, kernel, bias, a, b, scale, optimizer, steps):
    """Train factors by torch: W x + (alpha / r) B A x, as loralib writes it."""
    import torch

    weight, shift = torch.tensor(kernel.T.copy()), torch.tensor(bias)
    down = torch.nn.Parameter(torch.tensor(a.T.copy()))  # (r, in)
    up = torch.nn.Parameter(torch.tensor(b.T.copy()))  # (out, r)
    rule = optimizer([down, up])
    first = None
    for _ in range(steps):
        rule.zero_grad()
        features = torch.tensor(x)
        y = torch.nn.functional.linear(features, weight, shift)
        y = y + (features @ down.T @ up.T) * scale
        torch.nn.functional.mse_loss(y, torch.tensor(target)).backward()
        first = first or {"a": down.grad.numpy().T.copy(), "b": up.grad.numpy().T.copy()}
        rule.step()
    return first, {"a": down.detach().numpy().T, "b": up.detach().numpy().T}


@pytest.mark.torch
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gradients_and_steps_equal_torch(name):
    import torch

    rng = np.random.default_rng(0)
    x, target = (jnp.float32(rng.normal(size=(32, size))) for size in (12, 9))
    layer = Dense(9)
    params = jax.tree.map(
        lambda leaf: jnp.float32(rng.normal(0, 0.5, leaf.shape)),
        dict(layer.init(KEY, x)["params"]),
    )
    tree = with_b(grafted({"params": {"only": params}}, ("params/only",), rank=3, alpha=6.0))
    lora = jax.device_get(tree["params"]["only"]["lora"])
    assert float(lora["scale"]) == 2.0
    rules = {
        "sgd": (optax.sgd(0.05), lambda p: torch.optim.SGD(p, 0.05)),
        "adamw": (
            optax.adamw(0.01, weight_decay=0.1),
            lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        ),
    }
    tx, optimizer = rules[name]

    def loss(factors):
        y = layer.apply({"params": params | {"lora": lora | factors}}, x)
        return jnp.mean(jnp.square(y - target))

    ours = {"a": lora["a"], "b": lora["b"]}
    arrays = map(np.array, (x, target, params["kernel"], params["bias"], *ours.values()))
    theirs = torch_lora(*arrays, 2.0, optimizer, 10)
    first, state = jax.grad(loss)(ours), tx.init(ours)
    for _ in range(10):
        updates, state = tx.update(jax.grad(loss)(ours), state, ours)
        ours = optax.apply_updates(ours, updates)
    for mine, reference in ((first, theirs[0]), (ours, theirs[1])):
        for leaf in "ab":
            # 2e-4 of the largest: what correct independent code stays well below.
            bound = 2e-4 * np.abs(reference[leaf]).max()
            np.testing.assert_allclose(mine[leaf], reference[leaf], rtol=0, atol=bound)


def test_the_number_of_trainable_parameters():
    rank = 3
    run = assemble(VIT, image_batch(), "lora", options={"rank": rank})
    count = sum(leaf.size for leaf in jax.tree.leaves(run.abstract[0].params))
    head = VIT.width * VIT.num_classes + VIT.num_classes
    assert count == VIT.depth * 2 * rank * (VIT.width + VIT.width) + head


def test_a_starts_uniform_within_its_bound_and_differs_between_layers():
    tree = grafted(random_tree(VIT, image_batch()), rank=32)
    found = [leaf for path, leaf in flatten(tree).items() if path.endswith("lora/a")]
    bound = VIT.width**-0.5
    assert all(np.abs(a).max() <= bound for a in found)
    # A uniform variable's deviation is bound / sqrt(3); 1024 draws fix it to 3 %.
    np.testing.assert_allclose([a.std() for a in found], bound / 3**0.5, rtol=0.1)
    assert not np.array_equal(found[0], found[1])


def test_dropout_acts_in_training_alone():
    batch = image_batch(4)
    tree = with_b(grafted(random_tree(VIT, batch), rate=0.5))
    clean = with_b(grafted(random_tree(VIT, batch), rate=0.0))
    apply = logits_of(VIT, batch)
    np.testing.assert_array_equal(apply(tree), apply(clean))
    assert np.abs(apply(tree, dropout=KEY) - apply(tree)).max() > 1e-3
    assert not any(path.endswith("lora/rate") for path in flatten(clean))
    np.testing.assert_array_equal(apply(clean, dropout=KEY), apply(clean))


def test_a_rank_above_the_kernel_raises():
    with pytest.raises(
        BadInput, match="rank 33 exceeds the smaller side of a 32 x 32 kernel at params/blocks/0"
    ):
        assemble(VIT, image_batch(), "lora", options={"rank": 33})


def test_a_dead_target_raises_with_the_nearest_layer():
    with pytest.raises(
        BadInput,
        match=r"\*\*/querry' names no dense, conv, .* and embed layer; nearest: .*/query",
    ):
        targets_of(abstract_tree(VIT, image_batch()), ("params/**/querry",), "LoRA", SERVES)


def test_targets_are_dense_layers_only():
    found = targets_of(abstract_tree(VIT, image_batch()), ("params/**",), "LoRA", ("dense",))
    assert "params/embed/patch" not in found and "params/blocks/0/norm1" not in found
    assert "params/head" in found and len(found) == 4 * 6 + 1
