"""Compiled FLOPs of the step against full fine-tuning: each method at its floor."""

import dataclasses
import functools

import jax
import pytest
from tiny import MLM, VIT, assemble, compiled, image_batch, text_batch

from tljax.models.vit import ViT
from tljax.tree import join

# ViT-S/14 as DINOv2 has it, at 98 px; and a small one for every run of the tests.
SMALL = ViT(layer_scale=1e-5, num_classes=10)
NARROW = dataclasses.replace(
    VIT, width=96, mlp=384, heads=3, depth=6, patch=14, grid=(7, 7), num_classes=10
)
# Floors are 1/3, 2/3 and (1 + 2k/L)/3; the rest is LoRA's products, norms, softmax and GELU.
BOUNDS = {"probe": 0.36, "lora": 0.72, "last_k": 0.50}


@functools.cache
def flops(model, strategy, rank, **optimizer):
    """FLOPs that XLA counts in the compiled step; the gradient norm is one of its metrics."""
    batch = image_batch(2, 98, 10)
    options = {"lora": {"rank": rank}}.get(strategy)
    run = assemble(model, batch, strategy, options=options, **optimizer)
    return compiled(run, batch).cost_analysis()["flops"]


def assert_at_the_floor(model, rank, last, **optimizer):
    full = flops(model, "full", rank, **optimizer)
    for name, bound in (BOUNDS | {"last_k": last}).items():
        ratio = flops(model, name, rank, **optimizer) / full
        assert ratio < bound, f"{name}: {ratio:.3f} of full"
        assert ratio > 1 / 3 - 0.02, f"{name}: {ratio:.3f} of full is less than its forward pass"


def assert_clipping_is_free(model, rank):
    for name in ("full", *BOUNDS):
        clipped, unclipped = flops(model, name, rank), flops(model, name, rank, clip=None)
        assert clipped == pytest.approx(unclipped, rel=0.01), name


@pytest.mark.slow
def test_a_narrow_vit_is_at_the_floor_with_clipping_on():
    # Rank 2 of width 96 is rank 8 of width 384; the last 2 of 6 blocks: (1 + 4/6) / 3 = 0.556.
    assert_at_the_floor(NARROW, 2, 0.59)


@pytest.mark.slow  # tests/test_budget.py clips as well
def test_clipping_reads_no_frozen_gradient():
    full = flops(NARROW, "full", 2)
    for name in ("probe", "lora"):
        with_clip, without = flops(NARROW, name, 2), flops(NARROW, name, 2, clip=None)
        assert with_clip == pytest.approx(without, rel=0.01)
        assert with_clip < BOUNDS[name] * full


@pytest.mark.slow
def test_vit_s_is_at_the_floor():
    assert_at_the_floor(SMALL, 8, BOUNDS["last_k"])
    assert_clipping_is_free(SMALL, 8)


def test_counting_the_loss_first_costs_no_forward_pass():
    """The step counts labels before it differentiates: XLA must drop the rest of that pass."""
    batch = text_batch(mlm=True)
    run = assemble(dataclasses.replace(MLM, depth=1), batch, "full", task="mlm")
    state, frozen = run.abstract

    def plain(params, track, frozen, batch):
        def loss(params):
            terms, _ = run.objective(join(params, track, frozen), batch, jax.random.key(0))
            return terms["mlm"].sum / terms["mlm"].count

        return jax.value_and_grad(loss)(params)

    bare = jax.jit(plain).lower(state.params, state.track, frozen, batch).compile()
    ratio = compiled(run, batch).cost_analysis()["flops"] / bare.cost_analysis()["flops"]
    assert ratio < 1.15  # the optimizer and the norm of a tiny model; a forward pass would be 1.33


@pytest.mark.parametrize("strategy", ["probe", "lora", "last_k", "bitfit"])
def test_the_optimizer_state_holds_trainable_leaves_only(strategy):
    run = assemble(VIT, image_batch(), strategy)
    state, frozen = run.abstract
    trainable = sorted(leaf.shape for leaf in jax.tree.leaves(state.params))
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt) if leaf.shape)
    scalars = [leaf for leaf in jax.tree.leaves(state.opt) if not leaf.shape]
    assert moments == sorted(2 * trainable)
    # Counts of Adam and the schedule; learning rate and weight decay, each with a count.
    assert len(scalars) <= 6
    whole = sum(leaf.size for leaf in jax.tree.leaves(run.tree))
    kept = sum(leaf.size for leaf in jax.tree.leaves((state.params, state.track, frozen)))
    assert kept == whole  # every leaf is in exactly one place
