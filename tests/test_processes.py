"""Runs on other devices and of several processes: the same examples, the same end, together."""

import json
import os
import shutil
import socket
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import (
    codes,
    join_others,
    kill_at,
    record_rows,
    run,
    send_at,
    set_environment,
    start,
    use_devices,
)
from test_resume import DIGITS, VIT, lines_of, result_of, write_config

from tljax.ckpt import leaves_of
from tljax.lock import locked
from tljax.preemption import AGAIN
from tljax.storage import place

pytestmark = pytest.mark.once

RUN = {"steps": 10, "batch": 16, "save_every": 4, "log_every": 1, "eval_every": 5}
VALUES = {"data": DIGITS, "model": VIT, "strategy": {"name": "scratch"}, "run": RUN}


def words(workdir: Path, home: Any = None, **run_values: Any) -> list[str]:
    values = VALUES | {"run": RUN | run_values}
    config = write_config(workdir.with_suffix(".py"), values)
    return ["train", f"--config={config}", f"--workdir={home or workdir}"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rows_file(workdir: Path, process: int) -> Path:
    return workdir.with_name(f"{workdir.name}-rows-{process}")


def train(
    workdir: Path, processes: int, *signalled: tuple[int, str, str, int], home: Any = None
) -> list[int | None]:
    """Train in so many processes, of eight devices together; returns their exit codes.

    signalled: which process gets which signal, where, and at which time.  home: the run's folder
    where it is not `workdir`, beside which the logs are.
    """
    port, strikes = free_port(), {number: [(send_at, rest)] for number, *rest in signalled}
    started = [
        start(
            words(workdir, home),
            workdir.with_name(f"{workdir.name}-{number}.log"),
            (set_environment, (dict(os.environ),)),
            (use_devices, (8 // processes,)),
            (join_others, (port, processes, number)),
            (record_rows, (rows_file(workdir, number),)),
            *strikes.get(number, ()),
        )
        for number in range(processes)
    ]
    return codes(started)


def rows_of(workdir: Path, processes: int = 1) -> dict[int, set[tuple[int, ...]]]:
    """Read what was recorded of each step's global batch; of a step read twice, both."""
    found: dict[int, set[tuple[int, ...]]] = {}
    texts = [rows_file(workdir, i).read_text().splitlines() for i in range(processes)]
    shares = [list(map(json.loads, text)) for text in texts]
    for parts in zip(*shares, strict=True):
        [step] = {step for step, _ in parts}
        found.setdefault(step, set()).add(tuple(chain.from_iterable(rows for _, rows in parts)))
    return {step: found[step] for step in range(RUN["steps"])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two processes that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("processes") / "whole"
    assert train(workdir, 2) == [0, 0], workdir.with_name("whole-0.log").read_text()
    return workdir


@pytest.mark.parametrize(
    ("name", "place", "count"),
    [
        ("SIGTERM", "step", 6),
        pytest.param("SIGTERM", "step", 3, marks=pytest.mark.slow),  # all stop at a save
        pytest.param("SIGTERM", "save", 1, marks=pytest.mark.slow),
        pytest.param("SIGINT", "evaluate", 1, marks=pytest.mark.slow),
        pytest.param("SIGUSR1", "compile", 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(whole, tmp_path, name, place, count):
    ended = train(tmp_path / "run", 2, (1, name, place, count))
    logs = [(tmp_path / f"run-{number}.log").read_text() for number in range(2)]
    assert ended == [AGAIN, AGAIN], logs
    assert all(f"{name} in process 1: nothing is lost" in log for log in logs)
    assert train(tmp_path / "run", 2) == [0, 0]
    assert leaves_of(str(tmp_path / "run")) == leaves_of(str(whole))
    assert lines_of(tmp_path / "run") == lines_of(whole)
    assert result_of(tmp_path / "run") == result_of(whole)
    assert rows_of(tmp_path / "run", 2) == rows_of(whole, 2)


def test_processes_that_share_no_disk_go_on_from_an_object_store(whole, tmp_path, bucket):
    home = place("gs://bucket/processes")
    ended = train(tmp_path / "run", 2, (1, "SIGTERM", "step", 6), home=home)
    logs = [(tmp_path / f"run-{number}.log").read_text() for number in range(2)]
    assert ended == [AGAIN, AGAIN], logs
    assert train(tmp_path / "run", 2, home=home) == [0, 0]
    assert leaves_of(str(home)) == leaves_of(str(whole))
    assert lines_of(home) == lines_of(whole)
    assert result_of(home) == result_of(whole)
    # An error that only the first process meets ends both.
    (home / "result.json").unlink()
    bucket.refused.add("tables.txt")
    assert train(tmp_path / "run", 2, home=home) == [1, 1]
    logs = [(tmp_path / f"run-{number}.log").read_text() for number in range(2)]
    assert all(f"{home} cannot be written: Forbidden" in log for log in logs)
    bucket.refused.clear()


def test_an_error_that_one_process_meets_is_one_of_all(whole, tmp_path):
    """The folder is in use: only the first process looks."""
    workdir = Path(shutil.copytree(whole, tmp_path / "run"))
    (workdir / "result.json").unlink()
    with locked(workdir):
        assert train(workdir, 2) == [2, 2]
    assert all("in use by" in (tmp_path / f"run-{n}.log").read_text() for n in range(2))
    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    (newest / "manifest.json").write_text("{}")
    assert train(workdir, 2) == [0, 0]
    assert "set aside as" in (tmp_path / "run-0.log").read_text()
    assert result_of(workdir) == result_of(whole)


def alone(workdir: Path, devices: int, threads: int, *before: Any) -> int:
    calls = [(use_devices, (devices,)), (record_rows, (rows_file(workdir, 0),)), *before]
    return run(words(workdir, threads=threads), workdir.with_suffix(".log"), *calls)


@pytest.mark.parametrize(
    ("devices", "threads"),
    [(8, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1), (2, 3), (4, 0)))],
)
def test_examples_and_losses_are_those_of_two_processes(whole, tmp_path, devices, threads):
    """Also where it was killed on the way."""
    workdir = tmp_path / "run"
    assert alone(workdir, devices, threads, (kill_at, (7,))) == -9
    assert alone(workdir, devices, threads) == 0
    assert rows_of(workdir) == rows_of(whole, 2)
    assert all(len(rows) == 1 for rows in rows_of(workdir).values())
    assert losses(workdir) == pytest.approx(losses(whole), rel=1e-5)


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in lines_of(workdir) if "loss" in line]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    """Five steps of 25 on eight devices, and the same run at its end."""
    folder = tmp_path_factory.mktemp("saved")
    long = words(folder / "run", steps=25, save_every=5, eval_every=30)
    assert run(long, folder / "log", (send_at, ("SIGTERM", "step", 5))) == AGAIN
    shutil.copytree(folder / "run", folder / "begun")
    assert run(long, folder / "log") == 0
    return folder / "begun", folder / "run"


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        (1, {}),
        (2, {"fsdp": 2}),
        (4, {}),
        (8, {"fsdp": 4}),
        (8, {"fsdp": 2, "tensor": 2}),
    ],
)
@pytest.mark.slow
def test_a_run_goes_on_elsewhere_with_the_same_losses(saved, tmp_path, devices, mesh):
    """Bitwise equal arrays: test_checkpoint.py.  Here the next 20 losses, as sums differ."""
    begun, ended = saved
    workdir = Path(shutil.copytree(begun, tmp_path / "run"))
    long: Sequence[str] = words(workdir, steps=25, save_every=5, eval_every=30)
    axes = [f"--config.mesh.{axis}={count}" for axis, count in mesh.items()]
    assert run([*long, *axes], tmp_path / "log", (use_devices, (devices,))) == 0
    assert "not to the bit" in (tmp_path / "log").read_text()
    assert len(losses(workdir)) == 25
    np.testing.assert_allclose(losses(workdir)[5:], losses(ended)[5:], rtol=1e-5)
