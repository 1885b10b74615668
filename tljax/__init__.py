"""Transfer learning in JAX: parameters are data, transfer is tree surgery, training is one step.

pre = tljax.load("path or name")   # a model and its weights, of any known format
tljax.export(pre, "folder", to="hf")
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Find what the package offers when it is asked for: importing tljax costs nothing."""
    if name in ("load", "export", "Pretrained"):
        from tljax.exporter import export
        from tljax.pretrained import Pretrained, load

        return {"load": load, "export": export, "Pretrained": Pretrained}[name]
    raise AttributeError(f"module 'tljax' has no attribute {name!r}")
