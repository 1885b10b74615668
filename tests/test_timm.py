"""timm's files: outputs and gradients against timm itself, in and out, and bad files."""

import json
import shutil

import numpy as np
import pytest
from foreign import (
    assert_close,
    assert_gradients_close,
    gradients,
    images,
    run,
    same_bits,
)
from safetensors.numpy import load_file, save_file

from tljax.types import BadInput
from tljax.weights.files import held
from tljax.weights.table import to_foreign, to_tljax
from tljax.weights.timm import TIMM, open_timm, spell, to_timm_config

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
SMALL |= {"mlp_ratio": 1.5, "num_classes": 5}
VIT, GAP = "vit_small_patch16_224", {"global_pool": "avg"}
BLOCKS = {"layers": [2, 1, 1, 1], "channels": [16, 24, 32, 48], "num_classes": 5}
CASES = {
    "class": (VIT, {}),
    "headless": (VIT, {"num_classes": 0}),
    "fc_norm": (VIT, GAP),
    "mean": (VIT, GAP | {"fc_norm": False}),
    "fc_norm of class": (VIT, {"fc_norm": True}),
    "no class token": (VIT, GAP | {"class_token": False}),
    "map": (VIT, {"global_pool": "map", "class_token": False}),
    "registers": (VIT, {"reg_tokens": 3, "no_embed_class": True}),
    "registers, mean": (VIT, GAP | {"reg_tokens": 3, "class_token": False, "no_embed_class": True}),
    "no class position": (VIT, {"no_embed_class": True}),
    "qk_norm": (VIT, {"qk_norm": True, "num_heads": 4}),
    "no qkv bias": (VIT, {"qkv_bias": False}),
    "layer scale": (VIT, {"init_values": 0.1}),
    "tanh": (VIT, {"act_layer": "gelu_tanh"}),
    "relu": (VIT, {"act_layer": "relu"}),
    "oblong": (VIT, {"img_size": [32, 48], "patch_size": [8, 16]}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "quick clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "siglip": ("vit_so400m_patch16_siglip_256", {"num_classes": 0}),
    "basic": ("resnet18", BLOCKS),
    "bottleneck": ("resnet50", BLOCKS),
    "doubled": ("resnet18", BLOCKS | {"layers": [1, 1, 1, 1], "channels": [64, 128, 256, 512]}),
    "deep stem": ("resnet50", BLOCKS | {"stem_type": "deep", "stem_width": 8}),
    "deep stem, averaging": (
        "resnet50",
        BLOCKS | {"stem_type": "deep", "stem_width": 8, "avg_down": True},
    ),
    "averaging, basic": ("resnet34", BLOCKS | {"avg_down": True}),
}
VITS = [name for name, (kind, _) in CASES.items() if not kind.startswith("resnet")]
pytestmark = [pytest.mark.once, pytest.mark.torch]


def randomise(model, seed=0):
    """Draw every parameter and statistic anew: timm starts biases at zero and norms at one."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                around_one = tensor.ndim == 1 and bool((tensor == 1).all())
                tensor.copy_(torch.rand_like(tensor) + 0.5 if around_one else tensor)
                tensor.add_(torch.randn_like(tensor) * (0 if around_one else 0.1))
    return model.eval()


@pytest.fixture(scope="module")
def saved(timm, tmp_path_factory):
    """Give a case's model, and its folder as timm itself saves it."""
    folder, models = tmp_path_factory.mktemp("timm"), {}

    def save(case):
        if case not in models:
            kind, options = CASES[case]
            options = options if kind.startswith("resnet") else SMALL | options
            models[case] = randomise(timm.create_model(kind, **options))
            timm.models.save_for_hf(models[case], folder / case, safe_serialization=True)
        return models[case], folder / case / "model.safetensors"

    return save


def pictures(case, size=32):
    wide = 48 if case == "oblong" else size
    return images(2, size, wide, 3)


def forward(model, pixels):
    """Return timm's tokens or map, pooled features, and logits."""
    import torch

    with torch.no_grad():
        tokens = model.forward_features(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        pooled = model.forward_head(tokens, pre_logits=True)
        logits = model.forward_head(tokens)
    if tokens.ndim == 4:
        tokens = tokens.permute(0, 2, 3, 1).flatten(1, 2)
    return tokens.numpy(), pooled.numpy(), logits.numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.few(10)
def test_outputs_equal_timm(saved, case):
    model, path = saved(case)
    source = open_timm(path)
    pixels = pictures(case, 33) if source.arch == "resnet" else pictures(case)
    tokens, pooled, logits = forward(model, pixels)
    output = run(source, pixels)
    assert_close(output.tokens, tokens)
    if case != "distilled":  # timm returns the mean of both tokens there, tljax the class token
        assert_close(output.pooled, pooled)
    if "head" in source.tree["params"]:
        assert_close(output.logits, logits)
    else:
        assert output.logits is None
    assert source.assumed == ()
    assert set(source.ignored) == {n for n in load_file(path) if "num_batches_tracked" in n}


GIVEN = {  # what a file alone cannot tell, or tells otherwise by the rules
    "mean": {"pool": "mean"},
    "fc_norm of class": {"pool": "cls"},
    "tanh": {"activation": "gelu_tanh"},
    "siglip": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "quick clip": {"activation": "quick_gelu"},
    "oblong": {"grid": (4, 3), "patch": (8, 16)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_alone_tells_the_same_but_for_what_is_named_as_assumed(saved, tmp_path, case):
    _, path = saved(case)
    alone = shutil.copy(path, tmp_path / "weights.safetensors")
    given = GIVEN.get(case, {})
    full, source = open_timm(path), open_timm(tmp_path / "weights.safetensors", given)
    assert dict(source.fields) == dict(full.fields)
    assumed = {line.split("=")[0] for line in source.assumed}
    assert not assumed & given.keys()
    decided = {"eps", "stride_first"} if source.arch == "resnet" else {"eps", "heads", "activation"}
    assert decided - given.keys() - ({"heads"} if case == "qk_norm" else set()) <= assumed
    assert (source.preprocess, source.labels) == (None, None)
    assert alone.exists()


@pytest.mark.parametrize("case", ["layer scale", "map", "bottleneck", "deep stem, averaging"])
@pytest.mark.few(2)
def test_gradients_equal_timm(saved, case):
    import torch

    model, path = saved(case)
    source, pixels = open_timm(path), pictures(case)
    weights = images(2, 5, seed=1)
    for parameter in model.parameters():
        parameter.grad = None
    logits = model(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    (logits * torch.from_numpy(weights)).sum().backward()
    state = load_file(path)
    theirs = {name: held(np.zeros_like(array)) for name, array in state.items()}
    theirs |= {name: held(p.grad.numpy()) for name, p in model.named_parameters()}
    expected, _ = to_tljax(theirs, spell(source.fields), TIMM)
    assert_gradients_close(gradients(source, weights, pixels), {"params": expected["params"]})


@pytest.mark.parametrize("case", ["class", "clip"])
def test_tiny_activations_show_the_eps(timm, saved, tmp_path, case):
    _, path = saved(case)
    state = load_file(path)
    for name in state:
        if name.startswith(("patch_embed", "pos_embed", "cls_token")):
            state[name] = state[name] * np.float32(1e-3)
    shutil.copy(path.with_name("config.json"), tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    tiny = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    source = open_timm(tmp_path)
    pixels = pictures(case)
    logits = forward(tiny, pixels)[2]
    assert_close(run(source, pixels).logits, logits)
    wrong = run(source, pixels, eps=source.fields["eps"] * 2).logits
    assert np.abs(np.asarray(wrong) - logits).max() > 1e-3 * np.abs(logits).max()


@pytest.mark.parametrize("size", [16, 24, 48, 56])
@pytest.mark.parametrize("case", ["class", "registers", "distilled"])
def test_position_tables_are_resampled_as_timm_does(timm, saved, case, size):
    _, path = saved(case)
    model = timm.create_model(f"local-dir:{path.parent}", pretrained=True, img_size=size).eval()
    pixels = pictures(case, size)
    assert_close(run(open_timm(path), pixels).tokens, forward(model, pixels)[0])


@pytest.mark.parametrize("case", CASES)
def test_table_round_trip_is_bitwise(saved, case):
    _, path = saved(case)
    source = open_timm(path)
    state = {n: array for n, array in load_file(path).items() if n not in source.ignored}
    same_bits(to_foreign(source.tree, spell(source.fields), source.fields), state)


def export(source, folder, labels=None):
    folder.mkdir()
    head = source.tree["params"].get("head")
    fields = dict(source.fields) | {"num_classes": head["bias"].shape[0] if head else None}
    config = to_timm_config(source.arch, fields, labels, source.preprocess)
    (folder / "config.json").write_text(json.dumps(config))
    state = to_foreign(source.tree, spell(source.fields), source.fields)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_an_exported_folder_opens_in_timm_with_the_same_logits(timm, saved, tmp_path, case):
    model, path = saved(case)
    source, labels = open_timm(path), tuple("abcde")
    labels = labels if "head" in source.tree["params"] else None
    folder = export(source, tmp_path / "out", labels)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = pictures(case)
    for theirs, ours in zip(forward(again, pixels), forward(model, pixels), strict=True):
        np.testing.assert_array_equal(theirs, ours)
    second = open_timm(folder)
    assert dict(second.fields) == dict(source.fields)
    assert (second.labels, second.assumed) == (labels, ())
    assert second.preprocess == source.preprocess
    saved_by_timm = timm.create_model(f"local-dir:{path.parent}", pretrained=False)
    expected = timm.data.resolve_model_data_config(saved_by_timm)
    given = timm.data.resolve_model_data_config(again)
    for config in (given, expected):  # what the ratio does; its digits may differ
        config["crop_pct"] = [side // config["crop_pct"] for side in config["input_size"][1:]]
    same = {"mean", "std", "interpolation", "crop_mode", "crop_pct"}
    listed = [[given[k], expected[k]] for k in same]
    assert all(np.array_equal(ours, theirs) for ours, theirs in listed)


@pytest.mark.parametrize("kind", ["vit_small_patch16_224", "resnet50"])
def test_real_sizes(timm, tmp_path, kind):
    model = randomise(timm.create_model(kind))
    save_file({n: t.numpy() for n, t in model.state_dict().items()}, tmp_path / "w.safetensors")
    source, size = open_timm(tmp_path / "w.safetensors"), 224 if "vit" in kind else 64
    pixels = images(1, size, size, 3)
    assert_close(run(source, pixels).logits, forward(model, pixels)[2])


# What timm cannot be told, and what tljax does not read


@pytest.mark.parametrize(
    ("case", "change", "expected"),
    [
        ("class", {"eps": 1e-12}, "eps=1e-12"),
        ("class", {"pool": "cls+mean"}, "'cls\\+mean', expected one of"),
        ("class", {"registers": 2}, "registers=0 only"),
        ("class", {"patch_bias": False}, "patch_bias=True only"),
        ("class", {"projection": 4}, "projection=None only"),
        ("class", {"num_classes": 4}, "5 labels for 4 classes"),
        ("qk_norm", {"qk_norm": 1e-5}, "qk_norm=1e-06 only"),
        ("distilled", {"eps": 1e-5}, "eps=1e-05"),
        ("basic", {"stride_first": True}, "stride_first=False only"),
        ("basic", {"width": 32}, "width=64 only"),
        ("basic", {"stages": (1, 1), "widths": (8, 8)}, "2 stages"),
        ("basic", {"norm": "group"}, "norm='batch' only"),
    ],
)
def test_a_model_that_timm_lacks_is_not_exported(saved, case, change, expected):
    source = open_timm(saved(case)[1])
    with pytest.raises(BadInput, match=expected):
        to_timm_config(source.arch, dict(source.fields) | change, tuple("abcde"), None)


def rewrite(path, folder, change=None, config=None):
    """Copy a folder with its tensors or its configuration changed."""
    state = load_file(path)
    if change:
        change(state)
    save_file({n: np.ascontiguousarray(a) for n, a in state.items()}, folder / "model.safetensors")
    known = json.loads(path.with_name("config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config(known) if config else known))
    return folder / "model.safetensors"


def put(name, array):
    return lambda state: state.update({name: array})


@pytest.mark.parametrize(
    ("case", "change", "expected"),
    [
        ("class", lambda s: s.pop("blocks.1.mlp.fc1.weight"), "missing: blocks.1.mlp.fc1.weight"),
        ("class", lambda s: s.pop("blocks.1.attn.qkv.bias"), "missing: blocks.1.attn.qkv.bias"),
        ("class", lambda s: s.pop("cls_token"), "17 rows, with 0"),
        ("class", lambda s: s.pop("patch_embed.proj.weight"), "missing: patch_embed.proj.weight"),
        ("class", lambda s: s.pop("pos_embed"), "missing: pos_embed"),
        ("class", lambda s: s.pop("norm.bias"), "missing: norm.bias"),
        ("registers", lambda s: s.pop("reg_token"), "model_args.reg_tokens=3, but"),
        ("class", put("stranger", np.zeros(2, np.float32)), "unknown: stranger"),
        ("class", lambda s: s.update(norms=s.pop("norm.weight")), "unknown: norms"),
        ("class", put("pos_embed", np.zeros((1, 15, 128), np.float32)), "15 rows"),
        ("class", put("blocks.0.mlp.fc1.weight", np.zeros((384, 128), np.float32)), "gated"),
        ("class", put("norm.weight", np.zeros(128, np.int32)), "norm.weight holds int32"),
        ("class", put("norm.weight", np.full(128, np.nan, np.float32)), "NaN"),
        ("class", put("blocks.1.attn.qkv.weight", np.zeros((383, 128), np.float32)), "shape"),
        ("class", put("blocks.1.mlp.fc2.weight", np.zeros((192, 128), np.float32)), "shape"),
        ("bottleneck", lambda s: s.pop("layer2.0.downsample.1.running_var"), "missing: layer2.0"),
        ("bottleneck", lambda s: s.pop("layer4.0.downsample.0.weight"), "missing: layer4.0"),
        ("bottleneck", put("layer1.0.conv2.weight", np.zeros((4, 1, 3, 3), np.float32)), "grouped"),
        ("deep stem", put("conv1.0.weight", np.zeros((6, 3, 3, 3), np.float32)), "tiered"),
        ("basic", lambda s: s.pop("conv1.weight"), "missing: conv1.weight"),
    ],
)
def test_damaged_tensors_are_refused(saved, tmp_path, case, change, expected):
    path = rewrite(saved(case)[1], tmp_path, change)
    with pytest.raises(BadInput, match=expected):
        run(open_timm(path), pictures(case))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architecture": "swin_tiny_patch4_window7_224"}, "tljax has no 'swin"),
        ({"architecture": "convnext_tiny"}, "tljax has no 'convnext"),
        ({"architecture": "eva02_base_patch14_224"}, "tljax has no 'eva02"),
        ({"architecture": "vit_base_patch16_rpn_224"}, "norms after attention"),
        ({"architecture": "vit_pe_core_base_patch16_224"}, "rotary"),
        ({"architecture": "resnetblur50"}, "anti-aliasing"),
        ({"architecture": None}, "names no architecture"),
        ({"architecture": 3}, "names no architecture"),
        ({"global_pool": "avgmax"}, "global_pool='avgmax'"),
        ({"global_pool": "map"}, "global_pool='map'"),
        ({"model_args": {"pool_include_prefix": True}}, "model_args.pool_include_prefix=True"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, "model_args.norm_layer='rmsnorm'"),
        ({"model_args": {"act_layer": "silu"}}, "model_args.act_layer='silu'"),
        ({"model_args": {"depth": 3}}, "model_args.depth=3, but the tensors say 2"),
        ({"model_args": {"embed_dim": 128}}, "embed_dim without num_heads"),
        ({"model_args": {"img_size": "32"}}, "whole numbers"),
        ({"model_args": {"img_size": 3.5}}, "whole numbers"),
        ({"model_args": {"num_heads": "2"}}, "heads='2' do not divide"),
        ({"model_args": {"num_heads": True}}, "heads=True do not divide"),
        ({"model_args": {"num_heads": 3}}, "heads=3 do not divide"),
        ({"global_pool": ["avg"]}, "global_pool="),
        (
            {"pretrained_cfg": {"mean": [1] * 3, "std": [1] * 3, "crop_pct": 1e-320}},
            "crop_pct",
        ),
        ({"model_args": 3}, "must be objects"),
        ({"pretrained_cfg": 3}, "must be objects"),
        ({"pretrained_cfg": {"mean": "3", "std": 1}}, "mean"),
        ({"pretrained_cfg": {"label_names": 3}}, "label_names"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(saved, tmp_path, change, expected):
    path = rewrite(saved("class")[1], tmp_path, config=lambda known: known | change)
    with pytest.raises(BadInput, match=expected) as caught:
        open_timm(path)
    assert str(tmp_path) in str(caught.value)


def test_pooling_that_nothing_tells_is_asked_for(saved, tmp_path):
    state = load_file(saved("map")[1])
    bare = {name: x for name, x in state.items() if not name.startswith("attn_pool")}
    save_file(bare, tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match="give the field pool"):
        open_timm(tmp_path / "w.safetensors")
    assert open_timm(tmp_path / "w.safetensors", {"pool": "mean"}).fields["pool"] == "mean"


def test_a_token_that_nothing_would_miss_is_assumed_to_be_absent(saved, tmp_path):
    state = load_file(saved("registers")[1])
    del state["reg_token"]
    save_file(state, tmp_path / "w.safetensors")
    assert "registers=0: there is no reg_token" in open_timm(tmp_path / "w.safetensors").assumed


def test_names_and_pictures_are_read(saved, tmp_path):
    names = {str(i): f"class {i}" for i in (10, 2, 0, 1, 3)}
    weights = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32]}
    weights |= {"crop_pct": 0.9, "interpolation": "bilinear", "label_names": names}
    path = rewrite(
        saved("class")[1], tmp_path, config=lambda known: known | {"pretrained_cfg": weights}
    )
    source = open_timm(path)
    assert source.labels == ("class 0", "class 1", "class 2", "class 3", "class 10")
    found = dict(source.preprocess)
    assert (found["size"], found["resize"], found["interpolation"]) == ((32, 32), 35, "bilinear")
    assert (found["mean"], found["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("percent", [0.875, 0.9, 0.95, 0.965, 1.0, 0.7])
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (37, 91)])
def test_preprocessing_is_said_again_as_it_was(saved, tmp_path, percent, size):
    weights = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, *size], "crop_pct": percent}
    for mode in ("center", "squash", "border"):
        config = {"pretrained_cfg": weights | {"crop_mode": mode}}
        path = rewrite(saved("deep stem")[1], tmp_path, config=lambda known, c=config: known | c)
        source = open_timm(path)
        again = to_timm_config("resnet", source.fields, None, source.preprocess)["pretrained_cfg"]
        assert again["crop_mode"] == mode
        config = {"pretrained_cfg": again}
        path = rewrite(saved("deep stem")[1], tmp_path, config=lambda known, c=config: known | c)
        assert open_timm(path).preprocess == source.preprocess
