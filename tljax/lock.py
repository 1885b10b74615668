"""One process at a time writes into a run's folder."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tljax.types import BadInput

NAME = "lock.json"
BEAT, STALE = 10.0, 60.0  # seconds: a lock is touched so often, and is nobody's after so long


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which names host and process; one that nobody holds is taken over.

    A process of this host is looked for; one of another host has to touch its lock to keep it.
    Raises: BadInput if another process holds it, or it is no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BadInput(f"{folder} is a file, or lies below one; give a folder") from None
    path, host, pid = folder / NAME, socket.gethostname(), os.getpid()
    while not _create(path, {"host": host, "pid": pid, "started": started(pid)}):
        _take_over(path, host)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        path.unlink(missing_ok=True)


def _create(path: Path, content: dict[str, object]) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        json.dump(content, file)
    return True


def _take_over(path: Path, host: str) -> None:
    """Remove a lock whose holder is gone; raises BadInput if it is not."""
    try:
        age = time.time() - path.stat().st_mtime
        holder = json.loads(path.read_text() or "{}")
    except FileNotFoundError:  # given back just now
        return
    except ValueError:
        holder = {}
    known = {"host", "pid", "started"} <= holder.keys()
    here = known and holder["host"] == host
    alive = started(holder["pid"]) == holder["started"] if here else age < STALE
    if alive:
        who = f"process {holder['pid']} on {holder['host']}" if known else "another process"
        raise BadInput(
            f"{path.parent} is in use by {who}: wait for it, or give another --workdir; "
            f"a lock that is not touched for {STALE:.0f} s is nobody's ({path})"
        )
    print(f"{path}: its process is gone; taken over")
    path.unlink(missing_ok=True)


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        if path.exists():
            os.utime(path)


def started(pid: int) -> str:
    """Tell a process from a later one of its number, "" if there is none of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self").exists():
        return ""
    try:  # no /proc, as on macOS
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
