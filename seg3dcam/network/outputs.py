"""Find the logits in the output of a network.

Unless `output` says otherwise, the rule is:

- A single tensor is taken as the logits. If it has one axis too many, (B, n, K, *S), it holds the
  levels of deep supervision, and the first level is taken.
- In a list or tuple, the first full-resolution tensor is taken: deep supervision puts the finest
  level first, and a variational network puts its reconstruction last. If another tensor has the
  very same shape, this would be a guess, and it is refused.
- In a dict or dataclass, the only full-resolution tensor is taken.

Anything else is refused with an error that lists the choices. `output` may be a position, a key or
a name, or a function of the network's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from seg3dcam.errors import ModelError

#: None for the rule above, a position, a key, or a function of the network's output.
OutputSelection = int | str | Callable[[Any], torch.Tensor] | None

Path = tuple[int | str, ...]


def select_output(
    output: Any, selection: OutputSelection, spatial_shape: tuple[int, ...]
) -> torch.Tensor:
    """Return the logits (B, K, *S) in the output of a network.

    Args:
        output: what `model(x)` returned.
        selection: see `OutputSelection`.
        spatial_shape: the spatial shape of `x`, which full-resolution logits share.

    Raises:
        ModelError: no tensor, or more than one, can be the logits.

    >>> finest, coarse = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)
    >>> select_output([finest, coarse], None, (8, 8)) is finest
    True
    """
    if callable(selection):
        chosen = selection(output)
    else:
        size = tuple(spatial_shape)
        chosen = _by_rule(output, size) if selection is None else _at(output, selection, size)
        if _is_stack(chosen, size):
            chosen = chosen[:, 0]
    if not isinstance(chosen, torch.Tensor) or chosen.ndim < 2:
        raise ModelError(
            f"the network's output{_written(selection)} is {_describe(chosen)}; logits are a "
            f"tensor (B, classes, ...). It returned {_describe(output)}. Choose with output="
        )
    if chosen.layout != torch.strided or chosen.is_complex():
        what = "complex" if chosen.is_complex() else "not dense"
        raise ModelError(
            f"the network's logits are {what} ({chosen.dtype}, {chosen.layout}); they must be real "
            "numbers in a dense tensor. Give output=<function that makes them so>"
        )
    if _is_channels_last(chosen, tuple(spatial_shape)):
        raise ModelError(
            f"the network's logits are {_describe(chosen)}: the input's spatial shape "
            f"{tuple(spatial_shape)} comes before the classes; logits are (B, classes, "
            f"*{tuple(spatial_shape)}). Give {_channels_first(selection)}"
        )
    return chosen


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """Walk through nested tuples, lists, dicts and dataclasses; yield (path of keys, tensor).

    >>> [path for path, _ in tensors_in({"a": torch.zeros(1), "b": [torch.zeros(1)]})]
    [('a',), ('b', 0)]
    """
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from tensors_in(item, (*path, position))
    else:
        for key, item in _named(value).items():
            yield from tensors_in(item, (*path, key))


def item_of(value: Any, key: int | str) -> Any:
    """Return an element of a container by its position, its key, or the name of a field.

    Raises:
        KeyError, IndexError, TypeError: there is no such element.
    """
    if isinstance(key, str) and not isinstance(value, Mapping):
        names = getattr(value, "_fields", None) or _named(value)
        if key not in names:
            raise KeyError(key)
        return getattr(value, key)
    return value[key]


def _named(value: Any) -> Mapping[Any, Any]:
    """Return the named parts of a dict or dataclass; {} for anything else."""
    if isinstance(value, Mapping):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: getattr(value, part.name) for part in fields(value)}
    return {}


def _by_rule(output: Any, size: tuple[int, ...]) -> Any:
    """Return the logits by the rule of this module.

    Raises:
        ModelError: no tensor, or more than one, can be the logits.
    """
    if isinstance(output, torch.Tensor):
        return output
    found = list(tensors_in(output))
    full = [(path, tensor) for path, tensor in found if _is_full(tensor, size)]
    if not full and len(found) == 1 and not _named(output):
        return found[0][1]
    if not full:
        hint = "output='key'" if _named(output) else "output=<position, key or function>"
        raise ModelError(
            f"the network returned {_describe(output)}, with no tensor of the input's spatial "
            f"shape {size}; say which are the logits with {hint}"
        )
    first = full[0][1]
    rivals = [
        (path, tensor)
        for path, tensor in full
        if tensor is not first and (_named(output) or tensor.shape == first.shape)
    ]
    if rivals:
        choices = [
            f"{_choosing(output, path)} {tuple(tensor.shape)}"
            for path, tensor in [full[0], *rivals]
        ]
        raise ModelError(
            f"the network returned {_describe(output)}, with {len(choices)} tensors of the input's "
            f"spatial shape {size} that may be the logits; say which: {', '.join(choices)}"
        )
    return first


def _is_full(tensor: torch.Tensor, size: tuple[int, ...]) -> bool:
    """Tell whether a tensor has the spatial shape of the input."""
    return (tensor.ndim >= 2 and tuple(tensor.shape[2:]) == size) or _is_stack(tensor, size)


def _is_stack(value: Any, size: tuple[int, ...]) -> bool:
    """Tell whether a value holds all levels of deep supervision, (B, n, K, *S), of one size."""
    return isinstance(value, torch.Tensor) and value.ndim > 3 and tuple(value.shape[3:]) == size


def _is_channels_last(logits: torch.Tensor, size: tuple[int, ...]) -> bool:
    """Tell whether logits are (B, *S, K), so that a spatial axis would be read as the classes."""
    shape = tuple(logits.shape)
    return len(shape) == len(size) + 2 and shape[1:-1] == size and shape[2:] != size


def _channels_first(selection: OutputSelection) -> str:
    """Write the `output=` that brings the classes to the front."""
    if callable(selection):
        return "output= a function whose tensor has them first: .movedim(-1, 1)"
    part = "" if selection is None else f"[{selection!r}]"
    return f"output=lambda out: out{part}.movedim(-1, 1)"


def _at(output: Any, selection: int | str, size: tuple[int, ...]) -> Any:
    """Return one part of an output, or one level of a stack of deep supervision."""
    try:
        if isinstance(output, torch.Tensor):
            if isinstance(selection, str) or not _is_stack(output, size):
                raise TypeError("a tensor has no parts")
            return output[:, selection]
        return item_of(output, selection)
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(
            f"output={selection!r} does not exist: the network returned {_describe(output)}"
        ) from error


def _choosing(output: Any, path: Path) -> str:
    """Write the `output=` that gives the tensor at a path."""
    if len(path) == 1:
        last = isinstance(output, list | tuple) and path[0] == len(output) - 1
        return f"output={path[0]!r}" + " or -1" * last
    written = "output=lambda out: out"
    for key in path:
        by_name = not isinstance(output, Mapping | list | tuple)
        written += f".{key}" if by_name else f"[{key!r}]"
        output = item_of(output, key)
    return written


def _written(selection: OutputSelection) -> str:
    """Write a position or key in brackets, for messages."""
    return "" if selection is None or callable(selection) else f"[{selection!r}]"


def _describe(value: Any) -> str:
    """Describe an output in one line: types, keys and shapes."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} (" + ", ".join(map(_describe, value)) + ")"
    parts = "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in _named(value).items()) + "}"
    if isinstance(value, Mapping):
        return f"a dict {parts}"
    return f"a {type(value).__name__}" + (f" {parts}" if _named(value) else "")
