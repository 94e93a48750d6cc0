"""The options of the commands, and how their texts are read.

The options of `explain` are made from a job's settings, and read back to a job. Those that other
commands have too are types, such as `ModelSource`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Union, cast, get_args, get_origin

import typer

from seg3dcam.checks import Frame, check_word
from seg3dcam.errors import ConfigError
from seg3dcam.job.checks import check_job
from seg3dcam.job.settings import Axis, Job
from seg3dcam.settings import parse_yaml, read_yaml, validate

#: Options of pairs -> an example.
_PAIRS = {"settings": "window=4", "input": "t1=t1.nii.gz", "set": "inferer#roi_size=[64,64,64]"}

#: The usage of `explain`, shown where scan or model are missing.
_USAGE = (
    "Usage: seg3dcam explain SCAN --model MODEL, such as\n"
    "  seg3dcam explain ct.nii.gz --model liver.yaml\n"
    "or a whole job as YAML:\n"
    "  seg3dcam explain --config job.yaml\n"
    "`seg3dcam explain --help` lists all options"
)


# ------------------------------------------------------------------- options from settings


def job_options() -> list[Parameter]:
    """Return the argument SCAN, and an option for every other setting of a job.

    Two options are no settings: --input, another way to name the scan's files, and --config, which
    names a file of settings.
    """
    scan = typer.Argument(help=help_of("scan"))
    found = [parameter("scan", list[str], scan)]
    for name, field in Job.model_fields.items():
        if name != "scan":
            kind = _kind(field.annotation)
            # A flag has its name alone: there is no --no-signed.
            names = [f"--{name.replace('_', '-')}"] if kind is bool else []
            found.append(parameter(name, kind, typer.Option(*names, help=help_of(name))))
        if name == "frame":
            words = "image key of a bundle and its file, " + _repeatable("input")
            found.append(parameter("input", list[str], typer.Option(help=words)))
        if name == "out":
            words = "a whole job as YAML; options override it"
            found.append(parameter("config", Path, typer.Option(help=words)))
    return found


def help_of(setting: str) -> str:
    """Return what an option says of a job's setting."""
    field = Job.model_fields[setting]
    words = field.description or ""
    if setting in _PAIRS:
        return f"{words}, {_repeatable(setting)}"
    repeatable = setting != "scan" and get_origin(_kind(field.annotation)) is list
    return words + "; repeatable" * repeatable


def _repeatable(pair: str) -> str:
    example = _PAIRS[pair]
    return f'as "{example}"; repeatable' if "#" in example else f"as {example}; repeatable"


def parameter(name: str, kind: Any, option: Any, default: Any = None) -> Parameter:
    """Return a parameter of a command, as Typer reads it.

    Args:
        kind: what it takes.
        option: a Typer option or argument.
        default: its value where it is not given.
    """
    kind = kind | None if default is None else kind
    annotation = Annotated[kind, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(annotation: Any) -> Any:
    """Return what an option of a setting takes: a text, unless numbers or several are meant."""
    united = get_origin(annotation) in (Union, types.UnionType)
    kinds = {*get_args(annotation)} - {type(None)} if united else {annotation}
    if any(get_origin(kind) in (list, dict) for kind in kinds):
        return list[str]
    return next((kind for kind in (bool, int, float) if kinds == {kind}), str)


# --------------------------------------------------------------------- from options to a job


def job_of(options: Mapping[str, Any]) -> Job:
    """Return the job of a command line; options override its job file.

    Raises:
        ConfigError: illegal settings; where scan or model are missing, it says what to write.
    """
    config = options["config"]
    content = _job_of_file(config) if config else {}
    given = settings_of(options)
    if options["input"]:
        if options["scan"]:
            raise ConfigError("--input names the scan's files: leave out the others")
        given["scan"] = _pairs("input", options["input"])
    for name in ("settings", "set"):
        of_file = content.get(name, {})
        if name in given:  # what is no mapping in the file is left as it is, to be refused
            given[name] = {**of_file, **given[name]} if isinstance(of_file, dict) else of_file
    job = _validated({**content, **given}, config)
    check_job(job)
    if config and "model" in content and "model" not in given:
        job = job.model_copy(update={"model": _model_beside(config, job.model)})
    return job


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a command line names, as a job has them."""
    given = {k: v for k, v in options.items() if k in Job.model_fields and v is not None}
    for name, read in _READ.items():
        if name in given:
            given[name] = read(given[name])
    return given


def _validated(settings: dict[str, Any], config: Path | None) -> Job:
    """Return the job of all settings; where scan or model are missing, say what to write."""
    try:
        return validate(settings, Job, str(config or "command line"))
    except ConfigError as error:
        if all(settings.get(key) is not None for key in ("scan", "model")):
            raise
        raise ConfigError(f"{error}\n{_USAGE}") from None


def _job_of_file(path: Path) -> dict[str, Any]:
    """Return a job file's settings, with its scans, truth and folder relative to the file."""
    content = read_yaml(path)
    for key in ("scan", "out", "truth"):
        value = content.get(key)
        if isinstance(value, str):
            content[key] = _beside(path, value)
        elif isinstance(value, list):
            content[key] = [_beside(path, item) for item in value]
        elif isinstance(value, dict):
            content[key] = {name: _beside(path, item) for name, item in value.items()}
    return content


def _beside(path: Path, name: Any) -> Any:
    """Return the path of a file named in a job file; what is no name is left to be refused."""
    return str(path.parent / name) if isinstance(name, str) and name else name


def _model_beside(path: Path, model: str) -> str:
    """Return a model that a job file names, relative to the file."""
    from seg3dcam.models.load import relative_to

    return relative_to(path.parent, model)


def _method_settings(pairs: list[str]) -> dict[str, Any]:
    """Return the settings of ['name=value', ...]; values are read as YAML."""
    found = _pairs("settings", pairs)
    return {name: _value("settings", name, value) for name, value in found.items()}


def overrides(pairs: list[str] | None) -> dict[str, Any]:
    """Return the values of ['id=value', ...]; MONAI's own words stay words: $code, @id, %file."""
    found = _pairs("set", pairs or [])
    return {
        name: value if value[0] in "$@%" else _value("set", name, value)
        for name, value in found.items()
    }


def _value(option: str, name: str, text: str) -> Any:
    """Return what a text says as YAML."""
    try:
        return parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(
            f"--{option} {name}={text}: {text!r} cannot be read as a value"
        ) from error


def _pairs(option: str, pairs: list[str]) -> dict[str, str]:
    """Return the values of ['name=value', ...] by their names."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"--{option} {pair!r}: write name=value, such as {_PAIRS[option]}")
        if name in found:
            raise ConfigError(f"--{option} {pair!r}: {name} is given twice")
        found[name] = value
    return found


def _window(text: str) -> Any:
    """Return (width, level) of 'W,L', or the name of a preset."""
    parts = text.split(",")
    try:
        return tuple(float(part) for part in parts) if len(parts) == 2 else text
    except ValueError:
        return text


def _slice(text: str) -> int | str:
    """Return a slice's index, or "all"; ConfigError for anything else."""
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--slice {text!r}: a voxel index, such as 80, or all") from None


#: Options that are a text on the command line and something else in a job -> how they are read.
_READ: dict[str, Callable[[Any], Any]] = {
    "slice": _slice,
    "intensity_window": _window,
    "settings": _method_settings,
    "set": overrides,
}


# ---------------------------------------------------------------- options of other commands

ScanFiles = Annotated[list[str], typer.Argument(help=help_of("scan"))]
ModelSource = Annotated[str, typer.Option(help=help_of("model"))]
FrameName = Annotated[str | None, typer.Option(help=help_of("frame"))]
Overrides = Annotated[list[str] | None, typer.Option(help=help_of("set"))]
DeviceName = Annotated[str, typer.Option(help=help_of("device"))]
Trust = Annotated[bool, typer.Option("--trust", help="allow the model's own code")]


def number_or_word(text: str) -> float | str:
    """Return the number that a text is, or the text.

    >>> number_or_word("-1e3"), number_or_word("mean")
    (-1000.0, 'mean')
    """
    try:
        return float(text)
    except ValueError:
        return text


def axis_of(text: str) -> int | str:
    """Return the number of an axis, or a plane; ConfigError for anything else."""
    if text in ("0", "1", "2"):
        return int(text)
    planes = get_args(Axis)
    if text in planes:
        return text
    raise ConfigError(f"--axis {text!r}: legal are {', '.join(planes)}, and 0, 1, 2")


def frame_of(text: str | None) -> Frame | None:
    """Return a form of a NIfTI header; ConfigError for another word."""
    if text is not None:
        check_word("--frame", text, Frame)
    return cast("Frame | None", text)
