"""Reading the weights of a TorchScript archive without running its code.

`torch.jit.load` runs code from the archive: the `__setstate__` of a module may do whatever
TorchScript can, such as writing a file. Here the archive is only unpacked. Its pickle is read by an
unpickler that makes nothing but tensors and modules without code, and the tensors are made from
their bytes. The archive's source text says which tensors are parameters and buffers; it is searched
as text and never run.
"""

from __future__ import annotations

import ast
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

#: An archive's name for a storage of numbers -> their type.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

#: Most modules in an archive. A module that several others share counts in each place.
_MOST_MODULES = 100_000

#: Most levels at which modules may hold other modules; one that holds itself would never end.
_DEEPEST = 100

#: The lines in the source of a class that say which of its tensors are weights.
_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = (\[.*\])\n  __buffers__ = (\[.*\])$", re.MULTILINE
)


def is_torchscript(file: Path) -> bool:
    """Tell whether a file is a TorchScript archive, which holds code and weights."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def torchscript_state(file: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a TorchScript archive without running its code.

    Raises:
        ValueError: the archive is damaged, or only its own code can put its weights together.
    """
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        root = next(n.removesuffix("constants.pkl") for n in names if n.endswith("/constants.pkl"))
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        with archive.open(f"{root}data.pkl") as pickled:
            module = _Unpickler(pickled, lambda key: archive.read(f"{root}data/{key}")).load()
        weights = _weights_of_classes(archive, f"{root}code/")
    if not isinstance(module, _Module):
        raise ValueError("it holds no module")
    return dict(_state(module, weights))


class _Module:
    """A module in the archive: the full name of its class, and its attributes."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.attributes: Any = None

    def __setstate__(self, attributes: Any) -> None:
        self.attributes = attributes


class _Unpickler(pickle._Unpickler):
    """An unpickler that makes only plain values, tensors and `_Module`s.

    It derives from the unpickler that is written in Python, which keeps its memo in a dict. The one
    written in C reserves memory for whatever number of entries a file names.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._read = read
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            place = f"{module}.{name}"
            return type("_Module", (_Module,), {"__new__": lambda _: _new(place)})
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = _KNOWN.get(f"{module}.{name}")
        if known is None:
            raise pickle.UnpicklingError(f"{module}.{name} is no tensor")
        return known

    def load_build(self) -> None:
        if type(self.stack[-2]) is not _Module:  # a file may set no attributes of other objects
            raise pickle.UnpicklingError(f"{type(self.stack[-2]).__name__} with a state of its own")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, given: Any) -> torch.Tensor:
        kind, dtype, key, _, count = given
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown storage {given!r}")
        if key not in self._storages:
            data = bytearray(self._read(str(key)))
            if len(data) != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} has {len(data)} bytes")
            empty = torch.empty(0, dtype=dtype)
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else empty
        return self._storages[key]


def _new(place: str) -> _Module:
    return _Module(place)


def _tensor(storage: torch.Tensor, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)  # which refuses to go beyond the storage


def _same(values: Any, *_: Any) -> Any:
    return values


#: The functions that an archive's pickle may call -> what is called instead.
_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.jit._pickle.build_boollist": _same,
    "torch.jit._pickle.build_doublelist": _same,
    "torch.jit._pickle.build_intlist": _same,
    "torch.jit._pickle.build_tensorlist": _same,
    "torch.jit._pickle.restore_type_tag": _same,
}


def _weights_of_classes(archive: zipfile.ZipFile, root: str) -> dict[str, list[str]]:
    """Return the parameters and buffers that the archive's source names for every class."""
    found = {}
    for name in archive.namelist():
        if name.startswith(root) and name.endswith(".py"):
            source = archive.read(name).decode()
            module = name.removeprefix(root).removesuffix(".py").replace("/", ".")
            for kind, parameters, buffers in _CLASS.findall(source):
                weights = [*ast.literal_eval(parameters), *ast.literal_eval(buffers)]
                found[f"{module}.{kind}"] = weights
    return found


def _state(module: _Module, weights: dict[str, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a module and of all modules in it, named as in a `state_dict`."""
    left = [("", module)]
    for _ in range(_MOST_MODULES):
        if not left:
            return
        prefix, module = left.pop()
        if prefix.count(".") > _DEEPEST:
            raise ValueError(f"its modules lie more than {_DEEPEST} deep in each other")
        if not isinstance(module.attributes, dict) or module.place not in weights:
            name = module.place.rpartition(".")[2]
            raise ValueError(f"its {name} at {prefix or 'the top'} is made by code of its own")
        for name in weights[module.place]:
            value = module.attributes.get(name)
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
        inner = [(n, m) for n, m in module.attributes.items() if isinstance(m, _Module)]
        left.extend((f"{prefix}{name}.", m) for name, m in reversed(inner))
    raise ValueError(f"it has more than {_MOST_MODULES} modules")
