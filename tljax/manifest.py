"""What a saved step must be: a hash of every leaf, however it is sharded, and of every file."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from tljax import storage
from tljax.storage import Place
from tljax.types import BadInput, Tree

NAME = "manifest.json"


class Damaged(Exception):
    """A saved step is not what was saved."""


def by_path(tree: Any) -> dict[str, Any]:
    """Name every leaf of a tree, an optimizer's included, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@jax.jit
def hashes(tree: Any) -> dict[str, UInt32[Array, "2"]]:
    """Hash every leaf: the sum, modulo 2^32, of a hash of each element's index and bits; twice.

    Sums do not depend on their order, so neither on the devices that a leaf lies on.  A change of
    any one element changes each sum for certain (its hash is a bijection of the bits); of several,
    but for a chance of 2^-64.
    """
    return {path: _hash(leaf) for path, leaf in by_path(tree).items()}


def _hash(leaf: Array) -> UInt32[Array, "2"]:
    if leaf.dtype != jnp.bool_:
        leaf = jax.lax.bitcast_convert_type(leaf, f"uint{leaf.dtype.itemsize * 8}")
    bits, index = leaf.astype(jnp.uint32), jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    sums = [
        jnp.sum(
            _mixed(bits ^ _mixed(index * jnp.uint32(odd) + jnp.uint32(odd >> 8))), dtype=jnp.uint32
        )
        for odd in (0x9E3779B1, 0x85EBCA77)
    ]
    return jnp.stack(sums)


def _mixed(x: Array) -> Array:
    """Spread every bit over all of a word: the finalizer of MurmurHash3 (Appleby)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))


def describe(tree: Tree, digests: Mapping[str, Array]) -> dict[str, list[Any]]:
    """List dtype, shape and hash of every leaf, as JSON has them."""
    told = {path: "".join(f"{word:08x}" for word in two.tolist()) for path, two in digests.items()}
    leaves = by_path(tree)
    return {path: [str(x.dtype), list(x.shape), told[path]] for path, x in leaves.items()}


def sizes(folder: Place) -> dict[str, int]:
    """List the bytes of every file below a folder, without its manifest."""
    return {name: size for name, size in storage.sizes(folder).items() if name != NAME}


def write(folder: Place, content: Mapping[str, Any]) -> None:
    """Write a folder's manifest when all else in it is there to stay."""
    known = storage.digests(folder)
    files = {name: [size, known[name]] for name, size in sizes(folder).items()}
    storage.sync(folder)
    whole = dict(content) | {"files": files}
    storage.write_bytes(folder / NAME, json.dumps(whole | {"sum": _sum(whole)}).encode())


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(folder: Place, files: bool = True) -> dict[str, Any]:
    """Read a folder's manifest, and compare its files with it if asked to; raises Damaged."""
    try:
        content = json.loads((folder / NAME).read_text())
        if content.pop("sum") != _sum(content):
            raise ValueError
    except FileNotFoundError:
        raise Damaged(f"it has no {NAME}") from None
    except (ValueError, AttributeError, TypeError, KeyError):
        raise Damaged(f"{NAME} is damaged") from None
    if files:
        _compare(folder, content["files"])
    return content


def _compare(folder: Place, files: Mapping[str, list[Any]]) -> None:
    found, saved = sizes(folder), {name: size for name, (size, _) in files.items()}
    for name in sorted(saved.keys() | found.keys()):
        if saved.get(name) != found.get(name):
            have, want = (
                f"{n} bytes" if n is not None else "absent"
                for n in (found.get(name), saved.get(name))
            )
            raise Damaged(f"{name}: {have}, expected {want}")
    known = storage.digests(folder)
    for name, (_, saved_as) in files.items():
        # A disk and a store tell different hashes: of what was copied between them, only sizes.
        same_kind = (":" in known[name]) == (":" in saved_as)
        if same_kind and known[name] != saved_as:
            raise Damaged(f"{name} is not what was saved: it has the right size and other bytes")


def require_fit(content: Mapping[str, Any], wanted: Any) -> None:
    """Raise BadInput naming the first leaf that a run of `wanted` has in another form."""
    have = {path: f"{dtype}{shape}" for path, (dtype, shape, _) in content["leaves"].items()}
    want = {path: f"{np.dtype(x.dtype)}{list(x.shape)}" for path, x in by_path(wanted).items()}
    for path in sorted(want.keys() | have.keys()):
        if want.get(path) != have.get(path):
            raise BadInput(
                f"it does not fit this run: {path} is {have.get(path, 'absent')} on disk and "
                f"{want.get(path, 'absent')} here"
            )


def verify(content: Mapping[str, Any], tree: Any) -> None:
    """Compare every leaf that was read with its hash; raises Damaged naming the first one."""
    found = describe(tree, jax.device_get(hashes(tree)))
    for path, own in found.items():
        if content["leaves"].get(path) != own:
            raise Damaged(f"{path} is not what was saved")
