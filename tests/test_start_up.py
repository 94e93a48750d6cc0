"""Start-up: what is imported when, and names that are imported when they are first used."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers_cases import write_yaml

import seg3dcam
import seg3dcam.job
from seg3dcam import errors
from seg3dcam.cams.method_cards import card_of, method_cards, method_names
from seg3dcam.explaining.explain import ALL_METHODS
from seg3dcam.importing import OLD_NAMES, OldNames, find_old_names, imports_for_type_checkers, lazy

#: What takes seconds to import, and what nothing but results needs.
HEAVY = {"cv2", "matplotlib", "monai", "nibabel", "scipy", "torch"}

#: Runs commands, one after another. Says in JSON of each how it ended, what it said, and which
#: modules are there then: what a command imports is there after all that follow, too.
RUN_ALL = """
import contextlib, io, json, sys
from seg3dcam.cli.commands import main
for words in json.loads(sys.argv[1]):
    said, code = io.StringIO(), 0
    sys.argv = ["seg3dcam", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue(), list(sys.modules)]))
"""

JOB = ("explain", "ct.nii.gz", "--model", "model.yaml")
COMMANDS = {
    "nothing": ("", 2),
    "help": ("--help", 0),
    "help of explain": ("explain --help", 0),
    "help of features": ("features --help", 0),
    "help of layers": ("layers --help", 0),
    "help of demo": ("demo --help", 0),
    "version": ("--version", 0),
    "methods": ("methods", 0),
    "unknown command": ("explian", 2),
    "unknown option": ("explain --nope", 2),
    "nothing to explain": ("explain", 2),
    "no model": ("explain ct.nii.gz", 2),
    "a flag with a value": (" ".join([*JOB, "--trust", "true"]), 2),
    "unknown score": (" ".join([*JOB, "--score", "odds"]), 2),
    "unknown format": (" ".join([*JOB, "--format", "pdf"]), 2),
    "unknown method": (" ".join([*JOB, "--method", "gradcam"]), 2),
    "a setting of no method": (" ".join([*JOB, "--settings", "progress=1"]), 2),
    "no class": (" ".join([*JOB, "--score", "contrast"]), 2),
    "unknown setting of a job file": ("explain --config job.yaml", 2),
    "unknown frame of features": ("features ct.nii.gz --model model.yaml --frame pform", 2),
    "unknown plane of features": ("features ct.nii.gz --model model.yaml --axis axail", 2),
}


def python(code, *words, folder):
    path = os.pathsep.join([str(Path(seg3dcam.__file__).parents[1]), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """How each command ends, what it says, and the modules that are there then."""
    folder = tmp_path_factory.mktemp("commands")
    write_yaml(folder / "job.yaml", {"scan": "a", "model": "b", "scor": "logit"})
    every = json.dumps([words.split() for words, _ in COMMANDS.values()])
    done = python(RUN_ALL, every, folder=folder)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return dict(zip(COMMANDS, lines, strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_what_needs_no_network_is_said_without_pytorch(command, ends):
    code, said, modules = ends[command]
    assert code == COMMANDS[command][1], said
    assert "Traceback" not in said
    assert "seg3dcam.cli.commands" in modules
    assert not HEAVY & set(modules)


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    code = "import sys, seg3dcam; dir(seg3dcam); print(*sys.modules)"
    done = python(code, folder=tmp_path)
    assert "seg3dcam" in done.stdout.split()
    assert not {*HEAVY, "numpy", "pydantic"} & set(done.stdout.split())


def test_a_star_import_gives_every_public_name():
    """In a new process it is tried by test_package.py, which looks at what it loads."""
    names = {}
    exec("from seg3dcam import *", names)
    assert set(seg3dcam.__all__) <= set(names)


# ------------------------------------------------------------------ names imported when used

PACKAGES = [seg3dcam, seg3dcam.targets, seg3dcam.job]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_names_come_from_the_modules_that_type_checkers_see(package):
    seen = imports_for_type_checkers(package.__name__)
    assert len(seen) > 3
    assert set(seen) <= set(package.__all__) <= set(dir(package))
    assert set(package.__all__) - set(seen) <= {"targets"}  # a module of the package itself
    for name, module in seen.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


def test_explain_is_the_function_wherever_it_was_imported():
    module = importlib.import_module("seg3dcam.explaining.explain")
    assert seg3dcam.explain is module.explain
    assert not hasattr(seg3dcam, "explian")


def test_modules_are_attributes_of_their_package():
    assert seg3dcam.errors is errors
    assert seg3dcam.targets.regions.__name__ == "seg3dcam.targets.regions"
    with pytest.raises(AttributeError, match="'seg3dcam' has no attribute 'nothing_like_it'"):
        seg3dcam.nothing_like_it  # noqa: B018
    with pytest.raises(ImportError, match="nothing_like_it"):
        from seg3dcam import nothing_like_it  # noqa: F401


def test_a_name_that_is_a_modules_too_is_refused(tmp_path, monkeypatch):
    """Once the module is imported, the name would stand for it."""
    (tmp_path / "package_of_parts").mkdir()
    code = "if TYPE_CHECKING:\n    from package_of_parts.parts import parts, whole\n"
    (tmp_path / "package_of_parts" / "__init__.py").write_text(f"TYPE_CHECKING = False\n{code}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"^package_of_parts: parts is a module's name too"):
        lazy("package_of_parts")


def test_a_module_that_lacks_another_says_so(tmp_path, monkeypatch):
    folder = tmp_path / "package_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "module.py").write_text("import not_installed_anywhere\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(folder.name)
    get, _ = lazy(folder.name)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        get("module")


@pytest.mark.parametrize("name", ["GradCAM", "WindowPlan", "METHODS"])
def test_public_things_can_be_pickled(name):
    thing = getattr(seg3dcam, name)
    copy = pickle.loads(pickle.dumps(thing))
    assert copy is thing or list(copy) == list(thing)


def test_the_error_of_memory_is_one_of_both_trees_and_can_be_pickled():
    error = pickle.loads(pickle.dumps(errors.OutOfMemoryError("too large")))
    assert isinstance(error, errors.Seg3dcamError)
    assert isinstance(error, torch.OutOfMemoryError)
    assert type(error) is errors.OutOfMemoryError
    assert (type(error).__module__, str(error)) == ("seg3dcam.errors", "too large")
    assert not hasattr(errors, "OutOfMemory")


def test_methods_read_as_text_are_those_of_their_classes():
    assert method_names() == list(ALL_METHODS)
    cards = {key: card_of(inspect.getdoc(cam)) for key, cam in ALL_METHODS.items()}
    assert method_cards() == cards
    assert [list(card) for card in method_cards().values()] == [
        list(card) for card in cards.values()
    ]


# ------------------------------------------------------------------------------ older names


@pytest.fixture
def _forgotten():
    """No older name was imported yet, and none is known afterwards."""

    def forget():
        for name in OLD_NAMES:
            sys.modules.pop(name, None)
            vars(seg3dcam).pop(name.partition(".")[2], None)

    forget()
    yield
    forget()


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items(), ids=OLD_NAMES)
def test_an_older_name_is_the_same_module(old, new):
    module = importlib.import_module(new)
    spec, loader = module.__spec__, module.__loader__
    with pytest.warns(DeprecationWarning, match=f"^{old} is called {new}: import it") as caught:
        found = importlib.import_module(old)
    assert len(caught) == 1
    assert found is module
    assert sys.modules[old] is sys.modules[new] is module
    assert (module.__name__, module.__spec__, module.__loader__) == (new, spec, loader)
    assert importlib.util.find_spec(new) is spec
    assert importlib.import_module(old) is module  # once imported, without a warning


@pytest.mark.usefixtures("_forgotten")
def test_older_names_as_the_documents_of_then_had_them():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from seg3dcam.features import FeatureMaps, feature_maps
        from seg3dcam.layouts import Tokens
        from seg3dcam.look import Look

        attributions = seg3dcam.attributions
    assert {FeatureMaps.__module__, feature_maps.__module__} == {"seg3dcam.cams.feature_maps"}
    assert Tokens.__module__ == "seg3dcam.network.layouts"
    assert Look.__module__ == "seg3dcam.review.look"
    assert "occlusion" in attributions.ATTRIBUTIONS
    assert [warning.category for warning in caught] == [DeprecationWarning] * 4
    assert {warning.filename for warning in caught[:3]} == {__file__}


def test_older_names_are_looked_for_last_and_once():
    find_old_names()
    assert [type(finder) for finder in sys.meta_path].count(OldNames) == 1
    for name in OLD_NAMES:
        assert not (Path(seg3dcam.__file__).parent / f"{name.partition('.')[2]}.py").exists()
