"""A long run: nothing grows, nothing is compiled again."""

import json
from pathlib import Path

import pytest
from forked import run, watch
from test_resume import DIGITS, VIT, write_config

pytestmark = [pytest.mark.once, pytest.mark.slow]

STEPS = {"steps": 3000, "batch": 16, "log_every": 20, "eval_every": 100, "save_every": 100}


def test_memory_does_not_grow_and_nothing_is_compiled_again(tmp_path):
    """Over 3,000 steps with 30 evaluations and 30 saves; after the first of each."""
    values = {"data": DIGITS, "model": VIT, "strategy": {"name": "scratch"}, "run": STEPS}
    words = ["train", f"--config={write_config(tmp_path / 'long.py', values)}"]
    words.append(f"--workdir={tmp_path / 'run'}")
    seen: Path = tmp_path / "seen"
    assert run(words, tmp_path / "log", (watch, (seen,))) == 0
    lines = [json.loads(line) for line in seen.read_text().splitlines()]
    held = {step: size for kind, step, size in lines if kind == "bytes"}
    # The allocator's own hoards settle within some evaluations and saves.
    assert held[3000] < 1.03 * held[500], held
    compiled = [(step, name) for kind, step, name in lines if kind == "compiled"]
    assert not [name for step, name in compiled if step > 2 and name == "jit(step)"]
    # At the first evaluation and save, each part of a replicated leaf that a device writes is cut
    # out by a program of its own; then there is nothing left to compile.
    assert not [name for step, name in compiled if step > STEPS["save_every"]]
