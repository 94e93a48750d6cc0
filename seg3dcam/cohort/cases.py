"""The cases of a cohort: which scans there are, and what each is called.

A cohort is a folder of files or of DICOM series, an nnU-Net folder such as imagesTs, a pattern of
file names, a table (CSV or Parquet), or a datalist of MONAI (JSON). Here names are read and looked
for; no scan is opened.
"""

from __future__ import annotations

import csv
import glob
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seg3dcam.errors import ConfigError, Seg3dcamError, nearest, some
from seg3dcam.files.readers import stem
from seg3dcam.files.remote import Place, is_address, is_url, local_copy, place, without_login

#: What a name of a case may be: it is the name of its folder.
_LEGAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

#: Names of folders that some systems keep for devices.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)

#: Columns of a table, and the keys of a datalist: ours -> other names for it.
_COLUMNS = {"case": ("id",), "scan": ("image",), "truth": ("label",)}

#: Between the files of a scan of several channels, in a table.
_BETWEEN_CHANNELS = ";"

#: A channel of a case in an nnU-Net folder: name, number of the channel.
_CHANNEL = re.compile(r"(.+)_(\d{4})")

#: Endings of files in the folder of a DICOM series.
_SLICES = (".dcm", ".dicom", ".ima")

_FORMS = (
    "a folder of scans or of DICOM series, an nnU-Net folder such as imagesTs, a pattern such as "
    "'scans/*.nii.gz', a table (.csv or .parquet), or a datalist of MONAI (.json)"
)


@dataclass(frozen=True)
class CohortCase:
    """One case of a cohort.

    Attributes:
        name: by which it is known, and the name of its folder.
        files: the scan's files in the order of the channels, or the folder of a DICOM series.
        truth: the file of its label map, None without one.
    """

    name: str
    files: tuple[Place, ...]
    truth: Place | None = None


def read_cases(source: str | Path, *, without: Place | None = None) -> tuple[CohortCase, ...]:
    """Return the cases of a cohort, in the order in which they are named.

    Args:
        source: a folder, a pattern, a table or a datalist, here or at an address that fsspec knows,
            such as s3://bucket/scans. Files that a table or a datalist names lie relative to it.
        without: a folder below which a pattern finds nothing, such as that of the results.

    Raises:
        ConfigError: there are none, a table cannot be read, names are illegal or not unique, or
            files are missing.

    Example:
        >>> read_cases("imagesTs")[0]  # doctest: +SKIP
        CohortCase(name='liver_001', files=(PosixPath('imagesTs/liver_001_0000.nii.gz'),), ...)
    """
    try:
        return _read_cases(source, without)
    except Seg3dcamError as error:
        words = without_login(error, [str(source)])
        if words == str(error):
            raise
        raise type(error)(words) from None


def _read_cases(source: str | Path, without: Place | None) -> tuple[CohortCase, ...]:
    """Return the cases; an error may hold the password of an address."""
    try:
        found = _found(str(source), place(source), without)
    except Seg3dcamError:
        raise
    except Exception as error:  # every store has its own errors
        if isinstance(error, OSError) or is_url(source):
            raise ConfigError(f"{source} cannot be read: {error}") from error
        raise
    if not found:
        raise ConfigError(f"{source}: no scans found; a cohort is {_FORMS}")
    _check_names(source, [case.name for case in found])
    _check_files(source, found)
    return tuple(found)


def local_pairs(cases: Iterable[CohortCase]) -> Iterator[tuple[list[str], str]]:
    """Yield the files of each case's scan and truth, on this machine while they are needed."""
    for case in cases:
        if case.truth is not None:
            with ExitStack() as stack:
                scan = [stack.enter_context(local_copy(str(file))) for file in case.files]
                yield scan, stack.enter_context(local_copy(str(case.truth)))


def _found(source: str, path: Place, without: Place | None) -> list[CohortCase]:
    """Return the cases of a source, unchecked."""
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        if path.suffix.lower() in _READERS:
            return _READERS[path.suffix.lower()](path)
        return _of_files([path])
    if glob.has_magic(source):
        found = [one for one in _matching(path) if without is None or not _is_in(one, without)]
        return _of_files(sorted(found, key=str))
    what = "file" if path.suffix.lower() in _READERS else "folder"
    raise ConfigError(f"{source}: no such {what}; a cohort is {_FORMS}")


def _is_in(file: Place, folder: Place) -> bool:
    """Tell whether a file lies below a folder, on this machine or elsewhere."""
    if isinstance(file, Path) and isinstance(folder, Path):
        return folder.resolve() in file.resolve().parents
    return str(file).startswith(str(folder).rstrip("/") + "/")


def _matching(pattern: Place) -> Iterable[Place]:
    """Return what a pattern matches, looked for below its last folder without a wildcard."""
    parts = [pattern]
    while glob.has_magic(str(parts[-1])):
        parts.append(parts[-1].parent)
    base = parts[-1]
    below = "/".join(part.name for part in reversed(parts[:-1]))
    found: Iterable[Place] = base.glob(below)
    return found


# ------------------------------------------------------------------------------- folders and files


def _of_folder(folder: Place) -> list[CohortCase]:
    """Return the cases of a folder: scans, channels as nnU-Net names them, or DICOM series."""
    inside = sorted((path for path in folder.iterdir() if not _is_hidden(path)), key=str)
    # A link that leads nowhere is a file that is missing.
    files = [path for path in inside if not path.is_dir() and _is_readable(path)]
    if files and all(_CHANNEL.fullmatch(stem(path)) for path in files):
        return _of_channels(folder, files)
    return [*_of_files(files), *(_of_series(path) for path in inside if _is_series(path))]


def _of_files(paths: Iterable[Place]) -> list[CohortCase]:
    return [
        _of_series(path) if path.is_dir() else CohortCase(stem(path), (path,))
        for path in paths
        if not _is_hidden(path) and (_is_series(path) if path.is_dir() else _is_readable(path))
    ]


def _is_hidden(path: Place) -> bool:
    return path.name.startswith(".")


def _is_readable(path: Place) -> bool:
    """Tell whether a file's ending is that of a volume."""
    return stem(path) != path.name


def _of_series(folder: Place) -> CohortCase:
    return CohortCase(folder.name, (folder,))


def _is_series(path: Place) -> bool:
    return path.is_dir() and any(
        one.is_file() and not _is_hidden(one) and _is_dicom(one) for one in path.iterdir()
    )


def _is_dicom(file: Place) -> bool:
    """Tell whether a file is one of DICOM, by its ending; without one, by what it begins with."""
    if file.suffix:
        return file.suffix.lower() in _SLICES
    with file.open("rb") as opened:
        return bool(opened.read(132)[128:] == b"DICM")


def _of_channels(folder: Place, files: Sequence[Place]) -> list[CohortCase]:
    """Return the cases of an nnU-Net folder: case_0000.nii.gz, case_0001.nii.gz and so on.

    Truths are those of the folder of labels beside it, where there are any.
    """
    channels: dict[str, dict[int, Place]] = defaultdict(dict)
    for path in files:
        name, _, number = stem(path).rpartition("_")
        channels[name][int(number)] = path
    usual = Counter(frozenset(of) for of in channels.values()).most_common(1)[0][0]
    wrong = [name for name, of in channels.items() if frozenset(of) != usual]
    if wrong or usual != set(range(len(usual))):
        raise ConfigError(
            f"{folder}: names that end in _0000, _0001 and so on are channels, as nnU-Net has "
            f"them, and every case has 0000 to {len(usual) - 1:04d}; not so "
            f"{some(wrong or list(channels))}"
        )
    labels = folder.parent / folder.name.replace("images", "labels")
    there = labels.iterdir() if labels != folder and labels.is_dir() else ()
    truths = {stem(path): path for path in there if not path.is_dir() and _is_readable(path)}
    return [
        CohortCase(name, tuple(of[number] for number in sorted(of)), truths.get(name))
        for name, of in channels.items()
    ]


# -------------------------------------------------------------------------------------- tables


def _of_csv(path: Place) -> list[CohortCase]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a table that can be read: {error}") from error
    if any(None in row for row in rows):
        raise ConfigError(f"{path}: a row has more cells than there are columns")
    return _of_rows(path, columns, rows)


def _of_parquet(path: Place) -> list[CohortCase]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: a Parquet table needs pyarrow: pip install 'seg3dcam[cohort]'"
        ) from error
    try:
        with path.open("rb") as file:
            table = parquet.read_table(file)
    except (OSError, ArrowException) as error:
        raise ConfigError(f"{path}: not a table that can be read: {error}") from error
    return _of_rows(path, table.column_names, table.to_pylist())


def _of_rows(
    path: Place, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[CohortCase]:
    """Return the cases of a table's rows."""
    names = {ours: _column(path, ours, columns) for ours in _COLUMNS}
    if names["scan"] is None:
        if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
            raise ConfigError(f"{path}: {columns[0]!r} is one column: separate columns by commas")
        near = f": {nearest('scan', columns)}" if columns else ""
        raise ConfigError(
            f"{path}: no column 'scan' (or 'image'){near}; legal are {', '.join(_COLUMNS)}, "
            "others are left alone"
        )
    found = []
    for number, row in enumerate(rows, 2):
        cells = {ours: row.get(name) if name else None for ours, name in names.items()}
        where = f"{path}, line {number}"
        files = _files_of(where, cells["scan"])
        found.append(_of_names(where, path, cells["case"], files, cells["truth"]))
    return found


def _column(path: Place, ours: str, columns: Sequence[str]) -> str | None:
    """Return the column of a table that has our name, or another one for it; None without one."""
    found = [name for name in columns if name.strip().lower() in (ours, *_COLUMNS[ours])]
    if len(found) > 1:
        raise ConfigError(
            f"{path}: the columns {found[0]!r} and {found[1]!r} say the same: keep one"
        )
    return found[0] if found else None


def _files_of(where: str, cell: Any) -> list[str]:
    """Return the files that a cell names, one for each channel."""
    if cell is not None and not isinstance(cell, str):
        raise ConfigError(f"{where}: a scan is named by a text, not by {type(cell).__name__}")
    files = [part.strip() for part in (cell or "").split(_BETWEEN_CHANNELS)]
    if not all(files):
        what = "no scan is named" if files == [""] else f"{cell!r} names an empty file"
        raise ConfigError(f"{where}: {what}")
    return files


def _of_datalist(path: Place) -> list[CohortCase]:
    """Return the cases of a datalist: lists of {"image": ..., "label": ...}, or one such list."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a datalist that can be read: {error}") from error
    lists = content.values() if isinstance(content, dict) else [content]
    found = []
    for item in (item for one in lists if isinstance(one, list) for item in _scans_in(one)):
        if isinstance(item, str):
            item = {"image": item}  # as lists of scans without a truth are written
        files = item.get("image", item.get("scan"))
        files = [files] if isinstance(files, str) else files
        if not files or not isinstance(files, list) or not all(_is_name(file) for file in files):
            near = nearest("image", item) if not {"image", "scan"} & item.keys() else repr(files)
            raise ConfigError(f'{path}: an item without an "image" that names files: {near}')
        found.append(_of_names(str(path), path, item.get("case"), files, item.get("label")))
    return found


def _scans_in(listed: list[Any]) -> Iterator[Any]:
    """Yield the items of a list, of lists in it too; none of a list of other words, as classes."""
    words = [item for item in listed if isinstance(item, str)]
    if words and not any(_is_readable(Path(word)) for word in words):
        return
    for item in listed:
        if isinstance(item, list):
            yield from _scans_in(item)
        elif isinstance(item, dict | str):
            yield item


def _is_name(given: Any) -> bool:
    return isinstance(given, str) and bool(given.strip())


def _of_names(where: str, path: Place, name: Any, files: Sequence[str], truth: Any) -> CohortCase:
    """Return the case that a table or a datalist names, with its files relative to it."""

    def beside(file: str) -> Place:
        return place(file) if is_address(file) else path.parent / file

    if isinstance(name, float) and name.is_integer():
        name = int(name)  # as a column of whole numbers is read where one is missing
    if truth is not None and not isinstance(truth, str):
        raise ConfigError(f"{where}: a truth is one file, not {truth!r}")
    scans = tuple(beside(file) for file in files)
    own = str(name).strip() if name not in (None, "") else stem(scans[0])
    return CohortCase(own, scans, beside(truth.strip()) if truth and truth.strip() else None)


#: Ending of a file that names cases -> its reader.
_READERS: dict[str, Callable[[Place], list[CohortCase]]] = {
    ".csv": _of_csv,
    ".parquet": _of_parquet,
    ".json": _of_datalist,
}


# -------------------------------------------------------------------------------------- checks


def _check_names(source: str | Path, names: Sequence[str]) -> None:
    """Raise ConfigError unless every name is a folder's name of its own."""
    illegal = [
        name
        for name in names
        if not _LEGAL.fullmatch(name) or _DEVICES.fullmatch(name) or name[-1] == "."
    ]
    if illegal:
        raise ConfigError(
            f"{source}: names of cases are names of folders: letters, digits, '.', '-' and '_', at "
            f"most 100; not so {some(list(map(repr, illegal)))}. Name them in a column 'case'"
        )
    # Some file systems do not distinguish upper and lower case.
    counted = Counter(name.lower() for name in names)
    twice = list(dict.fromkeys(name for name in names if counted[name.lower()] > 1))
    if twice:
        raise ConfigError(
            f"{source}: {some(list(map(repr, twice)))}: more than one case of a name. Name them in "
            "a table with a column 'case'"
        )


def _check_files(source: str | Path, cases: Sequence[CohortCase]) -> None:
    """Raise ConfigError if a file of a case is missing."""
    listed: dict[Any, set[str]] = {}

    def exists(file: Place) -> bool:
        if isinstance(file, Path):
            return file.exists()
        # One look at a folder of a store takes as long as one at a file.
        if file.parent not in listed:
            try:
                there = file.parent.iterdir() if file.parent.is_dir() else ()
                listed[file.parent] = {one.name for one in there}
            except Exception as error:  # every store has its own errors
                raise ConfigError(f"{file.parent} cannot be read: {error}") from error
        return file.name in listed[file.parent]

    missing = [
        f"{case.name}: {file}"
        for case in cases
        for file in (*case.files, *([] if case.truth is None else [case.truth]))
        if not exists(file)
    ]
    if missing:
        raise ConfigError(f"{source}: files are missing:\n  " + some(missing, 10, "\n  "))
