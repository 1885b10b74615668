"""The house rules, held by reading the source: who imports whom, refused names, sizes, the tree."""

import ast
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tljax"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up; a module imports only what stands on lower lines, and its own folder.
ORDER = [
    {"preemption", "types"},
    {"tree", "quantized", "storage"},
    {"lock", "manifest", "meeting", "ports"},
    {"card", "config", "layers", "optim", "sharding", "state"},
    {"edits", "models", "objectives", "step"},
    {"weights"},
    {"checkpoint", "data", "metrics", "strategies"},
    {"evaluate", "features", "intervals", "proof", "source"},
    {"assembly", "fisher"},
    {"build", "pretrained"},
    {"plan"},
    {"train"},
    {"ckpt", "exporter", "inference", "sweep"},
    {"demo", "soup"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

# One door per thing: the only places that may import it.
DOORS = {
    "orbax": {"checkpoint"},
    "etils": {"storage"},
    "fsspec": {"storage"},
    "gcsfs": {"storage"},
    "ml_collections": {"build"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "array_record": {"data"},
    "re": {"tree", "data"},  # data: the markup of raw corpora, never a path
    "jax.make_mesh": {"sharding"},
    "jax.sharding.Mesh": {"sharding"},
    "jax.sharding.AxisType": {"sharding", "layers"},
    "jax.sharding.NamedSharding": {"sharding"},
    "jax.sharding.PartitionSpec": {"sharding", "layers"},
}

REFUSED_IMPORTS = {
    "tensorflow",
    "flax.training",
    "pickle",
    "importlib.import_module",
    "importlib.util",
    "clu.metric_writers",
    "clu.periodic_actions",
    "tljax.configs",
    "configs",
}
REFUSED_NAMES = {"pmap", "PRNGKey", "set_to_zero", "eval", "exec", "__import__", "import_module"}
REFUSED_FILES = {"util", "utils", "common", "helper", "helpers", "misc"}


def place(path: Path) -> str:
    """Name the part of the package that a file belongs to: its module or its folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """List what a file imports, as dotted names down to the imported name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def attributes(path: Path) -> set[str]:
    """List every dotted name a file reads: `jax.random.key` for the whole chain."""
    chains = {ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if is_chain(n)}
    return chains | imports(path)


def is_chain(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def within(name: str, parents: set[str] | dict) -> str:
    """Return the entry of `parents` that a dotted name equals or lies below."""
    return next((parent for parent in parents if f"{name}.".startswith(f"{parent}.")), "")


def by_path(path: Path) -> str:
    return str(path.relative_to(ROOT))


def own_imports(path: Path) -> set[str]:
    """List the parts of the package that a file imports, without its own folder."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("tljax.")}
    return names - ({place(path)} if path.parent != PACKAGE else set())


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_imports_point_downwards(path):
    if path == PACKAGE / "__init__.py":
        return  # it imports when it is asked for something: below
    unplaced = ({place(path)} | own_imports(path)) - set(RANK)
    assert not unplaced, f"give {sorted(unplaced)} a line in ORDER"
    upwards = {name for name in own_imports(path) if RANK[name] >= RANK[place(path)]}
    assert not upwards, f"{by_path(path)} imports {sorted(upwards)}, which stands no lower"


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_every_thing_has_one_door(path):
    for name in attributes(path):
        thing = within(name, DOORS)
        assert not thing or place(path) in DOORS[thing], (
            f"{by_path(path)} uses {name}; only {sorted(DOORS[thing])} may"
        )


@pytest.mark.parametrize("name", ["step", "state"])
def test_step_and_state_know_only_trees(name):
    allowed = {"jax", "optax", "flax.struct", "tljax.tree", "tljax.types", "tljax.state"}
    outside = {
        found
        for found in imports(PACKAGE / f"{name}.py")
        if not within(found, allowed) and found.split(".")[0] not in sys.stdlib_module_names
    }
    assert not outside


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=by_path)
def test_models_know_layers_and_never_each_other(path):
    assert own_imports(path) <= {"layers", "ports", "types"}
    table = path.name == "__init__.py"  # the names of the models: it alone knows all of them
    assert table or not any(name.startswith("tljax.models") for name in imports(path))


def test_edits_know_no_model_and_config_knows_no_machinery():
    for path in (PACKAGE / "edits").glob("*.py"):
        assert own_imports(path) <= {"ports", "quantized", "tree", "types"}, by_path(path)
    assert own_imports(PACKAGE / "config.py") <= {"tree", "types"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=by_path)
def test_configs_are_forked_not_imported(path):
    assert {name.split(".")[0] for name in imports(path)} <= {"ml_collections", "math"}


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_refused_names(path):
    refused = {name for name in imports(path) if within(name, REFUSED_IMPORTS)}
    chains = attributes(path)
    refused |= {name for name in chains if REFUSED_NAMES & set(name.split("."))}
    refused |= {name for name in chains if name == "jax.tree_map"}
    if place(path) in ("strategies", "edits"):
        # A leaf is frozen by its role, before anything is differentiated.
        refused |= {name for name in chains if name.endswith("stop_gradient")}
    assert not refused


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_nothing_is_looked_up_in_a_module_by_name(path):
    tree = ast.parse(path.read_text())
    bound = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "vars"):
            first = ast.unparse(node.args[0]).split(".")[0] if node.args else ""
            assert first not in bound, f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "module, absent", [("tljax.__main__", "tensorflow"), ("tljax", "jax"), ("tljax", "numpy")]
)
def test_importing_costs_no_more_than_it_must(module, absent):
    words = f"import sys, {module}; sys.exit('{absent}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], cwd=ROOT).returncode == 0


def lines_of_code(path: Path) -> int:
    """Count the lines that hold code: not the blank ones, nor docstrings and comments."""
    tree = ast.parse(path.read_text())
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, node.end_lineno + 1))
    code: set[int] = set()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in silent | {tokenize.ENCODING, tokenize.ENDMARKER}:
                code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def test_the_package_fits_in_a_head():
    """Lines of code, without foreign formats, of which there are as many as one wants to read.

    What explains them is not what one would want less of.
    """
    core = [path for path in FILES if place(path) != "weights"]
    assert sum(lines_of_code(path) for path in core) < 10_000
    assert max(lines_of_code(path) for path in FILES) < 500


def test_the_step_names_no_method_model_or_dataset():
    text = (PACKAGE / "step.py").read_text()
    assert len(text.splitlines()) < 80
    folders = ("models", "edits", "weights")
    files = [path.stem for folder in folders for path in (PACKAGE / folder).glob("*.py")]
    strategies = ["scratch", "probe", "bitfit", "last_k", "full", "distill", "adapter"]
    objectives = ["classify", "mlm", "contrastive", "teacher", "model", "dropout", "batch_stats"]
    data = ["image", "images", "input_ids", "label", "labels", "mnist", "fashion", "digits", "tfds"]
    words = set(re.findall(r"[a-z_]+", text.lower()))
    assert not words & {*files, *strategies, *objectives, *data}


def listed() -> list[Path]:
    """List the repository's files as git would commit them now."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in sorted(set(names.split("\0")) - {""}) if (ROOT / name).is_file()]


def test_file_names_say_what_is_inside():
    assert not [path for path in listed() if path.stem in REFUSED_FILES]


def only_marks_a_package(path: Path) -> bool:
    """Tell whether a file is an __init__.py that holds at most a docstring."""
    if path.name != "__init__.py":
        return False
    body = ast.parse((ROOT / path).read_text()).body
    return all(isinstance(node, ast.Expr) for node in body)


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    """One path a line, `#` starts a comment; a folder without Python files may stand for itself."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"^## The tree\n.*?^```\w*\n(.*?)^```", readme, re.S | re.M)
    assert block, "README.md needs a fenced block under the heading '## The tree'"
    lines = [line.split("#")[0].strip() for line in block[1].splitlines()]
    told = sorted(filter(None, lines))
    folders = [path for path in told if path.endswith("/")]
    parts = {"tljax", "configs", "docs", "launch", "tests", "benchmarks", ".ci"}
    real = set()
    for path in listed():
        name = path.as_posix()
        folder = next((folder for folder in folders if name.startswith(folder)), "")
        assert not folder or path.suffix != ".py", f"list {name} itself, not its folder"
        if (len(path.parts) == 1 or path.parts[0] in parts) and not only_marks_a_package(path):
            real.add(folder or name)
    absent = sorted(real - set(told))
    gone = sorted(set(told) - real)
    assert not absent and not gone, f"README lacks {absent} and names {gone}, which are not there"
