"""The command line in processes of their own, to be signalled and killed.

They are forked from a process that has imported everything, and so start at once.
"""

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
NAMES = ("__main__", "build", "ckpt", "inference", "source", "train")
SERVER.set_forkserver_preload([*(f"tljax.{name}" for name in NAMES), "tensorboardX", "forked"])
Call = tuple[Callable[..., None], tuple[Any, ...]]


def start(words: list[str], log: Path, *before: Call) -> BaseProcess:
    """Start `tljax` with these words, after some calls; what it prints is added to a file."""
    process = SERVER.Process(target=_work, args=(words, log, before), daemon=True)
    process.start()
    return process


def run(words: list[str], log: Path, *before: Call) -> int:
    """Return the exit code of such a process when it has ended."""
    process = start(words, log, *before)
    process.join()
    return process.exitcode


def _work(words: list[str], log: Path, before: tuple[Call, ...]) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for function, arguments in before:
        function(*arguments)
    from tljax.__main__ import main

    code = main(words)
    atexit._run_exitfuncs()  # which a forked process leaves out
    sys.stdout.flush()
    sys.exit(code)


def send_at(name: str, place: str, count: int) -> None:
    """Let the process send itself a signal, the count-th time that it comes to a place."""
    from tljax import checkpoint, train

    owners = {
        "step": (train.Intervals, "add"),
        "compile": (train, "compile_step"),
        "evaluate": (train, "evaluate"),
        "save": (checkpoint.Checkpoints, "save"),
    }
    owner, method = owners[place]
    function, left = getattr(owner, method), [count]

    def struck(*args: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and place != "save":
            os.kill(os.getpid(), getattr(signal, name))
        result = function(*args, **more)
        if left[0] == 0 and place == "save":  # it goes on behind
            os.kill(os.getpid(), getattr(signal, name))
        return result

    setattr(owner, method, struck)


def join_others(port: int, processes: int, process: int, devices: int) -> None:
    """Make the process one of several, with so many of eight devices."""
    import jax

    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
