"""Shared by the tests of the readers: voxels for small files."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def voxels():
    """Voxels (4, 5, 6), none of them 0."""
    return np.random.default_rng(0).integers(1, 90, (4, 5, 6)).astype(np.int16)
