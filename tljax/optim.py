"""One optax chain: clip, direction, decay, groups, schedule, learning rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tljax.tree import label, map_with_path
from tljax.types import BadInput, Rules, Tree


class Group(NamedTuple):
    """How a group of trainable leaves differs: factors on learning rate and weight decay."""

    lr: float = 1.0
    decay: float = 1.0


TOKENS = ("cls", "dist", "registers", "probe", "pos", "prompt", "prefix")
"""Leaves of several axes, or their parents, that are no kernels: learned tokens, the positions."""
DIRECTIONS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": lambda beta1, beta2, eps, momentum: optax.scale_by_adam(beta1, beta2, eps),
    "sgd": lambda beta1, beta2, eps, momentum: optax.trace(momentum),
    "lion": lambda beta1, beta2, eps, momentum: optax.scale_by_lion(beta1, beta2),
}


def schedule(kind: str, steps: int, warmup: int) -> optax.Schedule:
    """Return a factor in [0, 1] by step: linear warm-up, then cosine, linear or constant.

    warmup and steps are in steps; the last step has a factor just above zero.
    """
    after = max(steps - warmup, 1)
    falls = {
        "cosine": optax.cosine_decay_schedule(1.0, after),
        "linear": optax.linear_schedule(1.0, 0.0, after),
        "constant": optax.constant_schedule(1.0),
    }
    if kind not in falls:
        raise BadInput(f"schedule {kind!r} is none of {', '.join(falls)}")
    # The first step already moves: warm-up counts from 1/warmup, not from 0.
    rise = lambda count: (count + 1) / max(warmup, 1)  # noqa: E731 - a schedule is a function
    return optax.join_schedules([rise, falls[kind]], [warmup]) if warmup else falls[kind]


def decay_mask(params: Tree) -> Tree:
    """Return 1 for leaves that weight decay applies to: kernels and embeddings, not 1-D leaves.

    Class tokens and position tables are left out too, as MAE and timm do, and so are prompts.
    """

    def decays(path: str, leaf: Any) -> float:
        *_, parent, name = ("", *path.split("/"))
        return float(leaf.ndim > 1 and not {parent, name} & {*TOKENS})

    return map_with_path(decays, params)


def make_tx(
    params: Tree,
    *,
    name: str,
    lr: float,
    steps: int,
    warmup: int = 0,
    decay: float = 0.0,
    clip: float | None = None,
    fall: str = "cosine",
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    momentum: float = 0.9,
    groups: Rules = (),
) -> optax.GradientTransformation:
    """Build the optimizer of the trainable tree `params` (arrays or shapes).

    clip bounds the global norm of the trainable gradients, which are all there are.  Learning
    rate and decay are leaves of the optimizer state (`with_lr`, `with_decay`), so that trials of
    them share one compilation.
    """
    # A factor for every leaf: python floats, fixed at trace time.
    rates = label(params, [(glob, float(group.lr)) for glob, group in groups], 1.0)
    shares = label(params, [(glob, float(group.decay)) for glob, group in groups], 1.0)
    shares = optax.tree.mul(decay_mask(params), shares)

    def add_decay(weight_decay: jax.Array) -> optax.GradientTransformation:
        """Decouple weight decay from the direction, as Loshchilov & Hutter do."""
        add = lambda u, p, share: u + weight_decay * share * p if share else u  # noqa: E731
        return optax.stateless(lambda updates, own: jax.tree.map(add, updates, own, shares))

    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        DIRECTIONS[name](beta1, beta2, eps, momentum),
        optax.inject_hyperparams(add_decay)(weight_decay=decay),
        optax.stateless(lambda updates, _: optax.tree.mul(updates, rates)),
        optax.scale_by_schedule(schedule(fall, steps, warmup)),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=lr),
    )


def with_lr(opt: Any, lr: float | jax.Array) -> Any:
    """Return the optimizer state with another peak learning rate."""
    return optax.tree_utils.tree_set(opt, learning_rate=jnp.asarray(lr, jnp.float32))


def with_decay(opt: Any, decay: float | jax.Array) -> Any:
    """Return the optimizer state with another weight decay."""
    return optax.tree_utils.tree_set(opt, weight_decay=jnp.asarray(decay, jnp.float32))
