"""A look into a run's checkpoints, and a broom."""

import contextlib
import os
import time

from tljax import manifest, storage
from tljax.checkpoint import DAMAGED, Checkpoints
from tljax.lock import locked
from tljax.storage import Name, place
from tljax.types import BadInput, RunFailed


def opened(run: Name, keep: int | None = None, best: int = 0) -> Checkpoints:
    """Open the checkpoints of a run's folder; raises BadInput if there are none."""
    folder = place(run) / "checkpoints"
    if not folder.is_dir():
        raise BadInput(f"{run} has no checkpoints: expected the folder of a run")
    return Checkpoints(folder, keep, best)


def ls(run: Name) -> str:
    """List the saved steps: when, how large, worth what; and what was set aside."""
    with contextlib.closing(opened(run)) as checkpoints:
        lines = [f"{'step':>9}  {'saved':16}  {'bytes':>14}  {'leaves':>6}  score"]
        for step in checkpoints.steps():
            folder, told = checkpoints.folder / str(step), checkpoints.told(step)
            size = sum(manifest.sizes(folder).values())
            written = storage.changed(folder / manifest.NAME)
            saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(written)) if told else ""
            worth = told.get("score")
            shown = "no manifest" if not told else "" if worth is None else f"{worth:.5g}"
            count = len(told.get("leaves", ()))
            lines.append(f"{step:>9}  {saved:16}  {size:>14,}  {count:>6}  {shown}".rstrip())
        frozen = place(run) / "frozen"
        for name, size in storage.sizes(frozen).items():
            links = 0 if storage.in_store(frozen) else os.stat(frozen / name).st_nlink
            lines.append(f"frozen {name}  {size:,} bytes" + f", in {links} runs" * bool(links))
        aside = sorted((checkpoints.folder / DAMAGED).glob("*.txt"))
        return "\n".join([*lines, *(f"set aside: {path.read_text().strip()}" for path in aside)])


def verify(run: Name) -> str:
    """Read every number of every step; raises RunFailed if one is not what was saved."""
    with contextlib.closing(opened(run)) as checkpoints:
        steps = checkpoints.steps()
        found = {step: checkpoints.check(step) for step in steps}
    lines = [f"step {step}: {found[step] or 'whole'}" for step in steps] or ["no step is saved"]
    if any(found.values()):
        raise RunFailed("\n".join(["not all steps are whole", *lines]))
    return "\n".join(lines)


def diff(one: str, other: str) -> str:
    """Compare two saved states, RUN or RUN@STEP each, leaf by leaf, by their hashes."""
    (name, mine), (against, theirs) = ((each, leaves_of(each)) for each in (one, other))
    both = mine.keys() & theirs.keys()
    changed = sorted(path for path in both if mine[path] != theirs[path])
    lines = [f"{path}: {mine[path][0]}{mine[path][1]}" for path in changed]
    for title, paths in ((name, mine.keys() - both), (against, theirs.keys() - both)):
        lines += [f"{path}: in {title} alone" for path in sorted(paths)]
    return "\n".join([*lines, f"{len(both) - len(changed)} leaves are equal to the bit"])


def leaves_of(name: str) -> dict[str, list[object]]:
    """Return the leaves of a manifest: the newest one's of RUN, or that of RUN@STEP.

    The frozen tree is one of them, by the hash of its content.
    """
    run, _, step = name.rpartition("@") if "@" in name else (name, "", "")
    with contextlib.closing(opened(run)) as checkpoints:
        steps = checkpoints.steps()
        if not steps or (step and step not in map(str, steps)):
            raise BadInput(f"{name}: there is no such step; saved are {steps}")
        folder = checkpoints.folder / (step or str(steps[-1]))
    try:
        told = manifest.read(folder)
        return told["leaves"] | {"the frozen tree": ["", "", told["frozen"]]}
    except manifest.Damaged as error:
        raise BadInput(f"{name}: {error}") from None


def prune(run: Name, keep: int, best: int) -> str:
    """Remove all steps but the newest and the best ones.

    Raises: RunFailed if the newest one is damaged: nothing is removed then.
    """
    opened(run).close()
    with locked(run), contextlib.closing(opened(run, keep, best)) as checkpoints:
        newest = checkpoints.latest()
        if newest is not None and (wrong := checkpoints.check(newest)):
            raise RunFailed(f"nothing is removed: the newest step, {newest}, is damaged: {wrong}")
        gone = checkpoints.prune()
        return f"removed: {', '.join(map(str, gone)) or 'nothing'}; left: {checkpoints.steps()}"
