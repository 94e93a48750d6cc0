"""Shared by all tests: one thread, and the third-party tool that needs help to be imported."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

import pytest
import torch

# The networks of the tests are tiny: more threads cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pytorch_grad_cam() -> ModuleType:
    """Import pytorch-grad-cam, also where the installed torchvision does not fit the torch.

    Only the image helpers of pytorch-grad-cam use torchvision, and no test calls those, so an
    empty stand-in is enough. It is there during the import and gone afterwards.
    """
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError):
            for name, module in _torchvision_stand_in().items():
                patch.setitem(sys.modules, name, module)
        return importlib.import_module("pytorch_grad_cam")


def _torchvision_stand_in() -> dict[str, ModuleType]:
    names = ("", ".ops", ".transforms", ".transforms.functional")
    modules = {f"torchvision{name}": ModuleType(f"torchvision{name}") for name in names}
    top, transforms = modules["torchvision"], modules["torchvision.transforms"]
    top.ops, top.transforms = modules["torchvision.ops"], transforms
    transforms.functional = modules["torchvision.transforms.functional"]
    for name in ("Compose", "Normalize", "ToTensor"):
        setattr(transforms, name, _not_here)
    transforms.functional.resize = _not_here
    top.ops.box_iou = _not_here
    return modules


def _not_here(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("this is a stand-in for torchvision")
