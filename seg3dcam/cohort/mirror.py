"""An output folder that lies elsewhere, such as s3://bucket/explained.

Cases are made on the machine that explains them and copied there, `case.json` last. To plan and to
sum up, the records of the cases are copied here; of their other files only the sizes are taken
over, as empty places on the disk. So a folder of this machine and one elsewhere are planned and
summed up by the same code.

Nothing there can be locked: two runs at once may explain a case twice, with the same result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from seg3dcam.cohort.plan import CURRENT, OWN, SETTINGS, failure_file, log_file
from seg3dcam.errors import OutputError, Seg3dcamError
from seg3dcam.files import check_writable
from seg3dcam.files.remote import Place, is_url, place
from seg3dcam.job.record import NAME, FileEntry, record_of


@contextmanager
def output_folder(out: str | Path) -> Iterator[Here | Mirror]:
    """Give an output folder, wherever it lies.

    Raises:
        OutputError: nothing can be written there.
    """
    if not is_url(str(out)):
        yield Here(check_writable(out))
        return
    with mirrored(str(out)) as mirror:
        yield mirror


@contextmanager
def mirrored(address: str) -> Iterator[Mirror]:
    """Give a mirror of an output folder in a folder of this machine, which goes at the end."""
    with tempfile.TemporaryDirectory(prefix="seg3dcam-") as here:
        (Path(here) / OWN).mkdir()
        yield Mirror(place(address), Path(here))


@dataclass(frozen=True)
class Here:
    """An output folder on this machine, which needs no copies.

    Attributes:
        here: the folder.
    """

    here: Path

    @property
    def given(self) -> Path | str:
        """The folder as a user names it."""
        return self.here

    @property
    def free(self) -> int | None:
        """How many bytes are free there."""
        return int(psutil.disk_usage(str(self.here)).free)

    def fetch(self, names: Sequence[str]) -> None:
        """Do nothing: what is here is as it is now."""

    def keep_notes(self, name: str) -> None:
        """Do nothing."""

    def keep_own(self) -> None:
        """Do nothing."""

    def shown(self, path: Path) -> Place:
        """Return where a file lies for the user."""
        return path


@dataclass(frozen=True)
class Mirror:
    """An output folder elsewhere, and its mirror on this machine.

    Attributes:
        there: the folder elsewhere.
        here: the mirror.

    All methods raise OutputError where the other place cannot be read or written.
    """

    there: Any
    here: Path

    @property
    def given(self) -> Path | str:
        """The folder as a user names it."""
        return str(self.there)

    @property
    def free(self) -> int | None:
        """How many bytes are free there, which is not known."""
        return None

    def fetch(self, names: Sequence[str]) -> None:
        """Copy the cohort's own files and the records of cases here, as they are now."""
        with self._said("read"):
            # A store would make a bucket of any name, also of a wrong one.
            if (bucket := self.there.drive) and not self.there.fs.exists(bucket):
                raise OutputError(f"{self.there}: there is no {bucket}")
            sizes = self._sizes("")
            wanted = [f"{OWN}/{SETTINGS}", f"{OWN}/{CURRENT}"]
            for name in names:
                wanted += [f"{name}/{NAME}", self._relative(failure_file(self.here, name))]
            self._get([name for name in wanted if name in sizes])
        for name in names:
            self._take_place(name, sizes)

    def fetch_case(self, name: str) -> dict[str, FileEntry]:
        """Copy the record of one case here; return its files that are there, as they are there."""
        with self._said("read"):
            sizes = self._sizes(name)
            self._get([one for one in (f"{name}/{NAME}",) if one in sizes])
        return self._take_place(name, sizes)

    def keep_case(self, name: str, before: Mapping[str, FileEntry]) -> None:
        """Copy a case there that was explained here.

        Args:
            before: what `fetch_case` returned. Files that are the same now are not copied.
        """
        record = record_of(self.here / name)
        if record is None:
            return
        made = [file for file, entry in record.files.items() if before.get(file) != entry]
        with self._said("written"):
            # What is there may be replaced by halves from here on, so it has no record meanwhile.
            self._remove([f"{name}/{NAME}"])
            self._put(f"{name}/{file}" for file in made)
            self._put([f"{name}/{NAME}"])
            self._remove(f"{name}/{file}" for file in before if file not in record.files)

    def keep_notes(self, name: str) -> None:
        """Copy the log of a case there, and why it failed; where it did not, that goes there."""
        with self._said("written"):
            for file in (log_file(self.here, name), failure_file(self.here, name)):
                if file.exists():
                    self._put([self._relative(file)])
                elif file == failure_file(self.here, name):
                    self._remove([self._relative(file)])

    def keep_own(self) -> None:
        """Copy what belongs to no single case there: settings, tables, page."""
        own = [self.here / OWN / SETTINGS, self.here / OWN / CURRENT, *self.here.iterdir()]
        with self._said("written"):
            self._put(self._relative(file) for file in own if file.is_file())

    def shown(self, path: Path) -> Place:
        """Return where a file of the mirror lies for the user."""
        found: Place = self.there / self._relative(path)
        return found

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.here).as_posix()

    def _sizes(self, below: str) -> dict[str, int]:
        """Return the name of every file there -> its size in bytes."""
        self.there.fs.invalidate_cache()  # others write there, too
        root = self._path("")
        start = self._path(below)
        found = self.there.fs.find(start, detail=True) if self.there.fs.exists(start) else {}
        return {
            path.removeprefix(root).lstrip("/"): int(about["size"]) for path, about in found.items()
        }

    def _take_place(self, name: str, sizes: Mapping[str, int]) -> dict[str, FileEntry]:
        """Give the files of a case that are there their sizes here, and no content."""
        record = record_of(self.here / name)
        found = {}
        for file, entry in ({} if record is None else record.files).items():
            if (size := sizes.get(f"{name}/{file}")) is not None:
                empty = self.here / name / file
                empty.parent.mkdir(parents=True, exist_ok=True)
                with empty.open("wb") as opened:
                    opened.truncate(size)
                found[file] = entry.model_copy(update={"bytes": size})
        return found

    def _get(self, names: Iterable[str]) -> None:
        names = list(names)
        for name in names:
            (self.here / name).parent.mkdir(parents=True, exist_ok=True)
        if names:
            self.there.fs.get([self._path(n) for n in names], [str(self.here / n) for n in names])

    def _put(self, names: Iterable[str]) -> None:
        names = list(names)
        if names:
            for folder in {Path(name).parent.as_posix() for name in names}:
                self.there.fs.makedirs(self._path("" if folder == "." else folder), exist_ok=True)
            self.there.fs.put([str(self.here / n) for n in names], [self._path(n) for n in names])

    def _remove(self, names: Iterable[str]) -> None:
        for path in map(self._path, names):
            if self.there.fs.exists(path):
                self.there.fs.rm_file(path)

    def _path(self, name: str) -> str:
        root = str(self.there.path).rstrip("/")
        return f"{root}/{name}" if name else root

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except Seg3dcamError:
            raise
        except Exception as error:  # every store has its own errors
            raise OutputError(f"{self.there} cannot be {what}: {error}") from error
