"""What the tests of the networks share."""

from __future__ import annotations

import pytest
from helpers_networks import FEW, NETWORKS, ORDINARY, usual_grids

from seg3dcam.cams import steps


@pytest.fixture
def usual_grids_where_coarse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Give networks of a coarse bottleneck the usual grids, for tests that are not about places.

    Measuring all their layers takes up to a minute. `test_maps_equal_plain_torch` measures the
    grids of every network, and the other networks are measured in every test.
    """
    name = _network_of(request)
    if name is not None and NETWORKS[name].coarse:
        monkeypatch.setattr(steps, "measured_in_window", usual_grids)


@pytest.fixture
def usual_grids_but_for_ordinary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Give networks the usual grids where those of a relative are measured."""
    if _network_of(request) not in (None, *ORDINARY):
        monkeypatch.setattr(steps, "measured_in_window", usual_grids)


@pytest.fixture
def usual_grids_but_for_few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Give all networks but a few the usual grids, for tests that explain very many layers."""
    if _network_of(request) not in (None, *FEW):
        monkeypatch.setattr(steps, "measured_in_window", usual_grids)


def _network_of(request: pytest.FixtureRequest) -> str | None:
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return params.get("name", params.get("case"))
