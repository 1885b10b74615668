"""Loading: what is filled, what is not, and that nothing goes unsaid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax.edits.load import load
from tljax.tree import flatten, unflatten
from tljax.types import BadInput

KEY = jax.random.key(0)
SHAPES = {
    "params/embed/pos": (1, 5, 4),
    "params/blocks/0/mlp/up/kernel": (4, 8),
    "params/blocks/0/mlp/up/bias": (8,),
    "params/head/kernel": (4, 3),
    "params/head/bias": (3,),
    "batch_stats/norm/mean": (4,),
}
HEAD = (("params/head/**", "new task"),)


def make_tree(seed=0, drop=(), **shapes):
    """Draw a tree of `SHAPES`, less those below `drop`, with other `shapes` by the last name."""
    rng = np.random.default_rng(seed)
    wanted = {path: shapes.get(path.split("/")[-1], shape) for path, shape in SHAPES.items()}
    return unflatten(
        {
            path: rng.normal(size=shape).astype(np.float32)
            for path, shape in wanted.items()
            if not path.startswith(tuple(drop))
        }
    )


def abstract(tree):
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))


def ignored(report):
    return {row.path: row.detail for row in report.rows if row.status == "ignored"}


def test_every_leaf_of_an_equal_tree_is_loaded_bitwise():
    source, start = make_tree(0), make_tree(1)
    edit, report = load(source, abstract(start))
    filled = edit(start, KEY)
    assert jax.tree.structure(filled) == jax.tree.structure(start)
    jax.tree.map(np.testing.assert_array_equal, filled, source)
    assert report.counts() == {"loaded": len(SHAPES)}
    assert report.share == 1


def test_values_are_arguments_of_jit_and_take_the_dtype_of_the_target():
    source = make_tree(0)
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), make_tree(1))
    edit, _ = load(source, abstract(start))
    assert len(jax.tree.leaves(edit)) == len(SHAPES)
    traced = jax.jit(lambda edit, tree: edit(tree, KEY)).trace(edit, start)
    assert sum(np.size(constant) for constant in traced.jaxpr.consts) <= np.size(KEY)
    filled = jax.jit(lambda edit, tree: edit(tree, KEY))(edit, start)
    for path, leaf in flatten(filled).items():
        assert leaf.dtype == jnp.bfloat16
        expected = flatten(source)[path].astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(leaf), expected)


def test_a_fresh_leaf_keeps_its_value_and_its_source_counts_as_unused():
    source, start = make_tree(0), make_tree(1, kernel=(4, 8), bias=(8,))
    edit, report = load(source, abstract(start), fresh=HEAD)
    filled = flatten(edit(start, KEY))
    for path, leaf in flatten(start).items():
        expected = leaf if path.startswith("params/head/") else flatten(source)[path]
        np.testing.assert_array_equal(filled[path], expected)
    assert report.counts() == {"loaded": 4, "fresh": 2, "ignored": 2}
    assert report.share == pytest.approx(1 - 15 / sum(np.prod(s) for s in SHAPES.values()))
    assert ignored(report) == {"params/head/kernel": "new task", "params/head/bias": "new task"}


def test_a_source_without_a_head_is_ordinary():
    edit, report = load(make_tree(0, drop=["params/head"]), abstract(make_tree(1)), fresh=HEAD)
    assert report.counts() == {"loaded": 4, "fresh": 2}
    assert report.share == 1
    start = make_tree(1)
    heads = (tree["params"]["head"]["bias"] for tree in (edit(start, KEY), start))
    np.testing.assert_array_equal(*heads)


def test_a_target_leaf_that_nothing_fills_raises_with_the_nearest():
    with pytest.raises(BadInput, match="the source has no params/head/kernel") as caught:
        load(make_tree(0, drop=["params/head/kernel"]), abstract(make_tree(1)))
    assert "params/head/bias" in str(caught.value)
    assert "`fresh`" in str(caught.value)


def test_a_source_leaf_without_target_raises_until_ignored():
    source, target = make_tree(0), abstract(make_tree(1, drop=["params/head"]))
    with pytest.raises(BadInput, match="the model has no params/head/bias"):
        load(source, target)
    edit, report = load(source, target, ignored=(("params/head/*", "another task"),))
    assert ignored(report)["params/head/bias"] == "another task"
    assert "params/head/bias" not in edit.values


def test_a_leaf_that_is_ignored_and_wanted_must_be_fresh():
    source, target = make_tree(0), abstract(make_tree(1))
    with pytest.raises(BadInput, match="the source has no params/head/kernel"):
        load(source, target, ignored=(("params/head/kernel", "another task"),))


@pytest.mark.parametrize("path", SHAPES)
def test_another_shape_is_refused(path):
    leaves = flatten(make_tree(1))
    leaves[path] = np.zeros((*leaves[path].shape[:-1], 2), np.float32)
    with pytest.raises(BadInput) as caught:
        load(make_tree(0), abstract(unflatten(leaves)))
    message = str(caught.value)
    assert path in message
    assert str(SHAPES[path]) in message
    assert str(leaves[path].shape) in message


@pytest.mark.parametrize("rule", ["fresh", "ignored"])
def test_a_dead_rule_raises(rule):
    with pytest.raises(BadInput, match="params/haed") as caught:
        load(make_tree(0), abstract(make_tree(1)), **{rule: (("params/haed/**", "a reason"),)})
    assert "params/head" in str(caught.value)


def test_filling_another_tree_raises():
    edit, _ = load(make_tree(0), abstract(make_tree(1)))
    with pytest.raises(BadInput, match="params/head/kernel"):
        edit(make_tree(1, drop=["params/head/kernel"]), KEY)


def test_the_table_has_a_line_for_every_leaf_and_the_totals():
    _, report = load(make_tree(0), abstract(make_tree(1)), fresh=HEAD)
    lines = report.table().splitlines()
    assert len(lines) == len(SHAPES) + 2 + 1
    assert all(any(path in line for line in lines) for path in SHAPES)
    assert lines[-1].startswith("4 loaded, 2 fresh, 2 ignored; ")
