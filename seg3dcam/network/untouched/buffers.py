"""Copies of a network's buffers to work on, so that its own stay as they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from seg3dcam.network.attributes import AttributeValue, memory_of


def copies_of_buffers(
    model: nn.Module, values: Iterable[AttributeValue]
) -> dict[int, torch.Tensor]:
    """Return id of a buffer -> a copy of it to work on.

    Buffers that share memory, such as a view and its base, share it in their copies too. A buffer
    that shares memory with a parameter, or with a tensor in an attribute, gets no copy: what is
    written to the one must be seen in the other.

    Args:
        values: the values that modules keep in attributes.
    """
    others = [value for value, _ in values if isinstance(value, torch.Tensor)]
    taken = {memory_of(tensor) for tensor in (*others, *model.parameters())}
    groups: dict[int, dict[int, torch.Tensor]] = {}
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for buffer in module._buffers.values():
                if buffer is not None and memory_of(buffer) not in taken:
                    groups.setdefault(memory_of(buffer), {})[id(buffer)] = buffer
    copies: dict[int, torch.Tensor] = {}
    for group in groups.values():
        copies.update(zip(group, _copied(list(group.values())), strict=False))
    return copies


def _copied(buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies of buffers that share memory, which share it too; [] if that is impossible."""
    one = buffers[0]
    if len(buffers) == 1:
        return [one.detach().clone()]
    unlike = (b.dtype != one.dtype or b.is_quantized or b.is_conj() or b.is_neg() for b in buffers)
    if any(unlike):
        return []
    memory = one.untyped_storage().clone()
    size = memory.nbytes() // one.element_size()
    whole = one.detach().new_empty(0).set_(memory, 0, (size,), (1,))
    with torch.enable_grad():  # so that the copies are views for autograd, too
        return [whole.as_strided(b.shape, b.stride(), b.storage_offset()) for b in buffers]
