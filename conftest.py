"""Every test and example starts from the same random numbers."""

from __future__ import annotations

import pytest
import torch

#: Its class is made of Lightning's, which may not be installed; it has no doctest.
collect_ignore = ["seg3dcam/integrations/lightning_callback.py"]


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
