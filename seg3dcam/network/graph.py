"""What an autograd graph tells of a tensor: how deep it lies, and whether anything passes it by.

The graph must be that of frozen parameters: nothing but the network's input is left to lead to.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import torch

#: Operations that multiply with weights: convolutions, linear layers, attention. Not bilinear
#: interpolation.
_WEIGHTED = re.compile(r"conv|mm|^linear|attention", re.IGNORECASE)


#: Operations that may pool to a size of their own.
_POOLING = re.compile(r"^(adaptive|mean|sum|amax)", re.IGNORECASE)

#: A tensor in a graph: the node that made it, and which of the node's tensors it is.
Edge = tuple[Any, int]


def edge_of(tensor: torch.Tensor) -> Edge:
    """Return where a tensor is found among the `next_functions` of what was made from it."""
    return tensor.grad_fn, tensor.output_nr


def _topological(last: Any) -> list[Any]:
    """Return the nodes of a graph, each before those that it leads to; no recursion: deep nets."""
    done: dict[Any, None] = {}
    waiting = [(last, False)]
    while waiting:
        node, left = waiting.pop()
        if left:
            done.setdefault(node)
        elif node not in done:
            waiting.append((node, True))
            waiting.extend((inner, False) for inner, _ in _inner(node) if inner not in done)
    return list(reversed(done))


def _inner(node: Any) -> list[Edge]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def _is_input(node: Any) -> bool:
    return hasattr(node, "variable")


def _weight(node: Any) -> int:
    return int(_WEIGHTED.search(type(node).__name__) is not None)


def _sizes(edge: Edge) -> tuple[int, ...]:
    """Return the shape of the tensor at an edge."""
    node, number = edge
    return tuple(node.variable.shape if _is_input(node) else node._input_metadata[number].shape)


def _fixed_pools(nodes: list[Any]) -> set[Any]:
    """Return the operations that pool an image to a size that does not follow the image's.

    Those are poolings to one voxel, and adaptive ones; but not one that halves its image and is the
    only one to pool it, as a level of an encoder may be written.
    """
    pools = [n for n in nodes if _POOLING.match(type(n).__name__) and len(_inner(n)) == 1]
    together = Counter(_inner(node)[0] for node in pools)
    fixed = set()
    for node in pools:
        (edge,) = _inner(node)
        before, after = _sizes(edge), _sizes((node, 0))
        if before[:2] != after[:2] or math.prod(before[2:]) <= math.prod(after[2:]):
            continue  # of a whole image's channels or batch, or none smaller than before
        adaptive = len(before) == len(after) and type(node).__name__.startswith("Adaptive")
        halves = adaptive and all(
            small in (large, large // 2, (large + 1) // 2)
            for large, small in zip(before[2:], after[2:], strict=True)
        )
        if math.prod(after[2:]) == 1 or (adaptive and not (halves and together[edge] == 1)):
            fixed.add(node)
    return fixed


class Paths:
    """The ways from a network's input to its logits; operations with weights are counted.

    >>> x = torch.ones(1, 1, 4, requires_grad=True)
    >>> weight = torch.ones(1, 1, 1)
    >>> a = torch.nn.functional.conv1d(x, weight)
    >>> b = torch.nn.functional.conv1d(a, weight)
    >>> paths = Paths(a + b)
    >>> paths.depth(a), paths.height(a), paths.all_pass(a), paths.all_pass(b)
    (1, 1, True, False)
    >>> paths.leads_to_logits(a)  # by the addition alone
    True
    """

    def __init__(self, logits: torch.Tensor):
        self._logits = logits
        ordered = _topological(logits.grad_fn)
        self._depth: dict[Any, int] = {}
        for node in reversed(ordered):
            below = (self._depth[inner] for inner, _ in _inner(node))
            self._depth[node] = _weight(node) + max(below, default=0)
        self._fixed_pools = _fixed_pools(ordered)
        self._height = dict.fromkeys(ordered, 0)
        self._least = dict.fromkeys(ordered, len(ordered))
        self._least[logits.grad_fn] = 0
        for node in ordered:
            for inner, _ in _inner(node):
                above = self._height[node] + _weight(node)
                self._height[inner] = max(self._height[inner], above)
                least = self._least[node] + _weight(node)
                self._least[inner] = min(self._least[inner], least)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.grad_fn is not None and tensor.grad_fn in self._depth

    def depth(self, tensor: torch.Tensor) -> int:
        """Return how many operations with weights, at most, lie one after the other up to it."""
        return self._depth[tensor.grad_fn]

    def height(self, tensor: torch.Tensor) -> int:
        """Return how many operations with weights, at most, lie between it and the logits."""
        return self._height[tensor.grad_fn]

    def leads_to_logits(self, tensor: torch.Tensor) -> bool:
        """Tell whether some way from it to the logits meets no weights: it is one of their terms.

        So are the logits before a softmax or before they are resized, and those of a branch.
        """
        return self._least[tensor.grad_fn] == 0

    def all_pass(self, tensor: torch.Tensor, to: torch.Tensor | None = None) -> bool:
        """Tell whether no way leads from the input to the logits, or `to`, around a tensor."""
        cut = edge_of(tensor)
        end = (self._logits if to is None else to).grad_fn
        seen, waiting = {end}, [end]
        while waiting:
            node = waiting.pop()
            if _is_input(node):
                return False
            for edge in _inner(node):
                if edge != cut and edge[0] not in seen:
                    seen.add(edge[0])
                    waiting.append(edge[0])
        return True

    def behind_fixed_pool(self, tensor: torch.Tensor) -> bool:
        """Tell whether every way from the input to a tensor leads through a pool to a fixed size.

        So do the branches of pyramid pooling, and what is made of an image's mean. How large such
        a tensor is says nothing of how coarsely the network looks at its input.
        """
        seen, waiting = {tensor.grad_fn}, [tensor.grad_fn] if self._fixed_pools else []
        met = False
        while waiting:
            node = waiting.pop()
            if _is_input(node):
                return False
            met = met or node in self._fixed_pools
            if node not in self._fixed_pools:
                new = [inner for inner, _ in _inner(node) if inner not in seen]
                seen.update(new)
                waiting += new
        return met

    @staticmethod
    def leads(to: torch.Tensor, start: Edge) -> bool:
        """Tell whether a way leads from an earlier tensor, given by its edge, to a later one."""
        seen, waiting = {to.grad_fn}, [to.grad_fn]
        while waiting:
            for edge in _inner(waiting.pop()):
                if edge == start:
                    return True
                if edge[0] not in seen:
                    seen.add(edge[0])
                    waiting.append(edge[0])
        return False

    @staticmethod
    def parts(tensor: torch.Tensor) -> list[Edge]:
        """Return the edges of what a tensor was made from in one operation."""
        return _inner(tensor.grad_fn)

    @property
    def dilated(self) -> bool:
        """Whether there are dilated convolutions on the way."""
        return any(max(getattr(n, "_saved_dilation", (1,)), default=1) > 1 for n in self._depth)
