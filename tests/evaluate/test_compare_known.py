"""On networks with planted evidence the comparison finds what an exhaustive search finds."""

from __future__ import annotations

import pytest
from helpers_engine import signed_maps

from seg3dcam.cams.catalogue import ALL_METHODS
from seg3dcam.evaluate import compare, context_deletion

known = pytest.importorskip("benchmarks.known", reason="the benchmark is not there")

pytestmark = [signed_maps, pytest.mark.slow]

#: The bottleneck, the first level of the encoder, and the usual method.
LAYERS, METHODS = ["down_4", "conv_0"], ["hires_cam"]


@pytest.mark.parametrize("name", ["remote_cue"])
def test_the_best_of_all_combinations_is_found(name):
    """And it beats what a user gets who names neither layer nor method."""
    problem = known.PROBLEMS[name]
    network, (x, _, _) = problem.load(), problem.volume(seed=201)
    found = compare(network, x, problem.class_index, layers=LAYERS, methods=METHODS, steps=10)
    areas = {}
    for method in METHODS:
        result = ALL_METHODS[method](network, LAYERS)(x, problem.class_index)
        for layer, values in result.maps.items():
            curve = context_deletion(values[0], x, network, problem.class_index, steps=10)
            areas[layer, method] = curve.auc
    best = found.best
    assert best is not None
    assert best.area == pytest.approx(areas[best.layer, best.method])
    assert best.area <= min(areas.values()) + 0.05
    assert best.area < areas["down_4", "hires_cam"] - 0.2
