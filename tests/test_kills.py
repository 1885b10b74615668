"""SIGKILL at random moments, again and again: every run ends with the state of one without.

The fast tests kill one run, one in a save, and ask one to stop.  The long set, of 240, 40 and 20:
KILLS=20 SAVES=40 STOPS=20 pytest -m "slow or not slow" tests/test_kills.py
"""

import json
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import kill_in_save, run, start
from test_resume import (
    BERT,
    DIGITS,
    VIT,
    lines_of,
    result_of,
    write_config,
    write_table,
)

from tljax.checkpoint import Checkpoints
from tljax.manifest import read
from tljax.preemption import AGAIN

pytestmark = pytest.mark.once

RUN = {"steps": 12, "batch": 16, "save_every": 3, "log_every": 4, "eval_every": 6}
STRATEGIES: dict[str, Any] = {
    "scratch": {"name": "scratch"},
    "probe": {"name": "probe"},
    "lora": {"name": "lora", "rank": 2, "dropout": 0.1},
    "full": {"name": "full"},
}
CASES = [(kind, name) for kind in ("vit", "resnet", "bert") for name in STRATEGIES]
FAST = {("vit", "scratch")}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Each kind's data and model; the weights of the others are those of its pretraining."""
    folder = tmp_path_factory.mktemp("kills")
    words = ["good", "fine", "bad", "poor"]
    rows = [
        {"text": f"{words[i % 4]} one {i}", "label": ["up", "down"][i % 4 // 2]} for i in range(80)
    ]
    table = write_table(folder / "texts.csv", rows)
    resnet = {"name": "resnet", "stages": (1, 1), "width": 8, "bottleneck": False, "stem": "small"}
    return {
        "folder": folder,
        "vit": {"data": DIGITS, "model": VIT},
        "resnet": {"data": DIGITS, "model": resnet},
        "bert": {"data": {"name": str(table), "length": 8, "vocab": 60}, "model": BERT},
    }


def config_of(settings: dict[str, Any], kind: str, name: str) -> Path:
    values = settings[kind] | {"strategy": STRATEGIES[name], "run": RUN}
    if name != "scratch":
        values = {"data": values["data"], "strategy": values["strategy"], "run": RUN}
        values["weights"] = str(whole(settings, kind, "scratch"))
    return write_config(settings["folder"] / f"{kind}-{name}.py", values)


def whole(settings: dict[str, Any], kind: str, name: str) -> Path:
    """Return the folder of a run that nobody disturbed."""
    workdir = settings["folder"] / f"{kind}-{name}"
    if not workdir.exists():
        config = config_of(settings, kind, name)
        command(config, workdir).join()
        assert (workdir / "result.json").exists()
    return workdir


def command(config: Path, workdir: Path) -> BaseProcess:
    return start(words_of(config, workdir), workdir.with_name(f"{workdir.name}.log"))


def words_of(config: Path, workdir: Path) -> list[str]:
    return ["train", f"--config={config}", f"--workdir={workdir}"]


def leaves(workdir: Path) -> dict[str, Any]:
    """Return the hash of every leaf of the last saved state."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest()
    assert checkpoints.check(step) == ""
    checkpoints.close()
    return read(workdir / "checkpoints" / str(step))["leaves"]


def steps_of(workdir: Path) -> list[int]:
    there = (workdir / "checkpoints").glob("[0-9]*")
    return sorted(int(path.name) for path in there if (path / "manifest.json").exists())


def kill_at_random(
    config: Path, workdir: Path, seconds: float, numbers: np.random.Generator
) -> None:
    """Start a run and kill it, at a moment of those that a whole one takes."""
    process = command(config, workdir)
    time.sleep(numbers.uniform(0, seconds))
    process.kill()
    process.join()


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_a_run_that_is_killed_ends_as_one_that_is_not(settings, kind, name):
    expected, config = whole(settings, kind, name), config_of(settings, kind, name)
    seconds = json.loads((expected / "result.json").read_text())["seconds"]
    numbers = np.random.default_rng(0)
    for number in range(int(os.environ.get("KILLS", "1"))):
        workdir = settings["folder"] / f"{kind}-{name}-{number}"
        kill_at_random(config, workdir, seconds, numbers)
        command(config, workdir).join()
        assert leaves(workdir) == leaves(expected)
        assert result_of(workdir) == result_of(expected)
        assert lines_of(workdir) == lines_of(expected)


def test_a_run_that_is_killed_in_a_save_ends_as_one_that_is_not(settings):
    expected, config = whole(settings, "vit", "scratch"), config_of(settings, "vit", "scratch")
    numbers = np.random.default_rng(2)
    for number in range(int(os.environ.get("SAVES", "1"))):
        workdir = settings["folder"] / f"save-{number}"
        strike = (kill_in_save, (int(numbers.integers(1, 5)), float(numbers.uniform(0, 0.15))))
        killed = run(words_of(config, workdir), workdir.with_suffix(".log"), strike)
        assert killed in (-9, 0)  # 0: the last save was complete before
        newest = max([0, *steps_of(workdir)])
        command(config, workdir).join()
        assert max(steps_of(workdir)) >= newest
        assert leaves(workdir) == leaves(expected) and lines_of(workdir) == lines_of(expected)
        assert all(path.name.isdecimal() for path in (workdir / "checkpoints").iterdir())


def test_a_run_that_is_asked_to_stop_at_any_moment_saves_and_goes_on(settings):
    """From the moment that it says what it trains: while compiling, evaluating and saving too."""
    expected, config = whole(settings, "vit", "scratch"), config_of(settings, "vit", "scratch")
    seconds = json.loads((expected / "result.json").read_text())["seconds"]
    numbers = np.random.default_rng(3)
    for number in range(int(os.environ.get("STOPS", "1"))):
        workdir = settings["folder"] / f"stop-{number}"
        process, log = command(config, workdir), workdir.with_name(f"{workdir.name}.log")
        while "every leaf" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.01)
        time.sleep(numbers.uniform(0, 0.5 * seconds))
        process.terminate()
        process.join()
        assert process.exitcode == AGAIN or (workdir / "result.json").exists()
        command(config, workdir).join()
        assert leaves(workdir) == leaves(expected) and lines_of(workdir) == lines_of(expected)


@pytest.mark.slow
def test_ten_kills_of_one_run_never_go_back_and_leave_nothing(settings):
    expected, config = whole(settings, "vit", "scratch"), config_of(settings, "vit", "scratch")
    workdir, numbers, newest = settings["folder"] / "ten", np.random.default_rng(1), 0
    for _ in range(10):
        kill_at_random(config, workdir, 12.0, numbers)
        newest, before = max([0, *steps_of(workdir)]), newest
        assert newest >= before
    command(config, workdir).join()
    assert leaves(workdir) == leaves(expected) and lines_of(workdir) == lines_of(expected)
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert all(name.isdecimal() for name in names)
    assert not (workdir / "lock.json").exists()
    assert json.loads((workdir / "result.json").read_text())["test"]
