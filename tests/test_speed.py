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


def case(speed, kind, **other):
    fields = {
        "vit": (TINY | other, 32),
        "bert": (TINY | {"vocab_size": 40}, 8),
        "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, 32),
    }
    return speed["Case"](kind, *fields[kind])


@pytest.mark.parametrize(
    ("kind", "method", "low"),
    [
        ("vit", "lora", False),
        ("vit", "full", True),
        ("bert", "ia3", False),
        ("resnet", "norm", False),
        *(
            pytest.param(*case, False, marks=pytest.mark.slow)
            for case in [
                ("bert", "full"),
                ("bert", "last 2"),
                ("bert", "bitfit"),
                ("vit", "dora"),
                ("vit", "vera"),
                ("resnet", "probe"),
            ]
        ),
    ],
)
@pytest.mark.few(2)
def test_both_sides_make_the_same_steps(speed, kind, method, low):
    # The first loss shows the weights, the next ones the gradients and the optimizer.
    runs = speed["pair"](case(speed, kind), method, 8, "cpu", False, low)
    losses = speed["check"](runs, low, method)
    assert set(losses) == {"tljax", "torch"}
    assert losses["tljax"][0] != losses["tljax"][-1]


def test_a_method_that_torch_lacks_runs_alone(speed):
    wide = case(speed, "vit", hidden_size=64, intermediate_size=64)  # nf4 has blocks of 64
    runs = speed["pair"](wide, "qlora", 8, "cpu", False, False)
    assert list(speed["check"](runs, False, "qlora")) == ["tljax"]


def test_sides_that_differ_are_refused(speed):
    runs = {"tljax": lambda steps: [1.0] * steps, "torch": lambda steps: [1.001] * steps}
    with pytest.raises(AssertionError, match="step 0"):
        speed["check"](runs, False, "vera")


def test_later_losses_are_compared_where_nothing_random_differs(speed):
    runs = {"tljax": lambda steps: [1.0, 2.0, 3.0], "torch": lambda steps: [1.0, 2.0, 3.1]}
    with pytest.raises(AssertionError, match="step 2"):
        speed["check"](runs, False, "lora")
    assert speed["check"](runs, False, "vera")["torch"] == [1.0, 2.0, 3.1]


def test_sides_that_train_other_numbers_are_refused(speed, monkeypatch):
    pair = speed["pair"]
    monkeypatch.setitem(pair.__globals__, "freeze", lambda model, method: model)
    with pytest.raises(AssertionError, match="probe: tljax trains"):
        pair(case(speed, "vit"), "probe", 8, "cpu", False, False)


def test_a_method_is_compared_with_the_others_of_its_side(speed):
    own = {"full": 3.0, "lora": 2.0, "qlora": 2.5}
    assert speed["beside"]("full", own) == []
    assert [line.split()[0] for line in speed["beside"]("lora", own)] == ["1.500"]
    assert [line.split()[0] for line in speed["beside"]("qlora", own)] == ["1.200", "0.800"]


def test_the_count_of_operations_is_the_published_one(speed):
    # ViT-B/16 at 224: 17.6 GMACs forward (Dosovitskiy et al. 2020, as timm reports it), 3 passes.
    count = speed["flops"](speed["CASES"]["vit-b16"], "full")
    assert count == pytest.approx(3 * 2 * 17.5e9, rel=0.02)
