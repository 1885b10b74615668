"""Which leaves each strategy trains, on shapes alone: exact sets, never counts."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from tiny import (
    BERT,
    MLM,
    RESNET,
    VIT,
    abstract_tree,
    assemble,
    compiled,
    image_batch,
    one_device,
    text_batch,
)

from tljax.metrics import role_counts
from tljax.optim import decay_mask
from tljax.sharding import put_batch
from tljax.state import apply_edits
from tljax.strategies import STRATEGIES, make
from tljax.strategies.strategy import Start, blocks_read
from tljax.tree import flatten, join, label, matches
from tljax.types import BadInput

IMAGES, TEXTS = image_batch(), text_batch()
OPTIONS = {"vera": {"rank": 4}, "quantize": {"form": "int8"}}
VISION = ["scratch", "probe", "bitfit", "norm", "last_k", "surgical", "lora", "vera", "ia3", "ssf"]
VISION += ["adapter", "vpt", "prefix", "full"]


def having(run, role):
    return {path for path, own in flatten(run.roles.tree).items() if own == role}


def paths(model, batch, *globs):
    tree = flatten(abstract_tree(model, batch))
    found = {path for path in tree if any(matches(glob, path) for glob in globs)}
    assert found, f"the test itself names nothing: {globs}"
    return found


@pytest.mark.parametrize("name", ["scratch", "full"])
def test_scratch_and_full_train_every_parameter(name):
    run = assemble(VIT, IMAGES, name)
    assert having(run, "train") == set(flatten(abstract_tree(VIT, IMAGES)))
    assert run.roles.unread == []


def test_scratch_alone_starts_from_nothing():
    tree = abstract_tree(VIT, IMAGES)
    assert not make(tree, None, [("scratch", {})]).loads
    assert all(make(tree, None, [(name, {})]).loads for name in VISION if name != "scratch")


def test_the_probe_trains_the_head_alone():
    head = {"params/head/kernel", "params/head/bias"}
    assert having(assemble(VIT, IMAGES, "probe"), "train") == head
    assert having(assemble(BERT, TEXTS, "probe"), "train") == head


@pytest.mark.parametrize(("model", "batch"), [(VIT, IMAGES), (RESNET, IMAGES)], ids=["vit", "cnn"])
def test_bitfit_trains_every_bias_and_the_head(model, batch):
    run = assemble(model, batch, "bitfit")
    assert having(run, "train") == paths(model, batch, "params/**/bias", "params/head/kernel")


def test_bitfit_leaves_biases_that_nothing_reads_frozen_and_says_so():
    run = assemble(BERT, TEXTS, "bitfit")
    assert run.roles.unread == ["params/pooler/bias"]  # the head reads the mean of the tokens
    expected = paths(BERT, TEXTS, "params/**/bias", "params/head/kernel")
    assert having(run, "train") == expected - {"params/pooler/bias"}


def test_masked_language_modelling_trains_its_own_head():
    run = assemble(MLM, text_batch(mlm=True), "probe", task="mlm")
    assert having(run, "train") == paths(MLM, TEXTS, "params/mlm/**")
    run = assemble(MLM, text_batch(mlm=True), "scratch", task="mlm")
    assert run.roles.unread == ["params/pooler/bias", "params/pooler/kernel"]


def test_last_k_trains_the_top_blocks_the_norm_and_the_head():
    run = assemble(VIT, IMAGES, "last_k")  # k is 2 by default
    top = ("params/blocks/2/**", "params/blocks/3/**", "params/norm/*", "params/head/*")
    assert having(run, "train") == paths(VIT, IMAGES, *top)
    run = assemble(VIT, IMAGES, "last_k", options={"k": 1})
    assert having(run, "train") == paths(VIT, IMAGES, *top[1:])


def test_last_k_counts_from_the_block_that_is_read():
    below = dataclasses.replace(VIT, read="blocks/2")
    run = assemble(below, IMAGES, "last_k")
    top = ("params/blocks/1/**", "params/blocks/2/**", "params/norm/*", "params/head/*")
    assert having(run, "train") == paths(VIT, IMAGES, *top)
    assert run.roles.unread == []
    with pytest.raises(BadInput, match="k=4 exceeds the 3 blocks"):
        assemble(below, IMAGES, "last_k", options={"k": 4})


def test_blocks_are_ordered_by_number_not_by_name():
    tree = {"params": {"blocks": {str(number): {} for number in (0, 1, 10, 11, 2, 9)}}}
    assert blocks_read(tree, "blocks/10")[-2:] == ["params/blocks/9", "params/blocks/10"]


@pytest.mark.parametrize("name", ["scratch", "full", "bitfit"])
def test_blocks_above_read_are_frozen_and_listed(name):
    run = assemble(dataclasses.replace(VIT, read="blocks/1"), IMAGES, name)
    above = paths(VIT, IMAGES, "params/blocks/2/**", "params/blocks/3/**")
    asked = above if name != "bitfit" else {path for path in above if path.endswith("/bias")}
    assert set(run.roles.unread) == asked
    assert above <= having(run, "freeze")


def test_lora_trains_query_and_value_of_every_block_and_the_head():
    run = assemble(VIT, IMAGES, "lora", options={"rank": 2})
    layers = [f"{i}/attention/{name}" for i in range(4) for name in ("query", "value")]
    at = [f"params/blocks/{layer}/lora" for layer in layers]
    head = {"params/head/kernel", "params/head/bias"}
    assert having(run, "train") == {f"{path}/{leaf}" for path in at for leaf in "ab"} | head
    frozen = {f"{path}/scale" for path in at}
    assert having(run, "freeze") == set(flatten(abstract_tree(VIT, IMAGES))) - head | frozen


def test_a_new_head_may_learn_faster_than_the_rest():
    """By plain SGD from the same start the head moves three times as far, the rest as before."""
    moved = []
    for factor in (1.0, 3.0):
        options = {"leaves": ("params/norm/*",)}
        settings = {"name": "sgd", "momentum": 0.0, "head_rate": factor}
        run = assemble(VIT, IMAGES, [("surgical", options)], **settings)
        state, frozen = run.birth(jax.random.key(0))
        before = jax.device_get(flatten(state.params))
        state, _ = compiled(run, IMAGES)(state, frozen, put_batch(IMAGES, one_device()))
        moved.append({path: leaf - before[path] for path, leaf in flatten(state.params).items()})
    for path, update in moved[0].items():
        factor = 3.0 if path.startswith("params/head/") else 1.0
        # The updates are differences of numbers about 1, known to 1e-7.
        np.testing.assert_allclose(moved[1][path], factor * update, rtol=1e-4, atol=5e-7)


def test_lora_grafts_nothing_above_read():
    run = assemble(dataclasses.replace(VIT, read="blocks/1"), IMAGES, "lora", options={"rank": 2})
    grafted = {path.split("/")[2] for path in having(run, "train") if "/lora/" in path}
    assert grafted == {"0", "1"}
    assert run.roles.unread == []


@pytest.mark.parametrize("name", ["probe", "bitfit", "last_k"])
def test_statistics_of_a_frozen_backbone_are_fixed(name):
    run = assemble(RESNET, IMAGES, name)
    assert "batch_stats" not in run.tree
    statistics = {path for path in flatten(run.tree) if path.startswith("fixed_stats/")}
    assert statistics and statistics <= having(run, "freeze")
    assert having(run, "track") == set()


@pytest.mark.parametrize("name", ["scratch", "full"])
def test_statistics_of_a_trained_network_are_tracked(name):
    run = assemble(RESNET, IMAGES, name)
    assert having(run, "track") == paths(RESNET, IMAGES, "batch_stats/**")
    assert having(run, "freeze") == set()


@pytest.mark.once
@pytest.mark.slow
def test_fixed_statistics_stay_and_tracked_ones_move():
    for name, moves in (("probe", False), ("full", True)):
        run = assemble(RESNET, IMAGES, name)
        state, frozen = run.birth(jax.random.key(0))
        step = compiled(run, IMAGES)
        before = jax.device_get(flatten(join(state.track, frozen)))
        for _ in range(2):
            state, _ = step(state, frozen, put_batch(IMAGES, one_device()))
        after = jax.device_get(flatten(join(state.track, frozen)))
        same = [np.array_equal(before[path], after[path]) for path in before if "_stats/" in path]
        assert not any(same) if moves else all(same)


def test_the_users_rules_come_first():
    user = (("params/blocks/0/norm1/*", "train"), ("params/head/bias", "freeze"))
    run = assemble(VIT, IMAGES, "probe", user=user)
    expected = paths(VIT, IMAGES, "params/blocks/0/norm1/*", "params/head/kernel")
    assert having(run, "train") == expected


def test_a_dead_rule_of_the_user_raises_with_the_nearest_path():
    with pytest.raises(BadInput, match=r"params/blocks/4/.*matches nothing.*params/blocks/"):
        assemble(VIT, IMAGES, "probe", user=(("params/blocks/4/norm1/scale", "train"),))


def test_a_users_trainable_leaf_that_nothing_reads_raises():
    with pytest.raises(BadInput, match=r"params/blocks/3.*does not read"):
        below = dataclasses.replace(VIT, read="blocks/1")
        assemble(below, IMAGES, "probe", user=(("params/blocks/3/**", "train"),))


@pytest.mark.parametrize("name", VISION)
@pytest.mark.few(6)
def test_roles_are_an_optax_mask(name):
    """`selective_transform` over the whole tree moves exactly the leaves we train."""
    run = assemble(VIT, IMAGES, name)
    frozen = jax.tree.map(lambda role: role != "train", run.roles.tree)
    tx = optax.transforms.selective_transform(optax.sgd(1.0), freeze_mask=frozen)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), run.tree)
    ones = jax.tree.map(np.ones_like, zeros)
    updates, _ = tx.update(ones, tx.init(zeros), zeros)
    moved = {path for path, update in flatten(updates).items() if np.any(update)}
    assert moved == having(run, "train") == set(flatten(run.abstract[0].params))


def test_a_strategys_own_rules_are_never_dead():
    refused = {name: set() for name in ("vit", "bert", "resnet")}
    rates = {"full": {"layer_decay": 0.7}, "lora": {"b_rate": 16.0}}
    for kind, model, batch in (
        ("vit", VIT, IMAGES),
        ("bert", BERT, TEXTS),
        ("resnet", RESNET, IMAGES),
    ):
        tree = abstract_tree(model, batch)
        loaded = frozenset(path for path in flatten(tree) if not path.startswith("params/head/"))
        head = {"kernel": np.zeros((32, 5)), "bias": np.zeros(5)}
        start = Start("somewhere", loaded, lambda head=head: head, lambda _: {})
        for name in STRATEGIES:
            try:
                options = OPTIONS.get(name, {}) | rates.get(name, {})
                made = make(tree, None, [(name, options)], start)
            except BadInput:
                refused[kind].add(name)
                continue
            after = jax.eval_shape(
                lambda tree, key, made=made: apply_edits(made.edits, tree, key),
                tree,
                jax.random.key(0),
            )
            label(after, made.roles, "freeze")
            label(after, made.groups, None)
    alike = {"attentive"}  # none of these models pools by attention
    assert refused == {
        "vit": alike | {"batch_norm", "prompt"},
        "bert": alike | {"batch_norm", "vpt"},
        "resnet": alike | {"vera", "ia3", "adapter", "vpt", "prompt", "prefix", "quantize"},
    }


@pytest.mark.parametrize(
    ("name", "options", "frozen"),
    [
        ("full", {"layer_decay": 0.7}, "params/blocks/0/**"),
        ("lora", {"b_rate": 16.0}, "params/blocks/0/**"),
    ],
)
def test_a_users_freeze_takes_leaves_out_of_a_strategys_groups(name, options, frozen):
    user = ((frozen, "freeze"), ("params/head/bias", "freeze"))
    run = assemble(VIT, IMAGES, name, options=options, user=user, head_rate=3.0)
    assert not {path for path in having(run, "train") if matches(frozen, path)}


def test_lora_plus_is_faster_in_b_and_never_in_an_embedding():
    targets = ("params/**/query", "params/embed/word")
    options = {"b_rate": 16.0, "targets": targets, "rank": 2}
    groups = STRATEGIES["lora"](abstract_tree(BERT, TEXTS), None, **options).groups
    expected = {f"params/blocks/{i}/attention/query/lora/b": 16.0 for i in range(BERT.depth)}
    assert {glob: group.lr for glob, group in groups} == expected


@pytest.mark.parametrize("name", ["adapter", "prefix"])
def test_grafts_of_blocks_lie_in_those_that_are_read(name):
    """Block 10 is no part of block 1."""
    tree = abstract_tree(dataclasses.replace(VIT, depth=11), IMAGES)
    roles = STRATEGIES[name](tree, "blocks/1").roles
    assert {glob.split("/")[2] for glob, _ in roles if "/blocks/" in glob} == {"0", "1"}


def test_prompts_and_prefixes_do_not_decay():
    tree = {
        "blocks": {
            "0": {"prompt": np.ones((2, 3)), "attention": {"prefix": {"key": np.ones((2, 3))}}}
        }
    }
    tree["blocks"]["0"]["attention"]["key"] = {"kernel": np.ones((3, 3)), "bias": np.ones(3)}
    decays = flatten(decay_mask(tree))
    assert [path for path, share in decays.items() if share] == ["blocks/0/attention/key/kernel"]


BIT = dataclasses.replace(RESNET, norm="group")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            ("ia3", {"targets": ("params/**/conv1",), "feedforward": ()}),
            "a standardised conv layer",
        ),
        (("lora", {"use_dora": True, "rank": 2}), "takes LoRA without use_dora and dropout"),
        (("lora", {"dropout": 0.1, "rank": 2}), "takes LoRA without use_dora and dropout"),
        (("lora", {"targets": ("params/head",)}), "heads alone, which are trained whole"),
        (("ia3", {"targets": (), "feedforward": ()}), "has no targets"),
    ],
)
def test_what_a_layer_cannot_take_is_refused(chosen, message):
    with pytest.raises(BadInput, match=message):
        assemble(BIT, IMAGES, [chosen])
    assert having(assemble(BIT, IMAGES, "lora", options={"rank": 2}), "train")


IN_EVERY_BLOCK = {
    "norm": [f"norm{i}/{leaf}" for i in (1, 2) for leaf in ("scale", "bias")],
    "vera": [f"attention/{at}/lora/{v}" for at in ("query", "value") for v in ("inner", "outer")],
    "ia3": [f"attention/{at}/rescale/out" for at in ("key", "value")] + ["mlp/down/rescale/in"],
    "ssf": [
        f"{at}/rescale/{leaf}"
        for at in ["norm1", "norm2", "mlp/up", "mlp/down"]
        + [f"attention/{layer}" for layer in ("query", "key", "value", "out")]
        for leaf in ("out", "shift")
    ],
    "adapter": [
        f"{at}/serial/swish/{way}/{leaf}"
        for at in ("attention", "mlp")
        for way in ("down", "up")
        for leaf in ("kernel", "bias")
    ],
    "vpt": ["prompt"],
    "prefix": [f"attention/prefix/{of}" for of in ("key", "value")],
    "prompt": [],
}
ELSEWHERE = {  # in a ViT; in a BERT
    "norm": ({"norm/scale", "norm/bias"}, {"embed/norm/scale", "embed/norm/bias"}),
    "ssf": (
        {f"{at}/rescale/{leaf}" for at in ("norm", "embed/patch") for leaf in ("out", "shift")},
        {f"embed/norm/rescale/{leaf}" for leaf in ("out", "shift")},
    ),
    "prompt": (set(), {"embed/prompt"}),
}


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name in IN_EVERY_BLOCK for text in (False, True)
     if (name, text) not in (("vpt", True), ("prompt", False))],
)  # fmt: skip
@pytest.mark.few(6)
def test_what_is_grafted_is_trained_in_every_block_and_nothing_else(name, text):
    model, batch = (BERT, text_batch(length=6)) if text else (VIT, IMAGES)
    options = {"count": 2} if name in ("vpt", "prompt", "prefix") else OPTIONS.get(name, {})
    run = assemble(model, batch, name, options=options)
    inner = {f"blocks/{i}/{at}" for i in range(model.depth) for at in IN_EVERY_BLOCK[name]}
    outer = ELSEWHERE.get(name, (set(), set()))[text]
    expected = inner | outer | {"head/kernel", "head/bias"}
    assert having(run, "train") == {f"params/{path}" for path in expected}
    # Both of SSF's leaves on the pooler: this BERT's head reads the mean of the tokens.
    assert len(run.roles.unread) == (2 if text and name == "ssf" else 0)


def grafted_at(tree, port):
    return {path.partition(f"/{port}")[0] for path in flatten(tree) if f"/{port}" in path}


def test_several_strategies_train_what_each_would():
    """LoRA on attention, every norm in full, and one head."""
    run = assemble(VIT, IMAGES, [("lora", {"rank": 2}), ("norm", {})])
    alone = [
        having(assemble(VIT, IMAGES, [part]), "train")
        for part in (("lora", {"rank": 2}), ("norm", {}))
    ]
    assert having(run, "train") == set.union(*alone)


def test_full_after_lora_leaves_its_constants():
    run = assemble(VIT, IMAGES, [("full", {}), ("lora", {"rank": 2, "dropout": 0.1})])
    constants = {p for p in flatten(run.tree) if p.endswith(("/lora/scale", "/lora/rate"))}
    assert having(run, "freeze") == constants


def test_two_methods_at_one_port_are_refused():
    with pytest.raises(BadInput, match=r"query has lora already: two methods .* the same port"):
        assemble(VIT, IMAGES, [("lora", {"rank": 2}), ("vera", {"rank": 2})])
    with pytest.raises(BadInput, match="has rescale already"):
        assemble(VIT, IMAGES, [("ia3", {}), ("ssf", {})])


@pytest.mark.parametrize(
    ("policy", "statistics", "affine"),
    [("frozen", "fixed", "freeze"), ("tracked", "batch", "freeze"), ("trained", "batch", "train")],
)
def test_batch_norm_has_a_policy_whatever_else_trains(policy, statistics, affine):
    chosen = [("batch_norm", {"policy": policy}), ("last_k", {"k": 1})]
    run = assemble(RESNET, IMAGES, chosen)
    assert f"{statistics}_stats" in run.tree
    norm = "params/stem/norm/scale"
    told = {"fixed": "frozen", "batch": "tracked"}[statistics]
    norms = len(paths(RESNET, IMAGES, "batch_stats/**/mean"))
    counts = role_counts(run.tree, run.roles.tree)
    learned = {"frozen": 0, "tracked": 4, "trained": norms}[policy]  # 4 are in the last block
    assert f"BatchNorm: statistics {told}, {learned} of {norms} norms trained" in counts
    assert (norm in having(run, "train")) == (affine == "train")
    for order in (1, -1):  # wherever it stands
        frozen = assemble(RESNET, IMAGES, [("batch_norm", {}), ("full", {})][::order])
        assert norm in having(frozen, "freeze") and "fixed_stats" in frozen.tree


def test_a_layerwise_rate_falls_from_the_head_to_the_embedding():
    groups = dict(make(abstract_tree(VIT, IMAGES), None, [("full", {"layer_decay": 0.5})]).groups)
    rates = {glob.split("/**")[0]: group.lr for glob, group in groups.items()}
    assert rates == {"params/embed": 0.5**5} | {
        f"params/blocks/{i}": 0.5 ** (4 - i) for i in range(4)
    }


def test_surgery_by_glob():
    run = assemble(VIT, IMAGES, "surgical", options={"leaves": ("params/blocks/1/**",)})
    assert having(run, "train") == paths(VIT, IMAGES, "params/blocks/1/**", "params/head/*")
    with pytest.raises(BadInput, match=r"params/block/1.*matches nothing"):
        assemble(VIT, IMAGES, "surgical", options={"leaves": ("params/block/1/**",)})


def test_the_attentive_probe_trains_its_pooling():
    pooled = dataclasses.replace(VIT, pool="map", map_head=True)
    run = assemble(pooled, IMAGES, "attentive")
    assert having(run, "train") == paths(pooled, IMAGES, "params/map/**", "params/head/*")
    with pytest.raises(BadInput, match=r'set model\.pool to "map"'):
        assemble(VIT, IMAGES, "attentive")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "lora",
            {"targets": ("params/**/norm1",)},
            "is a norm layer, but LoRA serves dense, conv, standardised conv and embed",
        ),
        (
            "lora",
            {"rank_pattern": {"params/**/out": 2}},
            r"rank_pattern 'params/\*\*/out' matches nothing",
        ),
        (
            "lora",
            {"init": "pissa", "targets": ("params/embed/patch",), "rank": 2},
            "decomposes dense kernels",
        ),
        ("vera", {"targets": ("params/embed/patch",)}, "is a conv layer, but VeRA serves dense"),
        ("ia3", {"targets": ("params/**/down",)}, "named by targets and by feedforward"),
        ("adapter", {"width": 33}, "width 33 is no bottleneck"),
        ("prompt", {}, r"prompt is for a BERT .for images: vpt."),
        ("batch_norm", {}, "is for models with BatchNorm"),
    ],
)
def test_what_a_method_cannot_serve_is_refused(name, options, message):
    with pytest.raises(BadInput, match=message):
        assemble(VIT, IMAGES, name, options=options)


def test_methods_of_images_and_texts_are_not_exchanged():
    with pytest.raises(BadInput, match="vpt is for a ViT"):
        assemble(BERT, TEXTS, "vpt")
    for name in ("adapter", "prefix"):
        with pytest.raises(BadInput, match="modules: there are none"):
            assemble(RESNET, IMAGES, name)


def test_lora_takes_the_convolutions_of_a_resnet():
    run = assemble(RESNET, IMAGES, "lora", options={"rank": 2})
    assert grafted_at(run.tree, "lora") == {
        f"params/blocks/{i}/conv{j}" for i in (0, 1) for j in (1, 2, 3)
    }
