"""Eight simulated devices equal one, for every strategy; what is sharded, and what is refused."""

import dataclasses
import functools
import mmap
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from tiny import (
    BERT,
    QUICK,
    RESNET,
    VIT,
    abstract_tree,
    assemble,
    compiled,
    image_batch,
    one_device,
    random_tree,
    text_batch,
)

from tljax.edits.load import load
from tljax.objectives import make_predict
from tljax.sharding import check_batch, fsdp_spec, make_mesh, on, put, put_batch, specs, under
from tljax.tree import flatten
from tljax.types import BadInput

# Wide enough that kernels pass the size below which a leaf is replicated.
WIDE = dataclasses.replace(VIT, width=128, mlp=256, depth=2)
MODELS = {
    "vit": (WIDE, image_batch()),
    "resnet": (dataclasses.replace(RESNET, width=16, stages=(1, 1, 1)), image_batch()),
    "bert": (dataclasses.replace(BERT, width=128, mlp=256), text_batch()),
}
MESHES = {"one": (), "data8": (8, 1), "data2-fsdp4": (2, 4), "fsdp8": (1, 8)}
STEPS = 3


def mesh_of(name):
    return make_mesh(*MESHES[name]) if MESHES[name] else one_device()


def random_source(model, batch):
    """An edit that loads random values into every leaf."""
    return (load(jax.device_get(random_tree(model, batch)), abstract_tree(model, batch))[0],)


@functools.cache
def trained(model_name, strategy, mesh_name):
    """Return the leaves and losses after three steps on a mesh."""
    model, batch = MODELS[model_name]
    mesh = mesh_of(mesh_name)
    # Adam divides gradients by their size, so also the rounding of those that are nearly zero.
    options = {"k": 1} if strategy == "last_k" else {}
    settings = {"options": options, "name": "sgd", "lr": 0.1}
    source = random_source(model, batch)
    run = assemble(model, batch, strategy, mesh=mesh, source=source, **settings)
    state, frozen = run.birth(jax.random.key(0))
    for leaf, own in zip(
        jax.tree.leaves((state, frozen)),
        jax.tree.leaves((run.shardings.state, run.shardings.frozen)),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(own, leaf.ndim), "born in another place"
    step, losses = compiled(run, batch), []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, put_batch(batch, mesh))
        losses.append(jax.device_get(metrics))
    return jax.device_get(flatten(state.params) | flatten(state.track)), losses


NAMES = ("scratch", "probe", "bitfit", "last_k", "lora", "full")
QUICK_CASES = [("vit", name, "data2-fsdp4") for name in ("scratch", "lora", "full")]
QUICK_CASES += [("vit", "full", "data8"), ("vit", "full", "fsdp8")]
QUICK_CASES += [("resnet", "full", "data2-fsdp4"), ("bert", "full", "data2-fsdp4")]
ALL_CASES = [
    (model, name, mesh)
    for model in MODELS
    for name in NAMES
    for mesh in list(MESHES)[1:]
    if (model, name) != ("resnet", "lora")
]


@pytest.mark.parametrize(
    ("model", "strategy", "mesh"),
    [
        pytest.param(*case, marks=() if case in QUICK_CASES else pytest.mark.slow)
        for case in ALL_CASES
    ],
)
@pytest.mark.few(4)
def test_eight_devices_equal_one(model, strategy, mesh):
    (ours, losses), (theirs, references) = (
        trained(model, strategy, where) for where in (mesh, "one")
    )
    assert ours.keys() == theirs.keys()
    for metrics, reference in zip(losses, references, strict=True):
        for name, value in metrics.items():
            np.testing.assert_allclose(value, reference[name], rtol=1e-5, err_msg=name)
    largest = max(np.abs(leaf).max() for leaf in theirs.values())
    for path, leaf in theirs.items():
        # 1e-5 of the tensor's largest value: sums over devices run in another order.  The bias of
        # a key has a gradient of zero, which leaves rounding alone: it is judged by all tensors.
        bound = 1e-5 * (largest if path.endswith("key/bias") else np.abs(leaf).max())
        np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=bound, err_msg=path)


@pytest.mark.slow
def test_random_initialisation_does_not_depend_on_the_mesh():
    model, batch = MODELS["vit"]
    born = []
    for name in ("one", "data2-fsdp4"):
        run = assemble(model, batch, "lora", mesh=mesh_of(name))
        state, _ = run.birth(jax.random.key(0))
        born.append(jax.device_get(flatten(state.params)))
    for path, leaf in born[0].items():
        np.testing.assert_array_equal(born[1][path], leaf, err_msg=path)


def test_large_leaves_and_their_moments_are_born_sharded_and_stay():
    model, batch = MODELS["vit"]
    mesh = mesh_of("fsdp8")
    run = assemble(model, batch, "full", mesh=mesh, source=random_source(model, batch))
    state, frozen = run.birth(jax.random.key(0))
    kernel = "params/blocks/0/mlp/up/kernel"
    for _ in range(2):
        assert flatten(state.params)[kernel].addressable_shards[0].data.shape == (128, 32)
        sharded = [leaf for leaf in jax.tree.leaves(state.opt) if not leaf.is_fully_replicated]
        wanted = [spec for spec in flatten(run.specs).values() if spec != P()]
        assert len(sharded) == 2 * len(wanted) > 0  # Adam has two moments
        state, _ = run.step(state, frozen, put_batch(batch, mesh))
    assert run.step._cache_size() == 1


def test_a_step_compiles_once_over_a_run():
    model, batch = MODELS["vit"]
    mesh = mesh_of("data2-fsdp4")
    run = assemble(model, batch, "probe", mesh=mesh)
    state, frozen = run.birth(jax.random.key(0))
    for _ in range(3):
        state, _ = run.step(state, frozen, put_batch(batch, mesh))
    assert run.step._cache_size() == 1


# Activations.

FEW = dataclasses.replace(WIDE, width=256, mlp=1024, grid=(2, 2))


def lowered_predict(mesh, wrap):
    """Lower a forward pass whose weights outweigh its tokens: the partitioner's worst case."""
    batch = image_batch(8)
    tree = abstract_tree(FEW, batch)
    where = on(mesh, specs(tree, mesh))
    place = lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)  # noqa: E731
    image = place(batch["image"], on(mesh, P(("data", "fsdp"))))
    predict = wrap(make_predict("classify", FEW))
    return jax.jit(predict).lower(jax.tree.map(place, tree, where), {"image": image})


def whole_batch_bytes(lowered):
    """Sum the bytes of all arrays on a device that hold the tokens of the whole batch."""
    shapes = re.findall(r"= f32\[(8,5|40),(\d+)\]", lowered.compile(QUICK).as_text())
    return 4 * sum(40 * int(width) for _, width in shapes)


def test_activations_are_pinned_to_the_batch_axes_under_the_mesh():
    mesh = mesh_of("fsdp8")
    pinned, free = (
        lowered_predict(mesh, wrap) for wrap in (functools.partial(under, mesh), lambda f: f)
    )
    # After the embedding and after every block.
    assert pinned.as_text().count("sdy.sharding_constraint") == FEW.depth + 1
    assert free.as_text().count("sdy.sharding_constraint") == 0
    assert whole_batch_bytes(pinned) < whole_batch_bytes(free)


def test_no_device_holds_the_tokens_of_the_whole_batch():
    """With more tokens than weights, all activations of an fsdp step are a device's own eighth."""
    batch = image_batch(16, 32)
    model = dataclasses.replace(WIDE, grid=(8, 8), depth=1)
    text = compiled(assemble(model, batch, "full", mesh=mesh_of("fsdp8")), batch).as_text()
    tokens = 16 * 65
    sizes = {int(np.prod([int(n) for n in dims.split(",")]))
             for dims in re.findall(r"f32\[([\d,]+)\]", text)}  # fmt: skip
    assert max(sizes) < tokens * WIDE.width  # nothing as large as the whole residual stream
    assert f"f32[2,65,{WIDE.width}]" in text  # the device's own part of it


def test_predictions_are_equal_under_the_mesh():
    model, batch = MODELS["vit"]
    tree = random_tree(model, batch)
    predict, mesh = make_predict("classify", model), mesh_of("data2-fsdp4")
    expected = jax.jit(predict)(tree, batch)["logits"]
    placed = jax.device_put(tree, on(mesh, specs(tree, mesh)))
    found = jax.jit(under(mesh, predict))(placed, put_batch(batch, mesh))["logits"]
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


# Specs.


def test_the_largest_axis_that_divides_is_sharded():
    mesh = mesh_of("data2-fsdp4")
    assert fsdp_spec((128, 512), mesh) == P(None, "fsdp")
    assert fsdp_spec((512, 129), mesh) == P("fsdp", None)
    assert fsdp_spec((129, 511), mesh) == P()  # nothing divides
    assert fsdp_spec((64, 64), mesh) == P()  # too small
    assert fsdp_spec((1024, 1024), mesh_of("data8")) == P()


def test_rules_come_before_the_default_and_may_be_plain_tuples():
    mesh = mesh_of("data2-fsdp4")
    tree = {"a": jax.ShapeDtypeStruct((128, 512), jnp.float32),
            "b": jax.ShapeDtypeStruct((128, 512), jnp.float32)}  # fmt: skip
    found = specs(tree, mesh, (("a", ()), ("b", ("fsdp", "data"))))
    assert found == {"a": P(), "b": P("fsdp", "data")}
    on(mesh, found)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("c", ("fsdp",)), "matches nothing"),
        (("a", ("fsdp",)), "does not divide"),
        (("a", (None, None, "fsdp")), "does not divide"),
        (("a", ("fdsp",)), "axes data, fsdp, tensor, not fdsp"),
    ],
)
def test_a_rule_that_does_not_fit_raises(rule, message):
    tree = {"a": jax.ShapeDtypeStruct((129, 512), jnp.float32)}
    with pytest.raises(BadInput, match=message):
        specs(tree, mesh_of("data2-fsdp4"), (rule,))


@pytest.mark.parametrize("sizes", [(3, 1), (2, 2), (-1, 3), (-1, -1), (0, -1), (-1, 0), (-2, -4)])
def test_a_mesh_that_does_not_multiply_raises(sizes):
    with pytest.raises(BadInput, match="does not multiply to the 8 devices"):
        make_mesh(*sizes)


def test_one_axis_may_be_the_rest():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


def test_a_batch_that_does_not_divide_raises():
    mesh = mesh_of("data2-fsdp4")
    check_batch(16, mesh, 2)
    with pytest.raises(BadInput, match="use a multiple of 8"):
        check_batch(12, mesh)
    with pytest.raises(BadInput, match="use a multiple of 32"):
        check_batch(16, mesh, 4)


@pytest.mark.parametrize("begin", range(0, 64, 4))
@pytest.mark.parametrize("turned", [False, True])
def test_memory_that_was_put_may_be_used_again(begin, turned):
    """A CPU device keeps an aligned array instead of copying it: also one shard of eight."""
    memory = mmap.mmap(-1, 64 + 4 * 512 * 1024)  # begins on a page
    array = np.frombuffer(memory, np.float32, 512 * 1024, offset=begin).reshape(512, 1024)
    array[:] = np.arange(array.size).reshape(array.shape)
    given = array.T if turned else array
    expected = given.copy()
    on_one = put(given, SingleDeviceSharding(jax.devices()[0]))
    on_eight = put(given, NamedSharding(make_mesh(1, 8), P("fsdp")))
    across = put(given[0], NamedSharding(make_mesh(1, 8), P("fsdp")))
    scalar = put(np.squeeze(given[1:2, 1:2]), SingleDeviceSharding(jax.devices()[0]))
    array[:] = 0
    np.testing.assert_array_equal(on_one, expected)
    np.testing.assert_array_equal(on_eight, expected)
    np.testing.assert_array_equal(across, expected[0])
    np.testing.assert_array_equal(scalar, expected[1, 1])
