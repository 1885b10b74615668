"""The doors: what each port does, and each layer against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from tljax import layers
from tljax.layers import BatchNorm, Conv, Dense, Dropout, DropPath, Embed, GroupNorm, LayerNorm
from tljax.types import BadInput

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def moved(tree, seed=0):
    """Move every leaf of an initial tree: zero biases and unit scales hide bugs."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * random.normal(size=leaf.shape).astype(np.float32), tree
    )


def start(module, *inputs, seed=0):
    return moved(jax.jit(module.init)(KEY, *inputs), seed)


def as_numpy(tree):
    """Free a tree from jax's rule against implicit rank promotion."""
    return jax.tree.map(np.asarray, tree)


def near(ours, expected, tolerance=2e-6):
    """Assert equality relative to the largest value: 2e-6 is float32 rounding in short sums."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


# Dense and its LoRA port


def test_dense_flattening_equals_einsum_with_gradients():
    x, direction = normal(2, 3, 5), normal(2, 3, 4, seed=1)
    dense = Dense(4)
    variables = start(dense, x)

    def by_einsum(variables, x):
        leaves = variables["params"]
        return jnp.einsum("bli,io->blo", x, leaves["kernel"]) + leaves["bias"][None, None]

    for function in (
        lambda f: f,
        lambda f: jax.grad(lambda v, x: (f(v, x) * direction).sum(), (0, 1)),
    ):
        ours, expected = function(dense.apply)(variables, x), function(by_einsum)(variables, x)
        jax.tree.map(near, ours, expected)


def lora(rows, columns, rank=2, scale=0.5, rate=0.0, b=None):
    return {
        "a": normal(rows, rank, seed=3),
        "b": normal(rank, columns, seed=4) if b is None else b,
        "scale": jnp.asarray(scale),
    } | ({"rate": jnp.asarray(rate)} if rate else {})


def grafted(variables, factors):
    return {"params": variables["params"] | {"lora": factors}}


def test_lora_with_b_zero_is_the_base():
    x, dense = normal(2, 3, 5), Dense(4)
    variables = start(dense, x)
    factors = lora(5, 4, b=jnp.zeros((2, 4)))
    np.testing.assert_array_equal(
        dense.apply(grafted(variables, factors), x), dense.apply(variables, x)
    )


def test_lora_equals_the_folded_kernel():
    x, dense = normal(2, 3, 5), Dense(4)
    variables, factors = start(dense, x), lora(5, 4)
    kernel = variables["params"]["kernel"] + 0.5 * factors["a"] @ factors["b"]
    folded = {"params": variables["params"] | {"kernel": kernel}}
    near(dense.apply(grafted(variables, factors), x), dense.apply(folded, x))


@pytest.mark.parametrize("magnitude", [{}, {"magnitude": jnp.arange(1.0, 5.0)}])
def test_lora_works_on_a_bfloat16_base(magnitude):
    x, dense = normal(2, 3, 5), Dense(4, dtype=jnp.bfloat16)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), start(dense, x))
    factors = lora(5, 4) | magnitude
    loss = lambda factors: dense.apply(grafted(variables, factors), x).astype(jnp.float32).sum()  # noqa: E731
    gradients = jax.grad(loss)(factors)
    assert {leaf.dtype for leaf in gradients.values()} == {jnp.dtype(jnp.float32)}
    assert np.abs(gradients["b"]).max() > 0


def test_lora_dropout_falls_on_its_own_input_only():
    x, dense = jnp.ones((1, 4000)), Dense(1, use_bias=False)
    variables = {"params": {"kernel": jnp.ones((4000, 1))}}
    factors = lora(4000, 1, rank=1, scale=1.0, rate=0.25)
    factors |= {"a": jnp.full((4000, 1), 1 / 4000), "b": jnp.ones((1, 1))}
    tree = grafted(variables, factors)
    run = jax.jit(dense.apply)
    near(run(tree, x), [[4001.0]])
    with_rng = run(tree, x, rngs={"dropout": KEY}) - 4000
    # The mean of 4000 kept-or-dropped ones is 1 with a standard deviation of .009.
    assert 0 < abs(float(with_rng[0, 0]) - 1) < 0.05
    still = grafted(variables, {name: x for name, x in factors.items() if name != "rate"})
    np.testing.assert_array_equal(run(still, x, rngs={"dropout": KEY}), run(still, x))


def test_lora_dropout_differentiates_with_the_same_mask():
    x, dense = normal(3, 5), Dense(4)
    variables, factors = start(dense, x), lora(5, 4, rate=0.5)

    @jax.jit
    def total(b):
        tree = grafted(variables, factors | {"b": b})
        return dense.apply(tree, x, rngs={"dropout": KEY}).sum()

    b = factors["b"]
    direction = normal(2, 4, seed=9)
    near(jnp.vdot(jax.grad(total)(b), direction), total(b + direction) - total(b), 1e-4)


def with_magnitude(factors, columns):
    return factors | {"magnitude": 0.5 + jnp.abs(normal(columns, seed=5))}


@pytest.mark.torch
def test_dora_equals_peft(peft):
    import torch

    linear = torch.nn.Linear(5, 4)
    config = peft.LoraConfig(
        r=2, lora_alpha=1.0, lora_dropout=0.0, use_dora=True, target_modules=["0"]
    )
    model = peft.get_peft_model(torch.nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    x, direction, dense = normal(2, 3, 5), normal(2, 3, 4, seed=1), Dense(4)
    variables, factors = start(dense, x), with_magnitude(lora(5, 4, scale=0.5), 4)
    theirs = {
        "a": layer.lora_A["default"].weight,
        "b": layer.lora_B["default"].weight,
        "magnitude": layer.lora_magnitude_vector["default"].weight,
    }
    with torch.no_grad():
        for name, leaf in theirs.items():
            leaf.copy_(torch.tensor(np.array(factors[name]).T))
        linear.weight.copy_(torch.tensor(np.array(variables["params"]["kernel"]).T))
        linear.bias.copy_(torch.tensor(np.array(variables["params"]["bias"])))

    y = model(torch.tensor(np.array(x)))
    near(dense.apply(grafted(variables, factors), x), y.detach())
    (y * torch.tensor(np.array(direction))).sum().backward()
    total = lambda factors: (dense.apply(grafted(variables, factors), x) * direction).sum()  # noqa: E731
    gradients = jax.grad(total)(factors)
    for name, leaf in theirs.items():
        near(gradients[name], leaf.grad.numpy().T, 2e-6)


def test_dora_with_the_lengths_of_its_kernel_is_lora():
    x, dense = normal(2, 3, 5), Dense(4)
    variables, factors = start(dense, x), lora(5, 4)
    kernel = variables["params"]["kernel"] + 0.5 * factors["a"] @ factors["b"]
    lengths = factors | {"magnitude": jnp.linalg.norm(kernel, axis=0)}
    plain = dense.apply(grafted(variables, factors), x)
    near(dense.apply(grafted(variables, lengths), x), plain)


# Attention


def in_torch(attention, heads):
    """Return torch's own attention with the weights of ours."""
    import torch

    theirs = torch.nn.MultiheadAttention(8, heads, batch_first=True)
    inputs = [attention[name] for name in ("query", "key", "value")]
    with torch.no_grad():
        for leaf, name in ((theirs.in_proj_weight, "kernel"), (theirs.in_proj_bias, "bias")):
            leaf.copy_(torch.tensor(np.concatenate([np.asarray(x[name]).T for x in inputs])))
        theirs.out_proj.weight.copy_(torch.tensor(np.array(attention["out"]["kernel"]).T))
        theirs.out_proj.bias.copy_(torch.tensor(np.array(attention["out"]["bias"])))
    return theirs


@pytest.mark.torch
def test_attention_of_other_tokens_equals_torch():
    import torch

    x, query, attention = normal(2, 5, 8), normal(2, 3, 8, seed=1), layers.Attention(2)
    variables = start(attention, x)
    theirs = in_torch(variables["params"], 2)
    q, k = (torch.tensor(np.array(value)) for value in (query, x))
    near(attention.apply(variables, x, query=query), theirs(q, k, k)[0].detach(), 5e-6)


def test_a_causal_token_does_not_see_what_follows():
    x, attention = normal(2, 5, 8), layers.Attention(2, causal=True)
    variables = start(attention, x)
    read = jax.jit(jax.jacobian(lambda x: attention.apply(variables, x[None])[0].sum(1)))
    reads = np.abs(read(x[0])).sum(2) > 0  # [token, token it reads]
    np.testing.assert_array_equal(reads, np.tri(5, dtype=bool))


def test_query_and_key_norms_standardise_every_head():
    x, attention = normal(2, 5, 8), layers.Attention(2, qkv_bias=False, qk_norm=1e-6)
    variables = start(attention, x)
    params = variables["params"]
    assert set(params["query"]) == {"kernel"} and set(params["out"]) == {"kernel", "bias"}
    assert params["norm_query"]["scale"].shape == (4,)
    # Standardised, the scores do not feel the size of queries and keys.
    large = params | {name: {"kernel": 9 * params[name]["kernel"]} for name in ("query", "key")}
    near(attention.apply({"params": large}, x), attention.apply(variables, x), 1e-5)


# What a CPU does in its own way


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_the_gradient_of_a_product_is_exact_whichever_side_is_wider(shape):
    rows, kernel, direction = normal(9, shape[0]), normal(*shape, seed=1), normal(9, shape[1])
    _, pull = jax.vjp(layers.product_on_cpu, rows, kernel)
    expected = np.asarray(direction) @ np.asarray(kernel).T, np.asarray(rows).T @ direction
    jax.tree.map(near, pull(direction), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_heads_first_equals_jax_with_gradients(masked, causal):
    heads = [normal(3, 7, 2, 4, seed=seed) for seed in range(3)]
    # The last text has no token at all: its rows are means, not NaN.
    mask = jnp.asarray(np.arange(7) < np.array([[7], [4], [0]]))[:, None, None]
    mask = mask if masked else None

    def both(attend):
        y, pull = jax.vjp(lambda *heads: attend(*heads, mask, causal), *heads)
        return y, *pull(normal(*y.shape, seed=3))

    for ours, expected in zip(
        both(layers.attend_heads_first), both(layers.attend_by_jax), strict=True
    ):
        near(ours, expected, 1e-5)  # the softmax divides before its product, or after it


def test_attention_with_heads_first_keeps_its_weights_in_float32():
    heads = [normal(2, 7, 2, 4, seed=seed).astype(jnp.bfloat16) for seed in range(3)]
    ours = layers.attend_heads_first(*heads, None, False)
    assert ours.dtype == jnp.bfloat16
    exact = layers.attend_heads_first(*(x.astype(jnp.float32) for x in heads), None, False)
    near(ours.astype(jnp.float32), exact, 2**-7)  # a rounding of the scaled query, weights, sum


def test_gelu_is_exact():
    x = np.linspace(-12, 12, 400001).astype(np.float32).astype(np.float64)
    phi = 0.5 + 0.5 * scipy.special.erf(x * np.sqrt(0.5))
    slope = phi + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    gelu = layers.ACTIVATIONS["gelu"]
    y, pull = jax.vjp(gelu, jnp.asarray(x, jnp.float32))
    # Four roundings of numbers up to 1 (erf, its half, the sum, the product), relative to |x|.
    assert (np.abs(np.asarray(y, np.float64) - x * phi) <= 2.4e-7 * np.maximum(np.abs(x), 1)).all()
    assert np.abs(np.asarray(pull(jnp.ones_like(y))[0], np.float64) - slope).max() < 5e-7


# Convolution


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        *[(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (4, 4, 0), (3, 3, 1), (7, 2, 3)],
        *[((2, 5), (2, 5), 0), ((3, 2), (1, 2), 1)],
    ],
)
def test_convolution_on_a_cpu_equals_xla_with_gradients(size, stride, padding):
    size, stride = layers.pair(size), layers.pair(stride)
    x, kernel = normal(2, 11, 10, 3), normal(*size, 3, 4, seed=1)
    apart = size in ((1, 1), stride)

    def both(convolve):
        y, pull = jax.vjp(lambda x, k: convolve(x, k, stride, padding), x, kernel)
        return y, *pull(normal(*y.shape, seed=2))

    expected = jax.jit(lambda: both(layers.conv_by_xla))()
    for convolve in (layers.conv_on_cpu, layers.conv_as_matmul)[: 1 + apart]:
        for ours, theirs in zip(jax.jit(lambda by=convolve: both(by))(), expected, strict=True):
            near(ours, theirs, 1e-5)  # sums of up to 150 products, in another order


@pytest.mark.parametrize("size", [(9, 12), (8, 7)])
def test_a_maximum_on_a_cpu_equals_flax_with_gradients(size):
    x, fill = normal(2, *size, 4), normal(2, *[(n - 1) // 2 for n in size], 4, seed=1)

    def both(pool):
        y, pull = jax.vjp(pool, x)
        return y, *pull(fill)

    expected = both(lambda x: nn.max_pool(x, (3, 3), (2, 2)))
    for ours, theirs in zip(both(layers.max_pool), expected, strict=True):
        near(ours, theirs, 1e-6)  # a pixel's gradient is a sum of up to four


def test_conv_standardizes_every_filter():
    x = normal(2, 6, 6, 3)
    conv = Conv(4, 3, padding=1, standardize=True)
    variables = start(conv, x)
    kernel = np.asarray(variables["params"]["kernel"])
    kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-10)
    near(conv.apply(variables, x), layers.conv_by_xla(x, jnp.array(kernel), (1, 1), 1), 1e-5)


# Norms


def test_layer_norm_adds_its_eps_to_the_variance():
    x = 1e-6 * normal(3, 8)  # ordinary inputs would hide the eps
    norm = LayerNorm(1e-12)
    variables = start(norm, x)
    leaves = as_numpy(variables["params"])
    wide = np.asarray(x, np.float64)
    plain = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-12)
    near(norm.apply(variables, x), plain * leaves["scale"] + leaves["bias"])


def test_layer_norm_keeps_its_digits_under_a_large_mean():
    x = normal(3, 64)
    norm = LayerNorm(1e-6)
    variables = start(norm, x)
    # x + 1000 itself rounds to 6e-5; a one-pass variance would be off by 1e-1.
    near(norm.apply(variables, x + 1000), norm.apply(variables, x), 2e-4)


def test_statistics_are_float32_under_bfloat16():
    x = (100 + normal(4, 256)).astype(jnp.bfloat16)
    norm = LayerNorm(1e-6, jnp.bfloat16)
    variables = norm.init(KEY, x)
    exact = LayerNorm(1e-6).apply(variables, x.astype(jnp.float32))
    near(norm.apply(variables, x), exact, 2**-8)  # one rounding of the output


def test_group_norm_standardizes_groups_of_an_image():
    x = normal(2, 3, 3, 64)
    norm = GroupNorm(1e-5)
    y = np.asarray(norm.apply(norm.init(KEY, x), x)).reshape(2, 9, 32, 2)
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var((1, 3)), 1, atol=1e-4)  # the eps against variances near 1


@pytest.fixture
def batch_norm():
    x = 2 + 3 * normal(5, 4, 4, 6)
    norm = BatchNorm(1e-5)
    variables = jax.jit(norm.init)(KEY, x)
    stats = {"mean": normal(6, seed=5), "var": 0.5 + jnp.square(normal(6, seed=6))}
    return norm, moved({"params": variables["params"]}) | {"batch_stats": stats}, x


def test_initialising_does_not_touch_the_statistics():
    variables = BatchNorm(1e-5).init(KEY, 5 + normal(4, 3))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))


def test_batch_norm_reads_its_averages_unless_they_are_mutable(batch_norm):
    norm, variables, x = batch_norm
    stats, leaves = as_numpy(variables["batch_stats"]), as_numpy(variables["params"])
    plain = (np.asarray(x) - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    near(norm.apply(variables, x), plain * leaves["scale"] + leaves["bias"])


def test_batch_norm_uses_and_averages_the_batch_when_mutable(batch_norm):
    norm, variables, x = batch_norm
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    x = np.asarray(x)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))  # biased, as in Flax
    leaves = as_numpy(variables["params"])
    near(y, (x - mean) / np.sqrt(var + 1e-5) * leaves["scale"] + leaves["bias"])
    old, new = variables["batch_stats"], updates["batch_stats"]
    near(new["mean"], 0.9 * old["mean"] + 0.1 * mean)
    near(new["var"], 0.9 * old["var"] + 0.1 * var)


def test_fixed_statistics_are_read_and_never_change(batch_norm):
    norm, variables, x = batch_norm
    still = norm.apply(variables, x)
    fixed = {"params": variables["params"], "fixed_stats": variables["batch_stats"]}
    y, updates = norm.apply(fixed, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, still)
    assert not jax.tree.leaves(updates)
    # Averages that are there as well stay as they are.
    both = fixed | {"batch_stats": {"mean": jnp.zeros(6), "var": jnp.ones(6)}}
    y, updates = norm.apply(both, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, still)
    jax.tree.map(np.testing.assert_array_equal, updates, {"batch_stats": both["batch_stats"]})


# Table, dropout, errors, sharding


def test_embed_looks_up_and_attends_to_the_same_table():
    ids = jnp.array([[3, 0], [1, 3]])
    embed = Embed(5, 4)
    variables = embed.init(KEY, ids)
    table = variables["params"]["embedding"]
    rows = embed.apply(variables, ids)
    np.testing.assert_array_equal(rows, table[ids])
    near(embed.apply(variables, rows, method="attend"), rows @ table.T)


@pytest.mark.parametrize("kind", [Dropout, DropPath])
def test_dropout_needs_its_rng_and_keeps_the_mean(kind):
    x = jnp.ones((20_000, 2))
    module = kind(0.25)
    np.testing.assert_array_equal(module.apply({}, x), x)
    y = np.asarray(module.apply({}, x, rngs={"dropout": KEY}))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.03  # 5 standard deviations
    together = (y[:, 0] == y[:, 1]).mean()
    assert together == 1 if kind is DropPath else together < 0.7
    np.testing.assert_array_equal(kind(0.0).apply({}, x, rngs={"dropout": KEY}), x)


def test_heads_must_divide_the_width():
    with pytest.raises(BadInput, match="heads=3"):
        layers.Attention(3).init(KEY, normal(1, 2, 8))


def constraints(function, *inputs):
    """Count the sharding constraints in a traced function."""
    return str(jax.make_jaxpr(function)(*inputs)).count("sharding_constraint[")


def mesh_of(kind, *names):
    sizes = (2, 2, 2)[: len(names)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def test_activations_are_pinned_at_every_block_boundary():
    blocks = layers.Blocks(lambda index: Dense(6, name=str(index)), depth=3)
    x = normal(8, 6)
    variables = start(blocks, x)
    assert constraints(blocks.apply, variables, x) == 0
    mesh = mesh_of(jax.sharding.AxisType.Auto, "data", "fsdp", "tensor")
    with jax.set_mesh(mesh):
        assert constraints(functools.partial(blocks.apply), variables, x) == 4
        y = jax.jit(functools.partial(blocks.apply))(variables, x)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(("data", "fsdp"))), 2)
    near(y, blocks.apply(variables, x))


@pytest.mark.parametrize("names", [("model",), ("data",)])
def test_other_meshes_are_left_alone(names):
    with jax.set_mesh(mesh_of(jax.sharding.AxisType.Auto, *names)):
        assert constraints(layers.constrain_batch, normal(4, 2)) == 0


def test_explicit_axes_are_left_alone():
    with jax.set_mesh(mesh_of(jax.sharding.AxisType.Explicit, "data", "fsdp")):
        assert constraints(layers.constrain_batch, normal(4, 2)) == 0


def test_blocks_above_the_one_read_exist_but_do_not_run():
    def make(index):
        return Dense(4, name=str(index))

    x = normal(2, 4)
    variables = start(layers.Blocks(make, 3, "blocks/1"), x)
    assert sorted(variables["params"]) == ["0", "1", "2"]
    loss = lambda v: layers.Blocks(make, 3, "blocks/1").apply(v, x).sum()  # noqa: E731
    gradients = jax.grad(loss)(variables)["params"]
    assert np.abs(gradients["1"]["kernel"]).max() > 0
    assert not np.abs(gradients["2"]["kernel"]).any()
