"""Shared by all tests: one thread, a case to explain, and tools that need help to be imported."""

from __future__ import annotations

import gc
import importlib
import sys
import warnings
from collections import defaultdict
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch

# The networks of the tests are tiny: more threads cost more than they bring.
torch.set_num_threads(1)

# What is imported and collected stays to the end: nobody looks for garbage among it.
gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Look for garbage from here on, and only among what tests make."""
    importlib.import_module("hypothesis")  # asks who refers to an object, which freezing hides
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let a default run take `n` sets of parameters of a test that is marked `few(n)`.

    They are spread over all sets; the others are slow.
    """
    sets: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            sets[item.nodeid.partition("[")[0]].append(item)
    for of_test in sets.values():
        marker = of_test[0].get_closest_marker("few")
        count = marker.args[0] if marker else 0
        taken = {number * len(of_test) // count for number in range(count)}
        for number, item in enumerate(of_test):
            if number not in taken:
                item.add_marker("slow")


@pytest.fixture
def place(tmp_path):
    """A folder with a scan and a model, see `helpers_cases.Place`."""
    from helpers_cases import Place  # imports much, which few tests need

    return Place.at(tmp_path)


@pytest.fixture(scope="module")
def explained_once():
    """Let jobs that ask for the same explanation compute it once: for tests of what is written."""
    from helpers_cases import explain_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seg3dcam.job.run.explain_each", explain_once)
        yield


@pytest.fixture(scope="module")
def measured_once():
    """Let networks that are the same have their grids measured once: for tests of other things."""
    from helpers_cases import measure_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seg3dcam.network.grids.measurement.measure_grids", measure_once)
        yield


@pytest.fixture
def voxels():
    """Voxels (4, 5, 6) for a small file, none of them 0."""
    return np.random.default_rng(0).integers(1, 90, (4, 5, 6)).astype(np.int16)


@pytest.fixture(scope="module")
def browser():
    """A page in Chromium, in which the tests of a module open one address after another."""
    from helpers_browser import open_browser

    with open_browser() as page:
        yield page


@pytest.fixture(scope="session")
def pytorch_grad_cam() -> ModuleType:
    """Import pytorch-grad-cam, also where the installed torchvision does not fit the torch.

    Only the image helpers of pytorch-grad-cam use torchvision, and no test calls those.
    """
    return _import_without_torchvision("pytorch_grad_cam")


@pytest.fixture(scope="session")
def lightning() -> ModuleType:
    """Import Lightning, also where the installed torchvision does not fit the torch.

    Only image metrics use torchvision, and no test has one.
    """
    return _import_without_torchvision("lightning.pytorch")


def _import_without_torchvision(name: str) -> ModuleType:
    """Import a module; a torchvision that is broken is replaced by an empty one meanwhile."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError):
            for place, module in _torchvision_stand_in().items():
                patch.setitem(sys.modules, place, module)
        return importlib.import_module(name)


class _StandIn(ModuleType):
    """A module in which every name is a function that must not be called."""

    __path__: ClassVar[list[str]] = []  # a package, so that it may have modules

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _not_here


def _torchvision_stand_in() -> dict[str, ModuleType]:
    names = ("", ".models", ".ops", ".transforms", ".transforms.functional")
    modules: dict[str, ModuleType] = {}
    for name in names:
        modules[f"torchvision{name}"] = _StandIn(f"torchvision{name}")
        parent, _, last = f"torchvision{name}".rpartition(".")
        if parent:
            setattr(modules[parent], last, modules[f"torchvision{name}"])
    return modules


def _not_here(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("this is a stand-in for torchvision")
