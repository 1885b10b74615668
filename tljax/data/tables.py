"""Files of rows: CSV, TSV and JSONL, read whole, and what in them is refused."""

import csv
import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tljax.types import BadInput

TABLES = (".csv", ".tsv", ".jsonl")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def short(value: Any) -> str:
    """Show a value of a file, of whatever size, in one line."""
    return _SHORT.repr(value)


def first_few(names: Iterable[Any]) -> str:
    """Show the first names of a file in one line."""
    shown = [" ".join(str(name)[:40].split()) for name in islice(names, 12)]
    return ", ".join(shown)


def refuse_missing(name: str, keys: dict[str, str], present: Mapping[str, Any]) -> None:
    """Raise BadInput for a column that is not there."""
    for key in keys.values():
        if key not in present:
            raise BadInput(
                f"{name} has no column {key!r}: it has {first_few(present)}.\n"
                'Say which to use, for example columns={"text": "...", "label": "..."}.'
            )


def _parse_table(path: Path) -> list[dict]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if path.suffix != ".jsonl":
            reader = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            counts = Counter(reader.fieldnames or ())
            if twice := [name for name, count in counts.items() if count > 1]:
                raise BadInput(f"{path} has two columns of one name: {first_few(twice)}")
            return list(reader)
        rows = [json.loads(line) for line in stream if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadInput(f"{path}, row {number} is {short(row)}: expected an object of columns")
    return rows


def read_table(path: Path, columns: Mapping[str, str]) -> tuple[list[dict], list | None]:
    """Read rows of {"text", "text_b"?} and the values of the label column, None without one."""
    try:
        table = _parse_table(path)
    except BadInput:
        raise
    except (ValueError, RecursionError, csv.Error) as error:  # JSON's and Unicode's are ValueErrors
        raise BadInput(f"{path} is no {path.suffix} table in UTF-8: {error}") from None
    if not table:
        raise BadInput(f"{path} has no rows")
    keys = {key: key for key in ("text", "text_b", "label") if key == "text" or key in table[0]}
    keys |= columns
    for number, row in enumerate(table, 1):
        if None in row:  # csv's name for what is beyond the header
            raise BadInput(
                f"{path}, row {number} has more fields than the header: quote its commas"
            )
        refuse_missing(str(path), keys, row)
        for our, key in keys.items():
            if our != "label" and not isinstance(row[key], str):
                held = short(row[key])
                raise BadInput(f"{path}, row {number}: column {key!r} holds {held}, no {our}")
            if our != "label" and not _is_unicode(row[key]):
                raise BadInput(f"{path}, row {number}: column {key!r} holds half a character")
    values = [row[keys["label"]] for row in table] if "label" in keys else None
    return [{our: row[key] for our, key in keys.items() if our != "label"} for row in table], values


def _is_unicode(text: str) -> bool:
    """Tell whether a text has no lone surrogate, which JSON can spell and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_labels(values: list, place: Path) -> list:
    """Check the values of a label column; where one of them has a "|", all are lists."""
    if any(isinstance(value, str) and "|" in value for value in values):
        cut = lambda text: [part for part in text.split("|") if part]  # noqa: E731
        values = [cut(value) if isinstance(value, str) else value for value in values]
    for number, value in enumerate(values, 1):
        if value == "" or not isinstance(value, str | int | float | list):
            raise BadInput(
                f"{place}, row {number}: the label is {short(value)}; give it one, or no row"
            )
        if not all(_is_unicode(str(label)) for label in listed(value)):
            raise BadInput(f"{place}, row {number}: the label holds half a character")
    return values


def listed(value: Any) -> list:
    """Take one label as a list of one."""
    return value if isinstance(value, list) else [value]
