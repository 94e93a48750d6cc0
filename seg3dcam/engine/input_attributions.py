"""Attributions of the input's own voxels, with which CAMs are compared, over all windows.

Captum sees one window at a time, and in place of the score its slope at the prediction, the sum of
dS/dL . L. That is exact for gradients, and for every method where the score is linear in the
logits, as the logit of a class is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from seg3dcam.engine.gradients import seeded_windows, upstream_of
from seg3dcam.engine.layer_map import LayerMap, joined
from seg3dcam.engine.passes import FirstPass, scored_alone
from seg3dcam.engine.seed import Seed
from seg3dcam.geometry import FeatureGrid, cropped
from seg3dcam.methods.input_attributions import InputFormula
from seg3dcam.network.capture import Capture, capturing
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.network.random_draws import drawing_from, random_state
from seg3dcam.progress import Progress
from seg3dcam.targets import fixed
from seg3dcam.windows import Blend

Target = Callable[[torch.Tensor], torch.Tensor]

#: Batch of inputs (n, C, *S) -> scores (n,).
Score = Callable[[torch.Tensor], torch.Tensor]


def input_map(
    first: FirstPass,
    target: Target,
    seed: Seed,
    formula: InputFormula,
    output: OutputSelection,
    progress: Progress,
) -> LayerMap:
    """Return the map of one target, on the input's voxels.

    Plain and noisy gradients are summed over channels by their absolute value, everything else
    with its sign.

    Raises:
        MissingExtraError: captum is not installed.
    """
    random = random_state()
    with capturing(first.capture.member, [], output) as capture, drawing_from(random):
        items = range(len(first.x))
        return joined(
            [_map(first, item, target, seed, formula, capture, progress) for item in items]
        )


def _map(
    first: FirstPass,
    item: int,
    target: Target,
    seed: Seed,
    formula: InputFormula,
    capture: Capture,
    progress: Progress,
) -> LayerMap:
    windows = first.windows
    voxels = FeatureGrid.of_voxels(windows.roi)
    blend = Blend(windows, voxels, first.x.new_zeros(first.x.shape[1]))
    which = seeded_windows(first, [item], seed)
    for done, window in enumerate(which, 1):
        # In the input's precision: captum adds noise or small steps, which half precision loses.
        x = windows.cut(first.padded[item : item + 1], [window]).clone().to(capture.device)
        if len(windows) == 1:
            score_of = _of_all(first, item, target)
        else:
            score_of = _slope(upstream_of(first, seed, [item], [window]))
        scored = _ScoringNetwork(capture, score_of, first.logits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum's, on hooks and gradients that it sets
            (found,) = formula.attribute(scored, x).detach()
        blend.add_alone(window, found.to(first.x))
        progress("comparing", done, len(which))
    channels, grid = cropped(blend.total, blend.grid, windows.shape)
    values = (channels.abs() if formula.unsigned else channels).sum(0, keepdim=True)
    ceiling = values.abs().amax().reshape(1)
    flags = formula.flags(capture.model)
    return LayerMap(values, grid, voxels, ceiling, capture.dtype, None, flags)


def _of_all(first: FirstPass, item: int, target: Target) -> Score:
    """Return the score as a function of the logits of the one window that there is."""
    alone = scored_alone(fixed(target, first.logits), first.logits, item)
    return lambda logits: alone(first.windows.crop(logits))


def _slope(upstream: torch.Tensor) -> Score:
    """Return the part of one window in the score's slope, as a function of its logits."""
    return lambda logits: (logits * upstream).sum().reshape(1)


class _ScoringNetwork(nn.Module):
    """The network with the score behind it, as captum wants it: (n, C, *S) -> (n,)."""

    def __init__(self, capture: Capture, score_of: Score, like: torch.Tensor) -> None:
        super().__init__()
        self.model = capture.model
        self._capture, self._score_of, self._like = capture, score_of, like

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        of_model = self._capture.to_model(x.clone())
        if x.requires_grad:
            logits = self._capture.forward(of_model)
        else:
            logits = self._capture.observe(of_model, copy=False)
        logits = logits.to(self._like)
        return torch.cat([self._score_of(logits[n : n + 1]) for n in range(len(x))])
