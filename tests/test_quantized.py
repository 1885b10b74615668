"""Kernels in 8 and 4 bits: nearest values, bytes, the backward pass, and training on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VIT, abstract_tree, assemble, compiled, image_batch, one_device, random_tree

from tljax.edits.fold import merge
from tljax.layers import Dense
from tljax.models.vit import ViT
from tljax.quantized import NF4, read, to_int8, to_nf4
from tljax.sharding import put_batch
from tljax.state import apply_edits
from tljax.strategies import make
from tljax.tree import flatten, join
from tljax.types import BadInput

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
WIDE = VIT.clone(width=64, mlp=128, depth=2)
QLORA = [("lora", {"rank": 4}), ("quantize", {"form": "nf4"})]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def test_int8_rounds_every_column_to_its_own_steps():
    kernel = normal(50, 7) * np.arange(7, dtype=np.float32)  # one column of zeros
    found = np.asarray(read(to_int8(jnp.asarray(kernel))))
    step = np.abs(kernel).max(0) / 127
    assert (np.abs(found - kernel) <= step / 2 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(found[:, 0], 0)


def test_nf4_takes_the_nearest_of_its_values():
    """Without the second quantisation, in numpy: the nearest value times the block's largest."""
    kernel = normal(192, 9)
    blocks = kernel.T.reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    choice = np.abs(blocks[:, :, None] / largest[:, :, None] - np.array(NF4, np.float32)).argmin(-1)
    exact = (np.array(NF4, np.float32)[choice] * largest).reshape(9, 192).T
    found = np.asarray(read(to_nf4(jnp.asarray(kernel))))
    # The scales are rounded to 1/127 of their spread around the mean: values move by no more.
    spread = np.abs(largest - largest.mean()).max() / 254 * 1.01
    moved = np.abs(found - exact) > spread + 1e-7
    # Near the middle between two values a moved scale may choose the other one.
    assert moved.mean() < 0.005
    ours, theirs = (np.abs(x - kernel).mean() for x in (found, exact))
    assert ours < 1.01 * theirs


def test_nf4_keeps_its_own_values():
    values = np.tile(np.array(NF4, np.float32), 8).reshape(128, 1)
    # One block's scale is the mean itself: the second quantisation adds nothing.
    np.testing.assert_allclose(read(to_nf4(jnp.asarray(values))), values, atol=1e-7)


def test_a_large_frozen_vit_in_few_bytes():
    """ViT-L's resident bytes, by shapes alone: at most .27 of float32 in int8, .16 in nf4."""
    model = ViT(width=1024, depth=24, heads=16, mlp=4096, patch=16, grid=(14, 14))
    tree = abstract_tree(model, image_batch(1, 224))

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    ratios = {}
    for form in ("int8", "nf4"):
        edits = make(tree, None, [("quantize", {"form": form})]).edits
        small = jax.eval_shape(lambda tree, edits=edits: apply_edits(edits, tree, KEY), tree)
        ratios[form] = size(small) / size(tree)
    assert ratios["int8"] <= 0.27 and ratios["nf4"] <= 0.16, ratios


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_the_backward_pass_is_the_read_kernels_and_keeps_only_codes(form):
    kernel, x = normal(64, 32), normal(5, 64, seed=1)
    stored = {"int8": to_int8, "nf4": to_nf4}[form](jnp.asarray(kernel))
    layer = Dense(32, use_bias=False)

    def loss(x, kernel):
        return jnp.sum(jnp.square(layer.apply({"params": {"kernel": kernel}}, x)))

    plain = jax.grad(loss)(x, read(stored))
    np.testing.assert_allclose(jax.grad(loss)(x, stored), plain, rtol=1e-5, atol=1e-6)
    _, pull = jax.vjp(lambda x: loss(x, stored), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == (64, 32)]
    assert all(leaf.dtype == jnp.int8 for leaf in kept)


def test_lora_learns_on_a_quantised_base_and_folds_into_float32():
    batch = image_batch(16)
    run = assemble(WIDE, batch, QLORA, lr=1e-2)
    state, frozen = run.birth(KEY)
    assert flatten(frozen)["params/blocks/0/mlp/up/kernel/nf4"].dtype == np.uint8
    step, losses = compiled(run, batch), []
    for _ in range(8):
        state, metrics = step(state, frozen, put_batch(batch, one_device()))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    learned = join(state.params, frozen)
    folded = merge(learned)
    assert {leaf.dtype for leaf in flatten(folded).values()} == {jnp.dtype(jnp.float32)}
    apply = jax.jit(lambda tree: WIDE.apply(tree, jnp.asarray(batch["image"])).logits)
    found, expected = apply(folded), apply(learned)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_quantised_tree_folds_to_what_it_computes():
    batch = image_batch(2)
    tree = random_tree(WIDE, batch)
    edits = make(tree, None, QLORA).edits
    small = apply_edits(edits, tree, KEY)
    folded = merge(small)
    assert set(flatten(folded)) == set(flatten(tree))
    apply = jax.jit(lambda tree: WIDE.apply(tree, jnp.asarray(batch["image"])).logits)
    found, expected = apply(small), apply(folded)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    drift = np.abs(expected - apply(tree)).max() / np.abs(expected).max()
    assert 1e-3 < drift < 0.5  # four bits are not nothing


def test_training_a_quantised_leaf_is_refused():
    with pytest.raises(BadInput, match=r"kernel/.* is to be trained, but is stored as u?int8"):
        assemble(WIDE, image_batch(), [("quantize", {}), ("full", {})])


def test_a_kernel_that_does_not_divide_into_blocks_is_refused():
    with pytest.raises(BadInput, match=r"has 32 inputs, no multiple of nf4's 64"):
        make(abstract_tree(VIT, image_batch()), None, [("quantize", {})])


@pytest.mark.parametrize("second", ["lora", "vera", "ia3", "quantize"])
def test_grafting_onto_a_quantised_kernel_is_refused(second):
    with pytest.raises(BadInput, match="quantised already: graft first, then quantize"):
        assemble(WIDE, image_batch(), [("quantize", {}), (second, {})])
