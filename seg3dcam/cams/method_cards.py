"""The methods by name, with the entries of their docstrings, read without importing them.

Methods are classes that need PyTorch, which takes seconds to import. To list them, or to find out
that a name is not one of them, must be faster: so the classes are read from their source, as text.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

#: The files of this folder whose classes are methods.
_SOURCES = ("catalogue.py", "attributions.py")

#: The entries of a method's docstring.
ENTRIES = ("Formula", "Paper", "Cost", "Class-specific", "Undefined")


def method_names() -> list[str]:
    """Return the keys of all methods, as in `seg3dcam.cams.catalogue.ALL_METHODS`."""
    return list(method_cards())


@cache
def method_cards() -> dict[str, dict[str, str]]:
    """Return method -> the card of its class; see `card_of`."""
    folder = Path(__file__).parent
    trees = [ast.parse((folder / name).read_text(encoding="utf-8")) for name in _SOURCES]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        key: card_of(ast.get_docstring(node) or "")
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


def card_of(docstring: str) -> dict[str, str]:
    """Return the summary and the `ENTRIES` of a method's docstring, each on one line.

    >>> method_cards()["grad_cam"]["Cost"]
    '1 forward, 1 backward.'
    """
    found = {"Summary": docstring.partition("\n")[0]}
    for name in ENTRIES:
        entry = re.search(rf"^{name}: (.*(?:\n    .*)*)", docstring, re.MULTILINE)
        found[name] = re.sub(r"\s+", " ", entry[1]) if entry else ""
    return found
