"""Tests run in one process per core, and each starts from the same random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

#: Its class is made of Lightning's, which may not be installed; it has no doctest.
collect_ignore = ["seg3dcam/integrations/lightning_callback.py"]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Return 0 where single files or tests are named: more processes take 10 s to start.

    None leaves the number to pytest-xdist: one process for every core.
    """
    folders = all(Path(arg).is_dir() for arg in config.args)
    return None if folders else 0


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    import torch  # not needed by the process that hands out the tests

    torch.manual_seed(0)
