"""Models: pure Linen, made of `tljax.layers` alone."""

from flax import linen as nn

from tljax.models.bert import Bert
from tljax.models.clip import ClipText
from tljax.models.resnet import ResNet
from tljax.models.vit import ViT

MODELS: dict[str, type[nn.Module]] = {
    "vit": ViT,
    "resnet": ResNet,
    "bert": Bert,
    "clip_text": ClipText,
}
"""Architecture -> class: the names that configs, runs and weights use."""
