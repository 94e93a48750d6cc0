"""A folder in a store of objects, such as s3://bucket/results: what is there, copied here and back.

    store = Store("s3://bucket/results")
    store.files()                       # name -> size and mark, of all files below it
    store.put({"a/cam.nii.gz": Path("cam.nii.gz")})

All methods raise `OutputError` where the store, or this machine, cannot do it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from seg3dcam.errors import ConfigError, OutputError, Seg3dcamError
from seg3dcam.files.remote import has_login, mark_of, place, without_login
from seg3dcam.files.writing import FULL

#: Stores in which a file stands whole or not at all, so that no killed run leaves half of one.
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")


class Store:
    """A folder in a store of objects.

    Attributes:
        address: as it was given.
        place: the folder, as something like a path.

    Raises:
        ConfigError: the address is none, or of a store in which half a file may stand, or it holds
            a password, which would be read in tables and logs.
        MissingExtraError: the package for such addresses is not installed.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        if has_login(address):
            raise ConfigError(
                f"{without_login(address, [address])}: give name and password of a store in its "
                "own way, such as by environment variables, and not in the address"
            )
        if address.partition("://")[0] not in STORES:
            raise ConfigError(
                f"{address}: results go to a folder of this machine or of a shared disk, or to a "
                f"store of objects: {', '.join(f'{name}://' for name in STORES[:-1])}"
            )
        self.place: Any = place(address)

    def files(self, folder: str = "") -> dict[str, tuple[int, str]]:
        """Return the files below a folder: name, relative to it -> size in bytes, and mark.

        Hidden files are left out, and so are names that would lead out of the folder.
        """
        with self._said("read"):
            fs, root = self.place.fs, self._path(folder)
            fs.invalidate_cache()  # others write there, too
            # Not `exists`, which takes an error for "no".
            try:
                found = fs.find(root, detail=True)
            except FileNotFoundError:
                found = {}
        names = {path.removeprefix(root).lstrip("/"): about for path, about in found.items()}
        return {
            name: (int(about.get("size") or 0), mark_of(about))
            for name, about in names.items()
            if is_plain(name)
        }

    def contents(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return name -> content; what has gone meanwhile is left out."""
        with self._said("read"):
            paths = [self._path(name) for name in names]
            # Not `cat`, which takes a bracket in a name for a pattern.
            got = self.place.fs.cat_ranges(paths, None, None, on_error="return") if paths else []
            for content in got:
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
        found = zip(names, got, strict=True)
        return {name: content for name, content in found if isinstance(content, bytes)}

    def get(self, files: Mapping[str, Path]) -> None:
        """Copy files here: name -> path on this machine."""
        with self._said("read"):
            for name, path in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                self.place.fs.get_file(self._path(name), str(path))

    def put(self, files: Mapping[str, Path]) -> None:
        """Copy files there: name -> path on this machine."""
        with self._said("written"):
            fs, there = self.place.fs, [self._path(name) for name in files]
            if not self.place.drive:  # with one, folders need not be made, and a bucket must not be
                for path in there:
                    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            if there:
                fs.put([str(path) for path in files.values()], there)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, those that are there."""
        with self._said("written"):
            for path in map(self._path, names):
                with suppress(FileNotFoundError):
                    self.place.fs.rm_file(path)

    def _path(self, name: str) -> str:
        root = str(self.place.path).rstrip("/")
        return f"{root}/{name}" if name else root

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except Seg3dcamError:
            raise
        except Exception as error:  # every store has its own errors
            number = getattr(error, "errno", None)
            why = str(error) or type(error).__name__
            if what == "read" and number in FULL:
                # That is no error of a store that is read.
                number = FULL[0]
                why = "the disk to which it is copied is full: free some space, or change TMPDIR"
            told = OutputError(f"{self.address} cannot be {what}: {why}")
            told.errno = number
            raise told from error


def is_plain(name: str) -> bool:
    """Tell whether a name stays in its folder, and is not hidden.

    >>> is_plain("a/cam.nii.gz"), is_plain("a/../b"), is_plain("a/.lock")
    (True, False, False)
    """
    return all(part and part[0] != "." and "\\" not in part for part in name.split("/"))
