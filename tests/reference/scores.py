"""Scores of logits (B, K, *S), voxel by voxel, and the gradients that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

#: (z_0 ... z_K-1) of one voxel, class -> value; the scalars carry a graph.
Value = Callable[[Sequence[torch.Tensor], int], torch.Tensor]


def log_odds(z: Sequence[torch.Tensor], c: int) -> torch.Tensor:
    """Return log(p_c / (1 - p_c)) with p = softmax(z)."""
    return z[c] - torch.log(sum(torch.exp(z[d]) for d in range(len(z)) if d != c))


def logit(z: Sequence[torch.Tensor], c: int) -> torch.Tensor:
    """Return z_c, which is also the log-odds of a sigmoid."""
    return z[c]


def softmax(z: Sequence[torch.Tensor], c: int) -> torch.Tensor:
    """Return exp(z_c) / sum_d exp(z_d)."""
    return torch.exp(z[c]) / sum(torch.exp(value) for value in z)


def sigmoid(z: Sequence[torch.Tensor], c: int) -> torch.Tensor:
    """Return 1 / (1 + exp(-z_c))."""
    return 1 / (1 + torch.exp(-z[c]))


def all_channels(z: Sequence[torch.Tensor], c: int) -> torch.Tensor:
    """Return sum_d z_d: what `output.backward(ones_like(output))` differentiates."""
    return sum(z[d] for d in range(len(z)))


def contrast(z: Sequence[torch.Tensor], c: int, *, against: int) -> torch.Tensor:
    """Return z_c - z_d."""
    return z[c] - z[against]


def finer(
    z: Sequence[torch.Tensor], c: int, *, alpha: float, probability: Value = softmax
) -> torch.Tensor:
    """Return sum_d p_d (z_c - alpha z_d) / sum_d p_d over d != c, with p constant."""
    constant = [value.detach() for value in z]
    p = [probability(constant, d) for d in range(len(z))]
    others = [d for d in range(len(z)) if d != c]
    return sum(p[d] * (z[c] - alpha * z[d]) for d in others) / sum(p[d] for d in others)


def score(logits: torch.Tensor, value: Value, c: int, mask: np.ndarray) -> torch.Tensor:
    """Sum a value over the voxels of each item's mask (B, *S); returns (B,), with a graph."""
    totals = []
    for b in range(len(logits)):
        total = logits.new_zeros(())
        for u in np.ndindex(mask.shape[1:]):
            if mask[b][u]:
                total = total + value([logits[b, d][u] for d in range(logits.shape[1])], c)
        totals.append(total)
    return torch.stack(totals)


def predicted(logits: torch.Tensor, c: int, *, sigmoid: bool = False) -> np.ndarray:
    """Return where class c is predicted, (B, *S): it has the largest logit, or one above 0."""
    z = logits.detach().double().numpy()
    mask = np.zeros((z.shape[0], *z.shape[2:]), dtype=bool)
    for b in range(z.shape[0]):
        for u in np.ndindex(z.shape[2:]):
            values = [z[b, d][u] for d in range(z.shape[1])]
            mask[(b, *u)] = values[c] > 0 if sigmoid else values.index(max(values)) == c
    return mask


def soft_dice(logits: torch.Tensor, value: Value, c: int, mask: np.ndarray) -> torch.Tensor:
    """Return 2 sum(p m) / (sum p + sum m) of each item, (B,), where `value` gives p."""
    dice = []
    for b in range(len(logits)):
        common, total = logits.new_zeros(()), logits.new_zeros(())
        for u in np.ndindex(mask.shape[1:]):
            p = value([logits[b, d][u] for d in range(logits.shape[1])], c)
            common = common + p * float(mask[b][u])
            total = total + p + float(mask[b][u])
        dice.append(2 * common / total)
    return torch.stack(dice)


def detections(head: torch.Tensor, c: int, classes: int) -> list[list[tuple[tuple, torch.Tensor]]]:
    """List (place, objectness times class probability) of each item's predictions.

    The head is (B, anchors * (5 + classes), h, w), with places (anchor, y, x), or
    (B, n, 5 + classes), with places (n,).
    """
    width = 5 + classes
    listed = []
    for item in head:
        found = []
        if head.ndim == 3:
            for n, numbers in enumerate(item):
                found.append(((n,), sigmoid(numbers, 4) * sigmoid(numbers, 5 + c)))
        else:
            for a in range(len(item) // width):
                for y, x in np.ndindex(*item.shape[1:]):
                    numbers = [item[a * width + k, y, x] for k in range(width)]
                    found.append(((a, y, x), sigmoid(numbers, 4) * sigmoid(numbers, 5 + c)))
        listed.append(found)
    return listed


def components(mask: np.ndarray, connectivity: int = 1) -> list[set[tuple[int, ...]]]:
    """Return the connected components of a mask as sets of voxels, the largest first.

    Neighbours differ by at most 1 along every axis, and along at most `connectivity` of them.
    """
    waiting = [u for u in np.ndindex(mask.shape) if mask[u]]
    found: list[set[tuple[int, ...]]] = []
    for seed in waiting:
        if any(seed in component for component in found):
            continue
        component, front = {seed}, [seed]
        while front:
            u = front.pop()
            for v in waiting:
                steps = [abs(i - j) for i, j in zip(u, v, strict=True)]
                if v not in component and max(steps) == 1 and sum(steps) <= connectivity:
                    component.add(v)
                    front.append(v)
        found.append(component)
    return sorted(found, key=lambda component: -len(component))


def boundary(mask: np.ndarray, thickness: int = 1) -> np.ndarray:
    """Return which voxels have one of the mask and one of outside within some steps."""
    shell = np.zeros_like(mask)
    for u in np.ndindex(mask.shape):
        near = [
            mask[v]
            for v in np.ndindex(mask.shape)
            if sum(abs(i - j) for i, j in zip(u, v, strict=True)) <= thickness
        ]
        shell[u] = any(near) and not all(near)
    return shell


def activations_and_gradients(
    front: Callable[[torch.Tensor], torch.Tensor],
    back: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    score_of: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A = front(x) and d(sum of scores)/dA of a network cut in two: no hook is needed."""
    leaf = front(x).detach().clone().requires_grad_()
    total = score_of(back(leaf.clone())).sum()  # a copy, since `back` may begin with an in-place op
    (gradients,) = torch.autograd.grad(total, leaf)
    return leaf.detach(), gradients
