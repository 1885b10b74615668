"""Weights files from strangers: checked before they are believed, read one tensor at a time.

Nothing here runs code: no pickle, no module of a model folder.  Sizes are checked against the file
before anything is allocated, so that a hostile header costs nothing.
"""

import hashlib
import json
import mmap
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tljax.types import BadInput

MAX_HEADER, MAX_JSON = 4 << 20, 16 << 20  # bytes; ViT-L's header has 60 kB
MAX_TENSORS, MAX_NAME = 20_000, 500
MAX_RATIO = 50  # unpacked : packed bytes of an .npz
DTYPES: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
"""What safetensors calls the types that tljax reads."""
Empty = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""Gives an array to read into: `np.empty`, or one of memory that is used again."""
RECYCLED = 64 << 20  # bytes that `recycled` has; ViT-L's largest tensor has 16 MB


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array of a file: shape and type are known, its numbers are read when asked.

    Those that are parts of one tensor of the file share `read`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Empty], np.ndarray]
    name: str = ""  # in the file, for messages
    cut: Callable[[np.ndarray], np.ndarray] = lambda whole: whole  # what it is of what `read` gives

    @property
    def size(self) -> int:
        """Count the numbers."""
        return prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read it; every time anew."""
        array = self.cut(self.read(np.empty))
        return array if dtype is None else array.astype(dtype, copy=False)


Tensors = Mapping[str, Tensor]


def held(array: np.ndarray) -> Tensor:
    """View an array in memory as a tensor of a file."""
    return Tensor(array.shape, array.dtype, lambda _: array)


def recycled() -> Empty:
    """Return what gives the same memory each time: an array ends where the next one is asked for.

    Fresh memory costs several times what reading a file from the system's cache does; a larger
    array than `RECYCLED` still gets it.  Each begins at an odd multiple of 8 bytes: no device can
    use it where it is, so that `sharding.put` need not copy it twice.
    """
    memory = mmap.mmap(-1, 8 + RECYCLED)  # pages come as they are touched

    def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = prod(shape) * dtype.itemsize
        own = memory if size <= RECYCLED else mmap.mmap(-1, 8 + size)
        return np.frombuffer(own, dtype, prod(shape), offset=8).reshape(shape)

    return empty


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a file that is not there is an empty one.

    Raises: BadInput for one that is damaged, too large, or no object.
    """
    if not path.is_file():
        return {}
    if (size := path.stat().st_size) > MAX_JSON:
        raise BadInput(f"{path} has {size:,} bytes; no configuration needs {MAX_JSON:,}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} is not a JSON object, but a {type(found).__name__}")
    return found


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, not yet read, and its metadata.

    The official parser judges the header; the offsets it checked are then read from it.
    Raises: BadInput for a file that is damaged, or larger in its header than any model needs.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > MAX_HEADER:
                raise ValueError(f"its header would have {length:,} bytes, at most {MAX_HEADER:,}")
            header = json.loads(file.read(length), object_pairs_hook=_refuse_twice)
        with safe_open(path, framework="numpy"):
            pass
        if len(header) > MAX_TENSORS or max(map(len, header), default=0) > MAX_NAME:
            raise ValueError(
                f"it lists over {MAX_TENSORS:,} tensors, or names over {MAX_NAME} long"
            )
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged ({error}): copy or download it again") from None
    metadata = header.pop("__metadata__", {})
    return {
        name: _in_file(path, name, entry, 8 + length) for name, entry in header.items()
    }, metadata


def _in_file(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    shape, kind = tuple(entry["shape"]), entry["dtype"]
    if kind not in DTYPES:
        raise BadInput(f"{path}: tensor {name} holds {kind}; tljax reads {', '.join(DTYPES)}")
    dtype, offset = np.dtype(DTYPES[kind]), start + entry["data_offsets"][0]

    def read(empty: Empty) -> np.ndarray:
        found = empty(shape, dtype)
        left = memoryview(found.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while left:
                if not (count := file.readinto(left)):
                    raise BadInput(f"{path} became shorter while it was read: copy it again")
                left = left[count:]
        return found

    return Tensor(shape, dtype, read)


def open_npz(path: Path) -> dict[str, Tensor]:
    """Return the arrays of an .npz file, not yet unpacked.

    Raises: BadInput for a file that is damaged, holds pickled objects, or unpacks to far more than
    its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if (
                len(infos) > MAX_TENSORS
                or max((len(i.filename) for i in infos), default=0) > MAX_NAME
            ):
                raise ValueError(
                    f"it lists over {MAX_TENSORS:,} arrays, or names over {MAX_NAME} long"
                )
            if (size := sum(i.file_size for i in infos)) > MAX_RATIO * path.stat().st_size:
                raise ValueError(f"it would unpack to {size:,} bytes")
            return {i.filename.removesuffix(".npy"): _member(path, archive, i) for i in infos}
    # zlib.error, struct.error, NotImplementedError (an unknown packing) and EOFError among others.
    except Exception as error:
        raise BadInput(f"{path} is damaged or no .npz of arrays: {error}") from None


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = header(file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds pickled objects, which are never unpacked")
    # numpy has no name for bfloat16: it is saved as two bytes of no type.
    if start + prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename} has {info.file_size} bytes, not those of {shape}")
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype

    def read(_: Empty) -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as again, again.open(info.filename) as member:
                return np.lib.format.read_array(member, allow_pickle=False).view(dtype)
        except Exception as error:
            raise BadInput(f"{path}: {info.filename} is damaged: {error}") from None

    return Tensor(shape, dtype, read)


def digest_of(*paths: Path) -> Callable[[], str]:
    """Return what computes, when asked and once, the SHA-256 of files as they are now.

    Of one file it is the sum that publishers list; of several, that of the list of their sums.  It
    raises BadInput if a file has changed since.
    """
    stamps = [_stamp(path) for path in paths]

    @cache
    def compute() -> str:
        sums = []
        for path, stamp in zip(paths, stamps, strict=True):
            with open(path, "rb") as file:
                sums.append(hashlib.file_digest(file, "sha256").hexdigest())
            if _stamp(path) != stamp:
                raise BadInput(f"{path} has changed since it was opened: load it again")
        return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()

    return compute


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
