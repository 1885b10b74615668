"""Where a run's folder is, a disk or an object store, and what has to be written there whole.

An object store has no folders, no renaming and no locks.  What it has: an object is there as a
whole or not at all, can be created only if it is not there, and removed only if it is unchanged.
"""

import atexit
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import jax

os.environ.setdefault("EPATH_USE_TF", "false")  # etils would take TensorFlow's files if it is there
# gcsfs would treat zonal buckets apart, whose objects are not created conditionally.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
from etils import epath

from tljax.types import BadInput

STORE = "gs://"
"""The only store: orbax, by tensorstore, writes into no other that etils.epath knows."""
Place: TypeAlias = epath.Path
Name = str | os.PathLike[str]
"""What people give for a place."""


def place(name: Name) -> Place:
    """Name a file or folder on a disk, or in Google Cloud Storage.

    Raises: BadInput for an address of another kind, or where gcsfs is not installed.
    """
    text = os.path.expanduser(os.fspath(name))
    scheme, given, _ = text.partition("://")
    if given and f"{scheme}{given}" != STORE:
        raise BadInput(f"{text}: expected a path, or an address that begins with {STORE}")
    if text.startswith("gs:/") and not given:
        raise BadInput(f"{text} was {STORE} before pathlib took it for a path: give text")
    if given:
        _store()
    return epath.Path(text)


def in_store(path: Place) -> bool:
    """Tell an object store's address from a path on a disk."""
    return os.fspath(path).startswith(STORE)


def run_folder(name: Name) -> Place:
    """Name the folder of a run; raises BadInput for one that orbax would not find again.

    It looks for what it has written by a pattern that begins with the folder's name, and takes a
    store's address apart as one of the web.
    """
    folder = absolute(place(name))
    special = set("*?[#" if in_store(folder) else "*?[") & set(os.fspath(folder))
    if special:
        raise BadInput(
            f"{folder}: a run's folder cannot have {' '.join(sorted(special))} in its path"
        )
    return folder


def absolute(path: Place) -> Place:
    """Make a path on a disk independent of where this process is."""
    return path if in_store(path) else epath.Path(os.path.join(os.getcwd(), path))


@functools.cache
def _store() -> Any:
    """Return the client that etils.epath takes as well; raises BadInput if it is not installed."""
    try:
        import fsspec
        import gcsfs  # noqa: F401 - fsspec asks for it by name
    except ImportError:
        raise BadInput(f"{STORE} needs gcsfs: pip install 'tljax[gcs]'") from None
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs with a page what it raises, too
    # It would keep what it has listed for ever, and tensorstore writes behind its back.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs", finalize_on_close=True)


def refusals() -> tuple[type[Exception], ...]:
    """Return the errors by which a disk or a store refuses, or does not answer."""
    if "gcsfs" not in sys.modules:
        return (OSError,)
    from aiohttp import ClientError
    from gcsfs.retry import ChecksumError, HttpError, NonRetryableError
    from google.auth.exceptions import GoogleAuthError

    return (OSError, HttpError, NonRetryableError, ChecksumError, ClientError, GoogleAuthError)


def to_json(content: Any) -> str:
    """Write a document as strict JSON: NaN and infinity become null."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None), indent=2)


def write_json(path: Name, content: Any) -> None:
    """Write a document whole or not at all; of several processes the first one writes."""
    write_text(path, f"{to_json(content)}\n")


def write_text(path: Name, content: str) -> None:
    """Write a text whole or not at all; of several processes the first one writes."""
    write_bytes(path, content.encode())


def write_bytes(path: Name, content: bytes) -> None:
    """Write a file whole or not at all, to stay; of several processes the first one writes."""
    if jax.process_index():
        return
    file = place(path)
    if in_store(file):
        _store().pipe_file(str(file), content)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    _sync(file.parent)


def create(path: Place, content: bytes) -> bool:
    """Write a file if it is not there; tells whether it was not: of several, one creates it."""
    if in_store(path):
        return write_if(path, content, "0") is not None
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except OSError:  # a full disk: an empty file would be in the way
        path.unlink(missing_ok=True)
        raise
    return True


def write_if(path: Place, content: bytes, seen: str | None) -> str | None:
    """Write an object of a store if its `version` is the one that was seen, "0" if it was absent.

    Returns its new version; None if it was another one, and nothing was written.
    """
    if not seen:
        return None
    bucket, key = _parts(path)
    uploads = f"{_store().base.replace('/storage/', '/upload/storage/')}b/{quote(bucket)}/o"
    query = {"uploadType": "media", "name": key, "ifGenerationMatch": seen}
    try:
        told = _store().call("POST", uploads, data=content, json_out=True, **query)
    except FileExistsError:
        return None
    return str(told["generation"])


def discard(path: Place, seen: str | None = None) -> None:
    """Remove a file; one that is not there is no error.

    seen: a store's object is removed only if this still is its `version`.
    """
    try:
        if not in_store(path):
            os.unlink(path)
        elif seen is None:
            _store().rm_file(str(path))
        else:
            _store().call("DELETE", "b/{}/o/{}", *_parts(path), ifGenerationMatch=seen)
    except (FileNotFoundError, FileExistsError):
        pass


def version(path: Place) -> str | None:
    """Return what changes whenever an object of a store is written; None if it is not there."""
    if not in_store(path):
        return None
    try:
        return str(_store().info(str(path))["generation"])
    except (FileNotFoundError, KeyError):
        return None


def _parts(path: Place) -> tuple[str, str]:
    bucket, _, key = str(path).removeprefix(STORE).partition("/")
    return bucket, key


def there(path: Place) -> bool:
    """Tell whether a file or folder is there; a disk or store that does not say it is an error."""
    if in_store(path):
        return bool(path.exists())
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def changed(path: Place) -> float:
    """Return when a file was last written, in seconds since 1970; 0 if it is not there."""
    try:
        return path.stat().mtime if in_store(path) else os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def sync(folder: Place) -> None:
    """Wait until a folder with all below it is on the disk; a store's objects are there to stay."""
    if in_store(folder):
        return
    for path in [*Path(folder).rglob("*"), folder, folder.parent]:
        _sync(path)


def _sync(path: Name) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def names(folder: Place) -> set[str]:
    """List what is in a folder: nothing, if it is not there."""
    try:
        if in_store(folder):
            return {path.name for path in folder.iterdir()}
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def sizes(folder: Place) -> dict[str, int]:
    """List the bytes of every file below a folder, by its path from there."""
    if in_store(folder):
        return {name: facts["size"] for name, facts in _objects(folder).items()}
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def digests(folder: Place) -> dict[str, str]:
    """List a hash of every file below a folder: SHA-256, or what a store itself keeps of each."""
    if in_store(folder):
        return {name: f"crc32c:{facts['crc32c']}" for name, facts in _objects(folder).items()}
    return {name: digest(folder / name) for name in sizes(folder)}


def digest(path: Place) -> str:
    """Return half of the SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _objects(folder: Place) -> dict[str, dict[str, Any]]:
    start = len(str(folder).removeprefix(STORE)) + 1
    found = _store().find(str(folder), detail=True)
    return {name[start:]: facts for name, facts in sorted(found.items())}


def make_folder(folder: Place) -> None:
    """Make a folder where there are any."""
    if not in_store(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove(folder: Place) -> None:
    """Remove a folder and all below it; what is not there is no error."""
    if in_store(folder):
        for name in sizes(folder):
            discard(folder / name)
    elif there(folder):
        shutil.rmtree(folder)


def move(folder: Place, to: Place) -> None:
    """Rename a folder; in an object store its objects are copied there, and removed afterwards.

    Where that was cut off, doing it again completes it.
    """
    if in_store(folder):
        for name in sizes(folder):
            _store().cp_file(str(folder / name), str(to / name))
        remove(folder)
    else:
        os.rename(folder, to)


def upload(local: Path, folder: Place, *tops: str) -> None:
    """Copy files below a folder of this disk into an object store: all, or those of `tops`.

    What was written last goes last: it tells that the rest is there.
    """
    files = [name for name in sizes(epath.Path(local)) if not tops or name.split(os.sep)[0] in tops]
    for name in sorted(files, key=lambda name: os.stat(local / name).st_mtime_ns):
        _store().put_file(str(local / name), str(folder / name))


@contextmanager
def on_disk(folder: Place) -> Iterator[Path]:
    """Give a folder of this disk to write into: itself, or one that is uploaded at the end."""
    if not in_store(folder):
        make_folder(folder)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        upload(Path(temporary), folder)


def fetched(folder: Place, *wanted: str) -> Path:
    """Return a folder of this disk with some files of a place: itself, or one of copies."""
    if not in_store(folder):
        return Path(folder)
    local = _downloads() / str(folder).removeprefix(STORE)
    local.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        if there(folder / name):
            (local / name).write_bytes((folder / name).read_bytes())
        else:  # of an earlier run there
            (local / name).unlink(missing_ok=True)
    return local


@functools.cache
def _downloads() -> Path:
    folder = tempfile.mkdtemp(prefix="tljax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
