"""The measured grids of a network's layers, and what they are held against."""

from __future__ import annotations

import pytest
import torch

from seg3dcam.network.capture import capturing
from seg3dcam.network.grids.measurement import measure_grids
from seg3dcam.network.layers import resolve_layers


def grids_of(net, shape, names, **like):
    """Measure some layers of a network for an input of the given spatial shape."""
    x = torch.zeros(1, 1, *shape, **like)
    layers = resolve_layers(net, names)
    with capturing(net, layers) as capture:
        capture.observe(x, copy=False)
        shapes = capture.shapes
    return {str(layer): grid for layer, grid in measure_grids(net, x, shapes).items()}


def assert_grid(grid, stride, offset, *, within=1e-3):
    assert grid.measured
    assert grid.stride == pytest.approx(stride, abs=within)
    assert grid.offset == pytest.approx(offset, abs=within)
