"""What a run keeps, on a disk or in an object store, and the only place of orbax.

run/checkpoints/<step>/              the state, by orbax, and last its manifest
run/checkpoints/<step>.saving        a mark: the step is being saved, or in a store removed
run/checkpoints/<step>.aside         in a store, a mark: it is being moved, to the name within
run/checkpoints/damaged/<step>-<n>/  a step that was not what its manifest says
run/checkpoints/damaged/<step>-<n>.txt  why
run/frozen/<digest>.safetensors      what never moves: written once, named by its content
"""

import contextlib
import errno
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from jax.experimental import multihost_utils

from tljax import manifest, storage
from tljax.meeting import agreeing, as_first
from tljax.storage import Name, Place, in_store, place, run_folder, write_bytes, write_text
from tljax.tree import flatten, join, unflatten
from tljax.types import BadInput, RunFailed, Tree

DAMAGED, SAVING, ASIDE, TEMPORARY = "damaged", ".saving", ".aside", ".orbax-checkpoint-tmp"
REASONS = [os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)]
"""Why a disk refuses, somewhere in the page that tensorstore writes."""
FAILURES = (PermissionError, MemoryError, jax.errors.JaxRuntimeError)
"""What is no damage of a step that cannot be read."""


class Checkpoints:
    """The saved steps of one run, and beside them its frozen tree.

    The `keep` newest steps stay, and the `best` ones by their score.  None opens the folder to
    read: nothing is created, cleaned or set aside.
    """

    def __init__(self, folder: Name, keep: int | None = None, best: int = 0):
        self.folder, self._keep, self._best = run_folder(folder), keep, best
        self._frozen: str | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._saving: Future[None] | None = None
        if keep is None:
            if not self.folder.is_dir():
                raise BadInput(f"no checkpoints in {self.folder}: it does not exist")
        else:
            with agreeing(RunFailed), refusing(f"{self.folder} cannot be opened"):
                if jax.process_index() == 0:
                    storage.make_folder(self.folder)
                    self._clean()

    @cached_property
    def _writer(self) -> ocp.AsyncCheckpointer:
        return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

    def _clean(self) -> None:
        """Remove what a killed process left of a save or a removal; complete what it moved."""
        for name in sorted(storage.names(self.folder)):
            if TEMPORARY in name:
                storage.remove(self.folder / name)
            if name.endswith(SAVING):
                folder = self.folder / name.removesuffix(SAVING)
                if manifest.NAME not in storage.names(folder):
                    storage.remove(folder)
                storage.discard(self.folder / name)
            if name.endswith(ASIDE):
                aside = (self.folder / name).read_text()
                storage.move(self.folder / name.removesuffix(ASIDE), self.folder / DAMAGED / aside)
                storage.discard(self.folder / name)

    def steps(self) -> list[int]:
        """List the steps that are there, oldest first; whether they are whole, restoring says."""
        names = storage.names(self.folder)
        whole = [
            name
            for name in names
            if name.isdecimal() and not {f"{name}{SAVING}", f"{name}{ASIDE}"} & names
        ]
        return sorted(map(int, whole))

    def require_new(self) -> None:
        """Raise BadInput if steps were saved here once, and all of them are set aside."""
        with agreeing(RunFailed), refusing(f"{self.folder} cannot be listed"):
            aside = storage.names(self.folder / DAMAGED)
        if aside:
            raise BadInput(
                f"no step in {self.folder} is whole, see {DAMAGED}: a run never begins anew by "
                "itself; give another --workdir"
            )

    def latest(self) -> int | None:
        """Return the newest step, None if there is none; of several processes all ask."""
        return max(self.agreed_steps(), default=None)

    def agreed_steps(self) -> list[int]:
        """List the steps as the first process finds them, in all of them."""
        with agreeing(RunFailed), refusing(f"{self.folder} cannot be listed"):
            steps = self.steps() if jax.process_index() == 0 else []
        return as_first(steps)

    def save(
        self,
        step: int,
        state: Any,
        score: float | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the state in the background; a step that is already saved stays as it is.

        score: what the step is worth; the best ones are kept.  notes: go into the manifest.
        Raises: RunFailed if the last save failed, or this one at once.
        """
        self.wait()
        if step in self.agreed_steps():
            return
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        told = {"step": step, "frozen": self._frozen, "score": score, "notes": dict(notes or {})}
        hashes = manifest.hashes(state)  # before the next step takes the state's memory
        mark = self.folder / f"{step}{SAVING}"
        with agreeing(RunFailed), self._saying():
            if jax.process_index() == 0:
                storage.create(mark, b"")
        with agreeing(RunFailed), self._saying():
            self._writer.save(self.folder / str(step), args=ocp.args.StandardSave(state))

        def complete() -> None:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                leaves = manifest.describe(like, jax.device_get(hashes))
                manifest.write(self.folder / str(step), told | {"leaves": leaves})
                storage.discard(mark)
                self.prune()

        self._saving = self._thread.submit(complete)

    def wait(self) -> None:
        """Block until the save in progress is complete everywhere; raises RunFailed if it failed.

        Of several processes all call this.
        """
        if self._saving:
            with agreeing(RunFailed):
                self._finish()

    def _finish(self) -> None:
        saving, self._saving = self._saving, None
        if saving:
            with self._saying():
                saving.result()

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        """Say in one line why a step could not be saved; those before it stay."""
        try:
            yield
        except Exception as error:
            there = "unknown"
            with contextlib.suppress(*storage.refusals()):
                there = ", ".join(map(str, self.steps())) or "none"
            reason = next((text for text in REASONS if text in str(error)), first_line(error))
            raise RunFailed(
                f"a step could not be saved in {self.folder}: {reason}\n"
                f"saved before: {there}; the same command goes on from there"
            ) from error

    def close(self) -> None:
        """Finish this process's part of a save in progress, and stop the threads behind it."""
        try:
            self._finish()
        finally:
            self._thread.shutdown()
            if writer := self.__dict__.pop("_writer", None):
                writer.close()

    def prune(self) -> list[int]:
        """Remove what is neither among the newest steps nor among the best; returns the steps."""
        steps, scores, kept = self.steps(), {}, set()
        for step in steps:
            try:
                if (score := self.told(step).get("score")) is not None:
                    scores[step] = score
            except storage.refusals():  # not to be judged now
                kept.add(step)
        ranked = sorted(scores, key=lambda step: (scores[step], step))
        kept.update(ranked[max(len(ranked) - self._best, 0) :])
        gone = [step for step in steps[: -(self._keep or len(steps))] if step not in kept]
        for step in gone:
            self.remove(step)
        return gone

    def remove(self, step: int) -> None:
        """Remove a step; what a kill leaves of it is cleaned like an unfinished one."""
        folder = self.folder / str(step)
        if not in_store(folder):
            storage.move(folder, gone := self.folder / f"{step}{TEMPORARY}")
            storage.remove(gone)
            return
        storage.create(mark := self.folder / f"{step}{SAVING}", b"")
        storage.discard(folder / manifest.NAME)
        storage.remove(folder)
        storage.discard(mark)

    def told(self, step: int) -> dict[str, Any]:
        """Read what a step's manifest tells, {} if it is damaged or not there."""
        try:
            return dict(json.loads((self.folder / str(step) / manifest.NAME).read_text()))
        except (FileNotFoundError, ValueError):
            return {}

    def restore(self, abstract: Any) -> Any:
        """Read the newest whole state, bitwise as saved, onto the shardings of `abstract`.

        A damaged step is said, set aside, and the one before it is read.
        Raises: BadInput if none is whole, or for one of another structure, or trained on another
        frozen tree than the one that was saved here.
        """

        def read(step: int, told: Mapping[str, Any]) -> Any:
            if self._frozen not in (None, told["frozen"]):
                raise BadInput(
                    f"it was trained on frozen tree {told['frozen']}, this is {self._frozen}"
                )
            manifest.require_fit(told, abstract)
            args = ocp.args.StandardRestore(abstract)
            with contextlib.closing(ocp.Checkpointer(ocp.StandardCheckpointHandler())) as reader:
                state = reader.restore(self.folder / str(step), args=args)
            manifest.verify(told, state)
            return state

        return self._newest(read)

    def read(self) -> Tree:
        """Read the newest model tree, frozen leaves included, as numpy arrays.

        Raises: BadInput if that step is damaged: another one is another model.
        """

        def read(step: int, told: Mapping[str, Any]) -> Tree:
            parts = self._numbers(step, told, ("params", "track"))
            digest = told["frozen"]
            frozen = unflatten(_load_verified(self._frozen_file(digest))) if digest else {}
            return unflatten(flatten(join(parts["params"], parts["track"], frozen)))

        return self._newest(read)

    def check(self, step: int) -> str:
        """Read all of a step and of its frozen tree; returns what is wrong, "" if nothing is."""
        try:
            told = manifest.read(self.folder / str(step))
            self._numbers(step, told)
            if told["frozen"]:
                _load_verified(self._frozen_file(told["frozen"]))
        except FAILURES:
            raise
        except Exception as error:
            absent = isinstance(error, FileNotFoundError) or not in_store(self.folder)
            if isinstance(error, storage.refusals()) and not absent:
                raise
            return first_line(error)
        return ""

    def _numbers(self, step: int, told: Mapping[str, Any], parts: Sequence[str] = ()) -> Tree:
        """Read some parts of a state, or all, as numpy arrays; compare them with their hashes."""
        path, handler = self.folder / str(step), ocp.PyTreeCheckpointHandler()
        stored = handler.metadata(path).tree
        wanted = {name: stored[name] for name in parts or stored}
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=kinds, partial_restore=True)
        found = handler.restore(path, args=args)
        manifest.verify(told, found)
        return found

    def _newest(self, read: Callable[[int, Mapping[str, Any]], Any]) -> Any:
        """Read the newest step; where it is damaged a writer sets it aside, and reads the next."""
        self.wait()
        if not (steps := self.agreed_steps()):
            raise BadInput(f"no checkpoint in {self.folder}: nothing was saved yet")
        reasons = []
        for step in reversed(steps):
            try:
                with agreeing(manifest.Damaged, RunFailed), self._refusing(step):
                    told = manifest.read(self.folder / str(step), files=jax.process_index() == 0)
                # Orbax waits for all processes: what else goes wrong in one alone ends it.
                with agreeing(manifest.Damaged), self._refusing(step):
                    return read(step, told)
            except BadInput as error:
                raise BadInput(f"checkpoint of step {step} in {self.folder}: {error}") from None
            except manifest.Damaged as error:
                reasons.append(f"checkpoint of step {step} in {self.folder}: {first_line(error)}")
            if self._keep is None:
                break
            self.set_aside(step, reasons[-1])
        others = ", ".join(map(str, steps[:-1])) or "none"
        advice = (
            f"nothing was changed; move its folder away to use another step: {others}"
            if self._keep is None
            else "no step is whole, and a run never begins anew by itself: give another --workdir"
        )
        raise BadInput("\n".join([*reasons, advice]))

    def _refusing(self, step: int) -> contextlib.AbstractContextManager[None]:
        return refusing(f"checkpoint of step {step} in {self.folder} cannot be read", ValueError)

    def set_aside(self, step: int, reason: str) -> None:
        """Move a step out of the way, write why, and say it."""
        with agreeing(RunFailed), refusing(f"step {step} cannot be set aside"):
            if jax.process_index() == 0:
                aside, folder = self.folder / DAMAGED, self.folder / str(step)
                storage.make_folder(aside)
                before = [name for name in storage.names(aside) if name.startswith(f"{step}-")]
                moved = aside / f"{step}-{sum(name.endswith('.txt') for name in before)}"
                write_text(moved.with_suffix(".txt"), f"{reason}\n")
                mark = self.folder / f"{step}{ASIDE}"
                if in_store(mark):  # from here on it is no step, and whoever comes completes this
                    write_text(mark, moved.name)
                storage.move(folder, moved)
                storage.discard(mark)
                print(f"{reason}\nset aside as {moved}", file=sys.stderr)

    def save_frozen(self, tree: Tree) -> str:
        """Write the frozen leaves once, whole or not at all, and return their digest.

        Runs beside this one share the file by a hard link where they have it.
        """
        leaves = multihost_utils.process_allgather(flatten(tree), tiled=True)
        content = safetensors.numpy.save(leaves)
        self._frozen = hashlib.sha256(content).hexdigest()[:32]
        path = self._frozen_file(self._frozen)
        with agreeing(RunFailed), refusing(f"the frozen tree cannot be saved in {path.parent}"):
            if jax.process_index() == 0 and not _holds(path, len(content)):
                if storage.there(path):
                    print(f"{path} is damaged: written again", file=sys.stderr)
                runs = () if in_store(path) else self.folder.parent.parent.glob("*/frozen")
                twin = next((one / path.name for one in runs if _holds(one / path.name)), None)
                if not (twin and _linked(twin, path)):
                    write_bytes(path, content)
        return self._frozen

    def _frozen_file(self, digest: str) -> Place:
        return self.folder.parent / "frozen" / f"{digest}.safetensors"


@contextlib.contextmanager
def refusing(what: str, *more: type[Exception]) -> Iterator[None]:
    """Make an error of a disk or a store, or of more kinds, a RunFailed that says what."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if not isinstance(error, (*storage.refusals(), *more)):
            raise
        raise RunFailed(f"{what}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Shorten an error's text: tensorstore's fills a page."""
    return str(error).partition("\n")[0][:300] or type(error).__name__


def digest_of(tree: Tree) -> str:
    """Return a hash of a tree's paths, shapes, dtypes and bytes: of its safetensors file."""
    return hashlib.sha256(safetensors.numpy.save(flatten(tree))).hexdigest()[:32]


def read_tree(workdir: Name) -> Tree:
    """Read the newest model tree of a run as numpy; raises BadInput if there is none."""
    with contextlib.closing(Checkpoints(place(workdir) / "checkpoints")) as checkpoints:
        return checkpoints.read()


def _holds(path: Place, size: int = 0) -> bool:
    """Tell whether a file's content is what it is named by; of a store's object, by its size."""
    if in_store(path):
        return storage.sizes(path.parent).get(path.name) == size
    try:
        return storage.digest(path) == path.stem
    except OSError:
        return False


def _linked(twin: Place, path: Place) -> bool:
    """Link a file to another run's, if the file system can; tell whether it could."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        os.link(twin, temporary)
        os.replace(temporary, path)
    except OSError:
        return False
    return True


def _load_verified(path: Place) -> dict[str, np.ndarray]:
    if not storage.there(path):
        there = sorted(file.name for file in path.parent.glob("*.safetensors"))
        raise BadInput(f"no frozen tree {path}; its folder holds: {there}")
    with tempfile.TemporaryDirectory() as folder:
        local = path
        if in_store(path):  # from bytes, safetensors reads no bfloat16
            local = place(folder) / path.name
            local.write_bytes(path.read_bytes())
        if not _holds(local):
            raise BadInput(f"frozen tree {path} is damaged: its content is not what it is named by")
        return safetensors.numpy.load_file(local)
