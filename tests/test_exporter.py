"""Exports: other libraries open the folder, without a warning, and compute the same."""

import json
import logging
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_models import close, images
from test_pretrained import made

import tljax
from tljax.__main__ import main
from tljax.edits.lora import Graft, Target
from tljax.exporter import export
from tljax.pretrained import assemble
from tljax.proof import FIXTURE, NOTE
from tljax.tree import flatten, map_with_path, unflatten
from tljax.types import BadInput

pytestmark = pytest.mark.once

LABELS = ("cat", "dog", "emu")
IDS = np.random.default_rng(1).integers(3, 50, (2, 10)).astype(np.int32)
MASK = (np.arange(10) < [[10], [7]]).astype(np.int32)


def grafted(source, *targets, rank=2):
    """Add LoRA factors that are not zero to a source."""
    tree = Graft(tuple(Target(path, rank, 6 / rank) for path in targets))(
        source.tree, jax.random.key(0)
    )
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        wanted = path.endswith(("lora/a", "lora/b"))
        return rng.normal(0, 0.2, leaf.shape).astype(np.float32) if wanted else np.asarray(leaf)

    return replace(source, tree=map_with_path(draw, tree))


def logits(pre, *inputs):
    with jax.default_matmul_precision("highest"):
        return np.asarray(pre.model.apply(pre.variables, *map(jnp.asarray, inputs)).logits)


@pytest.fixture
def strict(caplog):
    """Fail on whatever transformers or peft have to say while they open a folder."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # peft's own, of any model
        yield
    logger.removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not said


IN_TRANSFORMERS = {
    "vit": ("vit", {}),
    "deit": ("vit", {"distilled": True, "grid": (4, 4)}),
    "dinov2": ("vit", {"layer_scale": 0.5, "eps": 1e-6, "mlp": 64, "pool": "cls+mean"}),
    "registers": (
        "vit",
        {"layer_scale": 0.5, "eps": 1e-6, "mlp": 64, "pool": "cls+mean", "registers": 2},
    ),
    "bert": ("bert", {"pool": "pooler", "pooler": True}),
    "roberta": ("bert", {"pool": "pooler", "pooler": True, "types": 1, "pad": 1, "eps": 1e-5}),
    "distilbert": (
        "bert",
        {"pool": "pooler", "pooler": True, "pooler_activation": "relu", "types": 0},
    ),
    "resnet": ("resnet", {}),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", IN_TRANSFORMERS)
@pytest.mark.few(3)
def test_transformers_opens_an_export_and_gives_the_same_logits(tmp_path, strict, name):
    import torch
    import transformers

    arch, fields = IN_TRANSFORMERS[name]
    pre = assemble(made(arch, LABELS, **fields), "")
    folder = export(pre, tmp_path / name)
    image = arch != "bert"
    kind = transformers.AutoModelForImageClassification
    if not image:
        kind = transformers.AutoModelForSequenceClassification
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    inputs = (images(2, 16, 16, 3),) if image else (IDS, MASK)
    with torch.no_grad():
        given = (
            {"pixel_values": torch.tensor(inputs[0].transpose(0, 3, 1, 2))}
            if image
            else {"input_ids": torch.tensor(IDS).long(), "attention_mask": torch.tensor(MASK)}
        )
        reference = model.eval()(**given).logits.numpy()
    close(logits(pre, *inputs), reference, 2e-5)
    assert tuple(model.config.id2label[i] for i in range(3)) == LABELS


@pytest.mark.torch
@pytest.mark.parametrize("name", ["vit", "map", "resnet"])
@pytest.mark.few(2)
def test_timm_opens_an_export_and_gives_the_same_logits(tmp_path, timm, name):
    import torch

    cases = {
        "vit": ("vit", {"eps": 1e-6}),
        "map": ("vit", {"eps": 1e-6, "pool": "map", "map_head": True, "class_token": False}),
        "resnet": ("resnet", {"stages": (1, 1, 1, 1), "width": 64}),
    }
    arch, fields = cases[name]
    pre = assemble(made(arch, LABELS, **fields), "")
    folder = export(pre, tmp_path / name, to="timm")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        pixels = images(2, 16, 16, 3)
        reference = model(torch.tensor(pixels.transpose(0, 3, 1, 2))).numpy()
    close(logits(pre, pixels), reference, 2e-5)


def test_an_npz_comes_back_as_it_was(tmp_path):
    fields = {"eps": 1e-6, "activation": "gelu_tanh", "prefix_positions": False}
    pre = assemble(made("vit", LABELS, **fields, resample="bilinear"), "")
    again = tljax.load(export(pre, tmp_path / "npz", to="npz") / "model.npz")
    jax.tree.map(np.testing.assert_array_equal, again.variables, pre.variables)


@pytest.mark.torch
@pytest.mark.parametrize("naming", ["4", "5"])
@pytest.mark.few(1)
def test_a_lora_goes_to_peft_and_comes_back(tmp_path, peft, strict, naming):
    import torch
    import transformers

    source = made("vit", LABELS)
    base = export(assemble(source, ""), tmp_path / "base")
    lora = grafted(source, "params/blocks/0/attention/query", "params/blocks/1/mlp/up")
    pre = assemble(lora, "")
    folder = export(pre, tmp_path / "lora", to="peft", naming=naming, base=str(base))
    here = logits(tljax.load(folder), pixels := images(2, 16, 16, 3))
    close(here, logits(pre, pixels), 2e-6)
    if naming == "5":  # the installed transformers
        model = transformers.ViTForImageClassification.from_pretrained(base)
        model = peft.PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            reference = model(torch.tensor(pixels.transpose(0, 3, 1, 2))).logits.numpy()
        close(here, reference, 2e-5)
        assert np.abs(here - logits(assemble(source, ""), pixels)).max() > 0.01


def test_a_lora_is_folded_on_demand_and_the_card_says_what_rounding_costs(tmp_path):
    source = made("vit", LABELS)
    pre = assemble(grafted(source, "params/blocks/0/attention/query"), "")
    with pytest.raises(BadInput, match="--merge"):
        export(pre, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    pixels = images(2, 16, 16, 3)
    exact = export(pre, tmp_path / "exact", merge=True)
    close(logits(tljax.load(exact), pixels), logits(pre, pixels), 2e-6)
    half = export(pre, tmp_path / "half", merge=True, dtype="bfloat16")
    assert load_file(half / FIXTURE)["logits"].dtype == np.float32
    line = next(x for x in (half / "README.md").read_text().splitlines() if "LoRA folded" in x)
    lost = float(line.split("changes the updates by ")[1].split("%")[0]) / 100
    kernel = "params/blocks/0/attention/query/kernel"
    sums = flatten(tljax.load(exact).variables)[kernel]
    update = sums - flatten(source.tree)[kernel]
    rounded = np.asarray(sums).astype(jnp.bfloat16).astype(np.float32)
    assert lost == pytest.approx(np.linalg.norm(rounded - sums) / np.linalg.norm(update), rel=0.01)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_the_type_of_a_file_is_kept_unless_another_is_asked_for(tmp_path, dtype):
    pre = assemble(made("vit", LABELS), "")
    first = export(pre, tmp_path / "first", dtype=dtype)
    second = export(tljax.load(first), tmp_path / "second")
    one, two = ((folder / "model.safetensors").read_bytes() for folder in (first, second))
    assert one == two  # byte for byte
    kinds = {str(tensor.dtype) for tensor in load_file(first / "model.safetensors").values()}
    assert kinds == {dtype or "float32"}


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    pre = assemble(made("vit", LABELS), "")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(BadInput, match="is there already"):
        export(pre, tmp_path / "full")
    for options, word in (
        ({"to": "onnx"}, "hf, timm, npz, peft"),
        ({"dtype": "int8"}, "float32, bfloat16, float16"),
        ({"to": "npz"}, "eps"),
        ({"to": "peft"}, "none"),
    ):
        with pytest.raises(BadInput, match=word):
            export(pre, tmp_path / "new", **options)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in ("link", "full/mine/new", "\0"):
        with pytest.raises(BadInput):
            export(pre, tmp_path / folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "link"]


def test_variables_of_another_model_are_refused(tmp_path):
    pre = assemble(made("vit", LABELS), "")
    leaves = flatten(pre.variables)
    without = {path: leaf for path, leaf in leaves.items() if "head" not in path}
    for variables, word in (
        (unflatten(without), "params/head"),
        (unflatten(leaves | {"params/head/bias": np.zeros(9, np.float32)}), "params/head/bias"),
        (unflatten(leaves | {"params/head/bias": np.full(3, np.nan)}), "params/head/bias.*NaN"),
        (unflatten(leaves | {"params/head/bias": np.array(["a", "b", "c"])}), "no numbers"),
        ((), "dict"),
    ):
        with pytest.raises(BadInput, match=word):
            export(replace(pre, variables=variables), tmp_path / "new")
    large = unflatten(leaves | {"params/head/bias": np.full(3, 1e6, np.float32)})
    with pytest.raises(BadInput, match=r"params/head/bias.*float16"):
        export(replace(pre, variables=large), tmp_path / "new", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("arch", ["vit", "roberta"])
@pytest.mark.few(1)
def test_a_lora_in_half_precision_keeps_its_scale_and_the_base(tmp_path, arch, dtype):
    form = {"pad": 1, "types": 1, "pool": "pooler"} if arch == "roberta" else {}
    source = made("bert" if form else "vit", LABELS, **form)
    base = export(assemble(source, ""), tmp_path / "base")
    lora = Graft((Target("params/blocks/0/attention/query", 3, 4 / 3),), 0.1)
    pre = assemble(replace(source, tree=lora(source.tree, jax.random.key(0))), "")
    out = export(pre, tmp_path / "lora", to="peft", dtype=dtype, base=str(base))
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["lora_dropout"], config["r"]) == (4, 0.1, 3)
    kept = flatten(tljax.load(out).variables)
    for path in ("params/blocks/0/attention/query/kernel", "params/blocks/0/mlp/wi/kernel"):
        if path in kept:
            np.testing.assert_array_equal(kept[path], flatten(pre.variables)[path])


def test_what_npz_cannot_say_is_said(tmp_path, capsys):
    own = {"eps": 1e-6, "activation": "gelu_tanh"}
    pre = assemble(made("vit", LABELS, **own), "")
    export(pre, tmp_path / "npz", to="npz")
    said, card = capsys.readouterr().out, (tmp_path / "npz" / "README.md").read_text()
    for words in ("names of the labels", "[-1, 1]"):
        assert words in said and words in card
    assert tljax.load(tmp_path / "npz").report.share == 1  # by its folder


def test_an_export_that_computes_something_else_is_not_left_behind(tmp_path, monkeypatch):
    pre = assemble(made("vit", LABELS), "")
    wrong = map_with_path(lambda _, x: x * 1.1, pre.variables)
    monkeypatch.setattr("tljax.exporter.load", lambda path, **_: assemble(made("vit", LABELS), ""))
    with pytest.raises(BadInput, match=r"other (pooled|logits)"):
        export(replace(pre, variables=wrong), tmp_path / "wrong")
    assert not list(tmp_path.iterdir())


CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({
        "data": {"name": "digits", "image_size": 16, "labels": 64, "test": "test[:64]"},
        "model": {"name": "vit", "width": 32, "depth": 2, "heads": 2, "mlp": 64, "patch": 4},
        "strategy": {"name": "scratch"},
        "run": {"steps": 2, "batch": 16},
    })
"""


@pytest.mark.slow
def test_a_run_is_exported_with_its_own_facts(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    words = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    assert main(["train", *words]) == 0
    out = tmp_path / "out"
    options = ["--to=timm"]  # transformers has no ViT of eps 1e-6 with a class token and no scale
    assert main(["export", str(tmp_path / "run"), str(out), *options]) == 0
    assert "same outputs" in capsys.readouterr().out
    card, result = (out / "README.md").read_text(), tmp_path / "run" / "result.json"
    test = json.loads(result.read_text())["test"]
    for fact in (
        f"| accuracy | {test['accuracy']:.4f} | [{test['accuracy/low']:.4f}, ",
        "On 64 examples",
        "- data: digits, 64 labels",
        "strategy: scratch",
        "2 steps of 16 examples, seed 0",
        "tljax train --config=",
    ):
        assert fact in card, f"{fact!r} is not in\n{card}"
    assert json.loads((out / NOTE).read_text())["digest"]
    for name, how in (
        ("result.json", lambda text: text[:9]),
        ("result.json", lambda _: "{}"),
        ("run.json", lambda text: text.replace('"name": "vit"', '"name": "wit"')),
        ("run.json", lambda text: text.replace('"fields": {', '"fields": [], "was": {')),
    ):
        text = (tmp_path / "run" / name).read_text()
        assert how(text) != text
        (tmp_path / "run" / name).write_text(how(text))
        with pytest.raises(BadInput, match=str(tmp_path / "run")):
            tljax.load(tmp_path / "run")
        (tmp_path / "run" / name).write_text(text)
    pre = tljax.load(out)
    assert pre.labels == tuple("0123456789") and "verified" in pre.verified
