"""What a run keeps on disk, and the only place of orbax.

run/checkpoints/<step>/              the state, by orbax: a temporary folder, renamed when complete
run/frozen/<digest>.safetensors      what never moves: written once, named by its content
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import LatestN

from tljax.tree import flatten, join, nearest, unflatten
from tljax.types import BadInput, Tree


class Checkpoints:
    """The saved steps of one run, and beside them its frozen tree.

    The `keep` newest steps stay.  None opens the folder to read: nothing is created or cleaned.
    """

    def __init__(self, folder: str | Path, keep: int | None = None):
        self.folder = Path(folder).absolute()
        if keep is None and not self.folder.is_dir():
            raise BadInput(f"no checkpoints in {self.folder}: it does not exist")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(keep),
            create=keep is not None,
            cleanup_tmp_directories=keep is not None,
        )
        handlers = {"state": ocp.StandardCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.folder, item_handlers=handlers, item_names=("state",), options=options
        )
        self._frozen: str | None = None

    def steps(self) -> list[int]:
        """List the complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Return the newest complete step, None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any) -> None:
        """Write the state in the background; a step that is already saved stays as it is.

        Raises: whatever made the last save fail.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state))
        self._manager.save(step, args=args, custom_metadata={"frozen": self._frozen})

    def wait(self) -> None:
        """Block until the save in progress is complete; raises what made it fail."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish the save in progress and stop the threads behind it."""
        with contextlib.closing(self._manager):
            self.wait()

    def restore(self, abstract: Any) -> Any:
        """Read the newest state, bitwise as saved, onto the shardings of `abstract`.

        Raises: BadInput for a step that is missing, damaged, of another structure, or trained on
        another frozen tree than the one that was saved here.
        """
        with self._reading() as (step, stored, digest):
            if self._frozen not in (None, digest):
                raise BadInput(f"it was trained on frozen tree {digest}, this is {self._frozen}")
            _require_equal(stored, abstract)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=args)["state"]

    def read(self) -> Tree:
        """Read the newest model tree, frozen leaves included, as numpy arrays."""
        with self._reading() as (step, stored, digest):
            wanted = {name: stored[name] for name in ("params", "track")}
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.PyTreeRestore(wanted, restore_args=kinds, partial_restore=True)
            path = self.folder / str(step) / "state"
            parts = ocp.PyTreeCheckpointHandler().restore(path, args=args)
            frozen = unflatten(_load_verified(self._frozen_file(digest))) if digest else {}
        return unflatten(flatten(join(parts["params"], parts["track"], frozen)))

    def save_frozen(self, tree: Tree) -> str:
        """Write the frozen leaves once, whole or not at all, and return their digest."""
        leaves = multihost_utils.process_allgather(flatten(tree), tiled=True)
        content, self._frozen = safetensors.numpy.save(leaves), digest_of(leaves)
        if not (path := self._frozen_file(self._frozen)).exists():
            write_bytes(path, content)
        multihost_utils.sync_global_devices("frozen tree saved")
        return self._frozen

    def _frozen_file(self, digest: str) -> Path:
        return self.folder.parent / "frozen" / f"{digest}.safetensors"

    @contextlib.contextmanager
    def _reading(self) -> Iterator[tuple[int, Tree, str | None]]:
        """Find the newest step, its structure and frozen digest; name any damage."""
        self.wait()
        step = self.latest()
        if step is None:
            raise BadInput(f"no checkpoint in {self.folder}: nothing was saved yet")
        others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
        try:
            metadata = self._manager.metadata(step)
            yield step, metadata.item_metadata["state"].tree, metadata.custom_metadata["frozen"]
        except Exception as error:  # tensorstore raises a bare Exception with a page of text
            reason = str(error).partition("\n")[0][:300]
            raise BadInput(
                f"checkpoint of step {step} in {self.folder}: {reason}\n"
                f"nothing was changed; move its folder away to use another step: {others}"
            ) from error


def digest_of(tree: Tree) -> str:
    """Return a hash of a tree's paths, shapes, dtypes and bytes: of its safetensors file."""
    return hashlib.sha256(safetensors.numpy.save(flatten(tree))).hexdigest()[:32]


def read_tree(workdir: str | Path) -> Tree:
    """Read the newest model tree of a run as numpy; raises BadInput if there is none."""
    with contextlib.closing(Checkpoints(Path(workdir) / "checkpoints")) as checkpoints:
        return checkpoints.read()


def to_json(content: Any) -> str:
    """Write a document as strict JSON: NaN and infinity become null."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None), indent=2)


def write_json(path: str | Path, content: Any) -> None:
    """Write a document whole or not at all; of several processes the first one writes."""
    write_text(path, f"{to_json(content)}\n")


def write_text(path: str | Path, content: str) -> None:
    """Write a text whole or not at all; of several processes the first one writes."""
    write_bytes(Path(path), content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; of several processes the first one writes."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _require_equal(stored: Tree, wanted: Any) -> None:
    """Compare leaf by leaf: orbax alone would cast a leaf of another dtype in silence."""

    def kinds(tree: Any) -> dict[str, str]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        name = partial(jax.tree_util.keystr, simple=True, separator="/")
        return {name(path): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for path, leaf in leaves}

    have, want = kinds(stored), kinds(wanted)
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise BadInput(
                f"does not fit this run: {name} is {have.get(name, 'absent')} on disk and"
                f" {want.get(name, 'absent')} here; nearest on disk: {nearest(name, have)}"
            )


def _load_verified(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        there = sorted(file.name for file in path.parent.glob("*.safetensors"))
        raise BadInput(f"no frozen tree {path}; its folder holds: {there}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    if found != path.stem:
        raise BadInput(f"frozen tree {path} is damaged: its content is not what it is named by")
    return safetensors.numpy.load_file(path)
