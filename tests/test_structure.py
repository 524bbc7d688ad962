"""The laws of the project's shape: who may import whom, how long files and functions are, and what a clone brings."""

import ast
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPTS = {
    "train", "eval", "run_libero_eval", "collect_demos", "check_demos", "convert_lerobot", "embed_language",
    "export_policy", "plot_curves", "serve_policy", "simulator_check",
}  # fmt: skip
WORKERS = (
    "rollouts.worker",
    "collection.demonstrator",
    "collection.scene_drawer",
)  # without torch they start sooner and hold less memory
FILE_LINES, FUNCTION_LINES = 500, 80
STORIES = {"train.py: main"}  # the training loop is read from top to bottom in one sitting
LARGEST_MB = 70  # of a checkout
LARGEST_HISTORY_MB = 115  # it has four generations of the weights that look, of 20 MB each
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def modules_of(root: Path) -> dict[str, Path]:
    """Every module by the name that it is imported by; those of benchmarks/ stand beside the root's on the path."""
    packages = [folder.parent for folder in root.glob("*/__init__.py")]
    files = [*root.glob("*.py"), *(file for folder in packages for file in folder.rglob("*.py"))]
    named = {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return named | {file.stem: file for file in (root / "benchmarks").glob("*.py")}


def parts_of(node: ast.AST, top_level: bool) -> Iterator[ast.AST]:
    """All nodes below one; with `top_level` those alone that an import of the module runs."""
    for child in ast.iter_child_nodes(node):
        if top_level and isinstance(child, FUNCTIONS):
            continue
        if top_level and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from parts_of(child, top_level)


def imports(file: Path, modules: dict[str, Path], top_level: bool = False) -> set[str]:
    """The modules that a file imports: the project's by their full names, others by their first word."""
    found = set()
    for node in parts_of(ast.parse(file.read_text()), top_level):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import in line {node.lineno}, expected the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name not in modules:  # a name out of a module
                name = name.rpartition(".")[0] or name
            found.add(name if name in modules else name.partition(".")[0])
    return found


MODULES = modules_of(ROOT)
PROJECT = {name: imports(file, MODULES) for name, file in MODULES.items()}


def test_the_reader_of_imports_misses_none(tmp_path):
    """Otherwise the laws below would hold whatever the project looked like."""
    (tmp_path / "wing").mkdir()
    (tmp_path / "wing/__init__.py").write_text("")
    (tmp_path / "wing/part.py").write_text("")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "reader.py").write_text(
        "import torch.nn as nn\nfrom wing import part\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from other import name\n"
        "try:\n    import h5py\nexcept ImportError:\n    pass\n"
        "class A:\n    def f(self):\n        import wing.part, einops\n"
    )
    modules = modules_of(tmp_path)
    assert modules.keys() == {"wing", "wing.part", "other", "reader"}
    at_import = {"torch", "wing.part", "typing", "h5py"}
    assert imports(modules["reader"], modules, top_level=True) == at_import
    assert imports(modules["reader"], modules) == at_import | {"other", "einops"}


def test_no_script_is_imported():
    assert MODULES.keys() >= SCRIPTS
    found = [f"{name} imports {script}" for name, of in PROJECT.items() for script in sorted(of & SCRIPTS)]
    assert not found, "; ".join(found)


def test_imports_run_in_no_circle():
    try:
        TopologicalSorter({name: of & MODULES.keys() for name, of in PROJECT.items()}).prepare()
    except CycleError as problem:
        pytest.fail(f"imported in a circle: {' <- '.join(problem.args[1])}")


@pytest.mark.parametrize("worker", WORKERS)
def test_a_simulator_process_does_not_import_torch(worker):
    ways = {worker: worker}  # module -> how the worker comes to it
    waiting = [worker]
    while waiting:
        name = waiting.pop()
        for imported in imports(MODULES[name], MODULES, top_level=True):
            if imported not in ways:
                ways[imported] = f"{ways[name]} -> {imported}"
                waiting += [imported] * (imported in MODULES)
    assert len(ways) > 10
    assert "torch" not in ways, ways["torch"]


def test_the_model_knows_neither_simulator_nor_files():
    outside = ("rollouts", "simulator", "demos", "training", "collection")
    found = [
        f"{name} imports {imported}"
        for name, of in PROJECT.items()
        for imported in of
        if name.startswith("jepa.") and imported.partition(".")[0] in outside
    ]
    assert not found, "; ".join(found)


def test_no_test_file_imports_another():
    files = sorted((ROOT / "tests").glob("*.py"))
    found = [f"{file.name} imports {name}" for file in files for name in imports(file, {}) if name.startswith("test_")]
    assert not found, "; ".join(found)


def test_no_file_of_the_root_is_long():
    lengths = {file.name: len(file.read_text().splitlines()) for file in ROOT.glob("*.py")}
    long = [f"{name} has {lines} lines" for name, lines in lengths.items() if lines > FILE_LINES]
    assert not long, f"{'; '.join(long)}, expected at most {FILE_LINES}"


def test_no_function_is_long():
    long = []
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, FUNCTIONS[:2]) and f"{file.relative_to(ROOT)}: {node.name}" not in STORIES:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{file.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long, f"{'; '.join(long)}, expected at most {FUNCTION_LINES}"


# ------------------------------------------------------------------------------------------------ what a clone brings


def git(*arguments: object) -> str:
    return subprocess.run(["git", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone() -> None:
    """Skips a test where git cannot say what belongs to the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone, a source archive")
    try:
        git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"git cannot read this clone: {problem}")


def test_a_clone_with_its_history_is_small(clone, tmp_path):
    """Weights that were committed once stay in the history for good."""
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("a shallow clone lacks most of the history")
    git("bundle", "create", tmp_path / "history", "HEAD")  # packed as a clone gets it
    found = (tmp_path / "history").stat().st_size / 1e6
    assert found > 1
    assert found < LARGEST_HISTORY_MB, f"the history takes {found:.0f} MB, expected less than {LARGEST_HISTORY_MB}"


def test_the_files_of_a_checkout_are_small(clone):
    files = [ROOT / name for name in git("ls-files", "-z").split("\0") if name]
    sizes = {file.relative_to(ROOT): file.stat().st_size / 1e6 for file in files if file.exists()}
    largest = [f"{name} ({sizes[name]:.0f} MB)" for name in sorted(sizes, key=lambda name: -sizes[name])[:3]]
    assert sum(sizes.values()) < LARGEST_MB, f"{sum(sizes.values()):.0f} MB, the largest are {', '.join(largest)}"
