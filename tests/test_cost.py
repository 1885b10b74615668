"""What a step costs beside its arithmetic, and the benchmarks' table of methods.

How much each method may cost is held by test_budget.py.
"""

import dataclasses
import functools

import accuracy
import jax
import jax.numpy as jnp
import methods
import pytest
from tiny import (
    BERT,
    MLM,
    RESNET,
    VIT,
    abstract_tree,
    assemble,
    compiled,
    image_batch,
    text_batch,
)

from tljax.state import apply_edits
from tljax.strategies import STRATEGIES, make
from tljax.tree import flatten, join, label
from tljax.types import BadInput

KINDS = {
    "vit": (VIT, image_batch()),
    "bert": (BERT, text_batch()),
    "resnet": (RESNET, image_batch()),
}
SMALL = {"width": 64, "mlp": 128, "depth": 2}
WIDE = {"vit": SMALL, "bert": SMALL, "resnet": {}}
"""Fields of the tiny models: nf4 has blocks of 64."""


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


@functools.cache
def own_tree(kind, **fields):
    model, batch = KINDS[kind]
    model = dataclasses.replace(model, **WIDE[kind], **fields)
    return model, abstract_tree(model, batch)


def trained(kind, name):
    """Return what a method of the benchmarks trains on a tiny model, from shapes alone."""
    model, tree = own_tree(kind, **methods.FIELDS.get(name, {}))
    key = jax.random.key(0)
    start, chosen = methods.start_of(tree), methods.chosen(methods.METHODS[name])
    strategy = make(tree, model.read, chosen, start)
    edited = jax.eval_shape(lambda key: apply_edits(strategy.edits, tree_of(tree), key), key)
    roles = flatten(label(edited, strategy.roles, "freeze"))
    paths = tuple(path for path, role in roles.items() if role == "train")
    if strategy.anchor:
        strategy.anchor(paths)
    return paths


def tree_of(abstract):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_of_the_benchmarks_fits_the_models_that_can_have_it(kind):
    found = {name: trained(kind, name) for name in methods.methods_of(kind)}
    assert set(found["probe"]) == {"params/head/kernel", "params/head/bias"}
    # What trains the head alone is no method: quantising, or a policy of BatchNorm, by itself.
    assert [name for name in found if set(found[name]) == set(found["probe"])] == ["probe"]
    for name in methods.CANNOT[kind] - methods.IMAGES:
        with pytest.raises(BadInput):
            trained(kind, name)


def test_the_table_of_methods_leaves_no_strategy_out():
    named = {part["name"] for parts in methods.METHODS.values() for part in parts}
    assert named == set(STRATEGIES) - {"scratch"}  # its step is that of full
    assert set(accuracy.RATES) <= set(methods.METHODS)
