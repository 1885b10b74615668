"""A run's folder: bitwise round trips, leftovers, damage, and runs as a source of weights."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax.checkpoint import SEAL, Checkpoints, read_tree, write_json
from tljax.state import State
from tljax.tree import flatten
from tljax.types import BadInput

ROOT = Path(__file__).parent.parent
HOME = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def make_tree(seed=0):
    numbers = np.random.default_rng(seed)
    kernel = numbers.normal(size=(8, 4)).astype(np.float32)
    params = {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(4)}, "body": None}
    body = {"kernel": jnp.asarray(numbers.normal(size=(16, 8)), jnp.bfloat16)}
    lora = {"scale": jnp.float32(0.3), "int8": jnp.arange(-4, 4, dtype=jnp.int8)}
    return {
        "train": {"params": params | {"low": jnp.asarray(kernel, jnp.bfloat16)}},
        "track": {"params": {"head": None}, "batch_stats": {"mean": jnp.arange(3.0)}},
        "frozen": {"params": {"head": {"kernel": None, "bias": None}, "body": body, "lora": lora}},
    }


def make_state(step=3, seed=0):
    tree = make_tree(seed)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = State(jnp.int32(0), tree["train"], tree["track"], tx.init(tree["train"]))
    grads = jax.tree.map(jnp.sin, state.params)
    _, opt = tx.update(grads, state.opt, state.params)
    return State(jnp.int32(step), state.params, state.track, opt)


def abstract(tree, sharding=HOME):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def bits(tree):
    return [(np.asarray(x).tobytes(), x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert bits(one) == bits(other)


@pytest.fixture
def run(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield checkpoints
    checkpoints.close()


def test_state_comes_back_bitwise_with_its_holes_and_optimizer(run):
    state = make_state()
    assert run.latest() is None
    run.save(3, state)
    restored = run.restore(abstract(state))
    assert_same(restored, state)
    assert restored.params["params"]["body"] is None
    assert restored.params["params"]["low"].dtype == jnp.bfloat16


def test_a_donated_state_is_saved_as_it_was(run):
    size = 1 << 20  # large enough that the background write is still under way
    state = State(jnp.int32(0), {"w": jnp.arange(size, dtype=jnp.float32)}, None, None)
    expected = bits(state)
    template = abstract(state)
    run.save(0, state)
    step = jax.jit(lambda s: s.replace(params={"w": s.params["w"] * 0 - 1}), donate_argnums=0)
    for _ in range(3):
        state = step(state)
    jax.block_until_ready(state)
    assert bits(run.restore(template)) == expected


def test_the_newest_are_kept_and_a_saved_step_is_never_rewritten(run):
    for step in (1, 2, 3):
        run.save(step, make_state(step, seed=step))
    run.save(3, make_state(3, seed=9))
    run.wait()
    assert run.steps() == [2, 3]
    assert_same(run.restore(abstract(make_state())), make_state(3, seed=3))
    assert_same(run.restore(abstract(make_state()), step=2), make_state(2, seed=2))
    with pytest.raises(BadInput, match="has step 3, later than 1"):
        run.save(1, make_state(1))


def test_a_missing_step_is_named_with_those_that_exist(run):
    with pytest.raises(BadInput, match="saved steps: none"):
        run.restore(abstract(make_state()))
    run.save(3, make_state())
    with pytest.raises(BadInput, match=r"no checkpoint of step 7 in .*saved steps: 3"):
        run.restore(abstract(make_state()), step=7)


@pytest.mark.parametrize("sealed", [True, False])
def test_partial_leftovers_are_ignored_and_cleaned(tmp_path, sealed):
    run = Checkpoints(tmp_path / "checkpoints", keep=2)
    run.save(3, make_state())
    run.close()
    if not sealed:
        (tmp_path / "checkpoints" / "3" / SEAL).unlink()
    partial = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (partial / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (partial / "state.orbax-checkpoint-tmp" / "manifest.ocdbt").write_bytes(b"half")
    looking = Checkpoints(tmp_path / "checkpoints")
    assert looking.latest() == 3
    looking.close()
    assert partial.exists()  # a reader must not remove what a running process is writing
    again = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert_same(again.restore(abstract(make_state())), make_state())
    again.save(4, make_state(4, seed=4))
    again.close()
    assert again.steps() == [3, 4]
    assert not partial.exists()


def test_a_process_killed_while_saving_loses_nothing_saved(tmp_path):
    code = f"""
        import os, jax.numpy as jnp
        from tljax.checkpoint import Checkpoints
        run = Checkpoints({str(tmp_path / "checkpoints")!r}, keep=2)
        run.save(1, {{"w": jnp.ones(4)}})
        run.save(2, {{"w": jnp.ones((4000, 4000))}})
        os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    assert done.returncode == 9
    run = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert 1 in run.steps()
    restored = run.restore(abstract({"w": jnp.ones(4)}), step=1)
    np.testing.assert_array_equal(restored["w"], np.ones(4, np.float32))
    run.close()
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def damage(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["gone", "truncated", "flipped"])
def test_every_damaged_file_is_named_and_other_steps_survive(tmp_path, how):
    run = Checkpoints(tmp_path / "checkpoints", keep=2)
    run.save(3, make_state(3))
    run.save(5, make_state(5))
    run.wait()
    folder = tmp_path / "checkpoints" / "5"
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != SEAL and p.stat().st_size]
    for path in files:
        kept = path.read_bytes()
        damage(path, how)
        with pytest.raises(BadInput, match=f"(?s)step 5.*{path.name}.*another step: 3"):
            run.restore(abstract(make_state()))
        path.write_bytes(kept)
    assert_same(run.restore(abstract(make_state())), make_state(5))
    run.close()


def test_another_structure_shape_or_dtype_is_refused(run):
    state = make_state()
    run.save(3, state)
    wider = abstract(state)
    wider.params["params"]["head"]["bias"] = jax.ShapeDtypeStruct((5,), jnp.float32, sharding=HOME)
    with pytest.raises(
        BadInput, match=r"params/params/head/bias is float32\[4\] on disk and float32\[5\]"
    ):
        run.restore(wider)
    other = abstract(state)
    other.params["params"]["low"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=HOME)
    with pytest.raises(BadInput, match=r"low is bfloat16\[8, 4\] on disk and float32"):
        run.restore(other)
    with pytest.raises(BadInput, match="absent"):
        run.restore(abstract(state).replace(track=None))


def test_a_failing_background_save_surfaces(tmp_path, monkeypatch):
    run = Checkpoints(tmp_path / "checkpoints", keep=2)
    run.save(1, make_state(1))
    run.wait()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, full)
    run.save(2, make_state(2))
    with pytest.raises(OSError, match="No space left"):
        run.wait()
    monkeypatch.undo()
    run.close()
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.latest() == 1
    assert_same(again.restore(abstract(make_state())), make_state(1))
    again.close()


def test_frozen_tree_is_stored_once_and_named_by_its_content(run):
    frozen = make_tree()["frozen"]
    digest = run.save_frozen(frozen)
    [file] = (run.folder.parent / "frozen").iterdir()
    stamp = file.stat().st_mtime_ns
    assert run.save_frozen(frozen) == digest
    assert file.stat().st_mtime_ns == stamp
    assert_same(run.load_frozen(digest, abstract(frozen)), frozen)
    other = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), frozen)
    assert run.save_frozen(other) != digest
    assert_same(run.load_frozen(digest, abstract(frozen)), frozen)


def test_a_tree_without_frozen_leaves_is_stored_too(run):
    digest = run.save_frozen({"params": {"head": None}})
    assert run.load_frozen(digest, {"params": {"head": None}}) == {"params": {"head": None}}


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_tampered_frozen_file_is_detected(run, how):
    frozen = make_tree()["frozen"]
    digest = run.save_frozen(frozen)
    [file] = (run.folder.parent / "frozen").iterdir()
    damage(file, how)
    with pytest.raises(BadInput, match=f"frozen tree .*{digest}.* is damaged"):
        run.load_frozen(digest, abstract(frozen))
    with pytest.raises(BadInput, match="damaged"):
        read_tree(file)
    file.unlink()
    with pytest.raises(BadInput, match="its folder holds: nothing"):
        run.load_frozen(digest, abstract(frozen))


def test_a_frozen_tree_of_another_shape_is_refused(run):
    frozen = make_tree()["frozen"]
    digest = run.save_frozen(frozen)
    del frozen["params"]["body"]
    with pytest.raises(BadInput, match=r"params/body/kernel is bfloat16.* absent here"):
        run.load_frozen(digest, abstract(frozen))


def test_a_run_is_read_as_numpy_without_knowing_its_structure(tmp_path):
    tree = make_tree()
    run = Checkpoints(tmp_path / "checkpoints", keep=3)
    run.save_frozen(tree["frozen"])
    run.save(3, make_state(3, seed=3))
    run.save(5, make_state(5))
    run.close()
    expected = flatten(tree["frozen"]) | flatten(tree["train"]) | flatten(tree["track"])
    for path in (tmp_path, tmp_path / "checkpoints" / "5"):
        found = flatten(read_tree(path))
        assert found.keys() == expected.keys()
        for name, leaf in expected.items():
            assert type(found[name]) is np.ndarray
            assert bits(found[name]) == bits(leaf), name
    old = read_tree(tmp_path / "checkpoints" / "3")
    assert bits(old["params"]["head"]) == bits(make_tree(3)["train"]["params"]["head"])
    [file] = (tmp_path / "frozen").iterdir()
    assert flatten(read_tree(file)).keys() == flatten(tree["frozen"]).keys()
    with pytest.raises(BadInput, match="does not exist"):
        read_tree(tmp_path / "nowhere")


def test_json_documents_are_replaced_whole(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"a": [1, 2]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


SAVE_ON_EIGHT = """
    import jax, jax.numpy as jnp, numpy as np, pathlib, sys
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    from tljax.checkpoint import Checkpoints, read_tree
    from tljax.state import State

    assert len(jax.devices()) == 8
    def mesh(*shape):
        return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    def put(tree, sharding):
        return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)
    def template(tree, sharding):
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(shape, tree)

    weights = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    frozen = {"params": {"body": jnp.asarray(weights, jnp.bfloat16), "head": None}}
    params = {"params": {"body": None, "head": jnp.asarray(weights)}}
    state = State(jnp.arange(8), params, None, {"mu": params})
    expected = [np.asarray(x).tobytes() for x in jax.tree.leaves((state, frozen))]
    first = NamedSharding(mesh(1, 8), P("fsdp"))
    other = NamedSharding(mesh(4, 2), P("data"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    run = Checkpoints(pathlib.Path(sys.argv[1]) / "checkpoints", keep=1)
    digest = run.save_frozen(put(frozen, first))
    run.save(1, put(state, first))
    for sharding in (first, other, one):
        back = run.restore(template(state, sharding))
        base = run.load_frozen(digest, template(frozen, sharding))
        assert [np.asarray(x).tobytes() for x in jax.tree.leaves((back, base))] == expected
        assert all(x.sharding == sharding for x in jax.tree.leaves((back, base)))
    run.close()
"""


def test_saved_on_eight_devices_restored_on_other_layouts_and_on_one(tmp_path):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(SAVE_ON_EIGHT), tmp_path]
    subprocess.run(command, env=env, cwd=ROOT, check=True)
    weights = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    params = {"params": {"body": None, "head": jnp.asarray(weights)}}
    state = State(jnp.arange(8), params, None, {"mu": params})
    run = Checkpoints(tmp_path / "checkpoints")
    assert_same(run.restore(abstract(state)), state)
    run.close()
    found = read_tree(tmp_path)
    np.testing.assert_array_equal(found["params"]["head"], weights)
    assert bits(found["params"]["body"]) == bits(jnp.asarray(weights, jnp.bfloat16))
