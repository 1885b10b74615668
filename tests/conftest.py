"""Before the first import of jax: eight simulated devices, strict numerics, checked signatures."""

import importlib.util
import os
from collections import Counter
from collections.abc import Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"

# Tests of one device take jax.devices()[:1]; the mesh tests take all eight.
flags = os.environ.get("XLA_FLAGS", "")
# Compiling is most of the time the tests take, and optimised code gains tiny models nothing.
flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10.") and importlib.util.find_spec("libtpu") is None:
    # Later ones, and libtpu, which reads the same variable, know no such flag and end the process.
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# An array captured by closure would be compiled in; the largest honest constants are the two small
# matrices that resample a position table.
os.environ["JAX_CAPTURED_CONSTANTS_WARN_BYTES"] = str(64 * 1024)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Tests start processes and change folders, and leave the user's own data alone.
os.environ["TLJAX_ASSETS"] = str(Path(os.environ.get("TLJAX_ASSETS", ROOT / "assets")).resolve())
os.environ.setdefault("TLJAX_DATA", str(CACHE / "tfds"))

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from torchvision_ops import declare_torchvision_ops  # noqa: E402

# Shapes in signatures are checked while the tests run, in the modules that compute.  Elsewhere a
# signature's array may rightly be a ShapeDtypeStruct, a sharding or a hole: jax rebuilds pytrees.
CHECKED = ["tljax.layers", "tljax.models", "tljax.edits", "tljax.evaluate", "tljax.metrics"]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

DEFAULT_ASSETS = ("vit", "minilm")
left_out: Counter[str] = Counter()


@pytest.fixture(scope="session")
def asset_dir() -> Path:
    """The folder of unpacked assets: launch/assets.sh describes it."""
    return Path(os.environ["TLJAX_ASSETS"])


def mark_slow(items: list[pytest.Item]) -> None:
    """Mark the cases of a test that is marked few(n) as slow, but for n spread evenly."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for same in cases.values():
        kept = same[0].get_closest_marker("few").args[0]
        fast = {number * len(same) // kept for number in range(kept)}
        for number, item in enumerate(same):
            if number not in fast:
                item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch"):
        declare_torchvision_ops()


@pytest.fixture(scope="session")
def bucket() -> Iterator[object]:
    """One object store for all: clients are made once in a process, with the address they find."""
    from bucket import serving

    with serving() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """Return timm, an independent implementation of what its users' files hold."""
    declare_torchvision_ops()
    return pytest.importorskip("timm")


@pytest.fixture(scope="session")
def peft() -> ModuleType:
    """Return peft, for adapters as its users' files hold them."""
    declare_torchvision_ops()
    return pytest.importorskip("peft")


def missing(item: pytest.Item) -> str:
    """Say what a test needs and is not here, as the words of the closing report, or nothing."""
    if item.get_closest_marker("torch"):
        absent = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
        if absent:
            return f"{' and '.join(absent)} not installed (extra: reference)"
    if item.get_closest_marker("libtpu") and importlib.util.find_spec("libtpu") is None:
        return "libtpu not installed (extra: plan)"
    for marker in item.iter_markers("assets"):
        names = marker.args or DEFAULT_ASSETS
        absent = [n for n in names if not Path(os.environ["TLJAX_ASSETS"], n).is_dir()]
        if absent:
            return f"assets not here (launch/assets.sh {' '.join(absent)})"
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    mark_slow(items)
    yield  # pytest's own -m and -k, so that only tests that would have run are counted
    reasons = {item: missing(item) for item in items}
    absent = [item for item in items if reasons[item]]
    left_out.update(reasons[item] for item in absent)
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if not reasons[item]]


@pytest.hookimpl(trylast=True)  # below the durations, where it is seen
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason, count in left_out.items():
        terminalreporter.write_line(f"left out: {count} tests, {reason}")
