"""Whole runs through the command line: evaluated, predicting, built upon."""

import csv
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tljax.__main__ import main
from tljax.build import build
from tljax.checkpoint import Checkpoints, read_tree
from tljax.config import parse
from tljax.source import merged, open_source
from tljax.tree import flatten
from tljax.types import BadInput

ROOT = Path(__file__).resolve().parent.parent
VIT = {"name": "vit", "width": 32, "depth": 2, "heads": 2, "mlp": 64, "patch": 4}
BERT = {"name": "bert", "width": 64, "depth": 1, "heads": 2, "mlp": 128, "positions": 16}
DIGITS = {"name": "digits", "image_size": 16, "labels": 128, "test": "test[:64]"}


def write_config(path: Path, values: dict[str, Any]) -> Path:
    lines = ["from ml_collections import ConfigDict", "def get_config():"]
    path.write_text("\n".join([*lines, f"    return ConfigDict({values!r})\n"]))
    return path


def train(workdir: Path, **values: Any) -> dict[str, Any]:
    """Train in this process; returns the result as written."""
    config = write_config(workdir.with_suffix(".py"), values)
    assert main(["train", f"--config={config}", f"--workdir={workdir}"]) == 0
    return result_of(workdir)


def result_of(workdir: Path) -> dict[str, Any]:
    result = json.loads((workdir / "result.json").read_text())
    return {split: result[split] for split in ("validation", "test")}


def lines_of(workdir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def state_of(workdir: Path) -> list[np.ndarray]:
    """Read the whole last state, optimizer included."""
    experiment = build(parse(json.loads((workdir / "run.json").read_text())["config"]))
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = checkpoints.restore(experiment.abstract[0])
    checkpoints.close()
    return jax.tree.leaves(jax.device_get(state))


def evaluated(workdir: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, float]:
    capsys.readouterr()
    assert main(["eval", str(workdir), *words]) == 0
    return json.loads(capsys.readouterr().out)


def predicted(workdir: Path, *paths: Path) -> list[dict[str, Any]]:
    out = workdir.parent / "preds.jsonl"
    assert main(["predict", str(workdir), *map(str, paths), f"--out={out}"]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf8").splitlines()]


def write_digits(folder: Path, picks: range) -> Path:
    data = load_digits()
    for i in picks:
        path = folder / str(data.target[i] % 3) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15.9).astype(np.uint8)).save(path)
    return folder


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def vit(folder) -> Path:
    """A finished ViT run with dropout, mixup and an average of the parameters."""
    augment = {"flip": True, "mixup": 0.2, "randaugment": (1, 5)}
    train(
        folder / "vit",
        data=DIGITS | {"augment": augment},
        model=VIT | {"dropout": 0.1, "drop_path": 0.1},
        strategy={"name": "scratch"},
        run={
            "steps": 12,
            "batch": 16,
            "save_every": 4,
            "log_every": 3,
            "eval_every": 6,
            "ema": 0.9,
        },
    )
    return folder / "vit"


@pytest.fixture(scope="module")
def resnet(folder) -> Path:
    """A finished ResNet run, BatchNorm and microbatches, on a folder with train and test."""
    write_digits(folder / "pictures" / "train", range(150))
    write_digits(folder / "pictures" / "test", range(150, 200))
    train(
        folder / "resnet",
        data={"name": str(folder / "pictures"), "image_size": 8},
        model={
            "name": "resnet",
            "stages": (1, 1),
            "width": 8,
            "bottleneck": False,
            "stem": "small",
        },
        strategy={"name": "scratch"},
        optim={"name": "sgd", "lr": 0.05, "decay": 1e-4, "warmup": 2},
        run={"steps": 12, "batch": 32, "microbatches": 2, "save_every": 4, "keep": 1},
    )
    return folder / "resnet"


def test_each_interval_is_logged_once(vit):
    steps = [line["step"] for line in lines_of(vit) if "loss" in line]
    assert steps == [3, 6, 9, 12]
    assert [line["step"] for line in lines_of(vit) if "validation/n" in line] == [6, 12]


def test_a_finished_run_says_so_and_changes_nothing(vit, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in vit.rglob("*")}
    capsys.readouterr()
    words = [f"--config={vit.with_suffix('.py')}", f"--workdir={vit}", "--config.run.threads=1"]
    assert main(["train", *words]) == 0  # threads move no bit, so others are the same run
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in vit.rglob("*")} == stamps


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.few(1)
def test_eval_gives_the_result_to_the_last_digit(request, capsys, name):
    run = request.getfixturevalue(name)
    assert evaluated(run, capsys) == result_of(run)["test"]
    assert evaluated(run, capsys, "--split=validation") == result_of(run)["validation"]


def test_eval_reads_other_data_with_the_same_labels(resnet, tmp_path, capsys):
    others = write_digits(tmp_path / "others", range(200, 300))
    scores = evaluated(resnet, capsys, f"--data={others}")
    assert scores["n"] == 20  # a folder without a test part: a fifth
    same = evaluated(resnet, capsys, f"--data={resnet.parent / 'pictures'}")
    assert same == result_of(resnet)["test"]


def test_predict_labels_pictures_in_order(resnet, tmp_path):
    pictures = write_digits(tmp_path / "new", range(200, 240))
    one = next(pictures.rglob("*.png"))
    rows = predicted(resnet, pictures, one)
    assert [row["image"] for row in rows] == [*map(str, sorted(pictures.rglob("*.png"))), str(one)]
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-12)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    alone = predicted(resnet, one)[0]["probabilities"]
    # The same picture among others: batches may sum in another order, by a few float32 roundings.
    assert alone == pytest.approx(rows[-1]["probabilities"], abs=1e-6)


def test_an_averaged_run_is_a_source_by_its_average(vit):
    tree = read_tree(vit)
    average, source = flatten(tree["ema"]["params"]), flatten(open_source(str(vit)).tree["params"])
    assert source.keys() == average.keys()
    for path, leaf in average.items():
        np.testing.assert_array_equal(source[path], leaf)
    kernel = tree["params"]["head"]["kernel"]
    assert not np.array_equal(kernel, average["head/kernel"]), "the average is not the last value"


@pytest.mark.slow
def test_a_run_is_adapted_by_lora_and_keeps_its_head(folder, vit, capsys):
    capsys.readouterr()
    train(
        folder / "lora",
        data=DIGITS,
        weights=str(vit),
        strategy={"name": "lora", "rank": 2, "targets": ("params/**/query", "params/**/up")},
        optim={"lr": 0.05},
        run={"steps": 4, "batch": 16},
    )
    assert "100.0% of the pretrained numbers used" in capsys.readouterr().out
    table = (folder / "lora" / "tables.txt").read_text()
    assert "params/head/kernel                      loaded" in table and "fresh" not in table
    tree, source = read_tree(folder / "lora"), merged(open_source(str(folder / "lora")))
    assert not [path for path in flatten(source.tree) if "lora" in path]
    experiment = build(parse({"data": DIGITS, "weights": str(vit), "run": {"batch": 16}}))
    batch = next(iter(experiment.data.eval_batches("test")))
    logits = [experiment.predict(one, batch)["logits"] for one in (tree, source.tree)]
    assert np.abs(tree["params"]["blocks"]["0"]["attention"]["query"]["lora"]["b"]).max() > 1e-3
    # Folded or beside the kernel: the same sum in another order.
    np.testing.assert_allclose(*logits, atol=2e-5, rtol=0)


def test_only_trained_leaves_have_an_average(folder, vit):
    train(
        folder / "averaged",
        data=DIGITS,
        weights=str(vit),
        strategy={"name": "lora", "rank": 2},
        optim={"lr": 0.05},
        run={"steps": 4, "batch": 16, "ema": 0.5},
    )
    tree = read_tree(folder / "averaged")
    averages = flatten(tree["ema"])
    assert all(path.endswith(("/a", "/b")) or "/head/" in path for path in averages)
    # A source has the averages in place of the values, folded into the kernels around them.
    head = open_source(str(folder / "averaged")).tree["params"]["head"]["kernel"]
    np.testing.assert_array_equal(head, averages["params/head/kernel"])
    assert not np.array_equal(head, tree["params"]["head"]["kernel"])


def test_frozen_random_features_are_pointed_out(folder, capsys):
    capsys.readouterr()
    run = {"steps": 2, "batch": 16}
    train(folder / "random", data=DIGITS, model=VIT, strategy={"name": "probe"}, run=run)
    assert "stays at random initialisation" in capsys.readouterr().out


def test_a_run_is_adapted_by_probe_to_other_labels(folder, resnet, capsys):
    capsys.readouterr()
    train(
        folder / "probe",
        data=DIGITS | {"image_size": 8},
        weights=str(resnet),
        strategy={"name": "probe"},
        run={"steps": 4, "batch": 16},
    )
    assert "loaded, 2 fresh, 2 ignored" in capsys.readouterr().out
    tree, before = flatten(read_tree(folder / "probe")), flatten(read_tree(resnet))
    frozen = [path for path in tree if "/head/" not in path]
    assert len(frozen) == len(before) - 2
    for path in frozen:
        origin = before[path.replace("fixed_stats", "batch_stats")]
        np.testing.assert_array_equal(tree[path], origin, err_msg=path)
    assert tree["params/head/kernel"].shape == (16, 10)
    assert evaluated(folder / "probe", capsys) == result_of(folder / "probe")["test"]


WORDS = {"good": ["fine", "great", "nice"], "bad": ["poor", "awful", "sad"]}


def sentence(kind: str, i: int) -> str:
    return f"a {WORDS[kind][i % 3]} thing number {i} é"


def text_run(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    table = write_table(folder / f"{name}.csv", rows)
    data = {"name": str(table), "length": 16, "vocab": 300, "validation": 24}
    values = {"strategy": {"name": "scratch"}, "optim": {"lr": 3e-3}} | more
    columns = more.pop("columns", {})
    values.pop("columns", None)
    return train(folder / name, data=data | {"columns": columns}, model=BERT, **values)


@pytest.mark.once
@pytest.mark.slow
def test_pairs_of_texts_in_bfloat16_on_an_fsdp_mesh(folder, capsys):
    rows = [
        {"first": sentence(kind, i), "second": f"so {i}", "verdict": kind}
        for i in range(90)
        for kind in WORDS
    ]
    result = text_run(
        folder,
        "pairs",
        rows,
        columns={"text": "first", "text_b": "second", "label": "verdict"},
        optim={"lr": 1e-2, "warmup": 5},
        run={"steps": 40, "batch": 16},
        mesh={"data": 1, "fsdp": 8},
        specs=(("params/**/kernel", ("fsdp",)),),  # leaves this small would be replicated
        precision={"compute": "bfloat16"},
    )
    assert result["test"]["n"] == 36
    assert result["test"]["accuracy"] > 0.8
    assert (folder / "pairs" / "tables.txt").read_text().count("| fsdp |") == 7
    assert evaluated(folder / "pairs", capsys) == result["test"]
    found = predicted(folder / "pairs", folder / "pairs.csv")
    assert [row["text"] for row in found] == [row["first"] for row in rows]
    assert all(row["text_b"].startswith("so ") and len(row["probabilities"]) == 2 for row in found)
    assert (
        sum(row["label"] == given["verdict"] for row, given in zip(found, rows, strict=True)) > 144
    )


@pytest.mark.once
@pytest.mark.slow
def test_several_labels_a_text(folder):
    rows = [
        {"text": f"{sentence('good', i)} {'red' if i % 2 else 'blue'}",
         "label": ["blue|odd", "red"][i % 2] if i % 5 else "none|red"}
        for i in range(120)
    ]  # fmt: skip
    result = text_run(folder, "several", rows, run={"steps": 3, "batch": 16})
    assert {"mAP", "micro_f1", "macro_f1", "mAP/low"} <= result["test"].keys()
    [found] = predicted(folder / "several", write_lines(folder / "one.txt", ["a red thing"]))
    assert found["probabilities"].keys() == {"blue", "none", "odd", "red"}
    assert found["labels"] == [name for name, p in found["probabilities"].items() if p > 0.5]


@pytest.mark.once
@pytest.mark.slow
def test_a_number_a_text(folder, capsys):
    rows = [{"text": sentence("good", i), "label": i / 7} for i in range(120)]
    result = text_run(folder, "number", rows, run={"steps": 3, "batch": 16})
    assert {"spearman", "pearson", "mse"} <= result["test"].keys()
    lines = ["a nice thing", "", "a great thing"]
    found = predicted(folder / "number", write_lines(folder / "two.txt", lines))
    assert [row["text"] for row in found] == ["a nice thing", "a great thing"]
    assert all(isinstance(row["value"], float) for row in found)


@pytest.mark.assets("brown")
def test_a_tag_a_word(folder):
    data = {"name": "pos", "labels": 64, "validation": 32, "test": "test[:32]"}
    result = train(
        folder / "tags",
        data=data | {"length": 16, "vocab": 500},
        model=BERT,
        strategy={"name": "scratch"},
        run={"steps": 3, "batch": 16},
    )
    assert {"token_accuracy", "token_accuracy/low"} <= result["test"].keys()
    [found] = predicted(folder / "tags", write_lines(folder / "words.txt", ["Dogs run fast ."]))
    assert len(found["labels"]) == 4  # one a word, whatever its pieces


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_plain_text_pretrains_and_adapts(folder, capsys):
    lines = [{"text": sentence(kind, i)} for i in range(200) for kind in WORDS]
    text_run(folder, "mlm", lines, run={"steps": 3, "batch": 16})
    assert main(["predict", str(folder / "mlm"), str(folder / "mlm.csv")]) == 2
    assert "adapt it to labels" in capsys.readouterr().err
    rows = [{"text": sentence(k, i), "label": k} for i in range(60) for k in WORDS]
    table = write_table(folder / "adapt.csv", rows)
    result = train(
        folder / "adapted",
        data={"name": str(table), "length": 16, "validation": 24},
        weights=str(folder / "mlm"),
        strategy={"name": "full"},
        run={"steps": 3, "batch": 16},
    )
    assert result["test"]["n"] == 24
    table = (folder / "adapted" / "tables.txt").read_text()
    assert "the model has no such head" in table  # of the pretrained MLM head
    embedding = read_tree(folder / "mlm")["params"]["embed"]["word"]["embedding"]
    assert (
        read_tree(folder / "adapted")["params"]["embed"]["word"]["embedding"].shape
        == embedding.shape
    )


def test_an_unfinished_run_is_no_source(tmp_path):
    train(tmp_path / "run", data=DIGITS, model=VIT, run={"steps": 2, "batch": 16})
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(BadInput, match="not finished"):
        open_source(str(tmp_path / "run"))


def test_a_fresh_layer_that_is_read_is_not_left_random(tmp_path):
    """A pooler that the weights lack would stay random and frozen under a probe."""
    table = tmp_path / "texts.csv"
    rows = [f"{'good' if i % 2 else 'bad'} film {i},{'yn'[i % 2]}" for i in range(64)]
    table.write_text("\n".join(["text,label", *rows]))
    data = {"name": str(table), "length": 16, "vocab": 60}
    train(tmp_path / "run", data=data, model=BERT, run={"steps": 1, "batch": 16})
    base = {"data": data, "weights": str(tmp_path / "run"), "run": {"steps": 1, "batch": 16}}
    values = base | {"model": {"pooler": True, "pool": "pooler"}, "strategy": {"name": "probe"}}
    with pytest.raises(BadInput, match=r"params/pooler/.* would stay random"):
        build(parse(values))
    build(parse(values | {"roles": (("params/pooler/**", "train"),)}))
