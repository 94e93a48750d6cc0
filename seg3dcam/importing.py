"""How the package is imported: names when they are first used, and modules under their older names.

PyTorch and what builds on it take seconds to import. So `import seg3dcam` imports none of it: the
block `if TYPE_CHECKING` of a package, which type checkers and editors read, says which module each
name is in, and `lazy` imports that module where the name is first asked for (PEP 562).
"""

from __future__ import annotations

import ast
import pkgutil
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

#: Module of seg3dcam 0.1 -> the module that holds what was in it.
OLD_NAMES = {
    "seg3dcam.attributions": "seg3dcam.cams.attributions",
    "seg3dcam.explanation": "seg3dcam.explaining.explanation",
    "seg3dcam.features": "seg3dcam.cams.feature_maps",
    "seg3dcam.layouts": "seg3dcam.network.layouts",
    "seg3dcam.look": "seg3dcam.review.look",
    "seg3dcam.review.map_2d": "seg3dcam.review.pictures.map_2d",
}


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`, which import a name when it is first used.

    Modules of the package are found as its attributes too, imported when they are first used.

    Args:
        package: its dotted name, `__name__`.

    Raises:
        ImportError: one of the names is a module's too. Importing that module would put the module
            in the place of the name.

    Example, in `__init__.py`:

        if TYPE_CHECKING:
            from seg3dcam.scan import Scan, load_scan
        else:
            __getattr__, __dir__ = lazy(__name__)
    """
    module_of = imports_for_type_checkers(package)
    modules = {
        module.removeprefix(f"{package}.").partition(".")[0] for module in module_of.values()
    }
    if both := modules & module_of.keys():
        raise ImportError(f"{package}: {', '.join(both)} is a module's name too; rename the module")

    def get(name: str) -> Any:
        if name in module_of:
            value = getattr(import_module(module_of[name]), name)
        else:
            value = _module(package, name)
        setattr(sys.modules[package], name, value)  # so that it is asked for only once
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return get, list_names


def imports_for_type_checkers(package: str) -> dict[str, str]:
    """Return name -> module of what a package imports under `if TYPE_CHECKING`."""
    source = pkgutil.get_data(package, "__init__.py") or b""
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    return {
        alias.name: line.module
        for block in blocks
        if ast.unparse(block.test) == "TYPE_CHECKING"
        for line in block.body
        if isinstance(line, ast.ImportFrom) and line.module and line.module != package
        for alias in line.names
    }


def _module(package: str, name: str) -> ModuleType:
    """Return a module of a package; AttributeError where there is none of this name."""
    full_name = f"{package}.{name}"
    missing = AttributeError(f"module {package!r} has no attribute {name!r}")
    if name.startswith("_"):
        raise missing
    try:
        return import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:  # a module is there, and lacks another one
            raise
        raise missing from None


class OldNames(MetaPathFinder, Loader):
    """Imports the very module that an older name stands for, with a DeprecationWarning."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where an older name leads; None for any other name."""
        return spec_from_loader(fullname, self) if fullname in OLD_NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module under its name of today."""
        name = OLD_NAMES[spec.name]
        warnings.warn(
            f"{spec.name} is called {name}: import it under this name",
            DeprecationWarning,
            stacklevel=2,
        )
        module = import_module(name)
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which the import system has just replaced."""
        if module.__spec__ is not None:
            module.__spec__ = self._specs.pop(module.__spec__.name)


def find_old_names() -> None:
    """Let older names be imported; a module that really has such a name comes first."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
