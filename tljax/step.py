"""The train step, the only one: gradients of the trainable part, one optimizer update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tljax.state import State
from tljax.tree import join
from tljax.types import Batch, Objective, Tree


class Shardings(NamedTuple):
    """Where each argument of the step lives, and its scalar results."""

    state: State
    frozen: Tree
    batch: jax.sharding.Sharding
    scalar: jax.sharding.Sharding


def make_step(
    objective: Objective, tx: optax.GradientTransformation, seed: int, shardings: Shardings,
    microbatches: int = 1,
) -> jax.stages.Wrapped:  # fmt: skip
    """Build `step(state, frozen, batch) -> (state, metrics)`, jitted; the state is donated.

    Only `state.params` is differentiated.  Randomness is `fold_in(seed, step)`, so a restart is
    exact.  Microbatches give the whole batch's gradient: counts are summed before the scan.  Where
    loss or gradient norm is not finite nothing moves but the counters.
    """

    def step(state: State, frozen: Tree, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        # (b m) -> m b keeps every example on its device; (m b) would gather the batch.
        cut = lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
        parts = jax.tree.map(cut, batch)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        inputs = (parts, jax.random.split(key, microbatches))

        @jax.jit  # traced once for its two uses
        def forward(params: Tree, track: Tree, frozen: Tree, part: Batch, key: jax.Array) -> Any:
            return objective(join(params, track, frozen), part, key)

        def count(one: Any) -> dict[str, jax.Array]:
            loss, _ = forward(state.params, state.track, frozen, *one)
            return {name: jnp.asarray(term.count, jnp.float32) for name, term in loss.items()}

        # A count reads the batch alone: XLA removes the rest of this forward pass.
        counts = {name: jnp.sum(c) for name, c in jax.lax.map(count, inputs).items()}

        def total(params: Tree, track: Tree, one: Any) -> Any:
            loss, aux = forward(params, track, frozen, *one)
            values = {k: t.weight * t.sum / jnp.maximum(counts[k], 1) for k, t in loss.items()}
            return sum(values.values()), (values, aux)

        def accumulate(carry: tuple[Tree, Tree], one: Any) -> Any:
            grads, track = carry
            grad = jax.value_and_grad(total, has_aux=True)
            (value, (values, aux)), new = grad(state.params, track, one)
            carry = jax.tree.map(jnp.add, grads, new), join(aux.track, track)
            return carry, ({"loss": value, **values}, aux.metrics)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (grads, track), (losses, sums) = jax.lax.scan(accumulate, (zeros, state.track), inputs)
        updates, opt = tx.update(grads, state.opt, state.params)
        metrics = {name: jnp.sum(value) for name, value in losses.items()}
        metrics |= {k: jnp.sum(s) / jnp.maximum(jnp.sum(n), 1) for k, (s, n) in sums.items()}
        metrics["grad_norm"] = optax.tree.norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        after = state.next(optax.apply_updates(state.params, updates), track, opt, good)
        return after, metrics | {"in_a_row": after.in_a_row}

    return jax.jit(
        step,
        in_shardings=shardings[:3],
        out_shardings=(shardings.state, shardings.scalar),
        donate_argnums=0,
    )
