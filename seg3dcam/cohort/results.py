"""Where a cohort's results lie: in a folder of this machine, or at an address such as s3://bucket/a.

At an address a case is made on the machine that explains it: all that its folder holds there is
fetched, the case is explained as in any folder, and what has changed is copied back, `case.json`
last. To plan and to sum up, records are fetched, and of all other files the sizes are asked for.

Nothing at an address can be locked: two runs at once may explain a case twice, with the same
result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from seg3dcam.cohort.plan import CURRENT, OWN, SETTINGS, failure_file, log_file
from seg3dcam.errors import OutputError, Seg3dcamError
from seg3dcam.files import check_writable, scratch_folder, write_json
from seg3dcam.files.remote import Place, is_url, place
from seg3dcam.job.record import NAME, Record, damaged, record_of

#: The size, the time and the number of every file of a case, by which a change is seen.
Snapshot = Mapping[str, tuple[int, int, int]]

_USER = re.compile(r"://[^/@]+@")


@contextmanager
def results_at(out: str | Path) -> Iterator[Here | Elsewhere]:
    """Give the results of a cohort, wherever they lie.

    Raises:
        OutputError: nothing can be written there.
    """
    if is_url(str(out)):
        with scratch_folder() as scratch:
            yield Elsewhere(str(out), place(str(out)), scratch)
    else:
        yield Here(check_writable(str(place(str(out)))))


@dataclass(frozen=True)
class Here:
    """Results in a folder of this machine.

    Attributes:
        folder: the folder.
    """

    folder: Path

    @property
    def place(self) -> Path:
        """The folder."""
        return self.folder

    @property
    def for_workers(self) -> Path | str:
        """What a worker has to know."""
        return self.folder

    @property
    def free(self) -> int | None:
        """How many bytes are free there."""
        return int(psutil.disk_usage(str(self.folder)).free)

    def fetch(self, names: Sequence[str]) -> Path:
        """Return the folder, which is always as it is now."""
        return self.folder

    def is_whole(self, name: str, record: Record, files: Iterable[str]) -> bool:
        """Tell whether files of a case are there with the sizes that its record says."""
        return not damaged(self.folder / name, record, files)

    def made(self, name: str, make: Callable[[Path], str | None]) -> str | None:
        """Let a case be made; return why it failed."""
        return make(self.folder)

    def keep_settings(self, folder: Path) -> None:
        """Do nothing."""

    def keep_notes(self, name: str, folder: Path) -> None:
        """Do nothing."""

    def keep_all(self, folder: Path) -> None:
        """Do nothing."""

    def shown(self, file: Path) -> Place:
        """Return where a file lies for the user."""
        return file


@dataclass(frozen=True)
class Elsewhere:
    """Results at an address.

    Attributes:
        address: as it was given, which may hold a password.
        place: the folder there.
        scratch: a folder of this machine that goes at the end.

    All methods raise OutputError where the other place cannot be read or written.
    """

    address: str
    place: Any
    scratch: Path
    _sizes: dict[str, int] = field(default_factory=dict)
    _fetched: list[Path] = field(default_factory=list)

    @property
    def for_workers(self) -> Path | str:
        """What a worker has to know."""
        return self.address

    @property
    def free(self) -> int | None:
        """How many bytes are free there, which is not known."""
        return None

    @property
    def name(self) -> str:
        """The address without a user's name and password."""
        return _USER.sub("://", self.address)

    # ------------------------------------------------------------------- to plan and to sum up

    def fetch(self, names: Sequence[str]) -> Path:
        """Copy the cohort's own files and the records of cases to a new folder here; return it."""
        folder = self.scratch / f"seen_{len(self._fetched)}"
        (folder / OWN).mkdir(parents=True)
        self._fetched.append(folder)
        with self._said("read"):
            self._sizes.clear()
            self._sizes.update(self._sizes_below(""))
            wanted = [f"{OWN}/{SETTINGS}", f"{OWN}/{CURRENT}"]
            for name in names:
                wanted += [f"{name}/{NAME}", _relative(failure_file(folder, name), folder)]
            self._get([name for name in wanted if name in self._sizes], folder)
        return folder

    def is_whole(self, name: str, record: Record, files: Iterable[str]) -> bool:
        """Tell whether files of a case were there, when fetched, with the sizes of its record."""
        return all(
            file in record.files and self._sizes.get(f"{name}/{file}") == record.files[file].bytes
            for file in files
        )

    def keep_settings(self, folder: Path) -> None:
        """Copy the settings of the cohort there, where they are new."""
        if f"{OWN}/{SETTINGS}" not in self._sizes:
            with self._said("written"):
                self._put([f"{OWN}/{SETTINGS}"], folder)

    def keep_all(self, folder: Path) -> None:
        """Copy there what belongs to no single case: tables, page, and which cases are done."""
        own = [folder / OWN / CURRENT, *folder.iterdir()]
        with self._said("written"):
            self._put([_relative(file, folder) for file in own if file.is_file()], folder)

    def shown(self, file: Path) -> Place:
        """Return where a file lies for the user."""
        found: Place = self.place / _relative(file, self._fetched[-1])
        return found

    # -------------------------------------------------------------------------------- one case

    def keep_notes(self, name: str, folder: Path) -> None:
        """Copy the log of a case there, and why it failed; where it did not, that goes there."""
        log, failure = log_file(folder, name), failure_file(folder, name)
        with self._said("written"):
            self._put([_relative(file, folder) for file in (log, failure) if file.exists()], folder)
            if not failure.exists():
                self._remove([_relative(failure, folder)])

    def made(self, name: str, make: Callable[[Path], str | None]) -> str | None:
        """Let a case be made here, and copy it there.

        Args:
            make: makes the case in a folder like that of a cohort; returns why it failed.
        """
        folder = self.scratch / "made"
        (folder / OWN).mkdir(parents=True)
        # If nothing can be written there, that is found out before hours of work.
        log_file(folder, name).write_text("begun\n", encoding="utf-8")
        with self._said("written"):
            self._put([_relative(log_file(folder, name), folder)], folder)
        with self._said("read"):
            for file in self._sizes_below(name):
                there, here = self._path(f"{name}/{file}"), folder / name / file
                here.parent.mkdir(parents=True, exist_ok=True)
                self.place.fs.get_file(there, str(here))
        before, old = _snapshot(folder / name), record_of(folder / name)
        error = make(folder)
        if _snapshot(folder / name) != before:
            with self._said("written"):
                self._keep(name, folder, before, old)
        self._name_it(log_file(folder, name), folder)
        self._name_it(failure_file(folder, name), folder)
        self.keep_notes(name, folder)
        return None if error is None else error.replace(str(folder), self.name)

    def _keep(self, name: str, folder: Path, before: Snapshot, old: Record | None) -> None:
        """Copy a case there in such an order that a record there never promises too much."""
        now, new = _snapshot(folder / name), record_of(folder / name)
        changed = [file for file, about in now.items() if about != before.get(file)]
        gone = [file for file in before if file not in now]
        unfinished = _unfinished(old, new)
        if unfinished is not None:
            # What is copied or removed from here on is listed in a run that has to be done again.
            file = write_json(folder / "unfinished.json", unfinished.model_dump())
            self.place.fs.put_file(str(file), self._path(f"{name}/{NAME}"))
            file.unlink()
        self._put([f"{name}/{file}" for file in changed if file != NAME], folder)
        self._remove([f"{name}/{file}" for file in gone if file != NAME])
        if new is None:
            self._remove([f"{name}/{NAME}"])
        else:
            self._put([f"{name}/{NAME}"], folder)

    def _name_it(self, file: Path, folder: Path) -> None:
        """Let a note name the address, and not the folder of this machine."""
        if file.exists():
            text = file.read_text(encoding="utf-8").replace(str(folder), self.name)
            file.write_text(text, encoding="utf-8")

    # ------------------------------------------------------------------------------- the store

    def _sizes_below(self, folder: str) -> dict[str, int]:
        """Return the names of files below a folder there, relative to it -> sizes in bytes."""
        self.place.fs.invalidate_cache()  # others write there, too
        root = self._path(folder)
        if not self.place.fs.exists(root):
            return {}
        found = self.place.fs.find(root, detail=True)
        names = {path.removeprefix(root).lstrip("/"): about for path, about in found.items()}
        # Anybody may have written there: a name must not lead out of the folder.
        legal = {name: about for name, about in names.items() if _is_safe(name)}
        return {name: int(about.get("size") or 0) for name, about in legal.items()}

    def _get(self, names: Sequence[str], folder: Path) -> None:
        """Copy files here; what has gone meanwhile is left out."""
        paths = {self._path(name): folder / name for name in names}
        found = self.place.fs.cat(list(paths), on_error="return") if paths else {}
        for path, content in found.items():
            if isinstance(content, FileNotFoundError):
                continue
            if isinstance(content, Exception):
                raise content
            paths[path].parent.mkdir(parents=True, exist_ok=True)
            paths[path].write_bytes(content)

    def _put(self, names: Sequence[str], folder: Path) -> None:
        fs = self.place.fs
        for parent in {str(PurePosixPath(self._path(name)).parent) for name in names}:
            # In a store of objects folders need not be made, and a bucket must not be.
            if not self.place.drive:
                fs.makedirs(parent, exist_ok=True)
        if names:
            fs.put([str(folder / name) for name in names], [self._path(name) for name in names])

    def _remove(self, names: Iterable[str]) -> None:
        for path in map(self._path, names):
            if self.place.fs.exists(path):
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
            why = str(error) or type(error).__name__
            told = OutputError(f"{self.name} cannot be {what}: {_USER.sub('://', why)}")
            told.errno = getattr(error, "errno", None)
            raise told from error


def _unfinished(old: Record | None, new: Record | None) -> Record | None:
    """Return a record that lists the files of both, as those of runs that have to be done again.

    Runs that are the same in both stay as they are. Returns None where neither has a run.
    """
    if old is None or new is None:
        one = new if old is None else old
        runs = [] if one is None else [run.model_copy(update={"key": ""}) for run in one.runs]
        nothing = {"key": "", "runs": runs, "explanations": []}
        return None if one is None else one.model_copy(update=nothing)
    kept = [run for run in new.runs if run in old.runs]
    changed = [run for run in new.runs if run not in kept]
    before = [run for run in old.runs if run not in kept]
    # The next run of this job replaces all files of the one that counts as its last.
    last = (changed or before or kept)[-1]
    files = list(dict.fromkeys(name for run in (*before, *changed) for name in run.files))
    undone = [last.model_copy(update={"key": "", "files": files})] if last not in kept else []
    keys = {run.key for run in kept}
    return new.model_copy(
        update={
            "key": "",
            "runs": [*kept, *undone],
            "files": {**old.files, **new.files},
            "explanations": [entry for entry in new.explanations if entry.run in keys],
        }
    )


def _snapshot(folder: Path) -> Snapshot:
    """Return what tells whether a file of a case is another one; hidden files are no results."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = _relative(file, folder)
        if file.is_file() and _is_safe(name):
            about = file.stat()
            found[name] = (about.st_size, about.st_mtime_ns, about.st_ino)
    return found


def _is_safe(name: str) -> bool:
    """Tell whether a name stays in its folder, and is not hidden."""
    return all(part and part[0] != "." and "\\" not in part for part in name.split("/"))


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()
