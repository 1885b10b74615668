"""One process at a time writes into a run's folder."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tljax import storage
from tljax.storage import Name, Place, place
from tljax.types import BadInput

NAME, BEATS = "lock.json", "lock.beat"
Holder = dict[str, str | int]
BEAT, STALE = 10.0, 60.0  # seconds: a lock is renewed so often, and is nobody's after so long


@contextmanager
def locked(workdir: Name) -> Iterator[None]:
    """Hold a folder's lock, which names host and process; one that nobody holds is taken over.

    A process of this host is looked for; one of another host has to renew its lock to keep it: by
    touching it, or in an object store by writing another object, so that the lock stays the one
    that it was.
    Raises: BadInput if another process holds it, or it is no folder.
    """
    folder = place(workdir)
    try:
        storage.make_folder(folder)
    except (FileExistsError, NotADirectoryError):
        raise BadInput(f"{folder} is a file, or lies below one; give a folder") from None
    pid = os.getpid()
    mine: Holder = {
        "host": socket.gethostname(),
        "space": _space(),
        "pid": pid,
        "started": started(pid),
    }
    path = folder / NAME
    while not storage.create(path, json.dumps(mine).encode()):
        _take_over(path, mine)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, mine, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _read(path) == mine:  # and nobody has taken it over
            storage.discard(path.with_name(BEATS))
            storage.discard(path)


def _read(path: Place) -> Holder:
    """Read who holds a lock: {} for one that is not whole, or not there."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _take_over(path: Place, mine: Holder) -> None:
    """Remove a lock whose holder is gone; raises BadInput if it is not."""
    seen = storage.version(path)
    holder = _read(path)
    renewed = [storage.changed(each) for each in (path, path.with_name(BEATS))]
    age = time.time() - max(renewed)
    if not renewed[0]:  # given back just now
        return
    here = bool(holder) and all(holder.get(name) == mine[name] for name in ("host", "space"))
    if here:
        alive = started(int(holder["pid"])) == holder["started"]
        advice = ""
    else:
        alive = age < STALE
        advice = f"; a lock that is not renewed for {STALE:.0f} s is nobody's"
    if alive:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        raise BadInput(
            f"{path.parent} is in use by {who} ({path}): wait for it, or give another "
            f"--workdir{advice}"
        )
    print(f"{path}: its process is gone; taken over")
    if storage.in_store(path):
        if seen:  # else it was given back meanwhile
            storage.discard(path, seen)
        return
    gone = path.with_name(f"{NAME}.{os.getpid()}")
    with suppress(FileNotFoundError):  # another process was faster
        path.rename(gone)
        if _read(gone) == holder:
            gone.unlink()
        else:  # what was renamed is a new holder's
            gone.rename(path)


def _beat(path: Place, mine: Holder, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(*storage.refusals()):  # it is renewed again soon
            if _read(path) == mine:
                if storage.in_store(path):
                    storage.write_bytes(path.with_name(BEATS), b"")
                else:
                    os.utime(path)


def _space() -> str:
    """Name the space that process numbers are counted in: a container has its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def started(pid: int) -> str:
    """Tell a process from a later one of its number, "" if there is none of it, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
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
