"""A MONAI bundle's config: read as plain data first, then, with trust, built.

`read` turns a folder into a `Bundle` without running anything. What lies outside of the schema is
said there, with file and key. Only `Bundle.parse` and what follows it run the config's own code.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import monai
import numpy as np
import torch
from monai.bundle import ConfigParser, ReferenceResolver
from monai.networks import nets
from monai.transforms import Compose
from torch import nn

from seg3dcam.errors import ModelError, Seg3dcamError, Seg3dcamWarning, nearest, tell
from seg3dcam.models.bundle.engine import stand_in
from seg3dcam.models.bundle.files import (
    Metadata,
    check_size,
    config_file,
    large_files,
    overridden,
    read_file,
)
from seg3dcam.models.specs import BundleSpec
from seg3dcam.settings import validate

#: Arguments of readers and writers. They may want packages that nothing here needs: scans are
#: read by `load_scan`, and no transform writes.
_UNUSED = {"LoadImage": ("reader",), "SaveImage": ("writer", "output_ext", "output_format")}

#: Arguments that networks once took and that never changed what they compute.
_RETIRED = {"SwinUNETR": ("img_size",)}

#: Names of numpy before and after version 2, as they are written in checkpoints.
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")

#: An entry of a config that is what another one is.
_REFERENCE = re.compile(r"@\w+((::|#)\w+)*")


def read(root: Path, spec: BundleSpec) -> Bundle:
    """Read a bundle's files as plain data; nothing of it runs.

    Raises:
        ModelError: no bundle, or no config in it.
        ConfigError: a file that is no JSON or YAML, or a key outside of the schema.
    """
    config = config_file(root, spec)
    content = overridden(read_file(config), spec.set, config.name)
    about = root / "configs" / "metadata.json"
    metadata = read_file(about) if about.is_file() else {}
    return Bundle(
        root=root,
        config=config,
        content=content,
        raw_metadata=metadata,
        metadata=validate(metadata, Metadata, str(about)),
    )


# ---------------------------------------------------------------- the config, trusted


@dataclass
class Bundle:
    """A bundle's config and, once it is trusted and parsed, what it stands for.

    Attributes:
        content: the config as plain data, with the user's own values.
        resolved: the same after MONAI has put in what macros (`%`) and relative ids stand for.
        itk: whether the config reads images with ITK.
        readers: the readers of images that the config names, as it says them.
        modules: the bundle's own Python modules, kept apart from those of other bundles, which
            mostly have the same names.
    """

    root: Path
    config: Path
    content: dict[str, Any]
    raw_metadata: dict[str, Any]
    metadata: Metadata
    resolved: dict[str, Any] = field(default_factory=dict)
    itk: bool = False
    readers: list[Any] = field(default_factory=list)
    modules: dict[str, ModuleType] = field(default_factory=dict)
    _parser: ConfigParser = field(default_factory=ConfigParser)

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def place(self) -> str:
        """The bundle and its config, as messages begin."""
        return f"bundle {self.name}: {self.config.name}"

    def download(self) -> str:
        """Return how to get the large files that are missing, ready to end a message."""
        absent = [name for name in large_files(self.root) if not (self.root / name).is_file()]
        if not absent:
            return ""
        return (
            f". large_files.yml lists {', '.join(absent)}: download with python -m monai.bundle "
            f"download_large_files --bundle_path {self.root}"
        )

    @contextmanager
    def own_code(self) -> Iterator[None]:
        """Let the bundle's own packages be imported; afterwards nothing of them is to be seen."""
        names = {p.stem for p in self.root.iterdir() if p.is_dir() or p.suffix == ".py"}

        def taken() -> dict[str, ModuleType]:
            found = [name for name in sys.modules if name.partition(".")[0] in names]
            return {name: sys.modules.pop(name) for name in found}

        others = taken()
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.root))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            self.modules = taken()
            sys.modules.update(others)
            sys.path.remove(str(self.root))

    def parse(self) -> None:
        """Resolve the config as MONAI does; only what is asked for later is built."""
        try:
            with _quiet():
                self._parser.set({**copy.deepcopy(self.content), "_meta_": self.raw_metadata})
                self._parser.resolve_macro_and_relative_ids()
        except Exception as error:
            raise ModelError(f"{self.place}: {_root_cause(error)}") from error
        self.resolved = self._parser.get()
        check_size(self.resolved, str(self.config))
        self.resolved.update(bundle_root=str(self.root), device="$torch.device('cpu')")
        self._parser = self._new_parser()

    def _new_parser(self) -> ConfigParser:
        return ConfigParser(self._to_build(copy.deepcopy(self.resolved)))

    def _to_build(self, value: Any) -> Any:
        """Return a config that builds here: on the CPU, without readers, writers and engines."""
        if isinstance(value, list):
            return [self._to_build(entry) for entry in value]
        if isinstance(value, str):
            return _on_cpu(value)
        if not isinstance(value, dict):
            return value
        target = str(value.get("_target_", "")).rpartition(".")[2]
        if value.get("_mode_") == "debug" or value.get("_debug_"):
            raise ModelError(f"{self.place}: {target} opens a debugger (_mode_: debug): remove it")
        for start, arguments in _UNUSED.items():
            if target.startswith(start):
                unused = {name: value.pop(name) for name in arguments if name in value}
                self._note_reader(unused.get("reader"))
        for argument in _RETIRED.get(target, ()):
            if argument in value and argument not in _accepted(target):
                del value[argument]
                tell(
                    f"{self.place}: {target} no longer takes {argument} (MONAI "
                    f"{monai.__version__}), which never changed what it computes: left out"
                )
        return {key: self._to_build(entry) for key, entry in stand_in(value, self.place).items()}

    def _note_reader(self, reader: Any) -> None:
        if isinstance(reader, str) and reader.startswith("@"):
            reader = self.get(self.followed(reader[1:]))
        self.readers.append(reader)
        self.itk |= "itk" in str(reader).lower()

    def get(self, identity: str) -> Any:
        """Return what the resolved config says at an id, None where nothing is there."""
        value: Any = self.resolved
        for part in ReferenceResolver.split_id(identity):
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                return None
        return value

    def followed(self, identity: str) -> str:
        """Return the id that a plain reference (`@id`) leads to in the end, or the id itself."""
        seen: set[str] = set()
        while identity not in seen:
            seen.add(identity)
            value = self.get(identity)
            if not isinstance(value, str) or not _REFERENCE.fullmatch(value):
                break
            identity = ReferenceResolver.normalize_id(value[1:])
        return identity

    def evaluator(self) -> dict[str, Any] | None:
        """Return what the config says of the evaluator that it runs; None: it has none."""
        found = self.get(self.followed("evaluator"))
        if isinstance(found, str) and found.startswith("$"):
            raise ModelError(
                f"{self.place}: evaluator is an expression, so what it uses is not seen; write it "
                "as _target_: SupervisedEvaluator with its arguments"
            )
        return found if isinstance(found, dict) and "_target_" in found else None

    def used(self, argument: str, name: str | None = None) -> str | None:
        """Return the id of what the evaluator has as an argument; None: it has none.

        Args:
            name: the id of what it is where there is no evaluator; default: the argument.
        """
        evaluator = self.evaluator()
        if evaluator is None:
            return self.followed(name or argument)
        if evaluator.get(argument) is None:
            return None
        return self.followed(f"{self.followed('evaluator')}::{argument}")

    def again(self) -> Bundle:
        """Return the same bundle, of which nothing is built yet."""
        return replace(self, _parser=self._new_parser())

    def check_network(self) -> None:
        """Raise ModelError where the network cannot be built."""
        self._module(self._own_network())

    def network(self) -> nn.Module:
        """Return the network that the evaluator runs, as it is at the moment."""
        network = self._module(self.used("network") or self._own_network())
        return unwrapped(network)

    def _own_network(self) -> str:
        own = "network_def" if self.get("network_def") is not None else "network"
        return own if self.get(own) is not None else self.used("network") or own

    def _module(self, key: str) -> nn.Module:
        network = self.parsed(key)
        if not isinstance(network, nn.Module):
            raise ModelError(
                f"{self.place}: {key} is a {type(network).__name__}, not a torch.nn.Module"
            )
        return network

    def transforms(self, key: str) -> list[Any]:
        """Return the transforms of a key, one after the other; none where the key is missing."""
        return self._flat(self.parsed(key)) if self.get(key) is not None else []

    def _flat(self, transform: Any) -> list[Any]:
        """Return the transforms of a Compose, of one in it, or of a list.

        Only of MONAI's own Compose: its subclasses choose among theirs, or change their order.
        """
        self._check_eager(transform)
        if type(transform) is Compose:
            transform = transform.transforms
        if not isinstance(transform, list | tuple):
            return [transform] if transform is not None else []
        return [inner for outer in transform for inner in self._flat(outer)]

    def _check_eager(self, transform: Any) -> None:
        """Raise ModelError where resampling waits, and several steps become one."""
        if getattr(transform, "lazy", False):
            raise ModelError(
                f"{self.place}: {type(transform).__name__} resamples lazily (lazy: true), which "
                "gives other voxels than one transform after the other. Set it to false, such as "
                "--set preprocessing#lazy=false, if the network was trained so; or explain the "
                "network in Python: SegModel(network, prepare=...)"
            )

    def parsed(self, key: str) -> Any:
        """Return what a key of the config stands for."""
        if self.get(key) is None:
            known = [str(k) for k in self.resolved if not str(k).startswith("_")]
            raise ModelError(f"{self.place} has no {key}: {nearest(key, known)}")
        try:
            # The random numbers of a network's first weights are nobody else's.
            with torch.random.fork_rng(devices=[]), _quiet(), _arrays_from_files():
                return self._parser.get_parsed_content(key)
        except (Exception, SystemExit) as error:
            cause = _root_cause(error)
            if isinstance(cause, Seg3dcamError):
                raise cause from None
            shown = key.replace("::", "#")
            made = self.metadata.monai_version or "unknown"
            if isinstance(cause, FileNotFoundError):
                raise ModelError(
                    f"{self.place}: {shown} cannot be built: {cause}{self.download()}"
                ) from error
            raise ModelError(
                f"{self.place}: {shown} cannot be built: {cause}{_mend(cause)}. The bundle was "
                f"made with MONAI {made}, {monai.__version__} is installed"
            ) from error


def unwrapped(network: nn.Module) -> nn.Module:
    """Return a network without what spreads it over several devices."""
    while isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        network = network.module
    return network


def _on_cpu(text: str) -> str:
    """Return an entry that builds on the CPU, also where it names a GPU."""
    text = re.sub(r"^cuda(:\d+)?$|(?<=['\"])cuda(:\d+)?(?=['\"])", "cpu", text)
    return re.sub(r"\.cuda\([^()]*\)", ".cpu()", text) if text.startswith("$") else text


def _accepted(network: str) -> list[str]:
    """Return the arguments of a network of MONAI."""
    kind = getattr(nets, network, None)
    return list(inspect.signature(kind).parameters) if isinstance(kind, type) else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence MONAI's warnings, which are of what is not used here; ours are still given."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for said in caught:
            if issubclass(said.category, Seg3dcamWarning):
                warnings.warn_explicit(said.message, said.category, said.filename, said.lineno)


@contextmanager
def _arrays_from_files() -> Iterator[None]:
    """Let a config's `torch.load` read numpy arrays too; what would run code is still refused."""
    rebuild, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    safe: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}]
    for module in _NUMPY:
        safe += [(rebuild, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    with torch.serialization.safe_globals(safe):
        yield


def _root_cause(error: BaseException) -> BaseException:
    """Return the error that MONAI wraps into others, which say only where it happened."""
    wrappers = ("Failed to ", "applying transform")
    while error.__cause__ is not None and str(error).startswith(wrappers):
        error = error.__cause__
    return error


def _mend(cause: BaseException) -> str:
    """Return what to do about a known cause, ready to end a message."""
    text = str(cause)
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if unknown:
        taken = _accepted(unknown[1])
        hint = f"; {nearest(unknown[2], taken)}" if taken else ""
        return f". Remove or rename {unknown[2]} in the config{hint}"
    if "weights_only" in text.lower() or "Weights only load failed" in text:
        return (
            ". The file holds more than tensors and arrays, and reading it could run code. If you "
            "know it, write torch.load(..., weights_only=False) in the config"
        )
    return ""
