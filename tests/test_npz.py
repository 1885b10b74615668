"""Google's .npz files against their modules, rebuilt from Flax's own parts; in, out, and bad."""

import functools
import io
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from foreign import (
    assert_close,
    assert_gradients_close,
    call,
    draw,
    gradients,
    images,
    run,
    same_bits,
)

from tljax.tree import flatten, map_with_path, unflatten
from tljax.types import BadInput
from tljax.weights.files import held
from tljax.weights.npz import NPZ, open_npz_weights, to_npz, write_npz
from tljax.weights.table import to_tljax

pytestmark = pytest.mark.once

# The originals, with the names that their authors gave (models.vit and models.bit_paper of
# big_vision, models_vit of vision_transformer): Flax makes the leaves and their layouts.


class MlpBlock(nn.Module):
    mlp: int

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(self.mlp)(x))
        return nn.Dense(x.shape[-1])(y)


class Encoder1DBlock(nn.Module):
    mlp: int
    heads: int
    old: bool = False

    @nn.compact
    def __call__(self, x):
        # In vision_transformer Flax counted all parts of a block together.
        def name(kind, new, old):
            return f"{kind}_{old if self.old else new}"

        y = nn.LayerNorm(name=name("LayerNorm", 0, 0))(x)
        part = name("MultiHeadDotProductAttention", 0, 1)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name=part)(y, y)
        y = nn.LayerNorm(name=name("LayerNorm", 1, 2))(x)
        return x + MlpBlock(self.mlp, name=name("MlpBlock", 0, 3))(y)


class AddPositionEmbs(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = nn.initializers.normal(0.02)
        return x + self.param("pos_embedding", table, (1, *x.shape[1:]))


class Encoder(nn.Module):
    depth: int
    mlp: int
    heads: int
    old: bool = False

    @nn.compact
    def __call__(self, x):
        if self.old:
            x = AddPositionEmbs(name="posembed_input")(x)
        for index in range(self.depth):
            name = f"encoderblock_{index}"
            x = Encoder1DBlock(self.mlp, self.heads, self.old, name=name)(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    mlp: int
    heads: int

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
        probe = jnp.tile(probe, [x.shape[0], 1, 1])
        x = nn.MultiHeadDotProductAttention(self.heads)(probe, x)
        return (x + MlpBlock(self.mlp)(nn.LayerNorm()(x)))[:, 0]


class OriginalViT(nn.Module):
    pool: str
    heads: int = 2
    rep_size: int = 0
    old: bool = False
    patch: tuple[int, int] = (8, 8)
    classes: int = 5

    @nn.compact
    def __call__(self, pixels):
        x = nn.Conv(32, self.patch, self.patch, padding="VALID", name="embedding")(pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if not self.old:
            table = nn.initializers.normal(0.02)
            x = x + self.param("pos_embedding", table, (1, *x.shape[1:]))
        if self.pool == "tok":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, x.shape[-1]))
            x = jnp.concatenate([jnp.tile(cls, [x.shape[0], 1, 1]), x], axis=1)
        x = tokens = Encoder(2, 48, self.heads, self.old, name="Transformer")(x)
        if self.pool == "map":
            x = MAPHead(48, self.heads)(x)
        else:
            x = x[:, 0] if self.pool == "tok" else x.mean(axis=1)
        if self.rep_size:
            x = nn.tanh(nn.Dense(self.rep_size, name="pre_logits")(x))
        return tokens, x, nn.Dense(self.classes, name="head")(x) if self.classes else x


def standardise(x, axis, eps):
    x = x - jnp.mean(x, axis=axis, keepdims=True)
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True) + eps)


class GroupNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        groups = standardise(x.reshape(*x.shape[:-1], 32, -1), (1, 2, 4), 1e-5)
        shape = (1, 1, 1, x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape)
        return groups.reshape(x.shape) * scale + self.param("bias", nn.initializers.zeros, shape)


class StdConv(nn.Conv):
    def param(self, name, *rest, **options):
        return standardise(super().param(name, *rest, **options), (0, 1, 2), 1e-10)


class ResidualUnit(nn.Module):
    middle: int
    stride: int

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(StdConv, use_bias=False)
        strides, residual = (self.stride, self.stride), x
        x = nn.relu(GroupNorm(name="gn1")(x))
        if x.shape[-1] != 4 * self.middle or self.stride > 1:
            residual = conv(4 * self.middle, (1, 1), strides, name="conv_proj")(x)
        x = nn.relu(GroupNorm(name="gn2")(conv(self.middle, (1, 1), name="conv1")(x)))
        pads = [(1, 1), (1, 1)]
        x = conv(self.middle, (3, 3), strides, padding=pads, name="conv2")(x)
        x = conv(4 * self.middle, (1, 1), name="conv3")(nn.relu(GroupNorm(name="gn3")(x)))
        return x + residual


class Stage(nn.Module):
    count: int
    middle: int
    stride: int

    @nn.compact
    def __call__(self, x):
        for index in range(self.count):
            stride = self.stride if index == 0 else 1
            x = ResidualUnit(self.middle, stride, name=f"unit{index + 1:02d}")(x)
        return x


class RootBlock(nn.Module):
    width: int
    fill: float

    @nn.compact
    def __call__(self, x):
        pads = [(3, 3), (3, 3)]
        x = StdConv(self.width, (7, 7), (2, 2), pads, use_bias=False, name="conv_root")(x)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=self.fill)
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


class OriginalBiT(nn.Module):
    counts: tuple[int, ...] = (2, 1)
    width: int = 64
    fill: float = -np.inf  # of the pool: big_vision's bit_paper.py; TensorFlow's original pads 0

    @nn.compact
    def __call__(self, x):
        x = RootBlock(self.width, self.fill, name="root_block")(x)
        for index, count in enumerate(self.counts):
            stride = 2 if index else 1
            x = Stage(count, self.width * 2**index, stride, name=f"block{index + 1}")(x)
        x = nn.relu(GroupNorm(name="norm-pre-head")(x))
        pooled = x.mean(axis=(1, 2))
        return x.reshape(x.shape[0], -1, x.shape[-1]), pooled, nn.Dense(5, name="head")(pooled)


CASES = {
    "class": OriginalViT("tok"),
    "mean": OriginalViT("gap"),
    "map": OriginalViT("map"),
    "four heads": OriginalViT("tok", heads=4),
    "headless": OriginalViT("gap", classes=0),
    "pre_logits": OriginalViT("tok", rep_size=12),
    "mean, pre_logits": OriginalViT("gap", rep_size=12),
    "old": OriginalViT("tok", old=True),
    "old, pre_logits": OriginalViT("tok", old=True, rep_size=12),
    "old, mean": OriginalViT("gap", old=True),
    "bit": OriginalBiT(),
    "wide bit": OriginalBiT((1, 1), 128),
    "tf bit": OriginalBiT(fill=0.0),
    "wide tf bit": OriginalBiT((1, 1), 128, fill=0.0),
}


def pixels_of(case, size=32):
    return images(2, 33, 39, 3) if "bit" in case else images(2, size, size, 3)


@functools.cache
def original(case):
    """Return an original's outputs and parameters, every one drawn at random."""
    model, pixels = CASES[case], pixels_of(case)
    shapes = jax.eval_shape(model.init, jax.random.key(0), pixels)["params"]
    rng = np.random.default_rng(1)
    params = map_with_path(lambda path, leaf: draw(rng, path, leaf.shape), shapes)
    return call(model.apply, {"params": params}, pixels), flatten(params)


def save(path, arrays):
    np.savez(path, **arrays)
    return path


def dumped(arrays):
    """Spell BiT as the dump of TensorFlow's original, with its odd numbers."""
    names, found = {"conv1": "a", "conv2": "b", "conv3": "c"}, {}
    norms = {"gn1": "a", "gn2": "b", "gn3": "c", "scale": "gamma", "bias": "beta"}
    for name, array in arrays.items():
        *place, module, leaf = name.split("/")
        start = "/".join(["resnet", *place])
        if module in ("conv_proj", "conv_root"):
            inner = "/a/proj" if module == "conv_proj" else ""
            found[f"{start}{inner}/standardized_conv2d_7/{leaf}"] = array
        elif module in names:
            found[f"{start}/{names[module]}/standardized_conv2d/{leaf}"] = array
        elif module == "head":
            array = array[None, None] if leaf == "kernel" else array
            found[f"{start}/head/conv2d/{leaf}"] = array
        else:
            inner = f"/{norms[module]}" if module in norms else ""
            found[f"{start}{inner}/group_norm/{norms[leaf]}"] = array[0, 0, 0]
    return found


def flat(arrays):
    return {n: a[0, 0, 0] if (a.shape[:3] == (1, 1, 1) and a.ndim == 4 and "gn" in n)
            or "norm-pre" in n else a for n, a in arrays.items()}  # fmt: skip


def prefixed(arrays):
    """Write a whole checkpoint of big_vision: parameters, optimizer, counters."""
    state = {f"params/{name}": array for name, array in arrays.items()}
    state |= {f"opt/0/mu/{name}": array for name, array in arrays.items()}
    return state | {"opt/0/count": np.int32(7), "chrono/accum_train_time": np.float64(1)}


def moved(arrays):
    """Spell positions as big_vision did before 2022: inside the encoder, with a class row."""
    name = "Transformer/posembed_input/pos_embedding"
    return {"Transformer/pos_embedding" if n == name else n: a for n, a in arrays.items()}


def stacked(arrays):
    """Stack the blocks, as big_vision's scan does."""
    found = {name: array for name, array in arrays.items() if "encoderblock_" not in name}
    for name in arrays:
        if "encoderblock_0" in name:
            blocks = [arrays[name.replace("block_0", f"block_{i}")] for i in range(2)]
            found[name.replace("encoderblock_0", "encoderblock")] = np.stack(blocks)
    return found


SPELLINGS = [(case, None) for case in CASES if "tf" not in case] + [
    ("tf bit", dumped), ("wide tf bit", dumped), ("bit", flat), ("class", prefixed),
    ("bit", prefixed), ("old", moved), ("class", stacked), ("map", stacked),
]  # fmt: skip
spellings = pytest.mark.parametrize(
    ("case", "spell"), SPELLINGS, ids=[f"{c}-{s.__name__ if s else ''}" for c, s in SPELLINGS]
)


@spellings
@pytest.mark.few(4)
def test_outputs_equal_the_original(tmp_path, case, spell):
    (tokens, pooled, logits), arrays = original(case)
    source = open_npz_weights(save(tmp_path / "w.npz", spell(arrays) if spell else arrays))
    output = run(source, pixels_of(case))
    assert_close(output.tokens, tokens)
    assert_close(output.pooled, pooled)
    if case == "headless":
        assert output.logits is None
    else:
        assert_close(output.logits, logits)
    assert all("beside" in why for why in source.ignored.values())
    assert bool(source.ignored) == (spell is prefixed)


@spellings
@pytest.mark.few(10)
def test_table_round_trip_is_bitwise(tmp_path, case, spell):
    _, arrays = original(case)
    source = open_npz_weights(save(tmp_path / "w.npz", spell(arrays) if spell else arrays))
    fields = dict(source.fields)
    if "tf" in case:  # big_vision's code would pad the pool otherwise
        with pytest.raises(BadInput, match="pool='lowest' only"):
            to_npz(source.tree, fields)
        fields["pool"] = "lowest"
    back = to_npz(source.tree, fields)
    expected = {
        n.replace("posembed_input/", "").replace("Transformer/pos_", "pos_")
        .replace("LayerNorm_2", "LayerNorm_1").replace("MlpBlock_3", "MlpBlock_0")
        .replace("Attention_1", "Attention_0"): a for n, a in arrays.items()
    }  # fmt: skip
    same_bits(back, expected)
    write_npz(tmp_path / "out.npz", back)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as again:
        same_bits(dict(again), expected)
    second = open_npz_weights(tmp_path / "out.npz")
    assert dict(second.fields) == fields
    jax.tree.map(np.testing.assert_array_equal, second.tree, source.tree)


@pytest.mark.parametrize("case", ["class", "map", "old, pre_logits", "bit"])
@pytest.mark.few(2)
def test_gradients_equal_the_original(tmp_path, case):
    _, arrays = original(case)
    source, pixels = open_npz_weights(save(tmp_path / "w.npz", arrays)), pixels_of(case)
    weights = images(2, 5, seed=2)

    def loss(params, pixels):
        return jnp.sum(weights * CASES[case].apply({"params": params}, pixels)[2])

    theirs = call(jax.grad(loss), unflatten(arrays), pixels)
    found = {name: np.asarray(leaf) for name, leaf in flatten(theirs).items()}
    expected = open_npz_weights(save(tmp_path / "g.npz", found)).tree
    assert_gradients_close(gradients(source, weights, pixels), expected)


@pytest.mark.parametrize("case", ["class", "old", "map"])
@pytest.mark.parametrize("size", [16, 56])
def test_position_tables_are_resampled_by_scipy_zoom(tmp_path, case, size):
    import scipy.ndimage

    _, arrays = original(case)
    source = open_npz_weights(save(tmp_path / "w.npz", arrays))
    name = next(name for name in arrays if name.endswith("pos_embedding"))
    table, own = arrays[name], int(case == "old")
    zoom = (size / 32, size / 32, 1)
    grid = scipy.ndimage.zoom(table[0, own:].reshape(4, 4, -1), zoom, order=1)
    new = np.concatenate([table[:, :own], grid.reshape(1, -1, table.shape[-1])], 1)
    pixels = images(2, size, size, 3)
    params = unflatten(arrays | {name: new})
    _, _, logits = call(CASES[case].apply, {"params": params}, pixels)
    assert_close(run(source, pixels).logits, logits)


def test_oblong_pictures_need_their_grid(tmp_path):
    model, pixels = OriginalViT("tok", patch=(8, 16)), images(2, 32, 48, 3)
    params = call(model.init, jax.random.key(0), pixels)["params"]
    path = save(tmp_path / "w.npz", flatten(params))
    given = {}
    for message, field in ((r"patch=\(8, 16\)", "patch"), (r"12 rows(.|\n)*grid=", "grid")):
        with pytest.raises(BadInput, match=message) as caught:
            open_npz_weights(path, given)
        assert str(path) in str(caught.value)
        given[field] = {"patch": (8, 16), "grid": (4, 3)}[field]
    source = open_npz_weights(path, given)
    assert (source.fields["patch"], source.fields["grid"]) == ((8, 16), (4, 3))
    assert_close(run(source, pixels).tokens, call(model.apply, {"params": params}, pixels)[0])


def test_what_is_assumed_is_named_and_can_be_given(tmp_path):
    path = save(tmp_path / "w.npz", original("mean")[1])
    names = [line.split("=")[0] for line in open_npz_weights(path).assumed]
    assert sorted(names) == ["activation", "eps", "grid", "pool"]
    source = open_npz_weights(path, {"activation": "gelu", "eps": 1e-5})
    assert (source.fields["activation"], source.fields["eps"]) == ("gelu", 1e-5)
    assert sorted(line.split("=")[0] for line in source.assumed) == ["grid", "pool"]
    path = save(tmp_path / "b.npz", original("bit")[1])
    assert sorted(x.split("=")[0] for x in open_npz_weights(path).assumed) == ["eps", "stem"]


# What big_vision cannot hold


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"eps": 1e-5}, "eps=1e-06 only"),
        ({"activation": "gelu"}, "gelu_tanh"),
        ({"pool": "mean"}, "pools by map, pooler, cls with a class token, the model by 'mean'"),
        ({"norm_pooled": True}, "norm_pooled=False only"),
        ({"registers": 3}, "registers=0 only"),
    ],
)
def test_a_model_that_big_vision_lacks_is_not_exported(tmp_path, change, expected):
    source = open_npz_weights(save(tmp_path / "w.npz", original("class")[1]))
    with pytest.raises(BadInput, match=expected):
        to_npz(source.tree, dict(source.fields) | change)


def test_a_leaf_without_a_place_is_not_dropped_on_export(tmp_path):
    source = open_npz_weights(save(tmp_path / "w.npz", original("class")[1]))
    source.tree["params"]["blocks"]["0"]["scale1"] = {"gamma": np.ones(32, np.float32)}
    with pytest.raises(BadInput, match=r"unknown: params/blocks/0/scale1/gamma"):
        to_npz(source.tree, source.fields)


# Damage

BLOCK, HEADS = "Transformer/encoderblock_1", "MultiHeadDotProductAttention_0"
DENSE = "Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel"
UNIT = "block1/unit02/conv2/kernel"


def changed(name, change):
    return lambda arrays: arrays | {name: change(arrays[name])}


def renamed(old, new):
    return lambda arrays: {new if name == old else name: array for name, array in arrays.items()}


def without(name):
    return lambda arrays: {n: array for n, array in arrays.items() if n != name}


def with_nan(array):
    return np.where(np.arange(array.size).reshape(array.shape) == 5, np.nan, array)


DAMAGE = {
    "missing": (without, "missing"),
    "renamed": (lambda name: renamed(name, f"{name}s"), "nearest"),
    "flat": (lambda name: changed(name, np.ravel), r"shape \(\d+,\)"),
    "transposed": (lambda name: changed(name, lambda a: np.moveaxis(a, -1, 0)[..., :-1]), "shape"),
    "integer": (lambda name: changed(name, lambda a: a.astype(np.int32)), "int32"),
    "nan": (lambda name: changed(name, with_nan), "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("case", "name"), [("class", DENSE), ("bit", UNIT)])
def test_a_damaged_array_is_refused_with_its_name(tmp_path, case, name, damage):
    change, expected = DAMAGE[damage]
    path = save(tmp_path / "w.npz", change(name)(original(case)[1]))
    with pytest.raises(BadInput, match=expected) as caught:
        run(open_npz_weights(path), pixels_of(case))
    leaf = {DENSE: "blocks/1/mlp/up/kernel", UNIT: "blocks/1/conv2/kernel"}[name]
    assert name in str(caught.value) or leaf in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda arrays: arrays | {"stranger": np.zeros(2, np.float32)}, "unknown: stranger"),
        (lambda arrays: arrays | {"conv_root/kernel": np.zeros((7, 7, 3, 4))}, "hybrid"),
        (without("embedding/kernel"), "missing: embedding/kernel"),
        (without("pos_embedding"), "sincos2d"),
        (without("cls"), "missing|unknown|told|mean"),
        (without("Transformer/encoderblock_0/LayerNorm_0/scale"), "missing"),
        (changed("Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel",
                 lambda a: a.transpose(1, 0, 2)), "query kernel has shape"),
        (changed(f"{BLOCK}/{HEADS}/key/bias", np.transpose),
         "key/bias has shape"),
        (changed(f"{BLOCK}/{HEADS}/out/kernel",
                 lambda a: a.transpose(1, 0, 2)), "out/kernel has shape"),
        (lambda arrays: arrays | {"Transformer/encoderblock_0/LayerNorm_2/scale":
            arrays["Transformer/encoderblock_0/LayerNorm_1/scale"]}, "both are what|are both what"),
        (lambda arrays: {"params/" + n: a for n, a in arrays.items()} | {"stranger": np.ones(2)},
         None),
    ],
)  # fmt: skip
def test_another_set_of_arrays_is_refused(tmp_path, change, expected):
    path = save(tmp_path / "w.npz", change(original("class")[1]))
    if expected is None:
        assert open_npz_weights(path).ignored.keys() == {"stranger"}
    elif expected.startswith("missing|"):  # without its token it is a file of another model
        assert any(line.startswith("pool='mean'") for line in open_npz_weights(path).assumed)
    else:
        with pytest.raises(BadInput, match=expected) as caught:
            open_npz_weights(path)
        assert str(path) in str(caught.value)


def test_pickles_are_never_read(tmp_path):
    path = save(tmp_path / "w.npz", original("class")[1] | {"cls": np.array([{}], object)})
    with pytest.raises(BadInput, match="pickled objects"):
        open_npz_weights(path)


def test_a_file_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", cls=np.zeros((1, 1, 40_000_000), np.uint8))
    with pytest.raises(BadInput, match="would unpack to"):
        open_npz_weights(tmp_path / "w.npz")


def test_many_blocks_in_one_array_are_refused(tmp_path):
    arrays = stacked(original("class")[1])
    many = {n: np.repeat(a, 501, 0) if "encoderblock/" in n else a for n, a in arrays.items()}
    with pytest.raises(BadInput, match="1002 blocks"):
        open_npz_weights(save(tmp_path / "w.npz", many))


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1, -30])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = save(tmp_path / "w.npz", original("class")[1])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match="damaged"):
        open_npz_weights(path)


def test_a_flipped_byte_of_an_array_is_refused_when_it_is_read(tmp_path):
    path = save(tmp_path / "w.npz", original("class")[1])
    data = bytearray(path.read_bytes())
    data[data.index(b"\x93NUMPY") + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match="damaged"):
        jax.tree.map(np.asarray, open_npz_weights(path).tree)


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    arrays = to_npz(open_npz_weights(save(tmp_path / "w.npz", original("class")[1])).tree, {
        "depth": 2, "heads": 2, "eps": 1e-6})  # fmt: skip
    for name in "ab":
        write_npz(tmp_path / name, arrays)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(io.BytesIO((tmp_path / "a").read_bytes())) as archive:
        assert archive.testzip() is None


def test_the_table_reads_what_it_writes():
    _, arrays = original("class")
    fields = {"depth": 2}
    leaves = NPZ.spell("vit", fields) + NPZ.spell("block", fields)
    tree, ignored = to_tljax({n: held(a) for n, a in arrays.items()}, leaves, NPZ)
    assert not ignored and len(flatten(tree)) == len(arrays)
