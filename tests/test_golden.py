"""The first losses of every recipe in configs/, as they were when it was last looked at.

A changed default, order of the data, initialisation or step shows here, also where it breaks no
property.  If a change was meant, say so in the CHANGELOG, measure again what the config and the
README say, and write new ones:

    GOLDEN=write pytest -m "slow or not slow" tests/test_golden.py
"""

import itertools
import json
import os
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from tljax.build import build, precision, read_config
from tljax.plan import compile_step
from tljax.train import advance

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).with_name("golden.json")
STEPS = 4
NEEDS = {
    "digits": (),
    "fashion_dinov2": ("vit", "fashion"),
    "pretrain_bert": ("brown", "gcide", "fortunes", "wordnet"),
    "pretrain_resnet": ("fashion",),
    "pretrain_vit": ("fashion",),
    "sentiment_minilm": ("minilm", "vader"),
}


def recipes():
    """List every config with each of its words."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        for word in runpy.run_path(str(path)).get("CHOICES", [""]):
            marks = [pytest.mark.assets(*NEEDS[path.stem])] if NEEDS[path.stem] else []
            marks += [pytest.mark.slow] if marks else []
            name = f"{path.stem}:{word}" if word else path.stem
            yield pytest.param(name, id=name, marks=marks)


def losses_of(recipe):
    """Return the first losses of a recipe, of its own run but for the device: one."""
    name, _, word = recipe.partition(":")
    given = f"{ROOT / 'configs' / name}.py" + (f":{word}" if word else "")
    config = read_config(given, {"run.features": "off"})
    with precision(config):
        experiment = build(config, devices=jax.devices()[:1])
        born = experiment.birth(jax.random.key(config.seed))
        steps = advance(experiment, compile_step(experiment), born)
        return [float(metrics["loss"]) for _, _, metrics in itertools.islice(steps, STEPS)]


@pytest.mark.parametrize("recipe", list(recipes()))
def test_the_first_losses_of_a_recipe_are_what_they_were(recipe):
    found = losses_of(recipe)
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("GOLDEN") == "write":
        known[recipe] = [round(loss, 6) for loss in found]
        FILE.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    assert recipe in known, f"{recipe} has no losses in {FILE.name}; see the top of this file"
    # Two versions of XLA, with and without optimising, gave three recipes within 2e-7 of each
    # other; the rest is room for other processors.
    np.testing.assert_allclose(found, known[recipe], rtol=1e-4, err_msg=__doc__)
