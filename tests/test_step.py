"""Properties of the one step: what moves, what does not, and that restarts are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tljax import optim
from tljax.objectives import add, average, make_objective
from tljax.sharding import BATCH, make_mesh, on
from tljax.state import assign_roles, make_birth
from tljax.step import Shardings, make_step
from tljax.tree import flatten, join, split
from tljax.types import Aux, BadInput, Output, Term

from jax.sharding import PartitionSpec as P  # isort: skip


class Net(nn.Module):
    """Two dense layers with BatchNorm between: small, with all three roles."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(16, name="below")(images.reshape(len(images), -1))
        moving = self.is_mutable_collection("batch_stats") and not self.is_initializing()
        x = nn.BatchNorm(use_running_average=not moving, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(jnp.tanh(x))
        return Output(x[:, None], x, nn.Dense(3, name="head")(x))


KEY = jax.random.key(0)
BATCH_OF_16 = {
    "image": np.random.default_rng(0).normal(size=(16, 4, 4, 1)).astype(np.float32),
    "label": np.arange(16, dtype=np.int32) % 3,
}


def start(rules, net=None, name="adamw", microbatches=1, objective=None, **options):
    """Return (step, state, frozen) of the small network on all devices."""
    net = net or Net()
    init = lambda key: net.init(key, BATCH_OF_16["image"])  # noqa: E731
    objective = objective or make_objective("classify", net)
    tree = jax.eval_shape(init, KEY)
    roles = assign_roles(tree, rules, (), objective, BATCH_OF_16, KEY).tree
    defaults = {"lr": 0.01, "steps": 100, "clip": None}
    tx = optim.make_tx(split(tree, roles).train, name=name, **(defaults | options))
    birth = make_birth(init, roles, tx, jnp.float32)
    mesh = make_mesh()
    here = on(mesh, P())
    state, frozen = jax.jit(birth, out_shardings=here)((), KEY)
    shardings = Shardings(here, here, on(mesh, BATCH), here)
    return make_step(objective, tx, 7, shardings, microbatches), state, frozen


ALL = (("params/**", "train"), ("batch_stats/**", "track"))
HEAD = (("params/head/**", "train"), ("batch_stats/**", "track"))


def test_frozen_leaves_are_bit_identical_and_trainable_leaves_move():
    step, state, frozen = start(HEAD)
    before = jax.tree.map(np.asarray, (state.params, frozen))
    for _ in range(20):
        state, _ = step(state, frozen, BATCH_OF_16)
    assert jax.tree.all(jax.tree.map(np.array_equal, before[1], jax.device_get(frozen)))
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), before[0], jax.device_get(state.params)
    )
    assert jax.tree.all(moved)


def test_the_optimizer_state_holds_trainable_leaves_only():
    _, state, _ = start(HEAD)
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt) if leaf.ndim]
    assert sorted(moments) == sorted([(16, 3), (3,)] * 2)


def test_one_compilation_and_a_donated_state():
    step, state, frozen = start(ALL)
    old = state
    for _ in range(3):
        state, _ = step(state, frozen, BATCH_OF_16)
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))


def test_split_equals_masking_the_optimizer_over_the_whole_tree():
    """The role tree is an optax mask: `selective_transform` must give the same numbers."""
    step, state, frozen = start(HEAD, lr=0.05, fall="constant", decay=0.1)
    objective = make_objective("classify", Net())
    tree = jax.device_get(join(state.params, state.track, frozen))
    whole, track = {"params": tree["params"]}, {"batch_stats": tree["batch_stats"]}
    is_frozen = {"params": {"below": True, "norm": True, "head": False}}
    inner = optax.adamw(
        0.05, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    )
    tx = optax.transforms.selective_transform(inner, freeze_mask=is_frozen)
    opt = tx.init(whole)

    def loss(params, track):
        terms, aux = objective(params | track, BATCH_OF_16, KEY)
        return terms["classify"].sum / terms["classify"].count, aux.track

    for _ in range(5):
        state, _ = step(state, frozen, BATCH_OF_16)
        grads, track = jax.grad(loss, has_aux=True)(whole, track)
        updates, opt = tx.update(grads, opt, whole)
        whole = optax.apply_updates(whole, updates)
    ours, theirs = flatten(state.params), flatten(whole)
    for path, leaf in ours.items():
        # 1e-5: five Adam steps amplify float32 rounding (design, principle 3, measured 1.1e-5).
        np.testing.assert_allclose(leaf, theirs[path], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_optimizers_move_only_what_is_trainable(name):
    step, state, frozen = start(HEAD, name=name)
    state, metrics = step(state, frozen, BATCH_OF_16)
    assert set(flatten(state.params)) == {"params/head/kernel", "params/head/bias"}
    assert float(metrics["grad_norm"]) > 0


def uneven(tree, batch, key):
    """A masked mean whose count differs between microbatches, plus a quadratic pull."""
    value = jnp.square(batch["x"] @ tree["w"])
    terms = {
        "task": Term(1.0, jnp.sum(value * batch["mask"]), jnp.sum(batch["mask"])),
        "pull": Term(0.1, jnp.sum(jnp.square(tree["w"] - 1)), jnp.ones(())),
    }
    return terms, Aux({}, {})


def test_microbatches_are_exact_with_uneven_masks():
    rng = np.random.default_rng(1)
    mask = (rng.random(32) < np.linspace(0.05, 0.95, 32)).astype(np.float32)
    batch = {"x": rng.normal(size=(32, 5)).astype(np.float32), "mask": mask}
    init = lambda key: {"w": jax.random.normal(key, (5,))}  # noqa: E731
    results = []
    for microbatches in (1, 4):
        tx = optax.sgd(0.1)
        here = on(make_mesh(), P())
        birth = make_birth(init, {"w": "train"}, tx, jnp.float32)
        state, frozen = jax.jit(birth, out_shardings=here)((), KEY)
        shardings = Shardings(here, here, on(make_mesh(), BATCH), here)
        step = make_step(uneven, tx, 0, shardings, microbatches)
        for _ in range(3):
            state, metrics = step(state, frozen, batch)
        results.append((np.asarray(state.params["w"]), float(metrics["loss"])))
    # 1e-6: the same sums in another order.
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_step_that_is_not_finite_moves_nothing_but_its_counters(bad, microbatches):
    step, state, frozen = start(ALL, microbatches=microbatches)
    state, _ = step(state, frozen, BATCH_OF_16)  # so that no moment is zero
    kept = ("params", "track", "opt")
    before = jax.device_get({name: getattr(state, name) for name in kept})
    image = BATCH_OF_16["image"].copy()
    image[3, 0, 0] = bad
    for row in (1, 2):
        state, metrics = step(state, frozen, BATCH_OF_16 | {"image": image})
        assert (int(state.step), int(state.skipped), int(state.in_a_row)) == (1 + row, row, row)
        assert int(metrics["in_a_row"]) == row
        after = jax.device_get({name: getattr(state, name) for name in kept})
        assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    state, _ = step(state, frozen, BATCH_OF_16)
    assert (int(state.step), int(state.skipped), int(state.in_a_row)) == (4, 2, 0)
    assert not np.array_equal(before["params"]["params"]["head"]["kernel"],
                              state.params["params"]["head"]["kernel"])  # fmt: skip


def test_randomness_is_a_function_of_seed_and_step():
    step, state, frozen = start(ALL, net=Net(dropout=0.5))
    copies = [jax.tree.map(jnp.copy, state) for _ in range(2)]
    (a, first), (b, second) = (step(copy, frozen, BATCH_OF_16) for copy in copies)
    assert jax.tree.all(jax.tree.map(np.array_equal, *jax.device_get((a, b))))
    later = state.replace(step=state.step + 1)
    _, third = step(later, frozen, BATCH_OF_16)
    assert float(first["loss"]) == float(second["loss"]) != float(third["loss"])


def test_average_follows_the_parameters_equally_with_microbatches():
    results = []
    for microbatches in (1, 4):
        init = lambda key: {  # noqa: E731
            "params": {"w": jnp.full((5,), 2.0)},
            "ema": {"params": {"w": jnp.zeros(5)}},
        }
        objective = average(
            lambda tree, batch, key: uneven(tree["params"], batch, key), 0.9 ** (1 / microbatches)
        )
        tx = optax.sgd(0.0)
        here = on(make_mesh(), P())
        roles = {"params": {"w": "train"}, "ema": {"params": {"w": "track"}}}
        birth = make_birth(init, roles, tx, jnp.float32)
        state, frozen = jax.jit(birth, out_shardings=here)((), KEY)
        shardings = Shardings(here, here, on(make_mesh(), BATCH), here)
        step = make_step(objective, tx, 0, shardings, microbatches)
        batch = {"x": np.ones((32, 5), np.float32), "mask": np.ones(32, np.float32)}
        state, _ = step(state, frozen, batch)
        results.append(np.asarray(state.track["ema"]["params"]["w"]))
    np.testing.assert_allclose(results[0], 0.2, rtol=1e-6)  # 0.9 x 0 + 0.1 x 2
    np.testing.assert_allclose(results[1], 0.2, rtol=1e-6)


def test_added_objectives_keep_their_terms():
    batch = {"x": jnp.ones((4, 5)), "mask": jnp.ones(4)}
    other = lambda tree, batch, key: (  # noqa: E731
        {"other": Term(2.0, jnp.ones(()), jnp.ones(()))},
        Aux({"m": (1.0, 1.0)}, {}),
    )
    loss, aux = add(uneven, other)({"w": jnp.ones(5)}, batch, KEY)
    assert set(loss) == {"task", "pull", "other"}
    assert set(aux.metrics) == {"m"}


def test_a_trainable_leaf_that_nothing_reads_is_an_error_only_if_the_user_named_it():
    tree = {"w": jnp.ones(5), "idle": jnp.ones(5)}
    batch = {"x": jnp.ones((4, 5)), "mask": jnp.ones(4)}
    with pytest.raises(BadInput, match="idle"):
        assign_roles(tree, (("idle", "train"),), (("w", "train"),), uneven, batch, KEY)
    roles = assign_roles(tree, (), (("**", "train"),), uneven, batch, KEY)
    assert roles.tree == {"w": "train", "idle": "freeze"}
    assert roles.unread == ["idle"]
    with pytest.raises(BadInput, match="nothing is trainable"):
        assign_roles(tree, (), (), uneven, batch, KEY)
