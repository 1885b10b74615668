"""A run's folder: bitwise round trips, leftovers, damage, and runs as a source of weights."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from tljax.__main__ import main
from tljax.checkpoint import Checkpoints, read_tree
from tljax.manifest import hashes
from tljax.state import first_state
from tljax.storage import write_json
from tljax.tree import flatten, unflatten
from tljax.types import BadInput, RunFailed

pytestmark = pytest.mark.once

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
    state = first_state(tree["train"], tree["track"], tx.init(tree["train"]))
    grads = jax.tree.map(jnp.sin, state.params)
    _, opt = tx.update(grads, state.opt, state.params)
    return state.replace(step=jnp.int32(step), opt=opt)


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
    state = first_state({"w": jnp.arange(size, dtype=jnp.float32)}, None, None)
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


def test_a_run_without_a_checkpoint_is_named(run):
    with pytest.raises(BadInput, match=r"no checkpoint in .*nothing was saved yet"):
        run.restore(abstract(make_state()))


def test_partial_leftovers_are_ignored_and_cleaned(tmp_path):
    run = Checkpoints(tmp_path / "checkpoints", keep=2)
    run.save(3, make_state())
    run.close()
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
    size = {1: 4, 2: (4000, 4000)}[run.latest()]
    restored = run.restore(abstract({"w": jnp.ones(size)}))
    np.testing.assert_array_equal(restored["w"], np.ones(size, np.float32))
    run.close()
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB; only root may mount one, so that others leave these tests out."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_at_this_save_and_the_step_before_is_whole(small_disk):
    numbers = np.random.default_rng(0)
    small, large = (jnp.asarray(numbers.normal(size=n), jnp.float32) for n in (1000, 2_000_000))
    run = Checkpoints(small_disk / "checkpoints", keep=2)
    run.save(1, {"w": small})
    run.save(2, {"w": large})
    with pytest.raises(RunFailed, match="No space left on device") as caught:
        run.wait()
    assert "saved before: 1;" in str(caught.value) and len(str(caught.value).splitlines()) == 2
    run.close()
    again = Checkpoints(small_disk / "checkpoints", keep=2)
    assert again.steps() == [1]
    np.testing.assert_array_equal(again.restore(abstract({"w": small}))["w"], small)
    again.save(3, {"w": small + 1})  # there is room again
    again.close()
    assert again.steps() == [1, 3]


@pytest.mark.parametrize("how", ["read-only", "no permission"])
def test_a_folder_that_cannot_be_written_is_said_at_this_save(tmp_path, how):
    """By a user without root's rights, who may write anywhere; mounting read-only takes them."""
    if how == "read-only" and os.geteuid():
        pytest.skip("mounting a file system is not allowed here")
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "checkpoints"
        run = Checkpoints(folder, keep=2)
        run.save(1, make_state())
        run.close()
        code = f"""
            import os, sys
            import jax, jax.numpy as jnp
            from tljax.checkpoint import Checkpoints
            from tljax.types import RunFailed
            run = Checkpoints({str(folder)!r}, keep=2)
            os.geteuid() or os.setuid(65534)
            try:
                run.save(2, {{"w": jnp.ones(8)}})
                run.close()
            except RunFailed as error:
                sys.exit(f"said: {{error}}")
        """
        Path(top).chmod(0o755)
        folder.chmod(0o555)
        words = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
        if how == "read-only":
            subprocess.run(words, check=True)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
        )
        if how == "read-only":
            subprocess.run(["umount", str(folder)], check=True)
        folder.chmod(0o755)
        assert done.returncode == 1 and "said: " in done.stderr, done.stderr
        said = done.stderr.partition("said: ")[2]
        assert str(folder) in said and "saved before: " in said
        again = Checkpoints(folder, keep=2)
        assert_same(again.restore(abstract(make_state())), make_state())
        again.close()


DAMAGES = {
    "deleted": lambda content: None,
    "emptied": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "zeroed": lambda content: bytes(len(content)),
}


def damage(path, how):
    content = DAMAGES[how](path.read_bytes()) if how in DAMAGES else flipped(path.read_bytes(), how)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def flipped(content, bit):
    at, number = divmod(bit, 8)
    return content[:at] + bytes([content[at] ^ (1 << number)]) + content[at + 1 :]


def restore_damaged(top, cases):
    """Damage one file of step 5 in a copy of a run, each in turn; list what was not noticed."""
    silent = []
    for number, (name, how) in enumerate(cases):
        copy = Path(top) / f"copy{number}"
        shutil.copytree(Path(top) / "checkpoints", copy / "checkpoints")
        damage(copy / "checkpoints" / "5" / name, how)
        run = Checkpoints(copy / "checkpoints", keep=2)
        state = run.restore(abstract(make_state()))
        reason = copy / "checkpoints" / "damaged" / "5-0.txt"
        noticed = reason.exists() and "step 5" in reason.read_text() and run.steps() == [3]
        try:
            assert_same(state, make_state(3))
        except AssertionError:
            noticed = False
        run.close()
        shutil.rmtree(copy)
        silent += [] if noticed else [[name, how]]
    return silent


def damaged_apart(top, cases):
    """Run restore_damaged in a process of its own.

    Orbax gives up at the first leaf that fails, and leaves the reads of the others unawaited, each
    of which warns when it is collected, in whatever test that is.
    """
    code = f"import conftest, json, test_checkpoint as t; top, cases = {str(top)!r}, {cases!r}"
    code += "; print(json.dumps(t.restore_damaged(top, cases)))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path},
        cwd=ROOT / "tests", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 3 and 5 of a run, and the files of the newer one."""
    top = tmp_path_factory.mktemp("saved")
    run = Checkpoints(top / "checkpoints", keep=2)
    run.save(3, make_state(3))
    run.save(5, make_state(5))
    run.close()
    folder = top / "checkpoints" / "5"
    files = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert {"manifest.json", "_METADATA"} <= files.keys()
    return top, files


@pytest.mark.parametrize("how", DAMAGES)
def test_no_damage_of_a_file_is_silent_and_the_step_before_is_read(saved, how):
    top, files = saved
    # An empty file cannot be emptied.
    cases = [(name, how) for name, size in files.items() if size or how == "deleted"]
    assert damaged_apart(top, cases) == []


def flips(files, count, seed):
    """Draw bits of all the files, each as likely as any other."""
    numbers, names = (
        np.random.default_rng(seed),
        [name for name in files for _ in range(files[name])],
    )
    drawn = [names[i] for i in numbers.integers(len(names), size=count)]
    return [(name, int(numbers.integers(8 * files[name]))) for name in drawn]


def test_no_flipped_bit_is_silent(saved):
    top, files = saved
    assert damaged_apart(top, flips(files, 20, seed=0)) == []


@pytest.mark.slow
def test_no_flipped_bit_of_two_hundred_is_silent(saved):
    top, files = saved
    assert damaged_apart(top, flips(files, 200, seed=1)) == []


def test_where_no_step_is_whole_a_run_does_not_begin_anew(saved, tmp_path, capsys):
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    for step in (3, 5):
        (tmp_path / "checkpoints" / str(step) / "manifest.json").unlink()
    run = Checkpoints(tmp_path / "checkpoints", keep=2)
    with pytest.raises(BadInput, match=r"(?s)step 5.*no manifest.*step 3.*never begins anew"):
        run.restore(abstract(make_state()))
    assert "set aside as" in capsys.readouterr().err
    run.close()
    again = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert again.latest() is None
    with pytest.raises(BadInput, match="never begins anew"):
        again.require_new()
    again.close()


def test_a_reader_of_a_damaged_step_changes_nothing_and_names_the_others(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "5" / "_METADATA", "one byte short")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=r"(?s)step 5.*_METADATA.*bytes, expected.*step: 3"):
        read_tree(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_hash_does_not_know_how_a_leaf_is_sharded_and_knows_every_bit():
    tree = {"w": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}
    places = [layout(kind) for kind in ("fsdp", "both", "one")]
    found = [jax.device_get(hashes(jax.device_put(tree, place)))["w"] for place in places]
    assert all(np.array_equal(one, found[0]) for one in found)
    seen = {tuple(found[0])}
    for bit in range(0, tree["w"].nbytes * 8, 37):
        changed = np.frombuffer(flipped(tree["w"].tobytes(), bit), np.float32).reshape(16, 8)
        seen.add(tuple(jax.device_get(hashes({"w": changed}))["w"]))
    assert len(seen) == 1 + len(range(0, tree["w"].nbytes * 8, 37))
    swapped = tree["w"][::-1].copy()  # the same numbers elsewhere
    assert tuple(jax.device_get(hashes({"w": swapped}))["w"]) not in seen


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "bool", "uint32", "float16"])
def test_every_kind_of_leaf_has_a_hash(dtype):
    ones = jnp.ones((3, 2), dtype)
    assert not np.array_equal(*jax.device_get([hashes(ones)[""], hashes(ones * 0)[""]]))
    assert hashes(jnp.zeros((0, 3), dtype))[""].tolist() == [0, 0]


def test_the_commands_look_into_a_run(saved, tmp_path, capsys):
    shutil.copytree(saved[0], tmp_path / "run")
    run = str(tmp_path / "run")

    def said(*words):
        capsys.readouterr()
        code = main(["ckpt", *words])
        found = capsys.readouterr()
        return code, found.out + found.err

    code, text = said("ls", run)
    assert code == 0 and [line.split()[0] for line in text.splitlines()] == ["step", "3", "5"]
    assert said("verify", run) == (0, "step 3: whole\nstep 5: whole\n")
    code, text = said("diff", f"{run}@3", run)
    assert code == 0 and text.startswith("step: int32[]\n") and text.count("\n") == 2
    assert said("diff", f"{run}@4", run)[0] == said("ls", str(tmp_path))[0] == 2
    damage(tmp_path / "run" / "checkpoints" / "3" / "_METADATA", "halved")
    code, text = said("verify", run)
    assert code == 1 and "step 3: _METADATA" in text and "step 5: whole" in text
    code, text = said("prune", run)
    assert (code, text) == (0, "removed: 3; left: [5]\n")


def test_the_best_steps_stay_beside_the_newest(tmp_path):
    run = Checkpoints(tmp_path / "checkpoints", keep=1, best=1)
    for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7)):
        run.save(step, make_state(step), score)
    run.wait()
    assert run.steps() == [2, 4]
    run.close()
    run = Checkpoints(tmp_path / "checkpoints", keep=1, best=3)  # more than have a score
    assert run.prune() == []
    run.close()


def test_runs_side_by_side_share_a_frozen_tree(tmp_path):
    files = []
    for name in ("a", "b"):
        run = Checkpoints(tmp_path / name / "checkpoints", keep=1)
        files.append(frozen_file(run, run.save_frozen(make_tree()["frozen"])))
    assert os.path.samefile(*files)
    files[0].unlink()
    assert files[1].exists()


def test_a_damaged_frozen_file_is_written_again(run, capsys):
    frozen = make_tree()["frozen"]
    file = frozen_file(run, run.save_frozen(frozen))
    content = file.read_bytes()
    damage(file, 800)
    run.save_frozen(frozen)
    assert file.read_bytes() == content
    assert "is damaged: written again" in capsys.readouterr().err


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
    with pytest.raises(RunFailed, match="No space left"):
        run.wait()
    monkeypatch.undo()
    run.close()
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.latest() == 1
    assert_same(again.restore(abstract(make_state())), make_state(1))
    again.close()


def frozen_file(run, digest):
    return run.folder.parent / "frozen" / f"{digest}.safetensors"


def test_frozen_tree_is_stored_once_and_named_by_its_content(run):
    frozen = make_tree()["frozen"]
    file = frozen_file(run, run.save_frozen(frozen))
    stamp = os.stat(file).st_mtime_ns
    assert frozen_file(run, run.save_frozen(frozen)) == file
    assert os.stat(file).st_mtime_ns == stamp
    other = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), frozen)
    assert frozen_file(run, run.save_frozen(other)) != file
    assert bits(unflatten(load_file(file))) == bits(unflatten(flatten(frozen)))


def test_a_tree_without_frozen_leaves_is_stored_too(run):
    assert load_file(frozen_file(run, run.save_frozen({"params": {"head": None}}))) == {}


@pytest.mark.parametrize("how", ["halved", 800])
def test_a_tampered_frozen_file_is_detected(run, how):
    digest = run.save_frozen(make_tree()["frozen"])
    run.save(3, make_state())
    file = frozen_file(run, digest)
    damage(file, how)
    with pytest.raises(BadInput, match=f"frozen tree .*{digest}.* is damaged"):
        run.read()
    file.unlink()
    with pytest.raises(BadInput, match=r"its folder holds: \[\]"):
        run.read()


def test_a_state_trained_on_another_frozen_tree_is_refused(run):
    frozen = make_tree()["frozen"]
    digest = run.save_frozen(frozen)
    run.save(3, make_state())
    run.save_frozen(jax.tree.map(lambda x: x + jnp.ones((), x.dtype), frozen))
    with pytest.raises(BadInput, match=f"trained on frozen tree {digest}"):
        run.restore(abstract(make_state()))
    run.save_frozen(frozen)
    assert_same(run.restore(abstract(make_state())), make_state())


def test_a_run_is_read_as_numpy_without_knowing_its_structure(tmp_path):
    tree = make_tree()
    run = Checkpoints(tmp_path / "checkpoints", keep=3)
    run.save_frozen(tree["frozen"])
    run.save(3, make_state(3, seed=3))
    run.save(5, make_state(5))
    run.close()
    expected = flatten(tree["frozen"]) | flatten(tree["train"]) | flatten(tree["track"])
    found = flatten(read_tree(tmp_path))
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert type(found[name]) is np.ndarray
        assert bits(found[name]) == bits(leaf), name
    with pytest.raises(BadInput, match="does not exist"):
        read_tree(tmp_path / "nowhere")


def test_json_documents_are_replaced_whole(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"a": [1, 2]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def layout(kind):
    """Eight devices as two meshes, or one of them."""
    if kind == "one":
        return jax.sharding.SingleDeviceSharding(jax.devices()[5])
    shape, axis = {"fsdp": ((1, 8), "fsdp"), "both": ((4, 2), "data")}[kind]
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, P(axis))


RESTORE_ON_ONE = """
    import jax, pathlib, sys
    from tests.test_checkpoint import abstract, assert_same, make_sharded
    from tljax.checkpoint import Checkpoints, read_tree

    assert len(jax.devices()) == 1
    home = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    folder = pathlib.Path(sys.argv[1])
    state, frozen = make_sharded(home)
    run = Checkpoints(folder / "checkpoints")
    assert_same(run.restore(abstract(state, home)), state)
    run.close()
    found = read_tree(folder)["params"]
    assert found["head"].tobytes() == state.params["params"]["head"].tobytes()
    assert found["body"].tobytes() == frozen["params"]["body"].tobytes()
    assert found["body"].dtype.name == "bfloat16"
"""


def make_sharded(sharding):
    weights = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    frozen = {"params": {"body": jnp.asarray(weights, jnp.bfloat16), "head": None}}
    params = {"params": {"body": None, "head": jnp.asarray(weights)}}
    # Every leaf has an axis to lie along.
    state = jax.tree.map(jnp.atleast_1d, first_state(params, None, {"mu": params}))
    state = jax.tree.map(lambda x: jnp.arange(8) if x.size == 1 else x, state)
    return jax.device_put((state, frozen), sharding)


def test_saved_on_eight_devices_restored_on_other_layouts_and_on_one(run):
    assert len(jax.devices()) == 8
    state, frozen = make_sharded(layout("fsdp"))
    run.save_frozen(frozen)
    run.save(1, state)
    for kind in ("fsdp", "both", "one"):
        back = run.restore(abstract(state, layout(kind)))
        assert_same(back, state)
        assert all(x.sharding == layout(kind) for x in jax.tree.leaves(back))
    code = textwrap.dedent(RESTORE_ON_ONE)
    command = [sys.executable, "-W", "error", "-c", code, run.folder.parent]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    subprocess.run(command, env=env, cwd=ROOT, check=True)
