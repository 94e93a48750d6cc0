"""The methods by name, with what their docstrings say, read without importing them.

Methods are classes that need PyTorch, which takes seconds to import. Listing them, and finding out
that a name is none of them, should not: so the classes are read from their source, as text.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

#: The files of `seg3dcam.cams` whose classes are methods.
_SOURCES = ("catalogue.py", "attributions.py")

#: What a method's docstring says, each in an entry.
_ENTRIES = ("Formula", "Paper", "Cost", "Class-specific", "Undefined")


def method_names() -> list[str]:
    """Return the keys of all methods, as in `seg3dcam.explaining.explain.ALL_METHODS`."""
    return list(method_cards())


@cache
def method_cards() -> dict[str, dict[str, str]]:
    """Return method -> its "Summary", "Formula", "Paper" and so on, as `card` of its class."""
    folder = Path(__file__).parents[1] / "cams"
    trees = [ast.parse((folder / name).read_text(encoding="utf-8")) for name in _SOURCES]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        key: _entries(ast.get_docstring(node) or "")
        for node in classes
        if (key := _key(node)) is not None
    }


def _key(node: ast.ClassDef) -> str | None:
    """Return the method that a class says it is: `method = key` or `method, formula = key, ...`."""
    for line in node.body:
        match line:
            case ast.Assign([ast.Name("method")], ast.Constant(str(key))) | ast.Assign(
                [ast.Tuple([ast.Name("method"), *_])], ast.Tuple([ast.Constant(str(key)), *_])
            ):
                return key
    return None


def _entries(docstring: str) -> dict[str, str]:
    """Return the entries of a method's docstring, each on one line."""
    found = {"Summary": docstring.partition("\n")[0]}
    for name in _ENTRIES:
        entry = re.search(rf"^{name}: (.*(?:\n    .*)*)", docstring, re.MULTILINE)
        found[name] = re.sub(r"\s+", " ", entry[1]) if entry else ""
    return found
