"""A folder that only one run at a time writes to.

No file in it is half-written, lost or mixed up with another run's, and files of somebody else stay
as they are.

    with locked("results") as lock, staging("results") as staged:
        ...                             # write to `staged`, a hidden folder in "results"
        names = placed_as("results", staged, ...)
        lock.announce(names.values())   # what a run that is killed from here on may leave
        move("results", staged, names)

A lock says which process on which machine is at work. Where that process has died, the next run
takes the lock over and removes what was left behind: temporary files, and files that the process
announced and that no record lists.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated

import psutil
from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, ValidationError

from seg3dcam.errors import OutputError
from seg3dcam.files import check_writable, digest_of, read_small, temporary_name, write_json

#: The file that says who is at work in a folder.
LOCK = ".seg3dcam-lock"

#: A lock that cannot be read may be half-written. After so many seconds its run must have died.
UNREADABLE = 10

#: Folders in which each explanation has a folder of its own. The files in any other folder belong
#: together.
OF_EACH = ("slices",)

#: Most bytes of a lock.
_LARGEST = 50_000_000


def _inside(name: str) -> str:
    """Return a name that leads to a file inside a folder; ValueError for any other name."""
    parts = name.split("/")
    if any(p in ("", ".", "..") or len(os.fsencode(p)) > 255 for p in parts) or "\0" in name:
        raise ValueError("a name of a file in the folder is needed, such as slices/a/axial_001.png")
    return name


#: The name of a file in a folder, relative to it, with "/" between folders.
Name = Annotated[str, AfterValidator(_inside)]


class _Holder(BaseModel):
    """Who holds a lock: a process, since when, and which files it may leave."""

    host: str
    process: int = Field(ge=1, lt=2**31)
    since: FiniteFloat
    files: list[Name] = []

    def is_alike(self, other: _Holder) -> bool:
        """Tell whether this is the same process."""
        return self == other.model_copy(update={"files": self.files})


class OccupiedError(OutputError):
    """Another run is at work in a folder."""


class Lock:
    """A folder's lock, held."""

    def __init__(self, path: Path, holder: _Holder) -> None:
        self._path, self._holder = path, holder

    @property
    def announced(self) -> list[str]:
        """The files that were announced."""
        return self._holder.files

    def announce(self, files: Iterable[str]) -> None:
        """Say which files, relative to the folder, have to go if this run does not end."""
        self._holder = self._holder.model_copy(update={"files": sorted(set(files))})
        write_json(self._path, self._holder.model_dump())


@contextlib.contextmanager
def locked(folder: str | Path, listed: Callable[[Path], Collection[str]]) -> Iterator[Lock]:
    """Hold a folder's lock, and clean up behind a run that died in it.

    Args:
        folder: is created if it is missing.
        listed: returns the files of complete runs, relative to the folder; they stay.

    Raises:
        OccupiedError: another run is at work there.
        OutputError: the folder cannot be written.
    """
    folder = check_writable(folder)
    path = folder / LOCK
    holder = _Holder(host=socket.gethostname(), process=os.getpid(), since=_started(os.getpid()))
    try:
        while not _taken(path, holder):
            earlier = _holder_of(path)
            if earlier is not None and _is_at_work(earlier):
                raise OccupiedError(_occupied(folder, earlier))
            _clean(folder, path, earlier, listed)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        reason = error.strerror or error
        raise OutputError(
            f"{folder} cannot be locked: {path} ({reason}). If no run is at work there, delete it"
        ) from error
    lock = Lock(path, holder)
    try:
        yield lock
    except BaseException:
        remove(folder, set(lock.announced) - set(listed(folder)))
        raise
    finally:
        # Where the folder was deleted meanwhile, another run may hold it by now.
        if (last := _holder_of(path)) is not None and last.is_alike(holder):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Give a hidden folder to write to, which is always removed at the end.

    Errors of writing name a file by the place in `folder` where it is to go.
    """
    staged = temporary_name(folder, ".run")
    try:
        staged.mkdir(parents=True)
        yield staged
    except OutputError as error:
        said = OutputError(str(error).replace(str(staged), str(folder)))
        said.errno = error.errno
        raise said from error
    finally:
        try:
            shutil.rmtree(staged, ignore_errors=True)
        except BaseException:
            # Ctrl-C in the midst of it: what is left would stay, since the run itself is complete.
            shutil.rmtree(staged, ignore_errors=True)
            raise


def placed_as(
    folder: Path, staged: Path, files: Iterable[Path], replaceable: Collection[str]
) -> dict[str, str]:
    """Return the names that staged files are to have in the folder, so that nothing is lost.

    A file keeps its name where that is free, may be replaced, or belongs to a file with the same
    content. Otherwise a number is added to the name, or to that of the folder where several files
    belong together.

    Args:
        files: in `staged`.
        replaceable: names of files that may be replaced.

    Returns:
        name in `staged` -> name in the folder, with "/" between folders.
    """
    units: dict[PurePosixPath, list[PurePosixPath]] = {}
    for file in files:
        name = PurePosixPath(file.relative_to(staged).as_posix())
        depth = 2 if name.parts[0] in OF_EACH and len(name.parts) > 2 else 1
        units.setdefault(PurePosixPath(*name.parts[:depth]), []).append(name)
    found: dict[str, str] = {}
    for unit, names in units.items():
        for candidate in _candidates(folder, unit):
            wanted = {str(name): str(candidate / name.relative_to(unit)) for name in names}
            if _is_free(folder, candidate, wanted, staged, replaceable):
                found |= wanted
                break
    return found


def described(staged: Path, names: Mapping[str, str]) -> dict[str, dict[str, int | str]]:
    """Return the size and SHA-256 of each staged file, by the name that it is to have.

    Raises:
        OutputError: a file is gone, such as after the folder was deleted.
    """
    found: dict[str, dict[str, int | str]] = {}
    for name, final in names.items():
        file = staged / name
        with _errors_in_words(file):
            found[final] = {"bytes": file.stat().st_size, "sha256": digest_of(file)}
    return found


def move(folder: Path, staged: Path, names: Mapping[str, str]) -> None:
    """Move staged files to their names.

    Raises:
        OutputError: a file is gone, such as after the folder was deleted.
    """
    for name, final in names.items():
        target = folder / final
        with _errors_in_words(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            (staged / name).replace(target)


@contextlib.contextmanager
def _errors_in_words(file: Path) -> Iterator[None]:
    """Say in words that a file is gone or cannot be written."""
    try:
        yield
    except FileNotFoundError as error:
        raise OutputError(
            f"{file} is gone: something deleted it, or its folder, while the run went on. "
            "Run it again"
        ) from error
    except OSError as error:
        raise OutputError(f"{file} cannot be written ({error.strerror or error})") from error


def remove(folder: Path, files: Iterable[str]) -> None:
    """Remove files of a folder, and folders that are empty then. No link is followed.

    Args:
        files: names that lie in the folder, see `Name`.
    """
    for name in files:
        file = folder / name
        if _has_link(folder, file.parent):
            continue
        with contextlib.suppress(OSError):
            if file.is_file() or file.is_symlink():
                file.unlink()
        for parent in file.relative_to(folder).parents[:-1]:
            with contextlib.suppress(OSError):  # not empty: it holds a file of somebody else's
                (folder / parent).rmdir()


def is_link_free(folder: Path, name: str) -> bool:
    """Tell whether a file of a folder lies in it, not behind a link that leads elsewhere."""
    return not _has_link(folder, folder / name)


# ------------------------------------------------------------------------------- the lock


def _taken(path: Path, holder: _Holder) -> bool:
    """Create the lock file; return False where there is one already."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(holder.model_dump_json())
    return True


def _holder_of(path: Path) -> _Holder | None:
    """Return who holds a lock; None where it is gone or stays unreadable."""
    for _ in range(2 * UNREADABLE):
        try:
            return _Holder.model_validate_json(read_small(path, _LARGEST))
        except FileNotFoundError:
            return None
        except ValidationError:
            # Its run may be writing it right now.
            if time.time() - path.lstat().st_mtime > UNREADABLE:
                return None
            time.sleep(0.5)
    return None


def _is_at_work(holder: _Holder) -> bool:
    """Tell whether a lock's process is running. One on another machine counts as running."""
    if holder.host != socket.gethostname():
        return True
    # The number of a process that has ended is given to another one.
    return psutil.pid_exists(holder.process) and _started(holder.process) == holder.since


def _started(process: int) -> float:
    """Return when a process began; 0 for one that has ended, also if nobody has noticed yet."""
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(process)
        if found.status() != psutil.STATUS_ZOMBIE:
            return float(found.create_time())
    return 0.0


def _occupied(folder: Path, holder: _Holder) -> str:
    said = f"process {holder.process} on {holder.host} is at work in {folder}: "
    if holder.host == socket.gethostname():
        return said + "wait for it, or choose another folder"
    return said + f"wait for it, or choose another folder. If it died, delete {folder / LOCK}"


def _clean(
    folder: Path,
    path: Path,
    holder: _Holder | None,
    listed: Callable[[Path], Collection[str]],
) -> None:
    """Remove a dead run's lock, and what it announced."""
    mine = temporary_name(folder, ".lock")
    try:
        path.rename(mine)
    except FileNotFoundError:
        return  # somebody else cleans up
    if holder is not None and _holder_of(mine) == holder:
        remove(folder, set(holder.files) - set(listed(folder)))
        mine.unlink()
    elif holder is None:
        mine.unlink()
    else:  # somebody else has cleaned up, and is at work
        mine.rename(path)


# ------------------------------------------------------------------------------- names


def _numbered(unit: PurePosixPath) -> Iterator[PurePosixPath]:
    """Yield a name, and the same with numbers: cam.nii.gz, cam_2.nii.gz, cam_3.nii.gz."""
    stem, dot, suffix = unit.name.partition(".")
    for number in itertools.count(1):
        yield unit if number == 1 else unit.with_name(f"{stem}_{number}{dot}{suffix}")


def _candidates(folder: Path, unit: PurePosixPath) -> Iterator[PurePosixPath]:
    """Yield names for a file or folder, outside of folders that belong to somebody else."""
    if unit.parent == PurePosixPath():
        return _numbered(unit)
    usable = (
        parent
        for parent in _numbered(unit.parent)
        if (folder / parent).is_dir() or not os.path.lexists(folder / parent)
        if not _has_link(folder, folder / parent)
    )
    return _numbered(next(usable) / unit.name)


def _is_free(
    folder: Path,
    unit: PurePosixPath,
    names: Mapping[str, str],
    staged: Path,
    replaceable: Collection[str],
) -> bool:
    """Tell whether files may have their names: no file of somebody else has one of them."""
    if _has_link(folder, folder / unit):
        return False
    if (folder / unit).is_file() and list(names.values()) != [str(unit)]:
        return False  # a file where a folder is wanted
    for name, final in names.items():
        there = folder / final
        if final in replaceable or not there.exists():
            continue
        if not _is_same(there, staged / name):
            return False
    return True


def _is_same(there: Path, staged: Path) -> bool:
    """Tell whether a file has the same content as a staged one; False where it cannot be read."""
    with contextlib.suppress(OSError):
        return there.is_file() and digest_of(there) == digest_of(staged)
    return False


def _has_link(folder: Path, path: Path) -> bool:
    """Tell whether a path below a folder is a link, or leads through one."""
    parts = path.relative_to(folder).parts
    return any(folder.joinpath(*parts[:count]).is_symlink() for count in range(1, len(parts) + 1))
