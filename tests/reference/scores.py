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
            mask[b][u] = values[c] > 0 if sigmoid else values.index(max(values)) == c
    return mask


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
