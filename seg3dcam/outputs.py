"""From what a network returns to its logits.

The rule, unless `output` says otherwise: a tensor is the logits; of a list or tuple the first
full-resolution tensor is (deep supervision puts the finest first, a variational network its
reconstruction loss last); of a dict the only full-resolution tensor is. Anything else is refused
with the choices listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from seg3dcam.errors import ModelError

#: None for the rule above, a position, a key, or a function of the network's output.
OutputSelection = int | str | Callable[[Any], torch.Tensor] | None


def select_output(
    output: Any, selection: OutputSelection, spatial_shape: tuple[int, ...]
) -> torch.Tensor:
    """Return the logits (B, K, *S) among the things that a network returned.

    Args:
        output: what `model(x)` gave.
        selection: see `OutputSelection`.
        spatial_shape: the spatial shape of `x`, which full-resolution logits share.

    Raises:
        ModelError: nothing, or more than one thing, can be meant.

    >>> finest, coarse = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)
    >>> select_output([finest, coarse], None, (8, 8)) is finest
    True
    """
    if callable(selection):
        chosen = selection(output)
    elif selection is not None:
        chosen = _at(output, selection)
    else:
        chosen = _by_rule(output, spatial_shape)
    if not isinstance(chosen, torch.Tensor) or chosen.ndim < 2:
        raise ModelError(
            f"the network's output{_written(selection)} is {_describe(chosen)}; logits are a "
            f"tensor (B, classes, ...). It returned {_describe(output)}. Choose with output="
        )
    return chosen


def tensors_in(
    value: Any, path: tuple[int | str, ...] = ()
) -> Iterator[tuple[tuple, torch.Tensor]]:
    """Walk nested tuples, lists and dicts; yield (path of keys, tensor) for every tensor.

    >>> [path for path, _ in tensors_in({"a": torch.zeros(1), "b": [torch.zeros(1)]})]
    [('a',), ('b', 0)]
    """
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, (*path, key))
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from tensors_in(item, (*path, position))


def _by_rule(output: Any, spatial_shape: tuple[int, ...]) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    full = [
        (path, tensor)
        for path, tensor in tensors_in(output)
        if tensor.ndim >= 2 and tuple(tensor.shape[2:]) == tuple(spatial_shape)
    ]
    if isinstance(output, Mapping) and len(full) != 1:
        raise ModelError(
            f"the network returned {_describe(output)}, with {len(full)} tensors of the input's "
            f"spatial shape {tuple(spatial_shape)}; say which are the logits with output='key'"
        )
    if full:
        return full[0][1]
    found = [tensor for _, tensor in tensors_in(output)]
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"the network returned {_describe(output)}, none of the input's spatial shape "
        f"{tuple(spatial_shape)}; say which are the logits with output=<position, key or function>"
    )


def _at(output: Any, selection: int | str) -> Any:
    try:
        return output[selection]
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(
            f"output={selection!r} does not exist: the network returned {_describe(output)}"
        ) from error


def _written(selection: OutputSelection) -> str:
    return "" if selection is None or callable(selection) else f"[{selection!r}]"


def _describe(value: Any) -> str:
    """Describe an output in one line: types, keys and shapes."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "a dict {" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} (" + ", ".join(map(_describe, value)) + ")"
    return f"a {type(value).__name__}"
