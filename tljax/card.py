"""The model card of an export, filled from what is known and nothing else."""

import json
from collections.abc import Mapping
from typing import Any

USE = {
    "hf": """from transformers import {auto}

model = {auto}.from_pretrained("{folder}")""",
    "timm": """import timm

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()""",
    "peft": """from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{folder}")""",
    "npz": """import tljax

pre = tljax.load("{folder}/model.npz")""",
}
LIBRARIES = {"hf": "transformers", "timm": "timm", "peft": "peft", "npz": "tljax"}


def make_card(folder: str, to: str, parameters: int, record: Mapping[str, Any], **use: str) -> str:
    """Write README.md: what the model is, what it scored, where it is from, how to make it again.

    record: a `Pretrained`'s, and `notes` of the export.  use: words of the code that opens it.
    """
    run = record["config"] if record["format"] == "run" else {}
    parts = [
        f"---\nlibrary_name: {LIBRARIES[to]}\ntags:\n- tljax\n---\n\n# {folder}\n",
        f"{parameters:,} parameters, exported by tljax.\n",
        f"```python\n{USE[to].format(folder=folder, **use)}\n```\n",
        *([_scores(run["result"]), _training(run)] if run else []),
        _origin(record, run),
    ]
    return "\n".join(parts)


def _scores(result: Mapping[str, Any]) -> str:
    """Tabulate test metrics; an interval where the run has one (95 %, Wilson)."""
    test = result["test"]
    rows = ["## Test metrics\n", "| metric | value | 95 % interval |", "|---|---|---|"]
    for name, value in test.items():
        if name == "n" or name.endswith(("/low", "/high")):
            continue
        ends = [test.get(f"{name}/{end}") for end in ("low", "high")]
        interval = "" if None in ends else f"[{ends[0]:.4f}, {ends[1]:.4f}]"
        rows.append(f"| {name} | {_number(value)} | {interval} |")
    return "\n".join([*rows, f"\nOn {int(test['n'])} examples, read once.\n"])


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _training(run: Mapping[str, Any]) -> str:
    """Say how it was trained, and how to do it again."""
    config = run["config"]
    data, labels = config["data"], config["data"]["labels"]
    strategy = " + ".join(part["name"] for part in config["strategy"])
    lines = [
        "## Training\n",
        f"- data: {data['name']}, {'all' if labels is None else labels} labels",
        f"- strategy: {strategy}, from {config['weights'] or 'scratch'}",
        f"- {config['run']['steps']} steps of {config['run']['batch']} examples, seed "
        f"{config['seed']}, on {run['device']}",
        f"- {', '.join(f'{name} {version}' for name, version in run['versions'].items())}",
        f"- code: commit {run['git'] or 'unknown'}\n",
        "```\n" + run["command"] + "\n```\n" if run.get("command") else "",
        "<details><summary>its whole config</summary>\n",
        f"```json\n{json.dumps(config, indent=2)}\n```\n\n</details>\n",
    ]
    return "\n".join(lines)


def _origin(record: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Say which weights this began with, by their digest."""
    digest = run["digest"] if run else record["digest"]
    lines = ["## Origin\n", f"- format: {record['format']} {record['kind']}".rstrip()]
    what = "SHA-256 of the weights file" if len(digest) == 64 else "tljax's digest of the weights"
    lines += [f"- {what} it began with: {digest}"] if digest else []
    lines += [f"- assumed on import: {text}" for text in record["assumed"]]
    return "\n".join([*lines, *(f"- {note}" for note in record["notes"])]) + "\n"
