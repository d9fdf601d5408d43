"""The package as a whole: its imports, its layering, its documentation and its licence."""

import ast
import collections
import graphlib
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import unittest.mock
import zipfile
from pathlib import Path

import pytest

from tests import wheel

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "medmoe_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FLOORS = [
    {"storage"},
    {"base", "data", "kernels", "parallel"},
    {"routing"},
    {"adapters"},
    {"checkpoints"},
    {"training", "inference"},
    {"evaluation", "planning", "serving"},
    {"api"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

IMPORT_ALL = """
import importlib, pkgutil, sys
import medmoe_jax.cli.main
late = {"scipy", "tensorflow_datasets"} & set(sys.modules)  # they would double the time of a start
names = [m.name for m in pkgutil.walk_packages(medmoe_jax.__path__, "medmoe_jax.")]
for name in names:
    if not name.endswith(("__main__", ".harness")):  # which needs the extra lm-eval
        importlib.import_module(name)
print(len(names), *sorted({"torch", "tensorflow", "transformers"} & set(sys.modules) | late))
"""


def parse(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"), filename=str(source))


def imported_modules(tree: ast.Module, package: str) -> set[str]:
    """Absolute dotted names that a module imports, `from x import y` counted as x and x.y."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*parent, node.module or ""]) if node.level else node.module
            module = module.rstrip(".")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def layering_faults(tree: ast.Module, room: str, package: str) -> list[str]:
    """Rooms imported by a module of `room` that are neither itself nor on a lower floor."""
    rooms = {
        name.split(".")[1]
        for name in imported_modules(tree, package)
        if name.count(".") >= 1 and name.startswith("medmoe_jax.")
    }
    return sorted(
        other
        for other in rooms & set(FLOOR_OF)
        if other != room and FLOOR_OF[other] >= FLOOR_OF[room]
    )


def test_importing_every_module_needs_neither_torch_nor_tensorflow():
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # torch is there where it is installed
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    count, *heavy = run.stdout.split()
    assert int(count) >= len(FLOOR_OF) - 2
    assert not heavy, f"imported at run time: {heavy}"


def test_every_room_has_a_floor():
    rooms = {source.relative_to(PACKAGE).parts[0] for source in SOURCES if source.parent != PACKAGE}
    assert rooms <= set(FLOOR_OF), f"rooms without a floor: {sorted(rooms - set(FLOOR_OF))}"


def test_each_floor_imports_only_lower_ones():
    faults = {}
    for source in SOURCES:
        parts = source.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 2:
            faults[str(source)] = layering_faults(parse(source), parts[1], ".".join(parts[:-1]))
    assert not {name: rooms for name, rooms in faults.items() if rooms}


@pytest.mark.parametrize(
    "line, fault",
    [
        ("from medmoe_jax.adapters import bank", ["adapters"]),
        ("from medmoe_jax import cli", ["cli"]),
        ("import medmoe_jax.training.loop", ["training"]),
        ("from ..adapters.bank import Bank", ["adapters"]),
        ("def f():\n    from medmoe_jax.parallel import mesh", ["parallel"]),
        ("from medmoe_jax.base import rope\nfrom medmoe_jax.errors import UserError", []),
        ("from . import rope\nfrom .rope import apply\nimport jax", []),
    ],
)
def test_the_layering_check_sees_every_form_of_import(line, fault):
    assert layering_faults(ast.parse(line), "base", "medmoe_jax.base") == fault


def circle(sources: dict[str, ast.Module]) -> list[str]:
    """Modules, by dotted name, that import each other in a ring; imports in functions count."""
    graph = {
        name: (imported_modules(tree, name.rpartition(".")[0]) & sources.keys()) - {name}
        for name, tree in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle():
    names = {s: ".".join(s.relative_to(ROOT).with_suffix("").parts) for s in SOURCES}
    # A package's face hands nothing on here, so that to import from it is to import a module.
    sources = {name: parse(s) for s, name in names.items() if s.name != "__init__.py"}
    assert len(sources) > 100
    assert not circle(sources)


def test_the_check_for_circles_sees_imports_inside_functions():
    ring = {
        "medmoe_jax.base.a": "from medmoe_jax.base.b import f",
        "medmoe_jax.base.b": "from medmoe_jax.base import c",
        "medmoe_jax.base.c": "def late():\n    from .a import g",
    }
    assert set(circle({name: ast.parse(text) for name, text in ring.items()})) == set(ring)
    ring["medmoe_jax.base.c"] = "import medmoe_jax.base.d"
    assert not circle({name: ast.parse(text) for name, text in ring.items()})


POINTER = re.compile(r"`((?:[\w.]+/)+\w+\.py)(?::([\w.]+))?`")


def defined(source: Path) -> set[str]:
    """Names that a module defines, `Class.method` among them."""
    found = set()
    for node in parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            found |= {f"{node.name}.{inner.name}"} if isinstance(inner, ast.FunctionDef) else set()
    return found


def test_the_documents_point_to_code_that_is_there():
    pointers, lost = 0, []
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for path, name in POINTER.findall(document.read_text(encoding="utf-8")):
            pointers += 1
            source = next((r / path for r in (ROOT, PACKAGE) if (r / path).is_file()), None)
            if source is None or (name and name not in defined(source)):
                lost.append(f"{document.name}: {path}:{name}")
    assert pointers > 10 and not lost, lost


def test_every_class_has_a_name_of_its_own():
    """A word means one thing in the whole house."""
    places = collections.defaultdict(list)
    for source in SOURCES:
        for node in parse(source).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(source.relative_to(PACKAGE)))
    assert len(places) > 300
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_public_functions_and_classes_have_docstrings():
    missing = []
    for source in SOURCES:
        tree = parse(source)
        if not ast.get_docstring(tree):
            missing.append(f"{source}: the module")
        for node in tree.body:
            public = isinstance(
                node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            ) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{source}:{node.lineno} {node.name}")
    assert not missing, "\n".join(missing)


def unannotated(tree: ast.Module | ast.ClassDef, within: str = "") -> list[str]:
    """Public functions and methods of a module that do not say what each argument and result is."""
    faults = []
    for node in tree.body:
        name = getattr(node, "name", "_")
        if name.startswith("_") and not re.fullmatch(r"__\w+__", name):
            continue
        if isinstance(node, ast.ClassDef):
            faults += unannotated(node, f"{name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            arguments += [one for one in (given.vararg, given.kwarg) if one]
            unsaid = [one.arg for one in arguments if one.annotation is None]
            own = unsaid[:1] if within and unsaid[:1] in (["self"], ["cls"]) else []
            if node.returns is None or unsaid != own:
                faults.append(f"{node.lineno} {within}{name}")
    return faults


def test_docstrings_begin_with_what_a_thing_is():
    """Never with "Of", which leaves what they speak of to the reader."""
    rooms = ("medmoe_jax", "configs", "tests", "benchmarks", "notebooks", "launch")
    sources = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(sources) > 600
    begins = re.compile(r'^\s*r?"""Of\b.*', re.MULTILINE)
    faults = {str(path.relative_to(ROOT)): begins.findall(path.read_text()) for path in sources}
    assert not {name: found for name, found in faults.items() if found}


def test_public_functions_say_what_they_take_and_give():
    faults = [f"{source}:{fault}" for source in SOURCES for fault in unannotated(parse(source))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "code, faults",
    [
        ("def f(x: int, *y: int, z: int = 0, **w: int) -> None: ...", []),
        ("def f(x) -> None: ...", ["1 f"]),
        ("def f(self) -> None: ...", ["1 f"]),
        ("def f(*x) -> None: ...", ["1 f"]),
        ("def f(*, x) -> None: ...", ["1 f"]),
        ("def f(x: int): ...", ["1 f"]),
        ("class A:\n    def __init__(self, x): ...", ["2 A.__init__"]),
        ("class A:\n    @classmethod\n    def f(cls, x: int) -> None: ...", []),
        ("class _A:\n    def f(self, x): ...\ndef _f(x): ...", []),
    ],
)
def test_the_check_for_annotations_sees_every_kind_of_argument(code, faults):
    assert unannotated(ast.parse(code)) == faults


def test_no_error_is_swallowed_by_a_broad_except():
    """What runs a file of the user's tells of whatever that raises."""
    broad = []
    for source in set(SOURCES) - {PACKAGE / "api" / "recipe_file.py"}:
        for node in ast.walk(parse(source)):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None
                or {"Exception", "BaseException"}
                & {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
            ):
                broad.append(f"{source}:{node.lineno}")
    assert not broad


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text()


def test_every_dependency_has_a_lower_and_an_upper_bound():
    setup = (ROOT / "setup.py").read_text()
    requirements = re.findall(r'^\s+"([\w\[\]-]+(?:[<>=].*))",?', setup, re.MULTILINE)
    assert len(requirements) > 20
    for requirement in requirements:
        assert re.search(r">=[\d.]+,<[\d.]+$|==[\d.]+$", requirement), requirement


def test_the_package_index_is_told_the_address_of_the_project(tmp_path):
    """That of pyproject.toml, where notebooks and site take it from too."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "medmoe_jax").mkdir()
    shutil.copy(ROOT / "medmoe_jax" / "__init__.py", tmp_path / "medmoe_jax")
    settings, told = tmp_path / "pyproject.toml", []
    for address in ("", "https://github.com/org/name"):
        line = f'repository = "{address}"'
        settings.write_text(re.sub('^repository = ".*"', line, settings.read_text(), flags=re.M))
        with unittest.mock.patch("setuptools.setup") as setup:
            runpy.run_path(str(tmp_path / "setup.py"))
        told.append(setup.call_args.kwargs["project_urls"].get("Repository"))
    assert told == [None, "https://github.com/org/name"]


def test_the_installed_command_points_to_the_entry_point():
    try:
        distribution = importlib.metadata.distribution("medmoe_jax")
    except importlib.metadata.PackageNotFoundError:
        assert "medmoe = medmoe_jax.cli.main:main" in (ROOT / "setup.py").read_text()
        return
    scripts = {entry.name: entry.value for entry in distribution.entry_points}
    assert scripts["medmoe"] == "medmoe_jax.cli.main:main"


WHEEL_ONLY = """
import sys
import zipfile

import medmoe_jax
from medmoe_jax.cli.configs import load_config

assert medmoe_jax.__file__.startswith(sys.argv[1]), medmoe_jax.__file__
config = load_config(["--config=medcare:qwen2-1.5b", "--config.run.log_every=3"])
assert tuple(config.stages.order) == ("aggregate", "align") and config.run.log_every == 3
"""


@pytest.mark.processes
def test_the_wheel_holds_all_that_the_folder_does(tmp_path):
    """Every file that belongs to the package, recipes too; a recipe loads where no clone is."""
    with zipfile.ZipFile(next(wheel.folder().glob("*.whl"))) as archive:
        held = set(archive.namelist())
    wanted = {
        name if name.startswith("medmoe_jax/") else f"medmoe_jax/{name}"
        for name in wheel.files()
        if name.startswith(("medmoe_jax/", "configs/")) and (ROOT / name).is_file()
    }
    assert wanted <= held, wanted - held
    site = str(wheel.site())
    subprocess.run(
        [sys.executable, "-c", WHEEL_ONLY, site], cwd=tmp_path, check=True,
        env=os.environ | {"PYTHONPATH": site},
    )  # fmt: skip


SKIPPING = """
import pytest

@pytest.mark.data
def test_reads_data():
    pytest.skip("the test finds a reason of its own")
"""


@pytest.mark.parametrize("exists, outcome", [(True, "1 failed"), (False, "1 skipped")])
def test_skipping_a_data_test_fails_where_the_data_exists(tmp_path, exists, outcome):
    (tmp_path / "data").mkdir()
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(SKIPPING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    data: needs the data folder\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MEDMOE_DATA": str(tmp_path / ("data" if exists else "absent"))},
        timeout=600,
    )
    assert outcome in run.stdout.splitlines()[-1], run.stdout
