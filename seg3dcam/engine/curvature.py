"""Gradients corrected for curvature, G - HA / 2, H being the Hessian of the score.

With stitched logits L = sum_w share_w l_w and the score S(L), the product of the Hessian with the
activations has two parts. Through the network: d/dA (u J) . A for the upstream gradient u and the
window's Jacobian J. Through the score: J^T (share_w H_S T), where T = sum_w share_w J A is how all
logits of the volume change when every activation grows in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from seg3dcam.engine.gradients import Gradients, gradient_pass, upstream_of
from seg3dcam.engine.passes import FirstPass, stitch
from seg3dcam.engine.seed import Seed
from seg3dcam.errors import ModelError
from seg3dcam.methods.pooled import corrected
from seg3dcam.network.layers import LayerRef
from seg3dcam.progress import Progress


def corrected_pass(
    first: FirstPass,
    items: Sequence[int],
    seeds: Sequence[Seed],
    progress: Progress,
    *,
    targets: Sequence[Callable[..., torch.Tensor]],
) -> Iterator[Gradients]:
    """Yield, in place of the gradients, G - HA / 2 of every target in every window with a seed.

    Two passes: the first finds T, one for each layer.
    """
    for number, (target, seed) in enumerate(zip(targets, seeds, strict=True)):
        tangents = _tangents(first, items, seed, progress)
        through_score = {
            layer: Seed.of(_hessian_product(target, first.logits, tangent))
            for layer, tangent in tangents.items()
        }
        for found in _differentiable(first, items, seed, progress):
            curvature = {
                layer: value + _through_score(first, items, found, layer, through_score[layer])
                for layer, value in _through_network(first, found).items()
            }
            yield replace(
                found,
                target=number,
                gradients={
                    layer: corrected(g.detach(), curvature[layer])
                    for layer, g in found.gradients.items()
                },
            )


def _differentiable(
    first: FirstPass, items: Sequence[int], seed: Seed, progress: Progress
) -> Iterator[Gradients]:
    with _twice():  # what fails in the caller's loop is not seen here
        yield from gradient_pass(first, items, [seed], progress, keep_graph=True, create_graph=True)


@contextmanager
def _twice() -> Iterator[None]:
    """Say what the network lacks, where a second derivative fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(
            f"the network cannot be differentiated twice, as shapley_cam needs: {error}"
        ) from error


def _tangents(
    first: FirstPass, items: Sequence[int], seed: Seed, progress: Progress
) -> dict[LayerRef, torch.Tensor]:
    """Return T of every layer, (B, K, *S), zero outside of these items."""
    tangents: dict[LayerRef, torch.Tensor] = {}
    for found in _differentiable(first, items, seed, progress):
        for layer, product in _products(found).items():
            with _twice():
                (change,) = torch.autograd.grad(product, found.upstream, retain_graph=True)
            tangent = tangents.setdefault(layer, torch.zeros_like(first.logits))
            stitch(first, tangent, items, found.batch, change)
    return tangents


def _products(found: Gradients) -> dict[LayerRef, torch.Tensor]:
    """Return sum G A of every layer, A being held fixed."""
    return {
        layer: (gradient * found.activations[layer]).sum()
        for layer, gradient in found.gradients.items()
    }


def _through_network(first: FirstPass, found: Gradients) -> dict[LayerRef, torch.Tensor]:
    with _twice():
        return {
            layer: first.capture.derivative(product, layer)
            for layer, product in _products(found).items()
        }


def _through_score(
    first: FirstPass, items: Sequence[int], found: Gradients, layer: LayerRef, seed: Seed
) -> torch.Tensor:
    upstream = upstream_of(first, seed, items, found.batch).to(found.logits)
    return first.capture.gradients(found.logits, upstream, keep_graph=True)[layer]


def _hessian_product(
    target: Callable[..., torch.Tensor], logits: torch.Tensor, tangent: torch.Tensor
) -> torch.Tensor:
    """Return the score's Hessian with respect to the logits, times a change of the logits."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(target(leaf).sum(), leaf, create_graph=True)
        if not gradient.requires_grad:  # a linear score
            return torch.zeros_like(logits)
        product: Any = torch.autograd.grad((gradient * tangent).sum(), leaf, allow_unused=True)[0]
    return torch.zeros_like(logits) if product is None else product.detach()
