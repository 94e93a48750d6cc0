"""State dicts: read without running code, and whether they fit a network."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from seg3dcam.errors import ModelError

#: Where a checkpoint keeps its state dict.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "network_weights", "net", "network")


def read_state(file: Path, key: str | None = None) -> Mapping[str, torch.Tensor]:
    """Read a state dict of tensors, also inside of a checkpoint, without running code.

    Args:
        key: where a checkpoint keeps it; None looks at the usual places.

    Raises:
        ModelError: no such file, or it holds something else.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such weights file (paths are relative to the model's YAML)")
    try:
        if file.suffix == ".pt2":
            raise ValueError(
                "an exported program: load it in Python, torch.save(program.state_dict, file), and "
                "give that file; or give it as exported"
            )
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        elif is_torchscript(file):
            content = torchscript_state(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        more = isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in str(
            error
        )
        reason = "it holds more than tensors, and reading that could run code" if more else error
        first_line = (str(reason).strip().splitlines() or [repr(error)])[0]
        raise ModelError(
            f"{file.name}: cannot be read as weights ({first_line}). Legal are "
            ".safetensors and files that torch.load(weights_only=True) reads: a state dict of "
            "tensors"
        ) from error
    for place in (key, *CHECKPOINT_KEYS):
        if isinstance(content, Mapping) and isinstance(content.get(place), Mapping):
            content = content[place]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        found = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
        raise ModelError(
            f"{file.name}: no state dict of tensors found. It holds {found}; looked for one under "
            + ", ".join(CHECKPOINT_KEYS)
        )
    return content


def is_torchscript(file: Path) -> bool:
    """Tell whether a file is a TorchScript archive, which holds code and weights."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def torchscript_state(file: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a TorchScript archive.

    Its own code is TorchScript, which knows no files and no processes, and runs only when it is
    called; its tensors are read by PyTorch's unpickler in C++, which makes no Python objects.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that TorchScript is old
        return torch.jit.load(str(file), map_location="cpu").state_dict()


def check_fit(
    network: nn.Module, state: Mapping[str, torch.Tensor], file: str, network_name: str
) -> None:
    """Raise ModelError unless a state dict has every key of a network, in its shape, and no other.

    Args:
        file, network_name: for messages.
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
    """Drop the prefixes that DataParallel and torch.compile put before every key, in any order.

    >>> list(without_prefix({"module.weight": torch.zeros(1)}))
    ['weight']
    """
    for prefix in ("module.", "_orig_mod.", "module."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def some(keys: Sequence[str]) -> str:
    """Name a few keys.

    >>> some(["a", "b", "c", "d", "e", "f", "g"])
    'a, b, c, d, e and 2 more'
    """
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
