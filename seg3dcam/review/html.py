"""HTML pages made of assets: slots that are filled, and a policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

#: A place in a page that is replaced by a part of it, such as {{script}}.
_SLOT = re.compile(r"\{\{(\w+)\}\}")


def asset(package: str, name: str) -> str:
    """Return the text of a file in a package's folder "assets"."""
    return (files(package) / "assets" / name).read_text(encoding="utf-8")


def filled(page: str, content: Mapping[str, str]) -> Iterator[str]:
    """Yield the text of a page, piece by piece, with its slots filled.

    >>> "".join(filled("<p>{{word}}</p>", {"word": "here"}))
    '<p>here</p>'
    """
    for number, part in enumerate(_SLOT.split(page)):
        yield content[part] if number % 2 else part


def policy(script: str, style: str, *more: str) -> str:
    """Return a security policy that allows one script and one style, and nothing from elsewhere.

    Args:
        more: what else is allowed, such as "img-src 'self'".
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_digest(script)}'",
            f"style-src '{_digest(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
            *more,
        ]
    )


def in_base64(blob: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(blob).decode("ascii")


def in_json(value: Any) -> str:
    """Return JSON without the characters < > &, so that no text can end the script element.

    >>> in_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    """Return the hash by which the policy knows a script or a style."""
    return "sha256-" + in_base64(hashlib.sha256(text.encode()).digest())
