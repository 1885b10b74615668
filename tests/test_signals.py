"""Signals, locks and what a run does that cannot go on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from forked import run, send_at
from test_resume import DIGITS, ROOT, VIT, lines_of, result_of, state_of, train, write_config

from tljax import lock
from tljax.__main__ import main
from tljax.build import build
from tljax.config import parse
from tljax.lock import locked
from tljax.preemption import AGAIN, Preempted, Signals
from tljax.types import BadInput

pytestmark = pytest.mark.once

RUN = {"steps": 12, "batch": 16, "save_every": 5, "log_every": 3, "eval_every": 4}
VALUES = {"data": DIGITS, "model": VIT, "strategy": {"name": "scratch"}, "run": RUN}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("signals") / "whole"
    train(workdir, **VALUES)
    return workdir


@pytest.mark.parametrize(
    ("name", "place", "count"),
    [
        ("SIGTERM", "step", 7),
        ("SIGINT", "evaluate", 2),
        ("SIGUSR1", "save", 1),
        ("SIGTERM", "compile", 1),
    ],
)
@pytest.mark.few(1)
def test_a_signal_saves_and_the_run_goes_on_as_if_there_had_been_none(
    whole, tmp_path, name, place, count
):
    words = [f"--config={whole.with_suffix('.py')}", f"--workdir={tmp_path / 'run'}"]
    code = run(["train", *words], tmp_path / "log", (send_at, (name, place, count)))
    assert code == AGAIN, (tmp_path / "log").read_text()
    assert f"{name}: nothing is lost; the same command goes on" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run" / "result.json").exists()
    assert main(["train", *words]) == 0
    assert lines_of(tmp_path / "run") == lines_of(whole)
    assert result_of(tmp_path / "run") == result_of(whole)
    for one, other in zip(state_of(tmp_path / "run"), state_of(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_signal_is_remembered_and_interrupts_only_where_it_may():
    with Signals() as signals:
        with pytest.raises(Preempted, match="SIGTERM"), signals.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        with pytest.raises(Preempted):
            signals.poll()
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked == "SIGUSR1"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # the next one ends the process
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_outside_the_main_thread_nothing_is_heard():
    found = []

    def work():
        with Signals() as signals:
            found.append(signals.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


def test_a_folder_in_use_is_refused_by_name(tmp_path):
    mine = f"in use by process {os.getpid()} on "
    with locked(tmp_path):
        with pytest.raises(BadInput, match=mine), locked(tmp_path):
            pass
        assert (tmp_path / lock.NAME).exists()
    assert not (tmp_path / lock.NAME).exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, capsys):
    code = f"""
import os, pathlib
from tljax.lock import locked
with locked(pathlib.Path({str(tmp_path)!r})):
    os._exit(9)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert (tmp_path / lock.NAME).exists()
    with locked(tmp_path):
        assert "its process is gone" in capsys.readouterr().out


ELSEWHERE = json.dumps({"host": "elsewhere", "pid": 1, "started": "1"}).encode()


@pytest.mark.parametrize(
    ("content", "who"),
    [
        (ELSEWHERE, "process 1 on elsewhere"),
        *((torn, "another process") for torn in (b"", bytes(50), b'{"host": "a', b"[]")),
    ],
)
def test_a_lock_of_another_host_is_kept_by_touching_it(tmp_path, content, who):
    """One that a power loss has torn, too."""
    path = tmp_path / lock.NAME
    path.write_bytes(content)
    with pytest.raises(BadInput, match=who), locked(tmp_path):
        pass
    old = time.time() - lock.STALE - 1
    os.utime(path, (old, old))
    with locked(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_loss_is_never_finite_stops_and_names_the_examples(tmp_path, capsys):
    values = VALUES | {"optim": {"lr": 1e38, "clip": None}}
    values |= {"run": RUN | {"steps": 40, "log_every": 2, "max_skipped": 6, "eval_every": None}}
    config = write_config(tmp_path / "bad.py", values)
    assert main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == 1
    message = capsys.readouterr().err
    assert "was not finite in" in message and "skipped.json" in message
    found = json.loads((tmp_path / "run" / "skipped.json").read_text())["examples by step"]
    assert len(found) >= 6
    # Step n reads batch n - 1: its labels are those of the examples named.
    data = build(parse(values)).data
    for step, ids in found.items():
        batch = next(data.train_batches(int(step) - 1))
        np.testing.assert_array_equal(batch["label"], [data.splits.train[i]["label"] for i in ids])


def test_a_spike_of_the_loss_goes_back_and_skips_the_batches(tmp_path, capsys, monkeypatch):
    from tljax import intervals as loop

    real = loop.averages
    calls = []

    def spiked(running):
        calls.append(None)
        values = real(running)
        return values | {"loss": 1e3} if len(calls) == 8 else values

    monkeypatch.setattr(loop, "averages", spiked)
    run = RUN | {"steps": 24, "log_every": 2, "save_every": 6, "eval_every": None, "spike": 3.0}
    train(tmp_path / "run", **(VALUES | {"run": run}))
    assert "by step 16: on from step 12, without the 4 batches since" in capsys.readouterr().out
    steps = [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line]
    assert steps == list(range(2, 25, 2))
    state = state_of(tmp_path / "run")
    assert [int(leaf) for leaf in state[-3:]] == [0, 0, 4]
