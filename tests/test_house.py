"""The house rules that a program can check: the direction of imports, the length of files, and unique class names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "trainer", "launch")
"""Each of these may import from itself and from the ones before it."""
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MOST_LINES = 400


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Return the project's modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return found & MODULES.keys()


def type_checking_imports(path: Path) -> set[str]:
    """Return the modules that a file imports only for type checkers, below `if TYPE_CHECKING`."""
    guarded = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {
        node.module for block in guarded for node in ast.walk(block) if isinstance(node, ast.ImportFrom) and node.module
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    allowed = ROOMS[: ROOMS.index(path.relative_to(ROOT).parts[0]) + 1]
    assert {module.partition(".")[0] for module in imports_of(path)} <= set(allowed)


def test_there_are_no_circles():
    graph = {module: imports_of(path) - type_checking_imports(path) - {module} for module, path in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_no_file_is_longer_than_a_reader_takes_in():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_two_public_classes_have_one_name():
    places = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


@pytest.mark.parametrize(
    "module",
    ["models.sizes", "trainer.stages", "trainer.recipes.schema", "trainer.recipes.reading", "launch.cli"],
)
def test_what_needs_no_torch_imports_none(module):
    program = f"import sys, {module}; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_module_logs_reaches_the_log_file(path):
    """`trainer.log.log_file` listens to the packages' loggers: one of another name, or a warning, goes nowhere."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "logging.getLogger"]
    allowed = {"logging.getLogger(__name__)", "logging.getLogger(name)", "logging.getLogger('DeepSpeed')"}
    assert set(names) <= allowed
    assert not [call for call in calls if ast.unparse(call.func) == "warnings.warn"]
