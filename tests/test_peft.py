"""LoRA adapters against PEFT: those trained there here, those written here there, and bad ones."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tljax.edits.fold import merge
from tljax.models.bert import Bert
from tljax.models.clip import ClipText
from tljax.models.vit import ViT
from tljax.tree import flatten, unflatten
from tljax.types import BadInput
from tljax.weights import open_weights
from tljax.weights.peft import base_of, graft_adapter, read_adapter, to_peft

# PEFT itself reads an attribute that transformers has deprecated, whatever the adapter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.once,
]
MODELS = {"vit": ViT, "bert": Bert, "clip_text": ClipText}
CLOSE = 2e-5  # as in test_weights.py
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = ENCODER | {"image_size": 16, "patch_size": 8}
TEXT = ENCODER | {"intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 24}
CASES = {
    "ViTForImageClassification": IMAGE | {"intermediate_size": 48, "num_labels": 3},
    "Dinov2ForImageClassification": IMAGE | {"mlp_ratio": 2, "num_labels": 3},
    "BertForSequenceClassification": TEXT | {"num_labels": 3},
    "ViTModel": IMAGE | {"intermediate_size": 48, "add_pooling_layer": False},
    "BertModel": TEXT,
    "DeiTForImageClassificationWithTeacher": IMAGE | {"intermediate_size": 48, "num_labels": 3},
    "Dinov2WithRegistersForImageClassification": IMAGE | {"mlp_ratio": 2, "num_labels": 3},
    "RobertaForSequenceClassification": TEXT | {"num_labels": 3, "type_vocab_size": 1},
    "RobertaForTokenClassification": TEXT | {"num_labels": 3, "type_vocab_size": 1},
    "DistilBertForSequenceClassification": {"dim": 32, "n_layers": 2, "n_heads": 4}
    | {"hidden_dim": 48, "vocab_size": 60, "max_position_embeddings": 24, "num_labels": 3},
    "CLIPVisionModel": IMAGE | {"intermediate_size": 48},
    "CLIPVisionModelWithProjection": IMAGE | {"intermediate_size": 48, "projection_dim": 8},
    "CLIPTextModelWithProjection": TEXT
    | {"projection_dim": 8, "bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 1},
}
VIT, DINO, BERT, _, _, DEIT, REGISTERS, ROBERTA, TAGGER, DISTIL, CLIP, IMAGES, TEXTS = CASES
ALL = {"r": 3, "target_modules": "all-linear"}
LORA = {
    "all-linear": (VIT, {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    "all-linear-dinov2": (DINO, ALL),
    "all-linear-bert": (BERT, ALL),
    "deit": (DEIT, ALL | {"modules_to_save": ["cls_classifier", "distillation_classifier"]}),
    "registers": (REGISTERS, ALL | {"modules_to_save": ["classifier"]}),
    "roberta": (ROBERTA, {"r": 3, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "all-linear-roberta": (ROBERTA, ALL),
    "tagger": (TAGGER, ALL | {"modules_to_save": ["classifier"]}),
    "distilbert": (
        DISTIL,
        {"r": 3, "target_modules": ["q_lin", "v_lin", "lin2"], "task_type": "SEQ_CLS"}
        | {"modules_to_save": ["pre_classifier"]},
    ),
    "clip": (CLIP, ALL),
    "clip-images": (IMAGES, ALL),
    "clip-texts": (TEXTS, ALL | {"modules_to_save": ["text_projection"]}),
    "bare-vit": ("ViTModel", {"r": 3, "target_modules": ["q_proj", "o_proj", "mlp.fc1"]}),
    "bare-bert": ("BertModel", {"r": 3, "target_modules": ["query", "dense"]}),
    "rslora": (VIT, {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["v_proj"]}),
    "rslora-bert": (BERT, {"r": 6, "use_rslora": True, "target_modules": ["key"]}),
    "dora": (VIT, {"r": 2, "use_dora": True, "target_modules": ["q_proj", "fc1", "fc2"]}),
    "dora-bert": (
        BERT,
        {"r": 2, "use_dora": True, "target_modules": ["query", "output.dense"]}
        | {"modules_to_save": ["classifier"]},
    ),
    "ranks": (
        VIT,
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "fc1"]}
        | {"rank_pattern": {"v_proj": 4, "^vit.layers.1.mlp.fc1": 5}}
        | {"alpha_pattern": {"1.attention.q_proj": 7, "v_proj": 2.5}}
        | {"modules_to_save": ["classifier"]},
    ),
    "some-layers": (
        VIT,
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        }
        | {"modules_to_save": ["classifier", "layernorm"], "lora_dropout": 0.25},
    ),
    "pattern": (BERT, {"r": 2, "target_modules": r".*layer\.0.*(query|value)"}),
    "task": (BERT, {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
}


SAVED = {"some-layers": ["params/norm"], "clip-texts": ["params/projection"]}
"""Modules saved whole that are no heads."""


@pytest.fixture(scope="module")
def torch_peft(tmp_path_factory):
    """Return a function that trains an adapter in torch, and remembers it; skips without PEFT."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read as peft is imported
    pytest.importorskip("peft", reason="peft cannot be imported", exc_type=ImportError)
    folder, found = tmp_path_factory.mktemp("peft"), {}

    def train(name):
        if name not in found:
            found[name] = train_adapter(*LORA[name], folder / name)
        return found[name]

    return train


def make_base(case, folder):
    """Save a transformers model with every parameter drawn anew."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind = case.partition("For")[0].partition("Model")[0]
    fields = dict(CASES[case])
    options = {x: fields.pop(x) for x in ("add_pooling_layer",) if x in fields}
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, case)(config, **options)
    with torch.no_grad():
        for tensor in model.parameters():
            around_one = tensor.ndim == 1 and bool((tensor == 1).all())
            tensor.copy_(torch.rand_like(tensor) + 0.5 if around_one else tensor)
            tensor.add_(torch.randn_like(tensor) * (0 if around_one else 0.1))
    model.save_pretrained(folder)


def open_base(case, folder):
    import transformers

    options = {"add_pooling_layer": False} if "add_pooling_layer" in CASES[case] else {}
    return getattr(transformers, case).from_pretrained(folder, **options).eval()


def inputs_of(case):
    rng = np.random.default_rng(0)
    if "patch_size" in CASES[case]:
        return (rng.normal(size=(3, 16, 16, 3)).astype(np.float32),)
    ids = rng.integers(3, 60, (3, 11)).astype(np.int32)
    ids[:, 3] = 59  # the end of text of CLIP
    return ids, (np.arange(11) < np.array([[11], [7], [4]])).astype(np.int32)


def forward(model, case):
    import torch

    tensors = [torch.from_numpy(x) for x in inputs_of(case)]
    if tensors[0].ndim == 4:
        return model(tensors[0].permute(0, 3, 1, 2))
    return model(*(x.long() for x in tensors))


def outputs(model, case):
    """Return logits, or those hidden states of a bare model that are no padding."""
    import torch

    with torch.no_grad():
        found = forward(model.eval(), case)
    if "For" in case:
        return found.logits.numpy()
    if case.endswith("Projection"):
        return (found.image_embeds if case == IMAGES else found.text_embeds).numpy()
    return found.last_hidden_state.numpy()[real(case)]


def real(case):
    return inputs_of(case)[-1].astype(bool) if "vocab_size" in CASES[case] else ...


def train_adapter(case, settings, folder):
    """Train by PEFT for three steps; return folders, outputs before and after, tensors."""
    import peft
    import torch

    make_base(case, folder / "base")
    base = open_base(case, folder / "base")
    before = outputs(base, case)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings)).train()
    moving = [x for x in model.parameters() if x.requires_grad]
    with torch.no_grad():
        for tensor in moving:  # b starts at zero
            tensor.add_(torch.randn_like(tensor) * 0.1)
    optimizer = torch.optim.Adam(moving, 0.02)
    for _ in range(3):
        optimizer.zero_grad()
        found = forward(model, case)
        embeds = {IMAGES: "image_embeds", TEXTS: "text_embeds"}
        name = "logits" if "For" in case else embeds.get(case, "last_hidden_state")
        found[name].square().sum().backward()
        optimizer.step()
    model.save_pretrained(folder / "adapter")
    after = outputs(model, case)
    model.merge_and_unload().save_pretrained(folder / "merged")
    return case, folder, before, after


def grafted(folder, adapter="adapter"):
    source = open_weights(folder / "base")
    tree = graft_adapter(source.tree, read_adapter(folder / adapter), source.kind, source.fields)
    return source, source.kind, jax.tree.map(np.asarray, tree)


def model_of(source, tree, **fields):
    head = tree["params"].get("head")
    fields |= {"num_classes": head["bias"].shape[0]} if head else {}
    return MODELS[source.arch](**(dict(source.fields) | fields))


def run(model, tree, case):
    with jax.default_matmul_precision("highest"):
        output = jax.jit(model.apply)(jax.tree.map(jnp.asarray, tree), *inputs_of(case))
    if case.endswith("Projection"):
        return output.pooled
    return output.logits if "For" in case else output.tokens[real(case)]


def assert_close(given, expected, tolerance=CLOSE):
    given, expected = np.asarray(given), np.asarray(expected)
    assert given.shape == expected.shape
    assert np.abs(given - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.torch
@pytest.mark.parametrize("name", LORA)
@pytest.mark.few(5)
def test_an_adapter_trained_by_peft_gives_the_same_here(torch_peft, name):
    case, folder, before, after = torch_peft(name)
    assert np.abs(after - before).max() > 1e-2 * np.abs(after).max()  # it does something
    source, _, tree = grafted(folder)
    assert_close(run(model_of(source, tree), tree, case), after)


@pytest.mark.torch
@pytest.mark.parametrize("name", LORA)
def test_an_adapter_written_here_gives_the_same_in_peft(torch_peft, name, tmp_path):
    import peft

    case, folder, _, after = torch_peft(name)
    source, kind, tree = grafted(folder)
    fields, saved = vars(model_of(source, tree)), SAVED.get(name, ())
    tensors, config = to_peft(tree, kind, fields, str(folder / "base"), saved=saved)
    write(tmp_path, tensors, config)
    model = peft.PeftModel.from_pretrained(open_base(case, folder / "base"), tmp_path)
    assert_close(outputs(model, case), after)
    theirs = load_file(folder / "adapter" / "adapter_model.safetensors")
    head = {x for x in tensors if x.startswith("base_model.model.classifier.")}
    assert tensors.keys() - theirs.keys() <= head  # a head that PEFT left as it was goes along
    for tensor, value in theirs.items():
        np.testing.assert_array_equal(tensors[tensor], value)
    again = graft_adapter(source.tree, read_adapter(tmp_path), kind, source.fields)
    for path, leaf in flatten(again).items():
        np.testing.assert_array_equal(np.asarray(leaf), flatten(tree)[path])


@pytest.mark.torch
@pytest.mark.parametrize("name", LORA)
def test_folding_equals_merge_and_unload(torch_peft, name):
    _, folder, _, _ = torch_peft(name)
    merged = flatten(merge(jax.tree.map(jnp.asarray, grafted(folder)[2])))
    theirs = flatten(open_weights(folder / "merged").tree)
    assert merged.keys() == theirs.keys()
    for path, leaf in merged.items():  # both sum in float32, in another order
        assert_close(leaf, theirs[path], 2e-6)


BY_HAND = {
    VIT: {
        ".layers.": ".encoder.layer.", ".attention.q_proj": ".attention.attention.query",
        ".attention.k_proj": ".attention.attention.key", ".mlp.fc1": ".intermediate.dense",
        ".attention.v_proj": ".attention.attention.value", ".mlp.fc2": ".output.dense",
        ".attention.o_proj": ".attention.output.dense",
    },
    DINO: {
        ".attention.q_proj": ".attention.attention.query",
        ".attention.k_proj": ".attention.attention.key",
        ".attention.v_proj": ".attention.attention.value",
        ".attention.o_proj": ".attention.output.dense",
    },
    BERT: {},
}  # fmt: skip
BY_HAND |= {DEIT: BY_HAND[VIT], REGISTERS: BY_HAND[DINO]}
"""Names of transformers 5 in memory -> those of 4.x."""


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", ["all-linear", "all-linear-dinov2", "all-linear-bert", "ranks", "deit", "registers"]
)
def test_both_namings_are_read_and_written(torch_peft, name):
    case, folder, _, _ = torch_peft(name)

    def rename(text):
        for new, old in BY_HAND[case].items():
            text = text.replace(new, old)
        return text

    def rename_pattern(pattern):
        return {rename(f".{key}").removeprefix("."): value for key, value in pattern.items()}

    new = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    old = {rename(tensor): value for tensor, value in new.items()}
    assert case == BERT or old.keys() != new.keys()
    config["target_modules"] = sorted(
        {rename(x.split(".lora_")[0])[17:] for x in new if "lora" in x}
    )
    patterns = {"v_proj": "attention.value", "1.attention.q_proj": "1.attention.attention.query"}
    patterns |= {"^vit.layers.1.mlp.fc1": "^vit.encoder.layer.1.intermediate.dense"}
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {patterns[pattern]: value for pattern, value in config[key].items()}
    write(folder / "old", old, config)
    source, kind, tree = grafted(folder, "old")
    jax.tree.map(np.testing.assert_array_equal, tree, grafted(folder)[2])
    back, described = to_peft(tree, kind, vars(model_of(source, tree)), None, naming="4")
    for tensor, value in old.items():
        np.testing.assert_array_equal(back[tensor], value)
    assert described["target_modules"] == config["target_modules"]


@pytest.mark.torch
def test_an_adapter_brings_the_head_that_its_base_lacks(torch_peft, tmp_path):
    case, folder, _, after = torch_peft("task")
    bare = load_file(folder / "base" / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        del bare[name]
    (tmp_path / "base").mkdir()
    save_file(bare, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_bytes((folder / "base/config.json").read_bytes())
    source = open_weights(tmp_path / "base")
    assert "head" not in source.tree["params"]
    tree = graft_adapter(source.tree, read_adapter(folder / "adapter"), "bert", source.fields)
    model = model_of(source, tree, pool="pooler")
    assert_close(run(model, jax.tree.map(np.asarray, tree), case), after)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["ranks", "bare-bert", "roberta"])
def test_peft_finds_the_class_of_the_base_by_itself(torch_peft, name, tmp_path):
    import peft

    case, folder, _, after = torch_peft(name)
    source, kind, tree = grafted(folder)
    fields = vars(model_of(source, tree))
    write(tmp_path, *to_peft(tree, kind, fields, str(folder / "base")))
    assert_close(outputs(peft.AutoPeftModel.from_pretrained(tmp_path), case), after)


@pytest.mark.torch
def test_each_tower_takes_its_own_part_of_a_clip_adapter(torch_peft):
    towers = {"clip-images": "vision_model.", "clip-texts": "text_model."}
    both = {}
    for name in towers:
        _, folder, _, _ = torch_peft(name)
        both |= load_file(folder / "adapter" / "adapter_model.safetensors")
    for name in towers:
        case, folder, _, after = torch_peft(name)
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        write(folder / "both", both, config | {"target_modules": "all-linear"})
        source, _, tree = grafted(folder, "both")
        assert_close(run(model_of(source, tree), tree, case), after)


@pytest.mark.torch
def test_a_start_that_moves_the_base_is_refused(torch_peft, tmp_path):
    """As its factors alone are not what was trained: in PEFT the base's kernels change as well."""
    import peft

    case = VIT
    make_base(case, tmp_path / "base")
    base = open_base(case, tmp_path / "base")
    kernel = base.vit.layers[0].attention.q_proj.weight.detach().clone()
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    moved = model.base_model.model.vit.layers[0].attention.q_proj.base_layer.weight.detach()
    assert (moved - kernel).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BadInput, match="moves the base"):
        read_adapter(tmp_path / "adapter")


# Without torch: settings, damage


def write(folder, tensors, config):
    folder.mkdir(exist_ok=True)
    save_file({x: np.ascontiguousarray(y) for x, y in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIELDS = {
    "width": 8,
    "depth": 2,
    "heads": 2,
    "mlp": 12,
    "vocab": 11,
    "positions": 6,
    "types": 2,
    "pooler": True,
}
ROOT = "base_model.model.bert.encoder.layer"
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["query", "key"]}
A, B = (f"{ROOT}.1.attention.self.query.lora_{x}.weight" for x in "AB")
MLP = f"{ROOT}.0.intermediate.dense.lora_A.weight"


def make_tensors():
    rng = np.random.default_rng(0)
    names = [f"{ROOT}.{i}.attention.self.{a}.lora" for i in (0, 1) for a in ("query", "key")]
    shapes = {"_A.weight": (2, 8), "_B.weight": (8, 2)}
    return {
        f"{name}{end}": rng.normal(size=shape).astype(np.float32)
        for name in names
        for end, shape in shapes.items()
    }


def make_tree(**fields):
    model, rng = Bert(**(FIELDS | fields)), np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 3), np.int32))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def graft(folder, change=lambda tensors: None, config=None, **fields):
    tensors = make_tensors()
    change(tensors)
    write(folder / "adapter", tensors, SETTINGS | (config or {}))
    return graft_adapter(make_tree(**fields), read_adapter(folder / "adapter"), "bert", FIELDS)


def test_an_adapter_lies_beside_its_kernels(tmp_path):
    config = {"base_model_name_or_path": "some/name", "lora_dropout": 0.25}
    lora = graft(tmp_path, config=config)["params"]["blocks"]["1"]["attention"]["query"]["lora"]
    np.testing.assert_array_equal(lora["a"], make_tensors()[A].T)
    np.testing.assert_array_equal(lora["b"], make_tensors()[B].T)
    assert (lora["scale"], lora["rate"]) == (3.0, 0.25)
    assert base_of(read_adapter(tmp_path / "adapter")) == "some/name"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'.*LORA"),
        ({"peft_type": None}, "peft_type=None"),
        ({"bias": "all"}, "bias='all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"use_qalora": True}, "use_qalora=True.*LoRA, rsLoRA and DoRA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"something_of_tomorrow": 1}, "something_of_tomorrow=1"),
        ({"init_lora_weights": "olora"}, "moves the base"),
        ({"init_lora_weights": "loftq"}, "moves the base"),
        ({"rank_pattern": {".*query": 2}}, r"'\.\*query' in rank_pattern"),
        ({"alpha_pattern": {"(query|key)": 2}}, "no name of a module"),
        ({"alpha_pattern": {"self.quer": 2}}, "names no module with LoRA .nearest: .*query"),
        ({"r": 3}, "of rank 2, but r and rank_pattern .* say 3"),
        ({"rank_pattern": {"1.attention.self.key": 4}}, "of rank 2, .* say 4"),
        ({"target_modules": ["query"]}, r"key\.lora_A\.weight is there, but target_modules"),
        ({"target_modules": ["query", "key", "value"]}, r"missing: .*value\.lora_"),
        ({"modules_to_save": ["classifier"]}, "'classifier', but there is no .*classifier.weight"),
        ({"use_dora": True}, r"missing: .*lora_magnitude_vector"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, config, expected):
    with pytest.raises(BadInput, match=expected) as caught:
        graft(tmp_path, config=config)
    assert str(tmp_path / "adapter") in str(caught.value)


HOSTILE = [
    {"r": "8"}, {"r": 0}, {"r": -1}, {"r": 2.5}, {"r": True}, {"r": None}, {"r": [2]},
    {"r": 10**400}, {"lora_alpha": "6"}, {"lora_alpha": float("nan")}, {"lora_alpha": 1e300},
    {"lora_alpha": float("-inf")}, {"lora_alpha": 10**400}, {"lora_alpha": {}},
    {"lora_dropout": 1.5}, {"lora_dropout": -1}, {"use_dora": "yes"}, {"use_rslora": 1},
    {"rank_pattern": [1]}, {"rank_pattern": {"query": 0}}, {"alpha_pattern": {"query": None}},
    {"rank_pattern": {"": 2}}, {"rank_pattern": {"^": 2}}, {"target_modules": {"query": 1}},
    {"target_modules": [1]}, {"modules_to_save": "classifier"}, {"modules_to_save": [None]},
    {"base_model_name_or_path": {"a": 1}}, {"peft_type": ["LORA"]}, {"init_lora_weights": []},
    {"bias": {}}, {"x" * 10_000: "y" * 10_000},
]  # fmt: skip


@pytest.mark.parametrize("config", HOSTILE, ids=lambda config: json.dumps(config)[:40])
def test_hostile_settings_are_refused_in_few_words(tmp_path, config):
    with pytest.raises(BadInput, match=CONFIG) as caught:
        graft(tmp_path, config=config)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff", "[" * 10**5, '{"r": 1e999}'])
def test_settings_that_are_no_settings_are_refused(tmp_path, text):
    write(tmp_path, make_tensors(), SETTINGS)
    (tmp_path / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=CONFIG):
        read_adapter(tmp_path)


def rename(old, new):
    return lambda tensors: tensors.update({x.replace(old, new): tensors.pop(x) for x in [*tensors]})


def put(name, *shape, dtype=np.float32):
    return lambda tensors: tensors.update({name: np.zeros(shape, dtype)})


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def poison(tensors):
    tensors[A][1, 2] = np.inf


DAMAGE = {
    "half": (drop(B), rf"missing: {B}"),
    "module": (drop(A, B), rf"missing: {A}"),
    "nothing": (lambda tensors: tensors.clear(), "no LoRA of a dense layer of bert"),
    "extra": (put("base_model.model.stranger", 2), "unknown: base_model.model.stranger"),
    "head": (put("base_model.model.classifier.weight", 3, 8), "unknown: .*classifier.weight"),
    "renamed": (rename("layer.1.attention.self.query", "layer.1.attention.self.q"), "nearest"),
    "deeper": (rename("layer.1.", "layer.2."), r"layer\.2\."),
    "root": (rename("base_model.model.", ""), "nearest: base_model.model"),
    "roberta": (rename(".bert.", ".roberta."), "another architecture"),
    "other": (rename("bert.encoder.layer", "model.layers"), "another architecture"),
    "embedding": (
        put("base_model.model.bert.embeddings.word_embeddings.lora_embedding_A", 2, 11),
        "on what is no dense layer",
    ),
    "norm": (put(f"{ROOT}.0.output.LayerNorm.lora_A.weight", 2, 8), "on what is no dense layer"),
    "magnitude": (put(A.replace("lora_A.weight", "lora_magnitude_vector"), 8), "unknown"),
    "transposed": (put(A, 8, 2), "shape"),
    "rank": (put(B, 8, 3), r"shape \(3, 8\), expected \(2, 8\)"),
    "flat": (put(A, 16), r"shape \(16,\)"),
    "integer": (put(A, 2, 8, dtype=np.int32), "int32"),
    "infinite": (poison, "infinity"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused(tmp_path, damage):
    change, expected = DAMAGE[damage]
    with pytest.raises(BadInput, match=expected) as caught:
        graft(tmp_path, change)
    assert str(tmp_path / "adapter" / WEIGHTS) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


def test_a_base_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"expected \(16, 2\) beside a kernel of 16 x 16"):
        graft(tmp_path, width=16)
    config = {"target_modules": ["query", "key", "pooler.dense"]}

    def add(tensors):
        name = "base_model.model.bert.pooler.dense.lora"
        tensors.update({f"{name}_A.weight": np.ones((2, 8), np.float32)})
        tensors.update({f"{name}_B.weight": np.ones((8, 2), np.float32)})

    graft(tmp_path, add, config)
    with pytest.raises(BadInput, match="the base model has no params/pooler/kernel"):
        graft(tmp_path, add, config, pooler=False)


def test_a_second_adapter_is_refused_until_the_first_is_merged(tmp_path):
    tree, adapter = graft(tmp_path), read_adapter(tmp_path / "adapter")
    with pytest.raises(BadInput, match="merge"):
        graft_adapter(tree, adapter, "bert", FIELDS)
    graft_adapter(merge(jax.tree.map(jnp.asarray, tree)), adapter, "bert", FIELDS)


def test_a_saved_module_must_fit_but_for_its_classes(tmp_path):
    def add(width):
        def change(tensors):
            tensors["base_model.model.classifier.weight"] = np.ones((5, width), np.float32)
            tensors["base_model.model.classifier.bias"] = np.ones(5, np.float32)

        return change

    config = {"modules_to_save": ["classifier", "score"]}
    tree = graft(tmp_path, add(8), config, num_classes=3)
    assert tree["params"]["head"]["kernel"].shape == (8, 5)
    with pytest.raises(BadInput, match=r"shape \(9, 5\), the base model has \(8, 3\)"):
        graft(tmp_path, add(9), config, num_classes=3)


def test_a_model_that_transformers_does_not_have_is_refused(tmp_path):
    tree = graft(tmp_path)
    with pytest.raises(BadInput, match=r"models of transformers: vit, .*not 'resnetv2'"):
        graft_adapter(tree, read_adapter(tmp_path / "adapter"), "resnetv2", FIELDS)
    with pytest.raises(BadInput, match=r"models of transformers: vit, .*not ''"):
        to_peft(tree, "", FIELDS, None)


@pytest.mark.parametrize(
    ("lacking", "there", "expected"),
    [
        (WEIGHTS, "adapter_model.bin", "a pickle, which is never opened"),
        (WEIGHTS, "x.txt", "has no adapter_model.safetensors; it holds: adapter_config.json, x"),
        (CONFIG, "adapter_model.bin", "has no adapter_config.json"),
    ],
)
def test_a_missing_file_is_named_with_what_is_there(tmp_path, lacking, there, expected):
    write(tmp_path, make_tensors(), SETTINGS)
    (tmp_path / lacking).unlink()
    (tmp_path / there).write_bytes(b"\x80\x04.")
    with pytest.raises(BadInput, match=expected):
        read_adapter(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"nowhere has no .*; it holds: nothing"):
        read_adapter(tmp_path / "nowhere")


def export(tree, **options):
    return to_peft(tree, "bert", FIELDS | {"pool": "cls"}, "base", **options)


def changed(tree, path, value):
    leaves = flatten(tree) | {path: value}
    return unflatten({name: leaf for name, leaf in leaves.items() if leaf is not None})


def test_what_an_adapter_has_no_place_for_is_refused(tmp_path):
    tree = graft(tmp_path)
    query = "params/blocks/1/attention/query/lora"
    cases = [
        (make_tree(), {}, "has no LoRA"),
        (changed(tree, f"{query}/rate", np.float32(0.5)), {}, "one dropout rate"),
        (changed(tree, f"{query}/b", None), {}, f"missing: {query}/b"),
        (changed(tree, f"{query}/magnitude", np.ones(8)), {}, "missing: .*/lora/magnitude"),
        (changed(tree, "params/blocks/1/norm1/lora/a", np.ones((8, 2))), {}, "unknown"),
        (tree, {"saved": ["params/poler"]}, "nearest: params/pooler"),
        (tree, {"saved": ["params/blocks/1/attention/query"]}, "merge them first"),
        (tree, {"saved": ["params/pooler/bias"]}, "saves modules whole"),
    ]
    for given, options, expected in cases:
        with pytest.raises(BadInput, match=expected):
            export(given, **options)


def test_ranks_and_scales_of_their_own_go_into_patterns(tmp_path):
    tree, query = graft(tmp_path), "params/blocks/0/attention/query/lora"
    for path, value in {
        f"{query}/a": np.ones((8, 3), np.float32),
        f"{query}/b": np.ones((3, 8), np.float32),
        f"{query}/scale": np.float32(5 / 3**0.5),
    }.items():
        tree = changed(tree, path, value)
    tensors, config = export(tree, saved=["params/pooler"])
    name = "encoder.layer.0.attention.self.query"
    assert (config["r"], config["rank_pattern"]) == (2, {name: 3})
    assert config["lora_alpha"] == 6 and config["alpha_pattern"].keys() == {name}
    assert config["modules_to_save"] == ["pooler.dense"]
    write(tmp_path / "again", tensors, config)
    again = graft_adapter(make_tree(), read_adapter(tmp_path / "again"), "bert", FIELDS)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
