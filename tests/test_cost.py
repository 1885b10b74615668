"""What a step costs beside its arithmetic, and the benchmarks' table of methods.

How much each method may cost is held by test_budget.py.
"""

import dataclasses

import accuracy
import jax
import methods
import pytest
from tiny import BERT, MLM, RESNET, VIT, assemble, compiled, image_batch, text_batch

from tljax.strategies import STRATEGIES
from tljax.tree import flatten, join
from tljax.types import BadInput

KINDS = {
    "vit": (VIT, image_batch()),
    "bert": (BERT, text_batch()),
    "resnet": (RESNET, image_batch()),
}
WIDE = {"width": 64, "mlp": 128}  # nf4 has blocks of 64


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


def steps(kind, name):
    """Assemble a method of the benchmarks on a tiny model of a kind."""
    model, batch = KINDS[kind]
    fields = ({} if kind == "resnet" else WIDE) | methods.FIELDS.get(name, {})
    model = dataclasses.replace(model, **fields)
    start = methods.start_of(assemble(model, batch, "full").tree)
    return assemble(model, batch, methods.chosen(methods.METHODS[name]), start=start)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_of_the_benchmarks_runs_on_the_models_that_can_have_it(kind):
    made = {name: steps(kind, name) for name in methods.methods_of(kind)}
    trained = {
        name: frozenset(p for p, role in flatten(run.roles.tree).items() if role == "train")
        for name, run in made.items()
    }
    assert trained["probe"] == {"params/head/kernel", "params/head/bias"}
    # What trains the head alone is no method: quantising, or a policy of BatchNorm, by itself.
    assert [name for name in trained if trained[name] == trained["probe"]] == ["probe"]
    for name in methods.CANNOT[kind]:
        with pytest.raises(BadInput):
            steps(kind, name)


def test_the_table_of_methods_leaves_no_strategy_out():
    named = {part["name"] for parts in methods.METHODS.values() for part in parts}
    assert named == set(STRATEGIES) - {"scratch"}  # its step is that of full
    assert set(accuracy.RATES) <= set(methods.METHODS)
