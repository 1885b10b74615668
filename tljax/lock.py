"""One process at a time writes into a run's folder."""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tljax import storage
from tljax.storage import Name, Place, place
from tljax.types import BadInput

NAME = "lock.json"
Holder = dict[str, str | int]
BEAT, STALE = 10.0, 60.0  # seconds: a lock is renewed so often, and is nobody's after so long


@contextmanager
def locked(workdir: Name) -> Iterator[None]:
    """Hold a folder's lock, which names host and process; one that nobody holds is taken over.

    A process of this host is looked for; one of another host has to renew its lock to keep it,
    and the clocks of hosts (and of a store) must agree within that time.  A process that finds
    its lock taken over ends at once: what it has saved stays.
    Raises: BadInput if another process holds it, or it is no folder.
    """
    folder = place(workdir)
    try:
        storage.make_folder(folder)
    except (FileExistsError, NotADirectoryError):
        raise BadInput(f"{folder} is a file, or lies below one; give a folder") from None
    pid = os.getpid()
    lock = Lock(
        folder / NAME,
        {
            "host": socket.gethostname(),
            "space": _space(),
            "pid": pid,
            "started": started(pid),
            "token": uuid.uuid4().hex,
        },
    )
    while not lock.take():
        lock.remove_stale()
    ended = threading.Event()
    beating = threading.Thread(target=lock.beat, args=(ended,), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join(STALE)  # a store may not answer
        with suppress(*storage.refusals()):  # it is nobody's, or soon
            lock.give_back()


@dataclass
class Lock:
    """A lock's file, what this process writes into it, and in a store the version it wrote."""

    path: Place
    mine: Holder
    version: str | None = None

    def take(self) -> bool:
        """Create the file; tells whether it is this process's."""
        if not storage.in_store(self.path):
            return storage.create(self.path, self._content())
        return self._write("0")

    def _write(self, seen: str | None) -> bool:
        """Write a store's object if its version is what was seen; tells whether it is one's own."""
        self.version = storage.write_if(self.path, self._content(), seen)
        if not self.version and self.holder() == self.mine:  # written, and the answer was lost
            self.version = storage.version(self.path)
        return bool(self.version)

    def _content(self) -> bytes:
        return json.dumps(self.mine).encode()

    def holder(self) -> Holder:
        """Read who holds it: {} for a file that is not whole, or not there."""
        try:
            found = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def remove_stale(self) -> None:
        """Remove a lock whose holder is gone; raises BadInput if it is not."""
        seen, renewed = storage.version(self.path), storage.changed(self.path)
        if not renewed:  # given back just now
            return
        holder, age = self.holder(), time.time() - renewed
        names = ("host", "space")
        if holder and all(holder.get(name) == self.mine[name] for name in names):
            alive = started(int(holder["pid"])) == holder["started"]
            advice = ""
        else:
            alive = age < STALE
            advice = f"; a lock that is not renewed for {STALE:.0f} s is nobody's"
        if alive:
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise BadInput(
                f"{self.path.parent} is in use by {who} ({self.path}): wait for it, or give "
                f"another --workdir{advice}"
            )
        print(f"{self.path}: its process is gone; taken over")
        if storage.in_store(self.path):
            if seen:  # of a renewed lock, or a new one, the version is another
                storage.discard(self.path, seen)
            return
        gone = self.path.with_name(f"{NAME}.{os.getpid()}")
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(self.path, gone)
            if Lock(gone, self.mine).holder() == holder:
                gone.unlink()
            else:  # what was renamed is a new holder's
                os.replace(gone, self.path)

    def beat(self, ended: threading.Event) -> None:
        """Renew the lock until the end; ends the process if it is another's."""
        while not ended.wait(BEAT):
            with suppress(Exception):  # whatever a store answers: it is tried again soon
                if not self.renew():
                    print(f"tljax: {self.path} was taken over; this process ends", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(1)

    def renew(self) -> bool:
        """Say that the holder is alive; tells whether it still holds the lock."""
        if not storage.in_store(self.path):
            holder = self.holder()
            if holder == self.mine:
                os.utime(self.path)
            return holder in ({}, self.mine)
        return self._write(self.version)

    def give_back(self) -> None:
        """Remove the lock, unless it was taken over."""
        if not storage.in_store(self.path):
            if self.holder() == self.mine:
                storage.discard(self.path)
        elif self.holder() == self.mine and (version := storage.version(self.path)):
            storage.discard(self.path, version)


def _space() -> str:
    """Name the space that process numbers are counted in: a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # of hosts with one name
        return f"{os.readlink('/proc/self/ns/pid')} {boot}"
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
