"""Read from an autograd graph how deep a tensor lies, and whether paths lead around it.

The parameters must be frozen, so that the only leaf of the graph is the network's input.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import torch

#: Operations that multiply with weights: convolutions, linear layers, attention. Bilinear
#: interpolation must not match.
_WEIGHTED = re.compile(r"conv|mm|^linear|attention", re.IGNORECASE)

#: Operations that may pool to a size of their own.
_POOLING = re.compile(r"^(adaptive|mean|sum|amax)", re.IGNORECASE)

#: A tensor in a graph: the node that made it, and its number among the outputs of that node.
Edge = tuple[Any, int]


def edge_of(tensor: torch.Tensor) -> Edge:
    """Return a tensor's entry in the `next_functions` of the nodes that use it."""
    return tensor.grad_fn, tensor.output_nr


def _topological(last: Any) -> list[Any]:
    """Return the nodes of a graph, from its last one back to the input, each before its inputs.

    Deep networks would exceed the limit of recursion, so there is a stack of nodes instead.
    """
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
    """Return the tensors that a node was computed from."""
    return [edge for edge in node.next_functions if edge[0] is not None]


def _is_input(node: Any) -> bool:
    return hasattr(node, "variable")


def _weight(node: Any) -> int:
    """Return 1 for an operation that multiplies with weights, else 0."""
    return int(_WEIGHTED.search(type(node).__name__) is not None)


def _sizes(edge: Edge) -> tuple[int, ...]:
    """Return the shape of the tensor at an edge."""
    node, number = edge
    return tuple(node.variable.shape if _is_input(node) else node._input_metadata[number].shape)


def _fixed_pools(nodes: list[Any]) -> set[Any]:
    """Return the operations that pool an image to a size that does not depend on the image's.

    These are poolings to one voxel, and adaptive poolings. An adaptive pooling that halves its
    image, and is the only one that pools it, does not count, since it may be a level of an encoder.
    """
    pools = [n for n in nodes if _POOLING.match(type(n).__name__) and len(_inner(n)) == 1]
    together = Counter(_inner(node)[0] for node in pools)
    fixed = set()
    for node in pools:
        (edge,) = _inner(node)
        before, after = _sizes(edge), _sizes((node, 0))
        if before[:2] != after[:2] or math.prod(before[2:]) <= math.prod(after[2:]):
            continue  # it pools channels or the batch, or the image does not become smaller
        adaptive = len(before) == len(after) and type(node).__name__.startswith("Adaptive")
        halves = adaptive and all(
            small in (large, large // 2, (large + 1) // 2)
            for large, small in zip(before[2:], after[2:], strict=True)
        )
        if math.prod(after[2:]) == 1 or (adaptive and not (halves and together[edge] == 1)):
            fixed.add(node)
    return fixed


class Paths:
    """The paths from a network's input to its logits, on which operations with weights are counted.

    Args:
        logits: the network's output, with a graph.

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
        """Return how many operations with weights lie on the longest path from the input to it."""
        return self._depth[tensor.grad_fn]

    def height(self, tensor: torch.Tensor) -> int:
        """Return how many operations with weights lie on the longest path from it to the logits."""
        return self._height[tensor.grad_fn]

    def leads_to_logits(self, tensor: torch.Tensor) -> bool:
        """Tell whether a path from it to the logits has no weights, so that it is a term of them.

        Examples are logits before a softmax or a resizing, and the logits of a branch.
        """
        return self._least[tensor.grad_fn] == 0

    def all_pass(self, tensor: torch.Tensor, to: torch.Tensor | None = None) -> bool:
        """Tell whether all paths from the input to the logits or to `to` pass a tensor."""
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
        """Tell whether every path from the input to a tensor leads through a pool to a fixed size.

        This is so in the branches of pyramid pooling, and for what is made from an image's mean.
        The size of such a tensor does not tell how coarsely the network looks at its input.
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
        """Tell whether a path leads from an earlier tensor, given as an edge, to a later one."""
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
        """Return the edges of the tensors that a tensor was computed from in one operation."""
        return _inner(tensor.grad_fn)

    @property
    def dilated(self) -> bool:
        """Whether there are dilated convolutions between the input and the logits."""
        return any(max(getattr(n, "_saved_dilation", (1,)), default=1) > 1 for n in self._depth)
