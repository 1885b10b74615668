"""Features once: where a cut may lie, that nothing changes from it, and what is kept of them."""

import dataclasses
import json
import os
import re
import shutil
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BERT, RESNET, assemble, image_batch, random_tree, text_batch
from tiny import VIT as DEEP

from tljax import features, train
from tljax.build import build
from tljax.checkpoint import read_tree
from tljax.config import parse
from tljax.data.augment import TransformImage
from tljax.data.loader import Loader, Versions
from tljax.data.pipeline import Pipeline, open_pipeline
from tljax.data.sources import Info, Source, Splits, identity
from tljax.features import Cut, compute, decide, filled, find_cut, serve
from tljax.objectives import add, forward, make_predict, passing
from tljax.sharding import make_mesh, put_batch
from tljax.tree import flatten, join, reads, split, unflatten
from tljax.types import Aux, BadInput, Term

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
IMAGES, TEXTS = image_batch(), text_batch()
VIT = dataclasses.replace(DEEP, depth=2)
DISTILLED = dataclasses.replace(VIT, distilled=True, distilled_head=True)
TAGS = {"label": TEXTS["input_ids"] % 3}


def found(model, batch, word, task="classify", user=(), options=None, extra=()):
    """Return the assembled run and its cut, or what is in the way."""
    run = assemble(model, batch, word, task=task, user=user, options=options, extra=extra)
    parts = split(run.tree, run.roles.tree)
    predict = make_predict(task, model)
    return run, find_cut(model, run.objective, predict, parts, batch, KEY)


HEAD = (("params/norm/**", "train"), ("params/head/**", "train"))
PLACES = {
    "probe": (VIT, IMAGES, "probe", {}, ("head",)),
    "probe of a lower block": (
        dataclasses.replace(VIT, read="blocks/0"), IMAGES, "probe", {}, ("head",)
    ),
    "probe with two heads": (DISTILLED, IMAGES, "probe", {}, ("head", "head_dist")),
    "the last norm": (VIT, IMAGES, "probe", {"user": HEAD}, ("blocks/end",)),
    "last_k": (VIT, IMAGES, "last_k", {"options": {"k": 1}}, ("blocks/before_1",)),
    "blocks that run again": (
        dataclasses.replace(VIT, remat=True),
        IMAGES, "last_k", {"options": {"k": 1}}, ("blocks/before_1",),
    ),
    "drop_path, none in block 0": (
        dataclasses.replace(VIT, drop_path=0.1), IMAGES, "probe", {}, ("blocks/before_1",)
    ),
    "bert probe": (BERT, TEXTS, "probe", {}, ("head",)),
    "bert last_k": (BERT, TEXTS, "last_k", {"options": {"k": 1}}, ("blocks/before_1",)),
    "tags": (
        dataclasses.replace(BERT, tokens=True), TEXTS | TAGS, "probe", {"task": "tag"}, ("head",)
    ),
    "resnet with fixed statistics": (RESNET, IMAGES, "probe", {}, ("head",)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PLACES))
@pytest.mark.few(4)
def test_the_cut_is_the_last_place_below_which_all_is_frozen(name):
    model, batch, word, more, names = PLACES[name]
    run, cut = found(model, batch, word, **more)
    assert isinstance(cut, Cut), cut
    assert cut.names == names
    assert not {path for path in cut.below if flatten(run.roles.tree)[path] != "freeze"}
    # A text's mask is read above a block, and not above the pooled vector of a head.
    kept = {"label", "cut"} | ({"attention_mask"} if name == "bert last_k" else set())
    assert set(cut.batch) == kept


def pixels(tree, batch, key):
    return {"pixels": Term(1.0, jnp.sum(batch["image"]), jnp.ones(()))}, Aux({}, {})


FROZEN = (("params/blocks/**", "freeze"), ("params/stem/**", "freeze"))
REFUSED = {
    "full": (VIT, IMAGES, "full", {}, "params/blocks/0/.* is not frozen"),
    "biases": (VIT, IMAGES, "bitfit", {}, "params/blocks/0/.*/bias is not frozen"),
    "dropout": (dataclasses.replace(VIT, dropout=0.1), IMAGES, "probe", {}, "chance"),
    "learning statistics": (
        RESNET,
        IMAGES,
        "full",
        {"user": FROZEN},
        "batch_stats/.* is not frozen",
    ),
    "a term on the pixels": (VIT, IMAGES, "probe", {"extra": (pixels,)}, "image is read beside"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_moves_or_draws_below_every_cut_is_refused(name):
    model, batch, word, more, reason = REFUSED[name]
    _, why = found(model, batch, word, **more)
    assert isinstance(why, str)
    assert re.search(reason, why), why


def test_a_second_model_on_the_same_inputs_is_never_given_the_first_ones_activations():
    """Its loss reads the cut in place of the image: what it would read below tells."""
    run = assemble(VIT, IMAGES, "probe")
    tree = run.tree | {"teacher": {"params": run.tree["params"]}}
    roles = run.roles.tree | {"teacher": jax.tree.map(lambda _: "freeze", tree["teacher"])}

    def distill(tree, batch, key):
        output, _ = forward(VIT, tree["teacher"], batch, key)
        loss = jnp.sum(jnp.square(output.logits.astype(jnp.float32)))
        return {"distill": Term(1.0, loss, jnp.ones(()))}, Aux({}, {})

    objective, predict = add(run.objective, distill), make_predict("classify", VIT)
    why = find_cut(VIT, objective, predict, split(tree, roles), IMAGES, KEY)
    assert isinstance(why, str) and "teacher/params/" in why
    alone = find_cut(VIT, run.objective, predict, split(tree, roles), IMAGES, KEY)
    assert isinstance(alone, Cut), "an unread teacher is in nobody's way"


def both_ways(model, batch, word, task="classify", **more):
    """Return loss and gradients on the fly and from the cut, jitted and not yet called."""
    run, cut = found(model, batch, word, task, **more)
    tree = random_tree(model, batch)
    if "fixed_stats" in run.tree:
        tree["fixed_stats"] = tree.pop("batch_stats")
    parts = split(tree, run.roles.tree)
    objective = filled(run.objective, batch)

    def total(params, rest, batch):
        loss, aux = objective(join(params, *rest), batch, KEY)
        return sum(term.sum / term.count for term in loss.values()), aux.metrics

    passed = jax.jit(partial(passing, model))(tree, batch)
    given = {k: batch[k] for k in cut.batch if k != "cut"}
    given |= {"cut": unflatten({name: passed[name] for name in cut.names})}
    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    return [step.lower(parts.train, parts[1:], b).compile() for b in (batch, given)], [
        (parts.train, parts[1:], b) for b in (batch, given)
    ]


EXACT = ["last_k", "bert probe", "bert last_k", "resnet with fixed statistics"]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.few(2)
def test_loss_and_gradients_from_the_cut_are_those_on_the_fly(name):
    model, batch, word, more, _ = PLACES[name]
    steps, args = both_ways(model, batch, word, **more)
    (whole, _), grads = steps[0](*args[0])
    (once, _), from_cut = steps[1](*args[1])
    # 1e-5 of the largest: the same operations, fused and summed otherwise.
    np.testing.assert_allclose(once, whole, rtol=1e-5)
    for path, leaf in flatten(grads).items():
        bound = 1e-5 * max(float(jnp.abs(leaf).max()), 1e-3)
        np.testing.assert_allclose(flatten(from_cut)[path], leaf, rtol=0, atol=bound, err_msg=path)
    spent = [step.cost_analysis()["flops"] for step in steps]
    assert spent[1] < spent[0] * (0.75 if "last_k" in name else 0.1), "the prefix still runs"


def test_reads_tells_outputs_apart():
    def function(a, b, key):
        return {"one": a["x"] * 2, "both": a["y"] + b, "drawn": jax.random.normal(key) + a["x"]}

    a, b = {"x": jnp.ones(()), "y": jnp.ones(())}, jnp.ones(())
    found = reads(function, a, b, KEY)
    assert found["one"] == ({"x": True, "y": False}, False, False)
    assert found["both"] == ({"x": False, "y": True}, True, False)
    assert found["drawn"] == ({"x": True, "y": False}, False, True)


class Squares(Source):
    """Example i is a row of first + i, and its label."""

    def __init__(self, count, first=0):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        value = self.first + index
        return {"image": np.full(3, value, np.float32), "label": np.int32(value)}


def squares(batch=8):
    parts = Squares(21), Squares(5, 100), Squares(8, 200)
    return Pipeline(
        task="classify", loader=Loader(batch), eval_transform=None, preprocess={}, seed=3,
        splits=Splits(*parts, Info("image", "classify", ("a", "b"))), train_transform=None,
        versions=parts[0],
    )  # fmt: skip


SHAPES = {
    "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    "cut/head": jax.ShapeDtypeStruct((8, 3), jnp.bfloat16),
}


@jax.jit
def squared(batch):
    return {"label": batch["label"], "cut/head": jnp.square(batch["image"]).astype(jnp.bfloat16)}


def table_of(made_of=lambda: {"seed": 1}, values=squared):
    mesh = make_mesh()
    put = partial(put_batch, mesh=mesh)
    return compute(values, squares(), put, made_of, mesh)


def refuse_to_compute(batch):
    """Tell shapes, and compute nothing."""
    if isinstance(batch["label"], jax.core.Tracer):
        return squared(batch)
    raise AssertionError("computed again")


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Let no table fit in memory; return the folder of the one that is written."""
    monkeypatch.setattr(features, "MEMORY", 0)
    monkeypatch.setenv("TLJAX_DATA", str(tmp_path))
    table_of()
    [folder] = (tmp_path / "features").iterdir()
    return folder


def test_a_table_holds_every_row_of_every_part_in_order(files, monkeypatch):
    written = table_of(values=refuse_to_compute).held
    assert all(isinstance(column, np.memmap) for column in written.values())
    rows = np.r_[np.arange(21), 100 + np.arange(5), 200 + np.arange(8)]
    monkeypatch.setattr(features, "MEMORY", 1 << 20)
    for table in (written, table_of().held):
        np.testing.assert_array_equal(table["label"], rows)
        assert table["cut/head"].dtype == jnp.bfloat16
        want = np.square(rows[:, None].repeat(3, 1)).astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(table["cut/head"]), want)


def test_a_table_of_another_origin_is_another_table(files):
    table_of(lambda: {"seed": 2})
    assert len(list(files.parent.iterdir())) == 2


def test_a_table_that_is_not_what_it_states_is_refused(files):
    stated = files / "features.json"
    key = json.loads(stated.read_text())["key"]
    file = files / "cut.head.npy"
    whole = file.read_bytes()
    flipped = whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
    for damaged in (whole[:-1], whole + b"0", flipped):
        file.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"cut.head.npy is not the file that was written"):
            table_of(values=refuse_to_compute)
    file.unlink()
    with pytest.raises(BadInput, match=r"cut.head.npy is not the file that was written"):
        table_of(values=refuse_to_compute)
    file.write_bytes(whole)
    stated.write_text(json.dumps({"key": "another"}))
    with pytest.raises(BadInput, match=f"states key another, this run's features have {key}"):
        table_of(values=refuse_to_compute)
    stated.unlink()
    with pytest.raises(BadInput, match="states key None"):
        table_of(values=refuse_to_compute)


def test_nothing_half_written_is_left_where_a_pass_ends_early(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "MEMORY", 0)
    monkeypatch.setenv("TLJAX_DATA", str(tmp_path))
    with pytest.raises(AssertionError):
        table_of(values=refuse_to_compute)
    assert not list((tmp_path / "features").iterdir())


def test_what_a_killed_pass_leaves_is_in_nobodys_way(files):
    """Also where a container gives every start the same process number."""
    for name in ("1.tmp", f"{os.getpid()}.0.tmp"):
        (files.parent / f"{files.name}.{name}").mkdir()
    shutil.rmtree(files)
    table_of()
    assert (files / "features.json").is_file()


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_batches_of_a_table_are_those_of_the_data(monkeypatch, room):
    """On the host, and on a mesh of eight devices whose rows are spread over four of them.

    Seven training batches are more than two epochs: an epoch ends within a batch.
    """
    monkeypatch.setattr(features, "MEMORY", 1 << 20)
    monkeypatch.setattr(features, "room", lambda _: room)
    mesh, plain = make_mesh(data=2, fsdp=2, tensor=2), squares()
    table = compute(squared, squares(), partial(put_batch, mesh=mesh), dict, mesh)
    assert table.spread.keys() == ({"cut/head"} if room else set())
    for column in table.spread.values():
        assert {part.data.shape for part in column.addressable_shards} == {(5, 2, 3)}
    ready, put = serve(table, plain, mesh)
    for batches, others, count in (
        (plain.train_batches(2), ready.train_batches(2), 7),
        (plain.eval_batches("validation"), ready.eval_batches("validation"), 1),
        (plain.eval_batches("test"), ready.eval_batches("test"), 1),
    ):
        for want, batch in zip(islice(batches, count), others, strict=False):
            assert ("row" in batch) == (room > 0)
            np.testing.assert_array_equal(batch["label"], want["label"], "labels stay here too")
            got = jax.device_get(put(batch))
            np.testing.assert_array_equal(got["label"], want["label"])
            exact = np.square(want["image"]).astype(jnp.bfloat16)
            np.testing.assert_array_equal(got["cut"]["head"], exact)
            assert want.keys() - {"image"} == got.keys() - {"cut"}
    assert put(next(ready.train_batches()))["label"].sharding.mesh == mesh


class Pictures(Squares):
    """Example i is the same picture each time."""

    def __init__(self, images):
        super().__init__(len(images))
        self.images = images

    def __getitem__(self, index):
        return {"image": self.images[index], "label": np.int32(index)}


def test_a_view_is_drawn_by_example_and_view_alone():
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    parent = Pictures([image] * 6)
    augment = parse({"data": {"name": "x", "augment": {"crop_scale": (0.2, 1.0)}},
                     "model": {"name": "vit"}}).data.augment  # fmt: skip
    versions = Versions(parent, TransformImage(8, augment), seed=5, views=3)
    loader = Loader(6, threads=0)
    batches = loader.train(versions, None, seed=1, views=3)
    epochs = [next(batches) for _ in range(7)]
    by_label = [batch["image"][np.argsort(batch["label"])] for batch in epochs]
    for epoch, batch in enumerate(epochs):
        assert sorted(batch["label"]) == list(range(6))
        np.testing.assert_array_equal(by_label[epoch], by_label[epoch % 3])
    assert not np.array_equal(by_label[0], by_label[1])
    assert len({view.tobytes() for part in by_label for view in part}) == 18


def test_a_run_says_why_it_computes_no_features_once(monkeypatch):
    plain, cut, mesh = squares(), Cut(("head",), (), SHAPES), make_mesh()
    endless = dataclasses.replace(plain, versions=None)
    where = lambda: cut  # noqa: E731
    asked = lambda mode, pipeline, passes, find: decide(mode, pipeline, mesh, passes, find)  # noqa: E731
    assert asked("auto", plain, 100, where)[0] is cut
    assert asked("auto", plain, 34, where) == (
        None, "computed at every step, as most examples are seen no more than once"
    )  # fmt: skip
    assert asked("on", plain, 1, where)[0] is cut
    assert asked("off", plain, 100, where)[0] is None
    assert "never repeat" in asked("auto", endless, 100, where)[1]
    assert "lora/a is not frozen" in asked("auto", plain, 99, lambda: "lora/a is not frozen")[1]
    with pytest.raises(BadInput, match=r"run.features='on'.* never repeat"):
        asked("on", endless, 100, where)
    monkeypatch.setattr(features, "MEMORY", 0)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: type("", (), {"free": 100}))
    assert "fit neither in memory nor" in asked("auto", plain, 100, where)[1]
    monkeypatch.setattr(features, "room", lambda _: 1 << 20)
    assert asked("auto", plain, 100, where)[0] is cut, "the devices have room"


@pytest.mark.parametrize(
    "augment, views",
    [
        ({}, 1),
        ({"smoothing": 0.1}, 1),
        ({"flip": True}, None),
        ({"flip": True, "views": 4}, 4),
        ({"views": 4}, 1),
        ({"mixup": 0.2, "views": 4}, None),
        ({"erase": 0.5}, None),
    ],
)
def test_inputs_repeat_unless_something_is_drawn_without_end(augment, views):
    config = parse({"data": DATA | {"augment": augment}, "model": MODEL})
    pipeline = open_pipeline(
        config.data, None, preprocess=None, tokenizer=None, batch=8, threads=0, seed=0
    )
    if views is None:
        assert pipeline.versions is None
    else:
        assert len(pipeline.versions) == views * len(pipeline.splits.train)


DATA = {"name": "digits", "image_size": 8, "labels": 48, "validation": 40, "test": "test[:36]"}
MODEL = {"name": "vit", "width": 32, "depth": 2, "heads": 2, "mlp": 64, "patch": 4}


def trained(workdir, features="auto"):
    values = {
        "data": DATA | {"augment": {"flip": True, "smoothing": 0.1, "views": 2}},
        "model": MODEL,
        "strategy": {"name": "probe"},
        "optim": {"lr": 1e-2, "decay": 0.01},
        "run": {"steps": 14, "batch": 16, "save_every": 4, "log_every": 3, "features": features},
    }
    result = train.train(build(parse(values)), workdir)
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    return result, [{k: v for k, v in row.items() if k != "time"} for row in rows]


@pytest.fixture(scope="module")
def on_the_fly(tmp_path_factory):
    """Return the folder, the result and the log of the run without features."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *trained(folder, "off")


@pytest.mark.parametrize("room", [0, 1 << 30])
@pytest.mark.few(1)
def test_a_run_from_features_is_the_run_on_the_fly_and_goes_on_to_the_bit(
    room, on_the_fly, tmp_path, capsys, monkeypatch
):
    """On eight devices, with two views of each image and an epoch that ends within a batch."""
    monkeypatch.setattr(features, "room", lambda _: room)
    once, lines = trained(tmp_path / "once")
    assert "features computed once up to head: 172 rows" in capsys.readouterr().out
    folder, whole, others = on_the_fly
    for row, other in zip(lines, others, strict=True):
        # 2e-5: float32 features of two programs, over 14 steps of AdamW.
        assert row == pytest.approx(other, rel=2e-5)
    assert once["test"] == pytest.approx(whole["test"], rel=2e-5)
    own, theirs = (flatten(read_tree(path)) for path in (tmp_path / "once", folder))
    assert own.keys() == theirs.keys(), "what is on disk is whole"
    for path, leaf in own.items():
        np.testing.assert_allclose(leaf, theirs[path], rtol=0, atol=2e-5, err_msg=path)

    class Interrupted(train.Intervals):
        def add(self, step, *rest, **more):
            super().add(step, *rest, **more)
            if step == 7:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "Intervals", Interrupted)
        trained(tmp_path / "again")
    assert not (tmp_path / "again" / "result.json").exists()
    again, resumed = trained(tmp_path / "again")
    assert resumed == lines
    assert again["test"] == once["test"]
    for path, leaf in flatten(read_tree(tmp_path / "again")).items():
        np.testing.assert_array_equal(leaf, own[path], err_msg=path)


def test_data_are_told_apart_by_their_files(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("text,label\na,b\n")
    data = parse({"data": {"name": str(path)}, "model": {"name": "bert"}}).data
    before = identity(data)
    assert before == identity(data)
    path.write_text("text,label\na,bc\n")
    assert before != identity(data)
    assert identity(data) != identity(data.model_copy(update={"labels": 1}))
