"""torchvision's operators by name, where its compiled ones do not load."""

import functools
import importlib.util
from pathlib import Path
from typing import Any


@functools.cache
def declare_torchvision_ops() -> Any:
    """Declare torchvision's operators where its compiled ones do not load.

    Its wheel asks for the one torch it was built with.  Importing it, as transformers, timm and
    peft do, takes no more than the names.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return None
    try:
        for path in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(path)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor x) -> Tensor")
        return library  # its declarations live as long as it does
    return None
