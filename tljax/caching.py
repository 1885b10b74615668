"""The persistent compilation cache: a program that was compiled once starts at once."""

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache, unless JAX_COMPILATION_CACHE_DIR says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path.home() / ".cache" / "tljax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
