"""Shared by the tests of the report: a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import Page, open_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    """A page in Chromium; the tests of a module open one address after another in it."""
    with open_browser() as page:
        yield page
