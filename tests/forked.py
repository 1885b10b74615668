"""The command line in processes of their own, to be signalled and killed.

They are forked from a process that has imported everything, and so start at once.
"""

import atexit
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
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


def run(words: list[str], log: Path, *before: Call) -> int | None:
    """Return the exit code of such a process when it has ended."""
    return codes([start(words, log, *before)])[0]


def codes(processes: list[BaseProcess], seconds: float = 400.0) -> list[int | None]:
    """Wait for processes; returns their exit codes, None for what has to be killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(end - time.monotonic(), 0.0))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return found


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


def kill_at(step: int) -> None:
    """Let the process kill itself in a step."""
    from tljax import train

    inner = train.Intervals.add

    def add(self: Any, now: int, metrics: Any) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(self, now, metrics)

    train.Intervals.add = add


def kill_in_save(number: int, delay: float) -> None:
    """Let the process kill itself so many seconds after the number-th save has begun."""
    from tljax.checkpoint import Checkpoints

    inner, left = Checkpoints.save, [number]

    def kill() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def save(*args: Any, **more: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            threading.Thread(target=kill).start()
        inner(*args, **more)

    Checkpoints.save = save


def use_devices(count: int) -> None:
    """Simulate so many devices instead of eight."""
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=8", f"count={count}")


def join_others(port: int, processes: int, process: int) -> None:
    """Make the process one of several."""
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)


def record_rows(path: Path) -> None:
    """Write down a hash of every example of every training batch, as this process reads them."""
    from tljax.data.pipeline import Pipeline

    inner = Pipeline.train_batches

    def train_batches(self: Pipeline, start: int = 0) -> Iterator[Any]:
        for step, batch in enumerate(inner(self, start), start):
            rows = [zlib.crc32(row.tobytes()) for row in batch["image"]]
            with path.open("a") as file:
                print(json.dumps([step, rows]), file=file)
            yield batch

    Pipeline.train_batches = train_batches


def watch(path: Path) -> None:
    """Write down what is compiled and, every 500 steps, the bytes that the process holds."""
    import jax.monitoring

    from tljax import train

    inner, now = train.Intervals.add, [0]

    def note(*row: Any) -> None:
        with path.open("a") as file:
            print(json.dumps(row), file=file)

    def add(self: Any, step: int, metrics: Any) -> None:
        inner(self, step, metrics)
        now[0] = step
        if step % 500 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            note("bytes", step, pages * os.sysconf("SC_PAGE_SIZE"))

    def compiled(event: str, seconds: float, **facts: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            note("compiled", now[0], facts.get("fun_name", "?"))

    train.Intervals.add = add
    jax.monitoring.register_event_duration_secs_listener(compiled)


def set_environment(values: dict[str, str]) -> None:
    """Set variables of the environment."""
    os.environ.update(values)


def hang_in(what: str) -> None:
    """Let no batch of training, or of an evaluation, ever come, and patience be short."""
    from tljax import preemption
    from tljax.data.loader import Loader

    inner = Loader._run

    def run(self: Any, build: Any, steps: range, kind: str) -> Iterator[Any]:
        hangs = lambda step: threading.Event().wait()  # noqa: E731
        return inner(self, hangs if kind == what else build, steps, kind)

    Loader._run = run
    preemption.PATIENCE, preemption.LIMIT = 0.5, 1.0


def lose_lock(path: str, content: str) -> None:
    """Let another process take over the lock of the run, as soon as it trains."""
    from tljax import lock, storage, train

    inner = train.Intervals.add
    lock.BEAT = 0.2

    def add(self: Any, step: int, metrics: Any) -> None:
        if step == 2:
            storage.write_text(path, content)
        inner(self, step, metrics)

    train.Intervals.add = add
