"""State dicts: reading them without running code, and checking that they fit a network."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from seg3dcam.errors import ModelError, some
from seg3dcam.models.torchscript import is_torchscript, torchscript_state

#: The keys under which a checkpoint may keep its state dict.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "network_weights", "net", "network")

#: The types that the numbers in weights and buffers can have.
_NUMBERS = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)

#: Names in the archive of an exported program, for PyTorch 2.6 and later.
_OF_PROGRAMS = ("serialized_exported_program.json", "/models/model.json", "archive_format")

State = Mapping[str, torch.Tensor]


def read_state(file: Path, key: str | None = None, *, trust: bool = False) -> State:
    """Read a state dict of tensors without running code. It may lie inside a checkpoint.

    The kind of file is told by its content alone; its suffix is not believed.

    Args:
        key: the key under which a checkpoint keeps the state dict, where the file itself is none.
            None looks under the usual keys.
        trust: allow the code of a TorchScript archive to run where its weights cannot be read
            otherwise. The code in a pickle never runs.

    Raises:
        ModelError: the file does not exist, or holds something else.
    """
    content = _content(file, trust)
    places = CHECKPOINT_KEYS if key is None else (key,)
    for place in places:
        if isinstance(content, Mapping) and isinstance(content.get(place), Mapping):
            content = content[place]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        found = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
        raise ModelError(
            f"{file.name}: no state dict of tensors found. It holds {found}; looked for one under "
            + ", ".join(places)
            + (" alone, as load_dict of the bundle's CheckpointLoader says" if key else "")
        )
    if not content:
        raise ModelError(f"{file.name}: the state dict holds no tensors: it is empty")
    for name, value in content.items():
        _check_entry(name, value, file.name)
    return content


def _content(file: Path, trust: bool) -> Any:
    """Return what a file of weights holds."""
    check_file(file, "weights file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, about old or experimental kinds of file
            return _read(file, trust)
    except ModelError:
        raise
    except Exception as error:  # the readers raise anything for a damaged file
        more = isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in str(
            error
        )
        reason = "it holds more than tensors, and reading that could run code" if more else error
        first_line = (str(reason).strip().splitlines() or [""])[0]
        if " " not in first_line:  # not a sentence, but such as the key of a KeyError
            first_line = f"it is damaged or no such file: {error!r}"
        raise ModelError(
            f"{file.name}: cannot be read as weights ({first_line}). Legal are "
            ".safetensors and files that torch.load(weights_only=True) reads: a state dict of "
            "tensors"
        ) from error


def check_file(file: Path, what: str) -> None:
    """Raise ModelError unless a path leads to a regular file."""
    try:
        found = file.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ModelError(f"{file}: {what} that cannot be reached: {error.strerror}") from error
    if not found:
        raise ModelError(f"{file}: no such {what} (paths are relative to the model's YAML)")


def _read(file: Path, trust: bool) -> Any:
    with file.open("rb") as opened:
        start = opened.read(9)
    if not start:
        raise ValueError("it is empty: 0 bytes")
    if start[8:] == b"{":  # the header of .safetensors, after its length in 8 bytes
        return load_file(file)
    names = _names_in_zip(file)
    if file.suffix == ".pt2" or any(name.endswith(_OF_PROGRAMS) for name in names):
        raise ValueError(
            "an exported program: load it in Python, torch.save(program.state_dict, file), and "
            "give that file; or give it as exported"
        )
    if is_torchscript(file):
        return _torchscript(file, trust)
    if start.startswith(b"PK") and not names:
        raise ValueError("it is truncated or damaged: the end of its zip archive is missing")
    with file.open("rb") as opened:  # given a path, torch.load would believe its suffix
        return torch.load(opened, map_location="cpu", weights_only=True)


def _names_in_zip(file: Path) -> list[str]:
    """Return the names in a zip archive, none for another file; ValueError for a zip bomb."""
    if not zipfile.is_zipfile(file):
        return []
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    # PyTorch compresses only source text, not tensors, so unpacking hardly makes a file larger.
    unpacked, packed = sum(entry.file_size for entry in entries), file.stat().st_size
    if unpacked > 10 * packed + 10_000_000:
        raise ValueError(f"its {packed} bytes unpack to {unpacked}, as no file of weights does")
    return [entry.filename for entry in entries]


def _torchscript(file: Path, trust: bool) -> dict[str, torch.Tensor]:
    """Return the weights of a TorchScript archive. Its code runs only if it must and is trusted."""
    try:
        state = torchscript_state(file)
    except Exception as error:
        if trust:
            return torch.jit.load(str(file), map_location="cpu").state_dict()
        raise ModelError(
            f"{file.name}: the weights of this TorchScript archive cannot be read without running "
            f"its code: {error}. Save its state dict in Python instead; or, if you know where it "
            "comes from, allow it with --trust (trust=True)"
        ) from error
    if not state:
        raise ModelError(
            f"{file.name}: this TorchScript archive has no parameters: a frozen one keeps its "
            "weights as constants of its code. Save the state dict of the network itself"
        )
    return state


def _check_entry(name: Any, value: torch.Tensor, file: str) -> None:
    """Raise ModelError for a key or a tensor that cannot belong to a network's weights."""
    if not isinstance(name, str):
        raise ModelError(
            f"{file}: the key {name!r} is of type {type(name).__name__}; the keys of a state dict "
            "are text, such as 'model.0.weight'"
        )
    if found := tensor_fault(value):
        raise ModelError(
            f"{file}: {name} is {found}. Weights are dense tensors of real numbers with their "
            "values, such as float32: convert it in Python, and save the state dict again"
        )


def tensor_fault(value: torch.Tensor) -> str:
    """Return why a tensor cannot be a network's weight, or "" where it can.

    >>> tensor_fault(torch.eye(3).to_sparse()), tensor_fault(torch.eye(3))
    ('sparse (torch.sparse_coo)', '')
    """
    if value.is_nested:
        return "a nested tensor"
    if value.is_meta:
        return "on the meta device, without any values"
    if value.dtype not in _NUMBERS:
        return f"{'quantized' if value.is_quantized else 'of type'} {value.dtype}"
    return "" if value.layout == torch.strided else f"sparse ({value.layout})"


def check_fit(
    network: nn.Module, state: Mapping[str, torch.Tensor], file: str, network_name: str
) -> None:
    """Raise ModelError unless a state dict has exactly the keys of a network, in the same shapes.

    Args:
        file: the file's name, for messages.
        network_name: how messages call the network.
    """
    own = network.state_dict()
    reshaped = [
        f"{key} is {tuple(state[key].shape)}, the network has {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{title}: {some(keys)}"
        for title, keys in [
            ("missing in the file", [key for key in own if key not in state]),
            ("unknown to the network", [key for key in state if key not in own]),
            ("of another shape", reshaped),
        ]
        if keys
    ]
    if problems:
        raise ModelError(f"{file}: the weights do not fit {network_name}. " + "; ".join(problems))


def check_finite(state: Mapping[str, torch.Tensor], file: str) -> None:
    """Raise ModelError where weights are NaN or infinite."""
    broken = [
        key
        for key, value in state.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if broken:
        raise ModelError(
            f"{file}: the weights hold NaN or infinite values, in {some(broken)}: did the "
            "training diverge? Take an earlier checkpoint"
        )


def without_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the prefixes that DataParallel and torch.compile put before every key.

    They may come in either order.

    >>> list(without_prefix({"module.weight": torch.zeros(1)}))
    ['weight']
    """
    for prefix in ("module.", "_orig_mod.", "module."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)
