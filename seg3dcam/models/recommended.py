"""The layer and method that a comparison recommends for a model, kept in a file beside it.

`seg3dcam compare --recommend` writes the file, and `--layer auto` uses it. It says for which
weights and which class it holds; with others it is not used. Like the model it may come from
anybody, so it is read as plain values, and a layer in it must be one of the network's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, FiniteFloat

from seg3dcam.cams.catalogue import ALL_METHODS, CAMS
from seg3dcam.errors import ConfigError, LayerError, some
from seg3dcam.files import printable, shortened, write_json
from seg3dcam.models.seg_model import SegModel
from seg3dcam.network.layers import resolve_layers
from seg3dcam.settings import Settings, read_json, validate

#: What is taken where neither a user nor a recommendation names a method.
USUAL_METHOD = "hires_cam"

_Word = Annotated[str, Field(min_length=1, max_length=500)]


class Recommendation(Settings):
    """A layer and a method for one class, and what they were chosen by."""

    class_name: _Word
    class_index: int = Field(ge=0, le=100_000)
    layer: _Word
    method: _Word
    cases: list[_Word] = Field(max_length=10_000, description="codes of the scans")
    figures: dict[_Word, FiniteFloat] = Field(max_length=100)
    versions: dict[_Word, _Word] = Field(max_length=100)


class Recommendations(Settings):
    """What the file holds: recommendations for the classes of a model with certain weights."""

    weights_sha256: str = Field(pattern="^[0-9a-f]{16}$", description="SegModel.fingerprint()")
    recommended: list[Recommendation] = Field(max_length=10_000)

    def of_class(self, index: int) -> Recommendation | None:
        """Return what is recommended for a class."""
        return next((one for one in self.recommended if one.class_index == index), None)


@dataclass(frozen=True)
class Advice:
    """What "auto" means for a model and some classes.

    Attributes:
        layer: the recommended layer; None for the layer that "auto" means anyway.
        method: the recommended method; None without a recommendation.
        words: what the user should know about it; "" where there is no file.
    """

    layer: str | None = None
    method: str | None = None
    words: str = ""


def read_recommendations(path: Path) -> Recommendations:
    """Read the file beside a model.

    Raises:
        ConfigError: it holds something else; the message names file and key.
    """
    return validate(read_json(path), Recommendations, path.name)


def write_recommendation(path: Path, weights: str, new: Recommendation) -> Path:
    """Write a recommendation; those for other classes of a model with the same weights stay.

    Args:
        path: the file beside the model, see `SegModel.recommended`.
        weights: the hash of the weights.

    Raises:
        ConfigError: there is a file of this name, and it holds something else.
        OutputError: it cannot be written.
    """
    others: list[Recommendation] = []
    if path.exists():
        before = read_recommendations(path)
        if before.weights_sha256 == weights:
            others = [one for one in before.recommended if one.class_index != new.class_index]
    listed = sorted([*others, new], key=lambda one: one.class_index)
    content = Recommendations(weights_sha256=weights, recommended=listed)
    return write_json(path, content.model_dump(mode="json"))


def advice_for(
    model: SegModel, classes: Sequence[int] | None, *, methods: Sequence[str] | None = None
) -> Advice:
    """Return what "auto" means for a model and the classes that are explained together.

    Args:
        classes: None if they are known only after the prediction.
        methods: those that the user named; None if none were.
    """
    path = model.recommended
    if path is None or not path.is_file():
        return Advice()
    try:
        found = read_recommendations(path)
    except ConfigError as error:
        return Advice(words=f"no recommendation is used: {error}")
    if found.weights_sha256 != model.fingerprint():
        return _unused(path, "it was made for other weights than this model's")
    if classes is None:
        names = some([_shown(one.class_name) for one in found.recommended], 5)
        return _unused(path, f"it is for {names}; name the class to use it")
    asked = list(dict.fromkeys(classes))
    known = [one for index in asked if (one := found.of_class(index)) is not None]
    words = some([model.class_name(index) for index in asked], 5)
    if len(known) < len(asked):
        names = some([_shown(one.class_name) for one in found.recommended], 5) or "no class"
        together = " together" * (len(asked) > 1)
        return _unused(path, f"it is for {names}, and not for {words}{together}")
    if len({(one.layer, one.method) for one in known}) > 1:
        why = f"it has another layer for each of {words}; explain them one by one"
        return _unused(path, why)
    one = known[0]
    return _usable(path, model, one, methods)


def _usable(
    path: Path, model: SegModel, one: Recommendation, methods: Sequence[str] | None
) -> Advice:
    """Return a recommendation for the class, if the network has the layer and there is the method.

    A layer is a plain name: patterns and "all" would stand for several.
    """
    if one.method not in ALL_METHODS:
        return _unused(path, f"there is no method {_shown(one.method)!r}")
    of_layers = one.method in CAMS and CAMS[one.method].formula.explains == "layers"
    words = _words(path, one, methods, of_layers)
    if not of_layers:
        return Advice(None, one.method, words) if methods is None else Advice()
    if "*" in one.layer or one.layer in ("all", "auto"):
        return _unused(path, f"{_shown(one.layer)!r} names no single layer")
    try:
        resolve_layers(model.module, one.layer)
    except LayerError:
        return _unused(path, f"the network has no layer {_shown(one.layer)!r}")
    return Advice(one.layer, one.method, words)


def _words(path: Path, one: Recommendation, methods: Sequence[str] | None, of_layers: bool) -> str:
    what, why = f"layer {_shown(one.layer)}" if of_layers else "the input", ""
    if methods is None or list(methods) == [one.method]:
        what += f" by {one.method}"
    else:
        why = f" by {one.method}, while {some(methods, 3)} was asked for"
    figures = ", ".join(
        f"{_shown(name).replace('_', ' ')} {one.figures[name]:.2f}"
        for name in ("context_deletion", "mask_alone")
        if name in one.figures
    )
    count = len(one.cases)
    return (
        f"auto is {what}, which {path.name} recommends for {_shown(one.class_name)}{why} "
        f"({figures}{', ' * bool(figures)}{count} scan{'s' * (count != 1)})"
    )


def _unused(path: Path, why: str) -> Advice:
    return Advice(words=f"{path.name} is not used: {why}")


def _shown(text: str) -> str:
    return shortened(printable(text), 80)
