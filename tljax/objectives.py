"""Losses as pure functions `(tree, batch, key) -> (loss, aux)`, and what each task predicts.

Losses and their reductions are float32 whatever the compute dtype; units are nats per example
(per masked token for mlm, per labelled token for tag), squared label units for regress.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from tljax.layers import Dense
from tljax.tree import flatten, join, unflatten
from tljax.types import Aux, BadInput, Batch, Key, Loss, Objective, Output, Reading, Term, Tree

COLLECTIONS = ("params", "batch_stats", "fixed_stats")
TEXT = ("input_ids", "attention_mask", "token_type_ids")


def inputs_of(batch: Batch) -> tuple[Any, ...]:
    """Return the model's positional inputs: an image batch has `image`, a text batch has ids."""
    return (batch["image"],) if "image" in batch else tuple(batch[name] for name in TEXT)


def variables_of(tree: Tree) -> Tree:
    """Return the collections that a model reads, without averages or other models."""
    return {name: tree[name] for name in COLLECTIONS if tree.get(name) is not None}


def collections_of(tree: Tree, batch: Batch) -> Tree:
    """Return the variables of a model, and the activations that a batch brings in `cut`."""
    return variables_of(tree) | ({"cut": batch["cut"]} if "cut" in batch else {})


def forward(
    model: nn.Module, tree: Tree, batch: Batch, key: Key, moving: tuple[str, ...] = ()
) -> tuple[Output, Tree]:
    """Run a model as in training: dropout from `key`, BatchNorm statistics moved.

    moving: further collections that are mutable.
    """
    variables, mutable = collections_of(tree, batch), ["batch_stats", *moving]
    output, moved = model.apply(
        variables, *inputs_of(batch), rngs={"dropout": key}, mutable=mutable
    )
    return output, moved


def infer(model: nn.Module, tree: Tree, batch: Batch) -> Output:
    """Run a model as in evaluation, with the averaged parameters where the tree has them."""
    variables = collections_of(join(tree.get("ema"), tree), batch)
    output: Any = model.apply(variables, *inputs_of(batch))
    return output


def passing(model: nn.Module, tree: Tree, batch: Batch) -> dict[str, Array]:
    """Return, by path, the activations that pass every cut in evaluation, in forward order."""
    variables = collections_of(join(tree.get("ema"), tree), batch)
    _, moved = model.apply(variables, *inputs_of(batch), mutable=["cut"])
    return flatten(moved["cut"])


def _objective(
    model: nn.Module,
    name: str,
    losses: Callable[[Array, Batch], tuple[Array, Array, dict]],
    readings: Sequence[Reading],
) -> Objective:
    """Build an objective from `losses(logits, batch) -> (values, weights, metrics)` per unit.

    The readings share its forward pass: a second one would have a backward pass of its own.
    """

    def objective(tree: Tree, batch: Batch, key: Key) -> tuple[Loss, Aux]:
        output, moved = forward(model, tree, batch, key)
        value, weight, metrics = losses(output.logits.astype(jnp.float32), batch)
        count = jnp.sum(weight)
        loss = {name: Term(1.0, jnp.sum(value * weight), count)}
        for reading in readings:
            loss = beside(loss, reading(model, output, tree, batch))
        sums = {k: (jnp.sum(v * weight), count) for k, v in metrics.items()}
        return loss, Aux(metrics=sums, track=moved)

    return objective


def beside(loss: Loss, more: Loss) -> Loss:
    """Put the terms of two losses side by side; raises BadInput if both have one of a name."""
    if twice := sorted(loss.keys() & more.keys()):
        raise BadInput(f"the loss has two terms {twice[0]!r}: name each strategy once")
    return loss | more


def cross_entropy(
    logits: Float[Array, "*b c"], labels: Int[Array, "*b"] | Float[Array, "*b c"]
) -> Float[Array, "*b"]:
    """Return the cross-entropy in nats with integer labels or label distributions."""
    if labels.ndim == logits.ndim:
        return optax.softmax_cross_entropy(logits, labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))


def _classify(logits: Array, batch: Batch) -> tuple[Array, Array, dict]:
    labels = batch["label"]
    hard = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    right = (jnp.argmax(logits, -1) == hard).astype(jnp.float32)
    value = cross_entropy(logits, labels)
    return value, jnp.ones_like(value), {"accuracy": right}


def _multilabel(logits: Array, batch: Batch) -> tuple[Array, Array, dict]:
    value = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch["label"]), -1)
    return value, jnp.ones_like(value), {}


def _regress(logits: Array, batch: Batch) -> tuple[Array, Array, dict]:
    value = jnp.square(logits[:, 0] - batch["label"])
    return value, jnp.ones_like(value), {}


def _tokens(logits: Array, batch: Batch) -> tuple[Array, Array, dict]:
    labels = batch["label"]
    right = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
    return cross_entropy(logits, labels), (labels >= 0).astype(jnp.float32), {"accuracy": right}


LOSSES = {
    "classify": _classify,
    "multilabel": _multilabel,
    "regress": _regress,
    "tag": _tokens,
    "mlm": _tokens,
}


def make_objective(task: str, model: nn.Module, readings: Sequence[Reading] = ()) -> Objective:
    """Return the objective of a task: classify, multilabel, regress, tag or mlm."""
    return _objective(model, task, LOSSES[task], readings)


def quadratic(tree: Tree, batch: Batch, key: Key) -> tuple[Loss, Aux]:
    """Pull leaves to their anchors, if there are any: sum of weight / 2 x (leaf - mean)^2.

    It reads every anchored leaf, so anchors are set after it is settled what the task reads.
    """
    if "anchor" not in tree:
        return {}, Aux({}, {})
    now, mean, weight = map(flatten, (tree, tree["anchor"]["mean"], tree["anchor"]["weight"]))
    pulls = [
        jnp.sum(weight[path] / 2 * jnp.square(now[path].astype(jnp.float32) - start))
        for path, start in mean.items()
    ]
    return {"anchor": Term(1.0, sum(pulls, jnp.zeros(())), jnp.ones(()))}, Aux({}, {})


def distill(weight: float, temperature: float) -> Reading:
    """Return the cross-entropy to the teacher's outputs, both softened, over the old classes.

    Unlike Hinton's form, the term is not multiplied by temperature^2.
    Source: Li and Hoiem 2016, arXiv 1606.09282, eq. 2 and 3.
    """

    def term(model: nn.Module, output: Output, tree: Tree, batch: Batch) -> Loss:
        old = tree.get("old")
        asked = model.clone(num_classes=None) if old else model
        told = infer(asked, tree["teacher"], batch)
        if old:
            taught = _old_logits(tree["teacher"]["params"]["head"], told.pooled)
            student = _old_logits(old["head"], output.pooled)
        else:
            taught, student = told.logits, output.logits
        soft = jax.nn.softmax(taught.astype(jnp.float32) / temperature)
        value = optax.softmax_cross_entropy(student.astype(jnp.float32) / temperature, soft)
        real = batch["label"] >= 0 if value.ndim == 2 else jnp.ones_like(value)
        return {"distill": Term(weight, jnp.sum(value * real), jnp.sum(real))}

    return term


def _old_logits(head: Tree, pooled: Float[Array, "b d"]) -> Float[Array, "b c"]:
    logits: Any = Dense(head["kernel"].shape[-1]).apply({"params": head}, pooled)
    return logits


def make_predict(task: str, model: nn.Module) -> Callable[[Tree, Batch], dict[str, Array]]:
    """Return `predict(tree, batch)`: float32 logits, or per-example sums where logits are large."""

    def logits(tree: Tree, batch: Batch) -> dict[str, Array]:
        return {"logits": infer(model, tree, batch).logits.astype(jnp.float32)}

    def sums(tree: Tree, batch: Batch) -> dict[str, Array]:
        value, weight, metrics = _tokens(logits(tree, batch)["logits"], batch)
        per_example = {"loss": value, "correct": metrics["accuracy"], "count": weight}
        return {k: jnp.sum(v * weight, -1) for k, v in per_example.items()}

    return sums if task == "mlm" else logits


def add(*objectives: Objective) -> Objective:
    """Sum objectives: their terms and metrics side by side; names must differ."""

    def objective(tree: Tree, batch: Batch, key: Key) -> tuple[Loss, Aux]:
        loss: Loss = {}
        metrics: dict[str, Any] = {}
        track: Tree = {}
        for one in objectives:
            terms, aux = one(tree, batch, key)
            loss, metrics, track = beside(loss, terms), metrics | aux.metrics, track | aux.track
        return loss, Aux(metrics, track)

    return objective


def average(objective: Objective, decay: float) -> Objective:
    """Let every leaf below `ema/` follow its own: ema <- decay * ema + (1 - decay) * leaf.

    The average sees the parameters before this step's update.  With m microbatches give
    decay ** (1 / m): the average then moves as far as in one pass.
    """

    def averaged(tree: Tree, batch: Batch, key: Key) -> tuple[Loss, Aux]:
        loss, aux = objective(tree, batch, key)
        follow = lambda mean, now: mean + (1 - decay) * (jax.lax.stop_gradient(now) - mean)  # noqa: E731
        now = flatten(tree)
        ema = {path: follow(mean, now[path]) for path, mean in flatten(tree["ema"]).items()}
        return loss, Aux(aux.metrics, dict(aux.track) | {"ema": unflatten(ema)})

    return averaged
