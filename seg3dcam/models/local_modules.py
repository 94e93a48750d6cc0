"""Importing Python modules that lie beside a model's YAML, which needs the user's trust."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

#: Modules that no file beside a YAML may replace, since everything else uses them too.
_SHARED = {
    *sys.stdlib_module_names,
    *("dynamic_network_architectures", "monai", "numpy", "seg3dcam", "torch", "torchvision"),
}


@contextmanager
def local_modules(folder: Path) -> Iterator[list[Path]]:
    """Let the modules in a folder be imported, in preference to others of the same names.

    Yields a list that is empty at first. When the context ends, the files of the folder that were
    imported have been added to it. The caller's `sys.path` and `sys.modules` are then as they were,
    so that two models in two folders, each with a `nets.py`, get each its own. Nothing is written
    into the folder.
    """
    folder = folder.resolve()
    names = _modules_in(folder) - _SHARED

    def taken() -> dict[str, ModuleType]:
        """Remove loaded modules with these names that come from elsewhere, and return them."""
        loaded = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in names}
        return {n: sys.modules.pop(n) for n in loaded if not _lies_in(n, folder)}

    path, writes, others = list(sys.path), sys.dont_write_bytecode, taken()
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    used: list[Path] = []
    try:
        yield used
    finally:
        used += _files_of(names, folder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in names:
                del sys.modules[name]
        sys.modules.update(others)
        sys.path[:], sys.dont_write_bytecode = path, writes


def _files_of(names: set[str], folder: Path) -> list[Path]:
    """Return the files in a folder from which modules with these names were loaded."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in names]
    files = {getattr(module, "__file__", None) for module in modules}
    found = {Path(file).resolve() for file in files if file is not None}
    return sorted(file for file in found if file.is_relative_to(folder) and file.is_file())


def _modules_in(folder: Path) -> set[str]:
    """Return the names of the modules and packages in a folder, also without an __init__.py."""
    names = {file.stem for file in folder.glob("*.py")}
    names |= {file.parent.name for file in folder.glob("*/__init__.py")}
    plain = {file.parent.name for file in folder.glob("*/*.py")} - names
    # A folder without __init__.py gives way to a package of the same name that is loaded.
    return names | {n for n in plain if getattr(sys.modules.get(n), "__file__", None) is None}


def _lies_in(name: str, folder: Path) -> bool:
    """Tell whether a loaded module, or the package that it belongs to, comes from a folder."""
    top = name.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    own = (folder / f"{top}.py", folder / top / "__init__.py")
    return file is not None and Path(file).resolve() in own
