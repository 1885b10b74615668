"""The path language: globs, labels, splits, edits, and leaves that nothing reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tljax.tree import edit, flatten, join, label, matches, split, unflatten, unread
from tljax.types import Aux, BadInput, Term

names = st.text("abkx01", min_size=1, max_size=3)
trees = st.recursive(
    st.integers(0, 9), lambda t: st.dictionaries(names, t, min_size=1, max_size=4), max_leaves=12
).filter(lambda t: isinstance(t, dict))


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("params/head/**", "params/head/kernel", True),
        ("params/head/**", "params/head", False),
        ("**/kernel", "kernel", True),
        ("**/kernel", "params/a/b/kernel", True),
        ("params/**/query", "params/blocks/0/attention/query", True),
        ("params/**/query", "params/query", True),
        ("params/*/query", "params/blocks/0/query", False),
        ("params/blocks/1*/**", "params/blocks/11/norm/scale", True),
        ("params/blocks/1*/**", "params/blocks/2/norm/scale", False),
        ("a.c", "abc", False),
    ],
)
def test_globs(glob, path, expected):
    assert matches(glob, path) is expected


@settings(suppress_health_check=[HealthCheck.too_slow])  # of the first draw, on a busy machine
@given(trees)
def test_flatten_and_unflatten_are_inverse(tree):
    assert unflatten(flatten(tree)) == tree


@given(trees, st.randoms())
def test_split_then_join_is_the_identity(tree, random):
    roles = jax.tree.map(lambda _: random.choice(["train", "track", "freeze"]), tree)
    parts = split(tree, roles)
    assert join(*parts) == tree
    counts = [len(flatten(part)) for part in parts]
    assert sum(counts) == len(flatten(tree))
    is_hole = lambda x: x is None  # noqa: E731
    shapes = {str(jax.tree.structure(part, is_leaf=is_hole)) for part in parts}
    assert len(shapes) == 1


@given(trees)
def test_first_rule_wins_and_default_fills(tree):
    paths = list(flatten(tree))
    labels = label(tree, [(paths[0], "first"), ("**", "second")], "default")
    assert flatten(labels)[paths[0]] == "first"
    assert all(flatten(labels)[path] == "second" for path in paths[1:])
    assert set(flatten(label(tree, [], "default")).values()) == {"default"}


def test_a_dead_rule_raises_and_names_the_nearest_path():
    with pytest.raises(BadInput, match=r"params/haed/.*params/head/kernel"):
        label({"params": {"head": {"kernel": 0}}}, [("params/haed/kernel", "train")], "freeze")


def test_edit_replaces_matching_subtrees_only():
    tree = {"a": {"kernel": 1}, "b": {"kernel": 2}}
    edited = edit(tree, [("b", lambda node: node | {"lora": 3})])
    assert edited == {"a": {"kernel": 1}, "b": {"kernel": 2, "lora": 3}}
    assert tree == {"a": {"kernel": 1}, "b": {"kernel": 2}}
    with pytest.raises(BadInput, match=r"nearest paths: [^,]"):
        edit(tree, [("c", lambda node: node)])
    assert edit({"a": 1}, [("*", lambda leaf: leaf + 1)]) == {"a": 2}  # not the root itself


def test_unread_finds_leaves_that_cannot_affect_the_loss():
    def objective(tree, batch, key):
        hidden = batch @ tree["used"]
        metric = jnp.sum(tree["metric_only"])
        loss = jnp.sum(jax.nn.relu(hidden)) + jnp.sum(tree["frozen"])
        return {"sum": Term(1.0, loss, jnp.ones(()))}, Aux({"m": (metric, 1)}, {})

    tree = {name: np.ones((3, 3), np.float32) for name in ("used", "metric_only", "frozen", "idle")}
    roles = dict.fromkeys(tree, "train") | {"frozen": "freeze"}
    found = unread(objective, split(tree, roles), jnp.ones((2, 3)), jax.random.key(0))
    assert sorted(found) == ["idle", "metric_only"]
