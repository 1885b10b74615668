"""A run in an object store: as on a disk, by the real clients, on a store in memory."""

import contextlib
import itertools
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
from bucket import serving
from forked import kill_at, kill_in_save, run, send_at, set_environment
from test_checkpoint import abstract, assert_same, make_state, make_tree
from test_resume import DIGITS, VIT, lines_of, result_of, write_config

from tljax import lock, storage
from tljax.__main__ import main
from tljax.checkpoint import Checkpoints
from tljax.lock import locked
from tljax.manifest import read
from tljax.preemption import AGAIN
from tljax.storage import place
from tljax.types import BadInput, RunFailed

pytestmark = pytest.mark.once
RUN = {"steps": 12, "batch": 16, "save_every": 3, "log_every": 1, "eval_every": 6}


@pytest.fixture(scope="module")
def bucket():
    """One store for all: clients are made once in a process, with the address they find then."""
    with serving() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def home(bucket, request):
    """A folder in the store, for this test alone."""
    bucket.refused.clear()
    return place(f"gs://bucket/{re.sub('[^a-z0-9]+', '-', request.node.name)}")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return a config and the folder of its run on a disk."""
    folder = tmp_path_factory.mktemp("disk")
    values = {"data": DIGITS, "model": VIT, "strategy": {"name": "scratch"}, "run": RUN}
    config = write_config(folder / "config.py", values)
    words = ["train", f"--config={config}", f"--workdir={folder / 'run'}"]
    assert run(words, folder / "log") == 0, (folder / "log").read_text()
    return config, folder / "run"


def train(bucket, config, home, log, *before):
    """Start or go on with a run in the store, in a process of its own; returns its exit code."""
    words = ["train", f"--config={config}", f"--workdir={home}"]
    return run(words, log, (set_environment, (bucket.environment,)), *before)


def require_as(expected, home):
    assert result_of(home) == result_of(expected)
    assert lines_of(home) == lines_of(expected)
    steps = {str(path.name) for path in (expected / "checkpoints").iterdir()}
    assert storage.names(home / "checkpoints") == steps
    for step in steps:
        own, other = (read(folder / "checkpoints" / step) for folder in (home, place(expected)))
        assert own["leaves"] == other["leaves"] and own["notes"] == other["notes"]


@pytest.mark.parametrize("address", ["s3://bucket/run", "https://host/run"])
def test_what_is_neither_a_disk_nor_a_known_store_is_refused(address):
    with pytest.raises(BadInput, match="begins with gs://"):
        place(address)


def test_pathlib_would_make_a_path_of_an_address():
    with pytest.raises(BadInput, match="give text"):
        place(Path("gs://bucket/run"))


@pytest.mark.parametrize("name", ["run[1]", "seed=*/run", "why?"])
def test_a_run_whose_name_is_a_pattern_is_refused_before_it_is_built_upon(name, tmp_path, expected):
    """Orbax would look for its files by that pattern, and write a step that none can read."""
    with pytest.raises(BadInput, match="in its name or above it"):
        Checkpoints(tmp_path / name / "checkpoints", keep=1)
    assert main(["train", f"--config={expected[0]}", f"--workdir={tmp_path / name}"]) == 2
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_a_disk_and_a_store_do_the_same(kind, tmp_path, home):
    folder = place(tmp_path / "here") if kind == "disk" else home
    if kind == "disk":
        storage.make_folder(folder)
    assert storage.names(folder) == set() and storage.sizes(folder) == {}
    assert storage.create(folder / "one", b"1") and not storage.create(folder / "one", b"2")
    storage.write_text(folder / "below" / "two", "22")
    storage.write_json(folder / "three.json", {"x": float("nan")})
    assert json.loads((folder / "three.json").read_text()) == {"x": None}
    assert storage.names(folder) == {"one", "below", "three.json"}
    assert storage.sizes(folder) | {"three.json": 0} == {"below/two": 2, "one": 1, "three.json": 0}
    assert abs(storage.changed(folder / "one") - time.time()) < 60
    assert storage.changed(folder / "none") == 0
    assert (storage.fetched(folder / "below", "two", "none") / "two").read_text() == "22"
    with storage.on_disk(folder / "made") as local:
        (local / "in").mkdir()
        (local / "in" / "four").write_text("4")
    assert (folder / "made" / "in" / "four").read_text() == "4"
    before = storage.digests(folder / "below")
    storage.move(folder / "below", folder / "moved")
    assert storage.digests(folder / "moved") == before
    storage.write_text(folder / "moved" / "two", "23")
    assert storage.digests(folder / "moved") != before
    storage.discard(folder / "one")
    storage.discard(folder / "one")
    for name in ("moved", "made", "none"):
        storage.remove(folder / name)
    assert storage.names(folder) == {"three.json"}


def test_an_object_is_removed_only_if_it_is_what_was_seen(home):
    storage.write_text(home / "x", "old")
    seen = storage.version(home / "x")
    storage.write_text(home / "x", "new")
    storage.discard(home / "x", seen)
    assert (home / "x").read_text() == "new"
    storage.discard(home / "x", storage.version(home / "x"))
    assert not (home / "x").exists() and storage.version(home / "x") is None


def test_of_many_one_creates_an_object(home):
    won = []

    def work(number):
        if storage.create(home / "x", str(number).encode()):
            won.append(str(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [(home / "x").read_text()]


@pytest.mark.parametrize(
    "how",
    [(kill_at, (7,)), (kill_in_save, (1, 0.05)), (kill_in_save, (3, 0.15))],
    ids=["in a step", "in the first save", "in the third save"],
)
def test_a_run_that_is_killed_ends_as_the_one_on_a_disk(how, bucket, expected, home, tmp_path):
    home = place(f"gs://bucket/killed/{how[0].__name__}-{how[1][0]}")
    config, whole = expected
    assert train(bucket, config, home, tmp_path / "log", how) == -9
    assert train(bucket, config, home, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    require_as(whole, home)
    assert "lock.json" not in storage.names(home)


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_save_ends_as_the_one_on_a_disk(
    bucket, expected, home, tmp_path
):
    config, whole = expected
    for number in range(20):
        where = home / str(number)
        for _ in range(3):
            before = (kill_in_save, (1, 0.02 * number))
            if train(bucket, config, where, tmp_path / "log", before) == 0:
                break
        assert train(bucket, config, where, tmp_path / "log") == 0
        require_as(whole, where)


def test_a_signal_saves_the_step_and_the_same_command_goes_on(bucket, expected, home, tmp_path):
    config, whole = expected
    log = tmp_path / "log"
    assert train(bucket, config, home, log, (send_at, ("SIGTERM", "step", 5))) == AGAIN
    assert max(line["step"] for line in lines_of(home)) >= 5
    assert train(bucket, config, home, log) == 0, log.read_text()
    require_as(whole, home)


def test_what_is_done_with_a_finished_run_is_done_in_a_store(
    bucket, expected, home, tmp_path, capsys
):
    config, whole = expected
    storage.upload(whole, home)
    assert main(["train", f"--config={config}", f"--workdir={home}"]) == 0
    assert f"{home} is finished" in capsys.readouterr().out
    assert main(["eval", str(home)]) == 0
    assert json.loads(capsys.readouterr().out) == result_of(whole)["test"]
    assert main(["ckpt", "verify", str(home)]) == 0
    assert "step 12: whole" in capsys.readouterr().out
    assert main(["ckpt", "diff", str(home), str(whole)]) == 0
    assert "leaves are equal to the bit" in capsys.readouterr().out
    assert main(["fisher", str(home), "--examples=16"]) == 0
    assert (home / "fisher.safetensors").exists()
    assert main(["soup", f"{home}/soup", str(home), str(whole)]) == 0
    assert result_of(home / "soup").keys() == {"validation", "test"}
    assert main(["export", str(home), f"{home}/exported", "--to=timm"]) == 0
    assert {"model.safetensors", "config.json"} <= storage.names(home / "exported")
    values = {"data": DIGITS, "weights": str(home), "strategy": {"name": "probe"}, "run": RUN}
    probe = write_config(tmp_path / "probe.py", values)
    words = [f"--config={probe}", "--lr=1e-3,1e-2", f"--workdir={home}/sweep"]
    assert main(["sweep", *words]) == 0
    assert {"sweep.json", "sweep.png", "result.json"} <= storage.names(home / "sweep")
    assert main(["ckpt", "prune", str(home)]) == 0
    assert storage.names(home / "checkpoints") == {"12"}
    capsys.readouterr()
    assert main(["ckpt", "ls", str(home)]) == 0
    assert " 12 " in capsys.readouterr().out
    assert main(["inspect", f"--config={home}/run.json"]) == 0


@pytest.fixture
def saved(home):
    with contextlib.closing(Checkpoints(home / "checkpoints", keep=2)) as checkpoints:
        checkpoints.save(3, make_state(3))
        checkpoints.save(5, make_state(5))
    return home


DAMAGES = {
    "deleted": None,
    "emptied": lambda content: b"",
    "short": lambda content: content[:-1],
    "zeroed": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_damaged_object_is_silent_and_the_step_before_is_read(
    all_of_them, bucket, saved, capsys
):
    """Every object of the newest step, damaged in one of the ways, or in all of them."""
    names = bucket.names(f"{saved.name}/checkpoints/5/")
    kept = dict(bucket.objects)
    for number, (name, how) in enumerate(itertools.product(names, DAMAGES)):
        # The empty commit_success.txt cannot be emptied.
        chosen = all_of_them or how == list(DAMAGES)[number // len(DAMAGES) % len(DAMAGES)]
        if not chosen or not (kept[name][1] or how == "deleted"):
            continue
        bucket.objects = dict(kept)
        content = bucket.objects.pop(name)[1]
        if how != "deleted":
            bucket.objects[name] = (10**6, DAMAGES[how](content))
        with contextlib.closing(Checkpoints(saved / "checkpoints", keep=2)) as checkpoints:
            assert_same(checkpoints.restore(abstract(make_state())), make_state(3))
            assert checkpoints.steps() == [3]
        reason = (saved / "checkpoints" / "damaged" / "5-0.txt").read_text()
        assert "step 5" in reason and reason.strip() in capsys.readouterr().err
        # All that was there is kept, but no longer in the way.
        there = [x for x in names if x != name or how != "deleted"]
        aside = bucket.names(f"{saved.name}/checkpoints/damaged/5-0/")
        assert [x.rpartition("/5-0/")[2] for x in aside] == [x.rpartition("/5/")[2] for x in there]


def test_the_manifest_comes_last_and_without_it_nothing_is_saved(bucket, home):
    with contextlib.closing(Checkpoints(home / "checkpoints", keep=2)) as checkpoints:
        checkpoints.save(3, make_state(3))
        checkpoints.wait()
        order = [name for name in bucket.written if name.startswith(home.name)]
        assert order[0].endswith("3.saving") and order[-1].endswith("3/manifest.json")
        bucket.refused.add("manifest.json")
        checkpoints.save(5, make_state(5))
        with pytest.raises(RunFailed, match="saved before: 3"):
            checkpoints.wait()
    bucket.refused.clear()
    with contextlib.closing(Checkpoints(home / "checkpoints", keep=2)) as checkpoints:
        assert storage.names(home / "checkpoints") == {"3"}
        assert_same(checkpoints.restore(abstract(make_state())), make_state(3))


def test_a_store_that_refuses_is_said_in_one_line(bucket, expected, home, capsys):
    bucket.refused.add("run.json")
    assert main(["train", f"--config={expected[0]}", f"--workdir={home}"]) == 1
    error = capsys.readouterr().err
    assert "forbidden" in error and "Traceback" not in error
    assert storage.names(home) == set()


def test_a_frozen_tree_in_a_store_is_checked_when_it_is_read(bucket, saved):
    frozen = make_tree()["frozen"]
    with contextlib.closing(Checkpoints(saved / "checkpoints", keep=2)) as checkpoints:
        digest = checkpoints.save_frozen(frozen)
        checkpoints.save(7, make_state(7))
    with contextlib.closing(Checkpoints(saved / "checkpoints")) as checkpoints:
        assert checkpoints.check(7) == ""
        storage.write_bytes(saved / "frozen" / f"{digest}.safetensors", b"other")
        assert "damaged" in checkpoints.check(7)


def test_a_folder_in_use_is_refused_by_name(home):
    mine = f"in use by process {os.getpid()} on "
    with locked(home):
        with pytest.raises(BadInput, match=mine), locked(home):
            pass
        assert storage.names(home) == {lock.NAME}
    assert storage.names(home) == set()


def test_a_lock_of_another_host_is_kept_by_renewing_it(bucket, home):
    path = home / lock.NAME
    storage.write_json(path, {"host": "elsewhere", "pid": 1, "started": "1"})
    with pytest.raises(BadInput, match="process 1 on elsewhere"), locked(home):
        pass
    bucket.times[f"{home.name}/{lock.NAME}"] = "2026-01-01T00:00:00.000Z"
    storage.write_bytes(home / lock.BEATS, b"")
    with pytest.raises(BadInput, match="process 1 on elsewhere"), locked(home):
        pass
    bucket.times[f"{home.name}/{lock.BEATS}"] = "2026-01-01T00:00:00.000Z"
    with locked(home):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_is_renewed_while_it_is_held(bucket, home, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with locked(home):
        until = time.monotonic() + 20
        while lock.BEATS not in storage.names(home) and time.monotonic() < until:
            time.sleep(0.05)
        assert lock.BEATS in storage.names(home)
    assert storage.names(home) == set()


def test_of_two_that_take_over_a_lock_one_gets_it(bucket, home, monkeypatch):
    """Both have seen the old one; the slower must not remove what the faster has made since."""
    path = home / lock.NAME
    storage.write_json(path, {"host": "elsewhere", "pid": 1, "started": "1"})
    bucket.times[f"{home.name}/{lock.NAME}"] = "2026-01-01T00:00:00.000Z"
    discard, faster = storage.discard, contextlib.ExitStack()

    def slowly(*arguments):
        monkeypatch.setattr(storage, "discard", discard)
        faster.enter_context(locked(home))
        discard(*arguments)

    monkeypatch.setattr(storage, "discard", slowly)
    with faster, pytest.raises(BadInput, match="in use by process"), locked(home):
        pass
