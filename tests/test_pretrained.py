"""`tljax.load`: every leaf accounted for, heads and grids by choice, values that are checked."""

import builtins
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tljax
from tljax.exporter import export
from tljax.models import MODELS
from tljax.pretrained import assemble, target_of
from tljax.proof import FIXTURE, NOTE, example_inputs
from tljax.sharding import make_mesh
from tljax.tree import flatten, map_with_path
from tljax.types import BadInput
from tljax.weights import files
from tljax.weights.table import Source

pytestmark = pytest.mark.once

VIT = {"width": 32, "depth": 2, "heads": 2, "mlp": 48, "patch": 4, "grid": (4, 4), "eps": 1e-12}
BERT = {"vocab": 50, "width": 32, "depth": 2, "heads": 2, "mlp": 48, "positions": 24}
RESNET = {"stages": (1, 2), "width": 8, "bottleneck": False}
CLIP = {"vocab": 50, "width": 32, "depth": 2, "heads": 2, "mlp": 48, "positions": 24}
SIZES = {"vit": VIT, "bert": BERT | {"pooler": True}, "resnet": RESNET, "clip_text": CLIP}


def made(arch, labels=None, **more):
    """Build a source with every leaf drawn at random, as if it had been read from a file."""
    fields = SIZES[arch] | more
    heads = {"num_classes": len(labels)} if labels else {}
    model = MODELS[arch](**fields, **heads)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        return np.abs(values) + 0.5 if path.endswith(("scale", "var")) else values

    tree = map_with_path(draw, target_of(model, {}))
    facts = {"digest": lambda: "", "ignored": {}, "format": "hf", "kind": "", "config": {}}
    places = {"tokenizer": None, "preprocess": None, "origin": "memory"}
    return Source(arch=arch, fields=fields, tree=tree, labels=labels, **facts, **places)


def run(pre, inputs=None):
    if inputs is None:
        inputs = [jnp.zeros(like.shape, like.dtype) for like in example_inputs(pre.model)]
    with jax.default_matmul_precision("highest"):
        return pre.model.apply(pre.variables, *map(jnp.asarray, inputs))


@pytest.fixture
def folder(tmp_path):
    """Export a small classifier to a folder; its path."""
    pre = assemble(made("vit", ("cat", "dog", "emu")), "")
    return export(pre, tmp_path / "vit")


@pytest.mark.parametrize("arch", SIZES)
def test_tracing_one_block_tells_all(arch):
    model = MODELS[arch](**SIZES[arch])
    whole = jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model))
    assert jax.tree.map(jnp.shape, target_of(model, {})) == jax.tree.map(jnp.shape, whole)


def test_importing_tljax_costs_nothing_and_offers_its_functions():
    assert tljax.load is tljax.pretrained.load and tljax.export is export
    with pytest.raises(AttributeError, match="lod"):
        _ = tljax.lod


def test_what_is_loaded_is_what_was_exported(folder):
    source = made("vit", ("cat", "dog", "emu"))
    pre = tljax.load(folder)
    assert pre.labels == source.labels and pre.origin == str(folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, pre.variables, source.tree)
    assert pre.report.share == 1 and set(pre.report.counts()) == {"loaded"}
    assert "digest" in pre.verified and len(pre.record["digest"]) == 64


@pytest.mark.parametrize("classes, shape", [(None, (1, 3)), (0, None), (3, (1, 3)), (5, (1, 5))])
def test_a_head_is_kept_dropped_or_new(folder, classes, shape):
    pre = tljax.load(folder, num_classes=classes)
    logits = run(pre).logits
    assert (None if logits is None else logits.shape) == shape
    kept = classes in (None, 3)
    assert (pre.labels is not None) == kept
    assert ("fresh" in pre.report.counts()) == (classes == 5)
    assert ("ignored" in pre.report.counts()) == (not kept)
    if classes == 5:
        assert not np.asarray(logits).any()


def test_a_text_tower_is_loaded_without_head_and_labels(tmp_path):
    source = made("clip_text", projection=6, eot=49)
    pre = tljax.load(export(assemble(source, ""), tmp_path / "clip"))
    jax.tree.map(np.testing.assert_array_equal, pre.variables, source.tree)
    assert pre.labels is None and run(pre).logits is None
    with pytest.raises(BadInput, match="no head"):
        tljax.load(tmp_path / "clip", num_classes=2)


def test_a_grid_is_resampled_once_as_the_model_would_in_every_call(folder):
    images = np.random.default_rng(0).normal(size=(2, 24, 32, 3)).astype(np.float32)
    here, there = tljax.load(folder, image_size=(24, 32)), tljax.load(folder)
    assert here.model.grid == (6, 8)
    ((row),) = [row for row in here.report.rows if row.status == "adapted"]
    assert row.path == "params/embed/pos" and "(4, 4) to (6, 8), bicubic" in row.detail
    both = (np.asarray(run(pre, (images,)).logits) for pre in (here, there))
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6)


def test_fields_of_the_model_can_be_chosen(folder):
    assert tljax.load(folder, read="blocks/0").model.read == "blocks/0"
    with pytest.raises(BadInput, match=r"no field 'widht'.*width"):
        tljax.load(folder, widht=3)


@pytest.mark.parametrize(
    "what",
    [
        {"num_classes": -1},
        {"num_classes": True},
        {"image_size": 18},
        {"image_size": "98"},
        {"heads": 0},
        {"tower": "vision"},
    ],
)
def test_a_size_that_means_nothing_is_refused(folder, what):
    with pytest.raises(BadInput, match=str(next(iter(what.values())))):
        tljax.load(folder, **what)


def test_on_a_mesh_no_device_holds_everything(tmp_path):
    wide = made("vit", ("a", "b"), width=256, mlp=512)
    folder = export(assemble(wide, ""), tmp_path / "wide")
    pre, plain = tljax.load(folder, mesh=make_mesh(1, 8)), tljax.load(folder)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(plain.variables))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(pre.variables):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert max(held.values()) < 0.2 * total  # an eighth, and the small leaves
    jax.tree.map(np.testing.assert_array_equal, pre.variables, plain.variables)


# Values


def change(folder, edit):
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


def swap(state, one, other):
    state[one], state[other] = state[other], state[one]


QUERY, KEY, OUT = (
    f"vit.encoder.layer.1.attention.{name}.weight"
    for name in ("attention.query", "attention.key", "output.dense")
)
PRESERVING = {
    "transposed": lambda state: state.update({OUT: np.ascontiguousarray(state[OUT].T)}),
    "exchanged": lambda state: swap(state, QUERY, KEY),
    "one number": lambda state: state[OUT].__setitem__((3, 4), state[OUT][3, 4] * 2 + 1),
    "exchanged norms": lambda state: swap(
        state,
        "vit.encoder.layer.0.layernorm_before.bias",
        "vit.encoder.layer.0.layernorm_after.bias",
    ),
}


@pytest.mark.parametrize("name", PRESERVING)
def test_changed_values_of_an_export_are_noticed(folder, name):
    change(folder, PRESERVING[name])
    with pytest.raises(BadInput, match="changed since its export"):
        tljax.load(folder)


def test_a_file_saved_again_is_known_by_its_outputs(folder):
    change(folder, lambda state: state.__setitem__(OUT, state[OUT] * np.float32(1 + 1e-7)))
    with pytest.warns(UserWarning, match="by their outputs only"):
        assert "outputs only" in tljax.load(folder).verified


def test_without_a_note_values_are_unverified(folder):
    (folder / NOTE).unlink()
    assert tljax.load(folder).verified == "values unverified"
    change(folder, PRESERVING["exchanged"])  # nothing there could tell
    assert tljax.load(folder).verified == "values unverified"


def test_a_changed_file_without_its_fixture_is_refused(folder):
    change(folder, PRESERVING["one number"])
    (folder / FIXTURE).unlink()
    with pytest.raises(BadInput, match="export it again"):
        tljax.load(folder)


def rewrite(path, edit):
    """Change a JSON document."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_changed_document_is_named_instead_of_the_weights(folder):
    swapped = {"0": "dog", "1": "cat", "2": "emu"}
    rewrite(folder / "config.json", lambda config: config.update(id2label=swapped))
    with pytest.warns(UserWarning, match=r"config\.json has changed since its export"):
        tljax.load(folder)


def test_what_is_pooled_comes_back(tmp_path):
    """transformers' configuration has no place for it."""
    source = made("vit", layer_scale=1.0, eps=1e-6, mlp=64, pool="mean")
    pre = assemble(source, "")
    folder = export(pre, tmp_path / "mean")
    again = tljax.load(folder)
    assert again.model.pool == "mean" and tljax.load(folder, pool="cls").model.pool == "cls"
    np.testing.assert_allclose(run(again).pooled, run(pre).pooled, rtol=1e-5, atol=1e-6)


def spoil_fixture(folder, **tensors):
    from safetensors.numpy import save_file

    rewrite(folder / NOTE, lambda note: note.update(digest="0" * 64))
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, folder / FIXTURE
    )


@pytest.mark.parametrize(
    "tensors",
    [
        {"images": (2, 4096, 4096, 3), "logits": (2, 3)},
        {"images": (2, 16, 16, 4), "logits": (2, 3)},
        {"images": (0, 16, 16, 3), "logits": (0, 3)},
        {"images": (2, 16, 16, 3)},
        {"images": (2, 16, 16, 3), "logits": (2, 4)},
        {"images": (2, 16, 16, 3), "pooled": (2, 32), "logits": (2, 3), "more": (1,)},
    ],
)
def test_a_fixture_of_other_shapes_is_refused(folder, tensors):
    spoil_fixture(folder, **tensors)
    with pytest.raises(BadInput, match=r"export it again"):
        tljax.load(folder)


@pytest.mark.parametrize(
    "note", ["[]", '{"digest": 3, "documents": {}}', '{"digest": "", "documents": {"../x": ""}}']
)
def test_a_note_that_tljax_did_not_write_is_refused(folder, note):
    (folder / NOTE).write_text(note)
    with pytest.raises(BadInput, match=NOTE):
        tljax.load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "float32, bfloat16 or float16"),
        ({"dtype": "nothing"}, "no model has the fields"),
        ({"name": "x"}, "no field 'name'"),
        ({"read": 5}, "read"),
        ({"grid": (2,)}, "no model has the fields"),
        ({"mesh": "x"}, "make_mesh"),
        ({"image_size": 2**20}, "image_size"),
        ({"num_classes": 10**12}, "num_classes"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(folder, options, message):
    with pytest.raises(BadInput, match=message):
        tljax.load(folder, **options)


HUGE = 10**400  # JSON's numbers may have any size


@pytest.mark.parametrize(
    ("document", "change"),
    [
        ("config.json", {"patch_size": 2**20, "image_size": 2**20}),
        ("config.json", {"layer_norm_eps": HUGE}),
        ("preprocessor_config.json", {"image_mean": HUGE}),
        ("preprocessor_config.json", {"image_std": [0.5, HUGE, 0.5]}),
        ("preprocessor_config.json", {"rescale_factor": HUGE}),
        ("preprocessor_config.json", {"size": HUGE}),
        ("preprocessor_config.json", {"resample": HUGE}),
    ],
)
def test_numbers_that_nothing_could_hold_are_refused(folder, document, change):
    (folder / NOTE).unlink()
    rewrite(folder / document, lambda content: content.update(change))
    with pytest.raises(BadInput, match=next(iter(change)).partition("_")[0]):
        tljax.load(folder)


@pytest.mark.parametrize("source", ["", 5, None, "x" * 5000, "a/" + "x" * 300])
def test_names_that_are_none_are_refused(source):
    with pytest.raises(BadInput):
        tljax.load(source)


def test_the_parts_of_one_tensor_are_read_once(tmp_path, monkeypatch):
    """timm keeps query, key and value in one tensor; ours are three leaves."""
    source = made("vit", ("a", "b"), width=64, depth=2, heads=2, eps=1e-6)
    folder = export(assemble(source, ""), tmp_path / "timm", to="timm")
    (folder / NOTE).unlink()
    opened = []
    real = builtins.open

    def counting(path, *rest, **more):
        opened.append(str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(files, "open", counting, raising=False)
    tensors = len(files.open_safetensors(folder / "model.safetensors")[0])
    opened.clear()
    tljax.load(folder)
    assert len([path for path in opened if path.endswith("model.safetensors")]) == tensors + 1


def test_nan_is_refused_when_it_is_read(folder):
    (folder / NOTE).unlink()
    change(folder, lambda state: state[OUT].__setitem__((0, 0), np.nan))
    with pytest.raises(BadInput, match=f"{OUT} holds NaN"):
        tljax.load(folder)


def test_leaves_are_float32_and_whole(folder):
    for path, leaf in flatten(tljax.load(folder).variables).items():
        assert leaf.dtype == np.float32 and isinstance(leaf, jax.Array), path
