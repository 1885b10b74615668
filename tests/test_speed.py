"""The benchmark's two sides are the same model: what it times must agree before it is timed."""

import runpy
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.torch,
    # peft reads a name that transformers has deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
SPEED = Path(__file__).resolve().parent.parent / "benchmarks" / "speed.py"
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def speed(peft):
    return runpy.run_path(SPEED)


def case(speed, kind):
    fields = {
        "vit": (TINY, 32),
        "bert": (TINY | {"vocab_size": 40}, 8),
        "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, 32),
    }
    return speed["Case"](kind, *fields[kind])


@pytest.mark.parametrize(
    ("kind", "method", "low"),
    [
        ("vit", "lora", False),
        ("vit", "full", True),
        ("bert", "full", False),
        ("resnet", "probe", False),
    ],
)
def test_both_sides_make_the_same_steps(speed, kind, method, low):
    # The first loss shows the weights, the next ones the gradients and the optimizer.
    runs = speed["pair"](case(speed, kind), method, 8, "cpu", False, low)
    losses = speed["check"](runs, low)
    assert losses["tljax"][0] != losses["tljax"][-1]


def test_sides_that_differ_are_refused(speed):
    runs = {"tljax": lambda steps: [1.0] * steps, "torch": lambda steps: [1.001] * steps}
    with pytest.raises(AssertionError, match="step 0"):
        speed["check"](runs, False)


def test_the_count_of_operations_is_the_published_one(speed):
    # ViT-B/16 at 224: 17.6 GMACs forward (Dosovitskiy et al. 2020, as timm reports it), 3 passes.
    count = speed["flops"](speed["CASES"]["vit-b16"], "full")
    assert count == pytest.approx(3 * 2 * 17.5e9, rel=0.02)
