"""The package as a whole: what it offers, what it loads, and that imports run one way."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import seg3dcam

PACKAGE = Path(seg3dcam.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOT = PACKAGE / "__init__.py"

# A module may import from the levels before its own, and a folder from itself.
LEVELS = [
    {"errors", "importing", "progress"},
    {"checks", "geometry"},
    {"files"},
    {"scan", "network", "windows"},
    {"targets", "methods"},
    {"engine"},
    {"cams"},
    {"evaluate"},
    {"settings"},
    {"models"},
    {"explaining"},
    {"review"},
    {"export"},
    {"job"},
    {"integrations", "demo", "cohort"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

#: File -> the file of a higher room that one of its functions imports when it is called: a result
#: that is shown in a notebook, or saved as a picture, draws itself.
ALLOWED_UPWARD = [
    ("cams/result.py", "review/pictures/map_2d.py"),
    ("explaining/explanation.py", "review/report/__init__.py"),
]

NEVER_LOADED = [
    "SimpleITK",
    "captum",
    "highdicom",
    "ignite",
    "lightning",
    "nilearn",
    "nnunetv2",
    "pyarrow",
    "pydicom",
    "pytorch_grad_cam",
    "ray",
    "pytorch_lightning",
    "selenium",
    "slicer",
    "torchio",
    "torchvision",
    "vtk",
]
# MONAI itself imports matplotlib; of our own modules, only those that draw may.
NOT_OURS = ["cv2", "matplotlib", "pydantic", "typer", "yaml"]


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


# ------------------------------------------------------------------------------------- public names


def test_public_names_are_importable_sorted_and_unique():
    names = seg3dcam.__all__
    assert all(hasattr(seg3dcam, name) for name in names)
    # As ruff sorts: CONSTANTS, Classes, functions.
    kinds = [0 if name.isupper() else 1 if name[0].isupper() else 2 for name in names]
    assert list(zip(kinds, names, strict=True)) == sorted(set(zip(kinds, names, strict=True)))


def test_every_name_that_the_package_imports_is_public():
    """As type checkers read them; test_start_up.py holds that these are imported at run time."""
    (block,) = (n for n in tree(PACKAGE / "__init__.py").body if isinstance(n, ast.If))
    imported = {a.asname or a.name for n in block.body for a in n.names}
    assert imported == set(seg3dcam.__all__)


@pytest.mark.parametrize("name", seg3dcam.__all__)
def test_every_public_class_and_function_has_a_docstring(name):
    thing = getattr(seg3dcam, name)
    if callable(thing) or name == "targets":
        assert thing.__doc__
        assert len(thing.__doc__) > 20


# ---------------------------------------------------------------------------------- what is loaded


def modules_after(*imports):
    """The modules that are there after each of some imports, with our warnings as errors."""
    code = "; ".join(["import sys", *(f"{one}; print(*sys.modules)" for one in imports)])
    command = [sys.executable, "-W", "error::DeprecationWarning:seg3dcam", "-c", code]
    done = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [set(line.split()) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def loaded():
    """After MONAI, which imports every reader of images that is installed; then after our names."""
    of_monai = "import monai.data, monai.inferers, monai.transforms, monai.networks.nets"
    return modules_after(of_monai, "from seg3dcam import *")


@pytest.mark.slow
@pytest.mark.parametrize("package", NEVER_LOADED)
def test_importing_loads_no_optional_package(package, loaded):
    of_monai, after = loaded
    assert package not in after - of_monai


@pytest.mark.slow
def test_importing_loads_neither_compiler_nor_command_line(loaded):
    unwanted = {"torch._dynamo", "torch._inductor", "seg3dcam.cli.commands", "typer"}
    assert not loaded[1] & unwanted


def imports_of(path, *, lazy=False):
    """Yield the dotted names that a file imports when it is imported itself.

    With `lazy` also those that its functions import when they are called.
    """
    waiting = list(tree(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


@pytest.mark.slow
def test_the_core_imports_no_package_of_the_rims():
    core = [p for p in FILES if LEVEL.get(room(p), 99) <= LEVEL["cams"]]
    assert len(core) > 10
    for path in core:
        found = {name.partition(".")[0] for name in imports_of(path)}
        assert not found & {*NEVER_LOADED, *NOT_OURS}, relative(path)


def test_the_core_imports_monai_where_it_is_used():
    """Importing MONAI takes seconds: whoever asks for help, or has no use for it, need not wait."""
    core = [p for p in FILES if LEVEL.get(room(p), 99) <= LEVEL["cams"] or room(p) == "explaining"]
    assert len(core) > 10
    for path in core:
        found = {name.partition(".")[0] for name in imports_of(path)}
        assert "monai" not in found, relative(path)


@pytest.mark.slow
def test_monai_is_loaded_by_nothing_but_what_needs_it():
    names = "GradCAM, explain, explain_each, load_explanation, load_model, load_scan, targets"
    (found,) = modules_after(f"from seg3dcam import {names}; targets.ClassLogit")
    assert "monai" not in found


# ------------------------------------------------------------------------------ imports run one way


def room(path):
    """Return the top-level module or folder of a file."""
    return relative(path).partition("/")[0].removesuffix(".py")


def imported_files(path):
    """Return the files of the package that a file imports, also those that its functions import."""
    found = set()
    for name in imports_of(path, lazy=True):
        parts = name.split(".")
        if parts[0] != PACKAGE.name:
            continue
        # A module, or a name in one.
        modules = [PACKAGE.joinpath(*parts[1:]), PACKAGE.joinpath(*parts[1:-1])]
        files = [file for m in modules for file in (m.with_suffix(".py"), m / "__init__.py")]
        found.add(next(file for file in files if file.is_file()))
    return found


def wrong_way(path):
    """Return the files that a file imports from a room that is not below its own."""
    own, level = room(path), LEVEL[room(path)]
    others = [file for file in imported_files(path) if room(file) != own]
    return {relative(f) for f in others if f == ROOT or LEVEL[room(f)] >= level}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_run_one_way(path):
    if room(path) in ("__init__", "__main__"):
        return
    assert room(path) in LEVEL, f"give {room(path)} a place in LEVELS"
    allowed = {other for own, other in ALLOWED_UPWARD if own == relative(path)}
    assert wrong_way(path) == allowed


def test_no_files_import_each_other_in_a_circle():
    """Not even lazily, but for the imports in `ALLOWED_UPWARD`."""
    files = {relative(path): set(map(relative, imported_files(path))) for path in FILES}
    for own, other in ALLOWED_UPWARD:
        files[own].remove(other)
    try:
        TopologicalSorter(files).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# --------------------------------------------------------------------------------- what is tracked

#: Bytes of the largest file that may be tracked: everybody who clones the project loads it.
LARGEST = 2_000_000


def too_large(folder):
    """Return the tracked files of a repository that are larger than that."""
    command = ["git", "-C", str(folder), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    files = [folder / name for name in listed.split("\0") if name]
    assert files
    return [str(f.relative_to(folder)) for f in files if f.is_file() and f.stat().st_size > LARGEST]


@pytest.mark.skipif(not (PACKAGE.parent / ".git").exists(), reason="no repository, but a copy")
def test_no_large_file_is_tracked():
    assert too_large(PACKAGE.parent) == []


def test_a_large_file_would_be_found(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "f.nii.gz").write_bytes(bytes(LARGEST + 1))
    (tmp_path / "small").write_bytes(bytes(LARGEST))
    (tmp_path / "untracked").write_bytes(bytes(LARGEST + 1))
    subprocess.run(["git", "-C", str(tmp_path), "add", "big", "small"], check=True)
    assert too_large(tmp_path) == ["big/f.nii.gz"]


# ----------------------------------------------------------------------------------------- habits


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_print_outside_the_command_line(path):
    calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]
    prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert room(path) == "cli" or not prints


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_input_is_not_checked_by_assert(path):
    """An assert vanishes under python -O and says nothing to the user."""
    assert not [n.lineno for n in ast.walk(tree(path)) if isinstance(n, ast.Assert)]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_error_is_swallowed_whole(path):
    handlers = [n for n in ast.walk(tree(path)) if isinstance(n, ast.ExceptHandler)]
    assert not [n.lineno for n in handlers if n.type is None], "a bare except"
    silent = [n.lineno for n in handlers if len(n.body) == 1 and isinstance(n.body[0], ast.Pass)]
    assert not silent


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(tree(path))
