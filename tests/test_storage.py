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
from forked import kill_at, kill_in_save, lose_lock, run, send_at, set_environment
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
VALUES = {"data": DIGITS, "model": VIT, "strategy": {"name": "scratch"}, "run": RUN}
LONG_AGO = "2026-01-01T00:00:00.000Z"


@pytest.fixture
def home(bucket, request):
    """A folder in the store, for this test alone."""
    bucket.refused.clear()
    bucket.failing.clear()
    return place(f"gs://bucket/{re.sub('[^a-z0-9]+', '-', request.node.name)}")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return a config and the folder of its run on a disk."""
    folder = tmp_path_factory.mktemp("disk")
    config = write_config(folder / "config.py", VALUES)
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
    with pytest.raises(BadInput, match="in its path"):
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
    [
        pytest.param((kill_at, (7,)), id="in a step", marks=pytest.mark.slow),
        pytest.param((kill_in_save, (1, 0.05)), id="in the first save", marks=pytest.mark.slow),
        pytest.param((kill_in_save, (3, 0.15)), id="in the third save"),
    ],
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


def test_a_step_that_was_being_set_aside_is_no_step(bucket, saved, monkeypatch):
    """Killed in the middle of it: the next process completes it, and reads the one before."""

    def cut_off(*_):
        raise KeyboardInterrupt

    with contextlib.closing(Checkpoints(saved / "checkpoints", keep=2)) as checkpoints:
        monkeypatch.setattr(storage, "remove", cut_off)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.set_aside(5, "the loss had risen")
    monkeypatch.undo()
    names = bucket.names(f"{saved.name}/checkpoints/damaged/5-0/")
    assert names and bucket.names(f"{saved.name}/checkpoints/5/")
    with contextlib.closing(Checkpoints(saved / "checkpoints")) as checkpoints:
        assert checkpoints.steps() == [3]
    with contextlib.closing(Checkpoints(saved / "checkpoints", keep=2)) as checkpoints:
        assert checkpoints.steps() == [3]
        assert storage.names(saved / "checkpoints") == {"3", "damaged"}
        checkpoints.save(5, make_state(5))
        assert_same(checkpoints.restore(abstract(make_state())), make_state(5))


def test_a_store_that_fails_for_a_while_is_asked_again(bucket, saved):
    bucket.failing = ["503"] * 2
    with contextlib.closing(Checkpoints(saved / "checkpoints", keep=2)) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state())), make_state(5))
    assert not bucket.failing


def test_a_store_that_does_not_answer_is_no_damage(bucket, saved, monkeypatch):
    with contextlib.closing(Checkpoints(saved / "checkpoints", keep=2)) as checkpoints:
        bucket.failing = ["401"] * 1000  # asked once
        with pytest.raises(RunFailed, match="cannot be listed"):
            checkpoints.restore(abstract(make_state()))
        monkeypatch.setattr(checkpoints, "steps", lambda: [3, 5])
        with pytest.raises(RunFailed, match=r"step 5 in .* cannot be read"):
            checkpoints.restore(abstract(make_state()))
        with pytest.raises(storage.refusals()):
            checkpoints.check(5)
        bucket.failing.clear()
        assert_same(checkpoints.restore(abstract(make_state())), make_state(5))
    assert storage.names(saved / "checkpoints") == {"3", "5"}


def test_a_store_that_refuses_is_said_in_one_line(bucket, expected, home, capsys):
    bucket.refused.add("run.json")
    assert main(["train", f"--config={expected[0]}", f"--workdir={home}"]) == 1
    error = capsys.readouterr().err
    assert f"{home} cannot be used: Forbidden" in error and "Traceback" not in error
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
    bucket.times[f"{home.name}/{lock.NAME}"] = LONG_AGO
    with locked(home):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_is_renewed_while_it_is_held_and_stays_ones_own(bucket, home, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    path = home / lock.NAME
    with locked(home):
        first, until = storage.version(path), time.monotonic() + 20
        while storage.version(path) == first and time.monotonic() < until:
            time.sleep(0.05)
        assert storage.version(path) != first
        bucket.failing = ["503", "lost"]  # not answered; done, but the answer is lost
        while bucket.failing and time.monotonic() < until:
            time.sleep(0.05)
        assert not bucket.failing
    assert storage.names(home) == set()


def test_of_two_that_take_over_a_lock_one_gets_it(bucket, home, monkeypatch):
    """Both have seen the old one; the slower must not remove what the faster has made since."""
    path = home / lock.NAME
    storage.write_json(path, {"host": "elsewhere", "pid": 1, "started": "1"})
    bucket.times[f"{home.name}/{lock.NAME}"] = LONG_AGO
    discard, faster = storage.discard, contextlib.ExitStack()

    def slowly(*arguments):
        monkeypatch.setattr(storage, "discard", discard)
        faster.enter_context(locked(home))
        discard(*arguments)

    monkeypatch.setattr(storage, "discard", slowly)
    with faster, pytest.raises(BadInput, match="in use by process"), locked(home):
        pass


def test_a_lock_that_is_renewed_at_the_last_moment_is_not_taken(bucket, home, monkeypatch):
    content = {"host": "elsewhere", "pid": 1, "started": "1"}
    storage.write_json(home / lock.NAME, content)
    bucket.times[f"{home.name}/{lock.NAME}"] = LONG_AGO
    discard = storage.discard

    def slowly(*arguments):
        monkeypatch.setattr(storage, "discard", discard)
        storage.write_json(home / lock.NAME, content)
        discard(*arguments)

    monkeypatch.setattr(storage, "discard", slowly)
    with pytest.raises(BadInput, match="process 1 on elsewhere"), locked(home):
        pass


def test_a_process_whose_lock_was_taken_over_ends_and_leaves_the_other_ones(bucket, home, tmp_path):
    """It was thought dead, as when its host is frozen for a while."""
    other = {"host": "elsewhere", "pid": 1, "started": "1"}
    words = (str(home / lock.NAME), json.dumps(other))
    before = (set_environment, (bucket.environment,)), (lose_lock, words)
    config = write_config(tmp_path / "config.py", VALUES | {"run": RUN | {"steps": 10**6}})
    log = tmp_path / "log"
    assert run(["train", f"--config={config}", f"--workdir={home}"], log, *before) == 1
    assert "was taken over; this process ends" in log.read_text()
    assert json.loads((home / lock.NAME).read_text()) == other


def test_an_answer_that_is_lost_costs_no_lock(bucket, home):
    bucket.failing = ["lost"]
    with locked(home):
        assert not bucket.failing
    assert storage.names(home) == set()
