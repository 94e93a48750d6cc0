"""Settings from YAML and JSON, which may be anybody's: read as plain values, and validated.

An unknown key is an error that names the nearest legal one.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from seg3dcam.errors import ConfigError, InputError, Seg3dcamWarning, nearest, tell


class Settings(BaseModel):
    """Settings that refuse an unknown key and do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Kind = TypeVar("Kind", bound=BaseModel)

#: Most problems that one message names.
_MOST_PROBLEMS = 12

#: Shortens a value for a message.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def validate(
    content: dict[str, Any],
    kind: type[Kind],
    source: str,
    error_class: type[InputError] = ConfigError,
) -> Kind:
    """Return validated settings.

    Args:
        source: the file's name, for messages.
        error_class: what is raised.

    Raises:
        ConfigError: every problem in one message, an unknown key with the nearest legal ones.

    >>> class Window(Settings):
    ...     roi_size: int
    >>> validate({"roi_siz": 96}, Window, "model.yaml")
    Traceback (most recent call last):
        ...
    seg3dcam.errors.ConfigError: model.yaml:
      roi_siz: unknown key, did you mean 'roi_size'?
      roi_size: missing
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        found = error.errors()
        problems = sorted({_problem(kind, detail) for detail in found[:_MOST_PROBLEMS]})
        more = len(found) - _MOST_PROBLEMS
        shown = problems + ([f"and {more} more"] if more > 0 else [])
        raise error_class(f"{source}:\n  " + "\n  ".join(shown)) from None


def _problem(kind: type[BaseModel], detail: Any) -> str:
    place = _place(kind, detail["loc"])
    where = ".".join(map(str, place)) or "settings"
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key, {nearest(str(detail['loc'][-1]), _keys(kind, place[:-1]))}"
    if detail["type"] == "missing":
        return f"{where}: missing"
    given = detail["input"]
    shown = "" if isinstance(given, dict) else f", got {_described(given)}"
    return f"{where}: {detail['msg'].removeprefix('Value error, ')}{shown}"


def _described(value: Any) -> str:
    """Return a short description of a value, whatever it is."""
    if not isinstance(value, str | int | float | list | tuple | None):
        return type(value).__name__
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"


def _place(kind: type[BaseModel], location: tuple[Any, ...]) -> list[Any]:
    """Return a location without pydantic's names for the members of a union."""
    place: list[Any] = []
    for part in location:
        of_union = re.fullmatch(r"str|int|float|constrained-\w+|[\w-]+\[.*\]", str(part))
        if isinstance(part, int) or part in _keys(kind, place) or not of_union:
            place.append(part)
    return place


def _keys(kind: type[BaseModel], path: list[Any]) -> list[str]:
    """Return the legal keys at a place in the settings."""
    for part in path:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not inner:
            return []
        kind = inner[0]
    return list(kind.model_fields)


#: Most bytes of a file. A model or a job has about a thousand bytes of YAML, and this many take
#: seconds to parse. The JSON files of nnU-Net and of MONAI's bundles list cases; some have millions
#: of bytes.
LARGEST = {"YAML": 250_000, "JSON": 50_000_000}

#: Most levels at which lists and mappings may lie in each other.
DEEPEST = 64

#: Most values in a document. An alias counts as all that it stands for.
MOST = {"YAML": 50_000, "JSON": 2_000_000}

#: Surrogate characters from escapes: they cannot be encoded.
_HALF = re.compile("[\ud800-\udfff]")

_TOO_DEEP = f"lists and mappings are nested too deeply; legal are {DEEPEST} levels"

#: Integers beyond this are no count, index or size of anything.
_LARGEST_INTEGER = 2**63


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    A date is read as the text that it is.

    Raises:
        ConfigError: missing, unreadable, not YAML, not a mapping, or not made of plain values.
    """
    return _mapping(Path(path), "YAML", lambda text: yaml.load(text, _Loader))


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Where a key is given twice, the last one counts, as in other readers of JSON; a warning says so.

    Raises:
        ConfigError: missing, unreadable, not JSON, not an object, or not made of plain values.
    """
    name = Path(path).name
    return _mapping(Path(path), "JSON", lambda text: _json(text, name))


def parse_yaml(text: str) -> Any:
    """Return what a piece of YAML stands for, such as a value on the command line.

    Raises:
        ConfigError: not YAML, or not made of plain values.

    >>> parse_yaml("[64, 2024-01-01]")
    [64, '2024-01-01']
    """
    return _plain(text, "YAML", _shown(text), lambda given: yaml.load(given, _Loader))


def _mapping(path: Path, kind: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    content = _plain(_text(path, kind), kind, str(path), parse)
    if not isinstance(content, dict):
        expected = "'key: value' lines" if kind == "YAML" else "a JSON object"
        raise ConfigError(f"{path}: expected {expected}, found {type(content).__name__}")
    return content


def _plain(text: str, kind: str, source: str, parse: Callable[[str], Any]) -> Any:
    """Parse a text. The error for whatever is wrong with it names its source."""
    refused = "not valid YAML" if kind == "YAML" else "cannot be read as JSON"
    try:
        content = parse(text)
        _check_plain(content, MOST[kind])
    except RecursionError:
        raise ConfigError(f"{source}: {refused}: {_TOO_DEEP}") from None
    except Seg3dcamWarning:
        raise
    except Exception as error:  # the parsers raise whatever a hostile text leads them to
        raise ConfigError(f"{source}: {refused}: {error}") from error
    return content


def _text(path: Path, kind: str) -> str:
    """Return a file's text; ConfigError where it is larger than its kind may be."""
    try:
        if path.is_fifo() and not path.is_relative_to("/dev"):  # nobody may ever write to it
            raise ValueError("it is a pipe, not a file")
        with path.open("rb") as file:
            found = file.read(LARGEST[kind] + 1)
        if len(found) > LARGEST[kind]:
            raise ValueError(
                f"it has more than {LARGEST[kind]} bytes, so it is no settings in {kind}"
            )
        return found.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # a NUL in the path, bytes that are no UTF-8
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error


#: Kinds of values that are not read as YAML means them: dates, merged mappings and the like.
_NOT_PLAIN = [
    f"tag:yaml.org,2002:{name}"
    for name in ("timestamp", "merge", "value", "binary", "omap", "pairs", "set")
]


class _Loader(yaml.SafeLoader):
    """Reads plain values, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            times = Counter(key for key in keys if isinstance(key, Hashable))
            twice = next((key for key, number in times.items() if number > 1), None)
            if twice is not None:
                raise _at(node, f"{_shown(twice)} is given twice")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        try:
            return int(super().construct_yaml_int(node))
        except ValueError:
            raise _at(node, f"{_shown(node.value)} cannot be read as a whole number") from None


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_PLAIN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag not in _NOT_PLAIN
} | {"tag:yaml.org,2002:int": _Loader.construct_yaml_int}


def _at(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _json(text: str, name: str) -> Any:
    def an_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
            tell(f"{name}: {_shown(twice)} is given twice; the last one counts")
        return found

    return json.loads(text, object_pairs_hook=an_object, parse_int=_whole)


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads 4,300 digits
        raise ValueError(f"{_shown(digits)} cannot be read as a whole number") from None


def _check_plain(content: Any, most: int) -> None:
    """Raise ValueError where a document is not made of plain values, or is too large or deep.

    An alias of YAML is the same object in several places; here it is visited in each of them, so
    that a few lines which stand for millions of values are found before anything copies them.
    """
    left, count = [(content, "", 0)], 1
    while left:
        value, place, depth = left.pop()
        if depth > DEEPEST:
            raise ValueError(_TOO_DEEP)
        if not isinstance(value, dict | list):
            _check_scalar(value, place)
            continue
        count += len(value)
        if count > most:
            raise ValueError(f"it stands for more than {most} values")
        if isinstance(value, dict):
            for key in value:
                _check_scalar(key, f"a key of {place}" if place else "a key")
            inner = [(f"{place}.{key}" if place else str(key), v) for key, v in value.items()]
        else:
            inner = [(f"{place}[{number}]", v) for number, v in enumerate(value)]
        left.extend((v, where, depth + 1) for where, v in inner)


def _check_scalar(value: Any, place: str) -> None:
    if not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{_shown(place)} is {_kind(value)}; legal are text, numbers and lists")
    if isinstance(value, int) and not -_LARGEST_INTEGER <= value < _LARGEST_INTEGER:
        digits = int(math.log10(abs(value))) + 1
        raise ValueError(f"{_shown(place)} is a whole number of about {digits} digits")
    if isinstance(value, str) and not value.isascii() and _HALF.search(value):
        raise ValueError(f"{_shown(place)} holds one half of a character (a lone surrogate)")


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _shown(value: Any) -> str:
    """Return a key or place, shortened in the middle."""
    text = value if isinstance(value, str) and not _HALF.search(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:50]}…{text[-20:]}"
