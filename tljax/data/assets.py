"""Where the raw material lies that registry packages ship: images, texts, weights."""

import os
from pathlib import Path

from tljax.types import BadInput

_INSIDE = {
    "fashion": "usr/share/datasets/fashion-mnist",
    "vader": "vaderSentiment-3.3.2.tar.gz",
    "spam": "package",
    "brown": "package",
    "wordnet": "usr/share/wordnet",
    "gcide": "usr/share/dictd",
    "fortunes": "usr/share/games/fortunes",
}


def find_asset(name: str) -> Path:
    """Find the files of an unpacked package: under $TLJAX_ASSETS, ./assets, or the system.

    Raises: BadInput naming the command that installs it.
    """
    root = Path(os.environ.get("TLJAX_ASSETS", "assets"))
    inside = _INSIDE.get(name, "")
    places = [root / name / inside]
    if inside.startswith("usr/"):
        places.append(Path("/") / inside)
    for place in places:
        if place.exists():
            return place
    raise BadInput(
        f"asset {name!r} is not installed: looked at {', '.join(map(str, places))}.\n"
        f"Run `make assets NAMES={name}`, or point $TLJAX_ASSETS at a folder that has it."
    )


def prepared_dir() -> Path:
    """Name the folder of prepared TFDS data: $TFDS_DATA_DIR, $TLJAX_DATA, or the user's cache."""
    chosen = os.environ.get("TFDS_DATA_DIR") or os.environ.get("TLJAX_DATA")
    return Path(chosen) if chosen else Path.home() / ".cache" / "tljax" / "tfds"
