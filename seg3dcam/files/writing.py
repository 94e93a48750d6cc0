"""Files that are either complete or not there.

Every file is written under a temporary name in the same folder, and renamed when it is complete and
on the disk. If anything fails in between, no incomplete file has the final name, and the file that
was there before stays as it was. A temporary name says which process made it, so that files left by
a killed process can be recognised.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from seg3dcam.errors import ConfigError, OutputError, Seg3dcamError

#: Every temporary name begins with this. The machine, the process and a random part follow.
PREFIX = ".seg3dcam-"

#: A message shows at most this many characters of a path.
_SHOWN = 200

#: Text that begins an address, and no path on this machine: s3://bucket; a Path has s3:/bucket.
_ADDRESS = re.compile(
    r"\s*([a-z0-9+.-]{2,}://|[a-z]+::|(s3a?|gc?s|az|abfss?|https?|s?ftp|file|local|memory):/)", re.I
)

#: Errors of a disk that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT)


def as_path(path: Any) -> Path:
    """Return a path to write to; raise OutputError for anything that is no path."""
    try:
        raw = os.fsencode(path)
    except (TypeError, ValueError):  # no text, or a character that cannot be encoded
        raw = b""
    if not raw or b"\0" in raw:
        raise OutputError(f"{path!r} is no path: name a file, such as 'cam.nii.gz'")
    text = os.fsdecode(raw)
    if _ADDRESS.match(text):
        raise OutputError(f"{text!r} is an address: name a path on this machine")
    return Path(text)


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes `path` when the block ends without error.

    The temporary file lies in the same folder, which is created if it is missing. Its name starts
    with a dot and keeps the suffix, since many writers choose the format by it. After any
    exception, including Ctrl-C, it is removed and `path` is as it was before.

    Every `OSError`, including those raised in the block, becomes an `OutputError` that names
    `path`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic(Path(folder) / "note.txt") as temporary:
    ...         _ = temporary.write_text("complete")
    ...     [file.name for file in Path(folder).iterdir()]
    ['note.txt']
    """
    final = as_path(path)
    temporary = temporary_name(final.parent, "".join(final.suffixes[-2:]))
    try:
        if final.is_dir():
            raise OutputError(f"{final} is a folder. Give the name of a file in it.")
        _create(temporary)
        yield temporary
        _onto_disk(temporary)
        temporary.replace(final)
        _folder_onto_disk(final.parent)
    except OutputError:
        raise
    except OSError as error:
        raise _explained(error, final) from error
    finally:
        with suppress(OSError):  # renamed already, or the disk is gone: the first error counts
            temporary.unlink()


def write_json(path: str | os.PathLike[str], obj: Any) -> Path:
    """Write `obj` as indented UTF-8 JSON, atomically.

    numpy numbers and arrays become numbers and lists, paths become text. NaN and infinity, which
    JSON does not know, become the texts "nan", "inf" and "-inf": Python's `float` reads them back.

    Raises `OutputError` if the file cannot be written, and `TypeError` for objects that JSON cannot
    hold.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(write_json(Path(folder) / "a.json", {"peak": float("nan")}).read_text(), end="")
    {
      "peak": "nan"
    }
    """
    text = json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text(path, text)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write text in UTF-8, atomically; raise `OutputError` if the file cannot be written."""
    # A name of a file that is no UTF-8 may stand in it; JSON reads what stands for it there.
    return write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file, atomically; raise `OutputError` if it cannot be written."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Create `folder` and prove that a file can be written in it, before hours of work.

    Raises `OutputError` if no file can be written. The file that proves it is removed again, and so
    are the files that killed processes left there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     list(check_writable(Path(folder) / "results").iterdir())
    []
    """
    folder = as_path(folder)
    probe = temporary_name(folder, ".probe")
    try:
        _create(probe)
        probe.write_bytes(b"\0" * 4096)
        _onto_disk(probe)
        remove_left_behind(folder)
    except OSError as error:
        raise _explained(error, folder) from error
    finally:
        with suppress(OSError):
            probe.unlink()
    return folder


def read_small(path: Path, most: int) -> bytes:
    """Return a file's content.

    Raises:
        OSError: it is missing, larger than `most` bytes, or a pipe or device, which might never
            end.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it is larger than {most} bytes", str(path))
    return path.read_bytes()


def resolved(path: str | Path) -> Path:
    """Return a path without links; raise ConfigError if it is illegal or its links form a loop."""
    try:
        found = Path(path).resolve()
        os.fsencode(found)
        found.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}…"
        raise ConfigError(f"{shown!r} is no usable path: {reason}") from error
    return found


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def digest_of_all(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the names and contents of files; order and folders do not count."""
    found = []
    for path in paths:
        with suppress(OSError):  # no result depends on a file that nobody can read
            found.append((path.name, digest_of(path)))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def temporary_name(folder: Path, suffix: str) -> Path:
    """Return a new hidden file name in a folder, which names this process."""
    return folder / f"{PREFIX}{_machine()}-{os.getpid()}-{secrets.token_hex(8)}{suffix[-32:]}"


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder.

    Those of processes that still run, or that ran on another machine, stay.
    """
    ours = re.compile(re.escape(f"{PREFIX}{_machine()}-") + r"([0-9]{1,9})-")
    for path in list(folder.iterdir()):
        made_by = ours.match(path.name)
        if made_by and not psutil.pid_exists(int(made_by[1])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder for this process alone, which goes at the end, in the system's temporary one.

    Those of processes that were killed go, too.

    Raises:
        OutputError: it cannot be made.
    """
    parent = Path(tempfile.gettempdir())
    folder = temporary_name(parent, ".scratch")
    with in_scratch(folder):
        folder.mkdir(mode=0o700)  # it may hold patients' volumes
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        remove_scratch_left_behind()


@contextmanager
def in_scratch(folder: Path) -> Iterator[None]:
    """Raise an OutputError that names TMPDIR for errors of a scratch folder, and no others."""
    try:
        yield
    except OSError as error:
        if isinstance(error, Seg3dcamError) and not (error.errno and str(folder) in str(error)):
            raise  # it is about something else
        reason = os.strerror(error.errno) if error.errno else str(error)
        told = OutputError(
            f"{folder.parent}, the folder for temporary files, cannot be written ({reason}): free "
            "some space there, or let TMPDIR name another one"
        )
        told.errno = errno.ENOSPC if error.errno in FULL else error.errno
        raise told from error


def remove_scratch_left_behind() -> None:
    """Remove the scratch folders of processes that were killed; they may hold patients' volumes."""
    with suppress(OSError):
        remove_left_behind(Path(tempfile.gettempdir()))


def _machine() -> str:
    """Return a few characters that identify this machine; a process number alone would not do."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _create(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    # Less the umask, these are the usual permissions of a new file. The 0o600 of `tempfile` would
    # keep colleagues from reading it.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def _onto_disk(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _folder_onto_disk(folder: Path) -> None:
    # The new name then survives a power cut. Not every system lets a folder be opened.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_ADVICE = {
    errno.EACCES: "Nothing may be written there: choose another folder, or change its permissions.",
    errno.EPERM: "Nothing may be written there: choose another folder, or change its permissions.",
    errno.EROFS: "The disk is read-only: choose another folder.",
    errno.ENOSPC: "The disk is full: free some space, or choose a folder on another disk.",
    errno.EDQUOT: "Your disk quota is used up: free some space, or choose another disk.",
    errno.ENOTDIR: "A part of this path is a file, not a folder: choose another folder.",
    errno.EEXIST: "A part of this path is a file, not a folder: choose another folder.",
    errno.ENAMETOOLONG: "The name is too long: choose a shorter one.",
}


def _explained(error: OSError, path: Path) -> OutputError:
    advice = _ADVICE.get(error.errno or 0, "Check the folder and the disk.")
    explained = OutputError(
        f"{path} cannot be written ({error.strerror or error}). {advice} "
        "Nothing half-written was left behind."
    )
    explained.errno = error.errno
    return explained


def plain(obj: Any) -> Any:
    """Return an object in types that JSON knows; see `write_json`."""
    if isinstance(obj, dict):
        return {key: plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    if isinstance(obj, np.ndarray):
        return plain(obj.tolist())
    if isinstance(obj, np.generic):
        return plain(obj.item())
    if isinstance(obj, float) and not np.isfinite(obj):
        return str(float(obj))
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    return obj
