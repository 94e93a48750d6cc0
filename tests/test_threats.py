"""The threat model names tests, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_threat_model_names_exists():
    page = (ROOT / "docs" / "threats.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| **")]
    assert len(rows) == 11
    for row in rows:
        files = [ROOT / name for name in re.findall(r"tests/[\w/]+\.py", row)]
        assert files or "there is none" in row
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"\btest_\w+(?=`)", row):
            assert f"def {name}(" in source or any(file.stem == name for file in files), name
