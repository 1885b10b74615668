"""Runs of several processes: they see the same examples, and stop and go on together."""

import socket
from pathlib import Path

import pytest
from forked import join_others, send_at, start
from test_resume import DIGITS, VIT, lines_of, result_of, write_config

from tljax.ckpt import leaves_of
from tljax.preemption import AGAIN

pytestmark = pytest.mark.once

RUN = {"steps": 10, "batch": 16, "save_every": 4, "log_every": 1, "eval_every": 5}
VALUES = {"data": DIGITS, "model": VIT, "strategy": {"name": "scratch"}, "run": RUN}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train(workdir: Path, processes: int, *signalled: tuple[int, str, str, int]) -> list[int]:
    """Train in so many processes; returns their exit codes.

    signalled: which process gets which signal, where, and at which time.
    """
    config = write_config(workdir.with_suffix(".py"), VALUES)
    words, port = ["train", f"--config={config}", f"--workdir={workdir}"], free_port()
    strikes = {number: [(send_at, rest)] for number, *rest in signalled}
    started = [
        start(
            words,
            workdir.with_name(f"{workdir.name}-{number}.log"),
            (join_others, (port, processes, number, 8 // processes)),
            *strikes.get(number, ()),
        )
        for number in range(processes)
    ]
    for process in started:
        process.join(300)
    return [process.exitcode for process in started]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("processes") / "whole"
    assert train(workdir, 2) == [0, 0], workdir.with_name("whole-0.log").read_text()
    return workdir


@pytest.mark.parametrize(
    ("name", "place", "count"),
    [("SIGTERM", "step", 6), ("SIGINT", "evaluate", 1), ("SIGUSR1", "compile", 1)],
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(whole, tmp_path, name, place, count):
    codes = train(tmp_path / "run", 2, (1, name, place, count))
    logs = [(tmp_path / f"run-{number}.log").read_text() for number in range(2)]
    assert codes == [AGAIN, AGAIN], logs
    assert all(f"{name} in process 1: nothing is lost" in log for log in logs)
    assert train(tmp_path / "run", 2) == [0, 0]
    assert leaves_of(str(tmp_path / "run")) == leaves_of(str(whole))
    assert lines_of(tmp_path / "run") == lines_of(whole)
    assert result_of(tmp_path / "run") == result_of(whole)
