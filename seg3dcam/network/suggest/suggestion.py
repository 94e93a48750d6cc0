"""Suggest the layers of a network that are worth explaining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from seg3dcam.checks import is_whole
from seg3dcam.errors import InputError, LayerError
from seg3dcam.network.capture import begun_again, capturing
from seg3dcam.network.ensemble import members_of, unwrap
from seg3dcam.network.layers import LayerRef, resolve_layers
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.network.suggest.choice import (
    Role,
    auto_choice,
    beside_middle,
    decoder_levels,
    encoder_levels,
    norm_that_reads,
    on_main_path,
)
from seg3dcam.network.suggest.graph import Paths
from seg3dcam.network.suggest.probing import Candidate, candidates_in, probe
from seg3dcam.network.suggest.reasons import LayerTraits, traits_of


@dataclass(frozen=True)
class Suggestion:
    """A layer worth explaining.

    Attributes:
        name: what to pass as `target_layers`.
        role: "bottleneck"; "middle" if no level is coarser than the output; "decoder" or "encoder"
            for the levels after and before the bottleneck; "early" or "late" for layers before and
            after the middle.
        shape: (C, *s) of its activations.
        stride: distance between its voxels, in voxels of the input, along each axis.
        megabytes: size of its activations for one input of the given shape; a map needs about three
            times as much.
        auto: True for the layer that "auto" means.
        reason: why it is suggested, and what was found out about it, in a sentence.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    megabytes: float
    auto: bool
    reason: str


@begun_again
def suggest_layers(
    model: nn.Module, input_shape: Sequence[int], *, output: OutputSelection = None
) -> list[Suggestion]:
    """List the layers that are worth explaining, the bottleneck first.

    Then come the levels of the decoder and those of the encoder, each coarse to fine. A network of
    one resolution has a middle, and layers after and before it, each the nearest first.

    Args:
        input_shape: shape of an input tensor, (B, C, *S); the batch size does not matter.
        output: which of several outputs are the logits.

    Raises:
        InputError: `input_shape` is no shape of an input.
        LayerError: the output depends on no layer whose activations have a place in the image.

    >>> network = nn.Sequential(
    ...     nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(),
    ...     nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 2, 1))
    >>> [(s.name, s.role, s.stride[0]) for s in suggest_layers(network, (1, 1, 16, 16))]
    [('2', 'bottleneck', 2), ('4', 'decoder', 1), ('0', 'encoder', 1)]
    """
    _check_shape(input_shape)
    input_shape = members_of(model)[0].seen(input_shape)
    model = unwrap(model)
    with capturing(model, [], output) as capture:
        probed = probe(capture, tuple(input_shape))
        found = candidates_in(capture, probed)
        candidates = on_main_path([c for c in found if c.read is None], probed.paths)
        if not candidates:
            raise LayerError(
                f"no layer of {type(model).__name__} gives activations with a place in the image, "
                "on a grid of whole strides, that the output depends on: name a target layer"
            )
        best, role = auto_choice(candidates, probed)
        before, after = _around(best, role, candidates, probed.paths)
        chosen = [*before, (best, role), *after]  # as they run
        layers = [norm_that_reads(layer, found) for layer, _ in chosen]
        all_traits = traits_of(layers, candidates, probed)
        suggestions = [
            _suggestion(one, role, traits)
            for one, (_, role), traits in zip(layers, chosen, all_traits, strict=True)
        ]
    return suggestions[len(before) :] + suggestions[: len(before)][::-1]


def _around(
    best: Candidate, role: Role, candidates: Sequence[Candidate], paths: Paths
) -> tuple[list[tuple[Candidate, Role]], list[tuple[Candidate, Role]]]:
    """Return the layers before and after the one that "auto" means, in the order they run in."""
    before: list[tuple[Candidate, Role]] = [
        (level, "encoder") for level in reversed(encoder_levels(best, candidates, paths))
    ]
    after: list[tuple[Candidate, Role]] = [
        (level, "decoder") for level in decoder_levels(best, candidates, paths)
    ]
    beside = beside_middle(best, candidates, paths) if role == "middle" else []
    before += [(one, role) for one, role in beside if role == "early"]
    return before, [(one, role) for one, role in beside if role == "late"] + after


def _suggestion(one: Candidate, role: Role, traits: LayerTraits) -> Suggestion:
    return Suggestion(
        str(one.layer),
        role,
        one.shape,
        one.stride,
        one.tensor.numel() * one.tensor.element_size() / 1e6,
        role in ("bottleneck", "middle"),
        traits.reason(role),
    )


def auto_layer(model: nn.Module, input_shape: Sequence[int], output: OutputSelection) -> LayerRef:
    """Return the layer that "auto" stands for: the bottleneck, or the middle if there is none."""
    chosen = next(s for s in suggest_layers(model, input_shape, output=output) if s.auto)
    return resolve_layers(model, chosen.name)[0]


def _check_shape(input_shape: Any) -> None:
    """Raise InputError unless a shape is (B, C, *S); the batch size does not matter."""
    try:
        sizes = tuple(input_shape)
    except TypeError:
        sizes = ()
    if len(sizes) < 3 or not all(is_whole(size) and size > 0 for size in sizes[1:]):
        given = type(input_shape).__name__ if hasattr(input_shape, "shape") else repr(input_shape)
        raise InputError(
            f"input_shape {given}: give whole numbers (B, C, *S), such as (1, 1, 96, 96, 96), the "
            "x.shape of an input x"
        )
