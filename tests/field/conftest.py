"""What the tests of the networks share."""

from __future__ import annotations

import pytest
from helpers_networks import NETWORKS, usual_grids

from seg3dcam.cams import steps


@pytest.fixture
def usual_grids_where_coarse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Give networks of a coarse bottleneck the usual grids, for tests that are not about places.

    Measuring all their layers takes up to a minute. `test_maps_equal_plain_torch` measures the
    grids of every network, and the other networks are measured in every test.
    """
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    name = params.get("name", params.get("case"))
    if name is not None and NETWORKS[name].coarse:
        monkeypatch.setattr(steps, "measured_in_window", usual_grids)
