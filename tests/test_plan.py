"""Plans: blocks that run again give the same numbers; a step is compiled for TPUs elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BERT, QUICK, RESNET, VIT, abstract_tree, image_batch, random_tree, text_batch

from tljax import build, objectives, plan, sharding
from tljax.__main__ import main
from tljax.config import parse
from tljax.types import BadInput

pytestmark = pytest.mark.once

MODELS = {
    "vit": (dataclasses.replace(VIT, depth=2, dropout=0.1, drop_path=0.1), image_batch()),
    "resnet": (RESNET, image_batch()),
    "bert": (dataclasses.replace(BERT, dropout=0.1), text_batch()),
}
TINY = {
    "data": {"name": "digits", "image_size": 16, "labels": 64, "test": "test[:64]"},
    "model": {"name": "vit", "width": 32, "depth": 2, "heads": 2, "mlp": 64, "patch": 4},
    "strategy": {"name": "full"},
    "run": {"steps": 2, "batch": 16},
}


def config(**sections):
    return parse({name: TINY.get(name, {}) | sections.get(name, {}) for name in TINY | sections})


def loss_of(model, tree, batch):
    objective = objectives.make_objective("classify", model)

    def loss(params):
        terms, aux = objective(tree | {"params": params}, batch, jax.random.key(3))
        return terms["classify"].sum / terms["classify"].count, aux.track

    return jax.value_and_grad(loss, has_aux=True)


def runs_again(function, *inputs):
    """Tell whether a function has parts that run again, by a field that they alone have."""
    return "prevent_cse=" in str(jax.make_jaxpr(function)(*inputs))


@pytest.mark.parametrize(
    "name",
    ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "vit")],
)
def test_running_blocks_again_changes_no_number(name):
    """Dropout draws the same bits; sums may differ in the last ones, as the program is another."""
    model, batch = MODELS[name]
    tree, batch = random_tree(model, batch), jax.tree.map(jnp.asarray, batch)
    results = []
    for remat in (False, True):
        step = loss_of(dataclasses.replace(model, remat=remat), tree, batch)
        assert runs_again(step, tree["params"]) == remat
        results.append(jax.jit(step).lower(tree["params"]).compile(QUICK)(tree["params"]))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(results[0][1]))
    # Some gradients are zero in exact arithmetic: the largest one is the scale of their noise.
    close = lambda x, y: np.testing.assert_allclose(y, x, rtol=1e-6, atol=1e-6 * largest)  # noqa: E731
    jax.tree.map(close, *results)


def test_blocks_are_born_the_same():
    model, batch = MODELS["bert"]
    again = dataclasses.replace(model, remat=True)
    inputs = objectives.inputs_of(batch)
    one, two = (str(jax.make_jaxpr(m.init)(jax.random.key(0), *inputs)) for m in (model, again))
    assert one == two


def test_running_blocks_again_is_no_property_of_a_model():
    built = build.build(config(run={"remat": True}))
    assert "remat" not in built.facts["fields"]
    assert built.facts == build.build(config()).facts
    assert runs_again(built.step, *built.abstract, built.data.example_batch)
    with pytest.raises(BadInput, match="no 'remat'"):
        build.build(config(model={"remat": True}))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_convolutions_have_the_form_of_the_target(platform):
    """On the mesh of a TPU that is elsewhere the layers are a TPU's, not this machine's."""
    kind = jax.sharding.AbstractDevice("some", 1, platform=platform)
    mesh = jax.sharding.AbstractMesh((1, 1, 1), sharding.AXES, abstract_device=kind)
    tree = abstract_tree(RESNET, image_batch())
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(RESNET.apply)(tree, image_batch()["image"]))
    assert "conv_general_dilated" in text
    assert ("conv_on_cpu" in text) == (platform == "cpu")


@pytest.mark.parametrize("topology", ["v5e", "v5e:3x3", "v9:2x2", "2x2", ""])
def test_unknown_slices_are_refused_by_name(topology):
    with pytest.raises(BadInput, match=r"v5e: 1x1 2x2 .*v6e") as error:
        plan.devices_of(topology)
    assert repr(topology) in str(error.value)


def test_without_its_compiler_a_tpu_is_refused_before_data_are_read(monkeypatch, tmp_path, capsys):
    def absent(*_):
        raise RuntimeError("JAX TPU support not installed\nlong story")

    monkeypatch.setattr(plan.topologies, "get_topology_desc", absent)
    path = tmp_path / "config.py"
    given = {**TINY, "data": {"name": "absent"}}
    path.write_text(
        f"import ml_collections\nget_config = lambda: ml_collections.ConfigDict({given})"
    )
    assert main(["inspect", f"--config={path}", "--topology=v5e:2x2"]) == 2
    message = capsys.readouterr().err
    assert "v5e:2x2" in message and "pip install 'tljax[plan]'" in message
    assert "long story" not in message


def test_what_does_not_fit_is_refused_with_the_compilers_words():
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20G exceeds 15.75G\nmore")

    with pytest.raises(BadInput, match=r"20G exceeds 15.75G\ntry --config.run.remat"):
        plan.compile_lowered(Lowered(), sharding.make_mesh())


@pytest.mark.libtpu
@pytest.mark.slow
def test_a_step_is_compiled_for_a_slice_that_is_elsewhere():
    """Each of four chips holds a quarter of what fsdp divides, and does a quarter of the work."""
    before = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    wide = {"model": {"width": 256, "mlp": 1024}, "mesh": {"data": 1, "fsdp": -1}}
    one, four = (plan.compile_for(f"v5e:{size}", config(**wide)) for size in ("1x1", "2x2"))
    assert (
        one.arguments / 4 < four.arguments < one.arguments / 3.5
    )  # small leaves are on every chip
    assert four.flops < one.flops / 3
    assert one.peak > one.arguments and one.outputs > one.aliased > one.arguments / 2
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == before


@pytest.mark.libtpu
@pytest.mark.slow
def test_a_compiler_that_is_there_says_what_does_not_fit():
    large = {"model": {"width": 4096, "mlp": 16384, "depth": 12, "heads": 32}}
    with pytest.raises(BadInput, match=r"the step does not fit: .*HBM"):
        plan.compile_for("v5e:1x1", config(**large))
