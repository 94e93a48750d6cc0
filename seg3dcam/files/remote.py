"""Files that lie elsewhere, by their address: s3://bucket/scan.nii.gz, and whatever fsspec knows.

    place("s3://bucket/scans")       # like a Path
    with local_copy("s3://bucket/scan.nii.gz") as path: ...

A name without "://" is a path on this machine, and so is file:///scans/a.nii.gz.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from seg3dcam.errors import ConfigError, MissingExtraError, ScanError
from seg3dcam.files.writing import scratch_folder

if TYPE_CHECKING:
    from upath import UPath

#: A path on this machine, or a place elsewhere.
Place = Union[Path, "UPath"]

#: What stores call a mark of a file's content or the time of its last change, the best first.
_MARKS = (
    *("ETag", "etag", "md5Hash", "content_md5", "checksum", "LastModified", "last_modified"),
    *("mtime", "updated", "modified", "created"),
)

#: A user's name and password in an address, and in words about one. A password may hold "/", "@".
_LOGIN = re.compile(r"://(?P<login>[^/:@]*:.*)@", re.DOTALL)
_LOGIN_IN_WORDS = re.compile(r"://[^/\s:@]*:\S*@")

#: The signature and the like of an address that was signed for others to use.
_QUERY = re.compile(r"(://[^\s?]*\?)\S*=\S*")

#: Addresses of paths on this machine.
_HERE = re.compile(r"(file|local)://")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[a-z]+::")


def is_url(name: str | Path) -> bool:
    """Tell whether a name is an address.

    >>> is_url("s3://bucket/a.nii.gz"), is_url("scans/a.nii.gz"), is_url("file:///scans/a.nii.gz")
    (True, False, False)
    """
    return isinstance(name, str) and _URL.match(name) is not None and not _HERE.match(name)


def is_address(name: str) -> bool:
    """Tell whether a name says where it lies, so that it is relative to nothing.

    >>> is_address("file:///scans/a.nii.gz"), is_address("s3://bucket/a"), is_address("a.nii.gz")
    (True, True, False)
    """
    return is_url(name) or _HERE.match(name) is not None


def place(name: str | Path) -> Place:
    """Return the place of a name.

    Raises:
        MissingExtraError: the package for such addresses is not installed.
    """
    if not is_url(name):
        return Path(_HERE.sub("", name) if isinstance(name, str) else name)
    try:
        from upath import UPath
    except ImportError as error:
        told = f"{name}: pip install 'seg3dcam[cohort]'"
        raise MissingExtraError(without_login(told, [str(name)])) from error
    try:
        found = UPath(name)
        _ = found.fs  # what is missing for a protocol is said here
    except ImportError as error:
        raise MissingExtraError(without_login(f"{name}: {error}", [str(name)])) from error
    except Exception as error:  # every store has its own errors
        raise ConfigError(without_login(f"{name}: {error}", [str(name)])) from error
    return found


def has_login(address: str) -> bool:
    """Tell whether an address holds a user's name and password."""
    return _LOGIN.search(address) is not None


def without_login(words: object, addresses: Iterable[str] = ()) -> str:
    """Return words about addresses without users' names, passwords and signatures.

    Args:
        addresses: whose names and passwords may stand in the words by themselves.

    >>> without_login("s3://key:sec/ret@bucket/a"), without_login("s3://bucket/a")
    ('s3://bucket/a', 's3://bucket/a')
    >>> without_login("no user me:secret at host", ["sftp://me:secret@host/a"])
    'no user ... at host'
    """
    told = str(words)
    for found in filter(None, map(_LOGIN.search, addresses)):
        login = found["login"]
        for secret, shown in ((f"{login}@", ""), (login, "..."), (login.partition(":")[2], "...")):
            told = told.replace(secret, shown) if secret else told
    return _QUERY.sub(r"\1...", _LOGIN_IN_WORDS.sub("://", told))


def fingerprint(file: Place) -> str:
    """Return a text that is another one when the file is; of a remote one what its store says."""
    if isinstance(file, Path):
        about = file.stat()
        # With its place: of copies, which may have one size and time, none passes for another.
        return f"{file.absolute()} {about.st_size} {about.st_mtime_ns}"
    return f"{file} {mark_of(file.fs.info(file.path))}"


def mark_of(known: Mapping[str, Any]) -> str:
    """Return a text that is another one when a file is, of what its store says of it."""
    # A store says more of a file that is asked for than of one in a list, so not all of it counts.
    mark = next((known[name] for name in _MARKS if known.get(name)), None)
    return f"{known.get('size')} {known if mark is None else mark}"


@contextmanager
def local_copy(name: str) -> Iterator[str]:
    """Give the path of a file or folder on this machine, copied there if it lies elsewhere.

    Raises:
        ScanError: it cannot be fetched.
    """
    if not is_url(name):
        yield name
        return
    with scratch_folder() as folder:
        yield str(_fetched(name, folder))


def _fetched(name: str, folder: Path) -> Path:
    source: Any = place(name)
    target = folder / (source.name or "scan")
    try:
        if source.is_dir():
            target.mkdir()
            for one in source.iterdir():
                one.fs.get_file(one.path, str(target / one.name))
        else:
            source.fs.get_file(source.path, str(target))
    except Exception as error:  # every store has its own errors
        raise ScanError(without_login(f"{name} cannot be fetched: {error}", [str(name)])) from error
    return target
