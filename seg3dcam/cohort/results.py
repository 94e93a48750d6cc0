"""Where a cohort's results lie: in a folder of this machine, or at an address such as s3://bucket/a.

At an address a case is made on the machine that explains it. What its folder holds there is
fetched, the case is explained as in any folder, and what has changed is copied back. Before the
first file there is replaced, a record says that the case has to be done again; `case.json` comes
last. So a run that is killed leaves no case that counts as done too early, and no file that no
record lists.

To plan and to sum up, this machine has a folder with the records of all cases; of their other files
only the sizes are asked for.

Nothing at an address can be locked. Two runs at once may explain a case twice; the second one sees
that the folder has changed, and leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from seg3dcam.cohort.plan import OWN, SETTINGS, log_file, note_file
from seg3dcam.errors import OutputError
from seg3dcam.files import as_path, check_writable, scratch_folder, write_json, write_text
from seg3dcam.files.remote import Place, is_address, is_url, place
from seg3dcam.files.store import Store, is_plain
from seg3dcam.job.record import NAME, Record, damaged, files_of, record_of

#: What tells whether a file of this machine is another one: its size, time and number.
About = tuple[int, int, int]


@contextmanager
def results_at(out: str | Path) -> Iterator[Here | Elsewhere]:
    """Give the results of a cohort, wherever they lie.

    Raises:
        ConfigError: results cannot go to such an address.
        OutputError: nothing can be written there.
    """
    if isinstance(out, str) and is_url(out):
        store = Store(out)
        with scratch_folder() as scratch:
            (scratch / OWN).mkdir()
            yield Elsewhere(store, scratch)
    else:
        folder = place(out) if isinstance(out, str) and is_address(out) else as_path(out)
        yield Here(check_writable(str(folder)))


@dataclass(frozen=True)
class Here:
    """Results in a folder of this machine.

    Attributes:
        folder: has a folder for every case.
    """

    folder: Path

    @property
    def place(self) -> Place:
        """The folder as the user knows it."""
        return self.folder

    @property
    def for_workers(self) -> Path | str:
        """What `results_at` needs in another process."""
        return self.folder

    @property
    def free(self) -> int | None:
        """How many bytes are free there; None where that is not known."""
        return int(psutil.disk_usage(str(self.folder)).free)

    def refresh(self, names: Sequence[str]) -> bool:
        """Let `folder` have the records of cases as they are now; tell whether any has changed."""
        return False

    def is_whole(self, name: str, record: Record, files: Iterable[str]) -> bool:
        """Tell whether files of a case are there with the sizes that its record says."""
        return not damaged(self.folder / name, record, files)

    def made(self, name: str, make: Callable[[Path], str | None]) -> str | None:
        """Let a case be made; return why it failed.

        Args:
            make: makes the case in a folder like that of a cohort; returns why it failed.
        """
        return make(self.folder)

    def keep(self) -> None:
        """Keep what belongs to no single case and has changed in `folder`."""


@dataclass(frozen=True)
class Elsewhere:
    """Results at an address; the properties and methods are those of `Here`.

    Attributes:
        store: the folder there.
        folder: a folder of this machine that goes at the end, with the cohort's own files and the
            records of the cases.

    All methods raise OutputError where the store cannot be read or written.
    """

    store: Store
    folder: Path
    # Of files there: name -> size and mark. Of files in `folder`: what they were when last copied.
    _there: dict[str, tuple[int, str]] = field(default_factory=dict)
    _kept: dict[str, About] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        found: Place = self.store.place
        return found

    @property
    def for_workers(self) -> Path | str:
        return self.store.address

    @property
    def free(self) -> int | None:
        return None

    def refresh(self, names: Sequence[str]) -> bool:
        wanted = [f"{OWN}/{SETTINGS}"]
        for name in names:
            wanted += [f"{name}/{NAME}", _relative(note_file(self.folder, name), self.folder)]
        before = dict(self._there)
        self._there.clear()
        self._there.update(self.store.files())
        new = [name for name in wanted if self._there.get(name) not in (None, before.get(name))]
        contents = self.store.contents(new)
        changed = False
        for name in wanted:
            here = self.folder / name
            if name not in self._there:
                changed |= here.exists()
                here.unlink(missing_ok=True)
            elif name in contents and not (here.exists() and here.read_bytes() == contents[name]):
                changed = True
                here.parent.mkdir(parents=True, exist_ok=True)
                here.write_bytes(contents[name])
                self._kept[name] = _about(here)
        return changed

    def is_whole(self, name: str, record: Record, files: Iterable[str]) -> bool:
        sizes = {file: self._there.get(f"{name}/{file}", (None, ""))[0] for file in files}
        return all(f in record.files and size == record.files[f].bytes for f, size in sizes.items())

    def made(self, name: str, make: Callable[[Path], str | None]) -> str | None:
        with scratch_folder() as folder:
            notes = [file(folder, name) for file in (log_file, note_file)]
            names = {_relative(note, folder): note for note in notes}
            # If nothing can be written there, that is found out before hours of work.
            write_text(notes[0], "begun\n")
            self._keep_notes(names)
            for name_there, content in self.store.contents(list(names)).items():
                write_text(names[name_there], content.decode("utf-8", "replace"))
            case = _Fetched(self.store, name, folder / name)
            error = make(folder)
            case.copy_back()
            for note in filter(Path.exists, notes):
                # The user knows the address, and not the folder of this machine.
                text = note.read_text(encoding="utf-8").replace(str(folder), self.store.name)
                write_text(note, text)
            try:
                self._keep_notes(names)
            except OutputError:
                if error is not None:
                    raise
                # The case is done, with its notes or without.
            return None if error is None else error.replace(str(folder), self.store.name)

    def _keep_notes(self, notes: Mapping[str, Path]) -> None:
        """Copy notes on a case there: name -> file here, which may be missing."""
        self.store.put({name: note for name, note in notes.items() if note.exists()})

    def keep(self) -> None:
        own = [file for place in (self.folder / OWN, self.folder) for file in place.iterdir()]
        now = {_relative(file, self.folder): _about(file) for file in own if file.is_file()}
        new = [name for name in now if is_plain(name) and now[name] != self._kept.get(name)]
        self.store.put({name: self.folder / name for name in new})
        self._kept.update(now)


class _Fetched:
    """A case of an address, in a folder of this machine, in which it is made anew.

    Args:
        store: the cohort's.
        name: of the case.
        folder: gets all files of the case.
    """

    def __init__(self, store: Store, name: str, folder: Path) -> None:
        self._store, self._name, self._folder = store, name, folder
        self._there = store.files(name)
        store.get({f"{name}/{file}": folder / file for file in self._there})
        self._before, self._old = _snapshot(folder), record_of(folder)

    def copy_back(self) -> None:
        """Copy what has changed there, in such an order that a record never promises too much."""
        now, new = _snapshot(self._folder), record_of(self._folder)
        if now == self._before:
            return
        if new is not None and damaged(self._folder, new, files_of(new)):
            raise OutputError(
                f"files of {self._folder} went while the run went on: something else deletes "
                "there. Run it again, or let TMPDIR name another folder"
            )
        changed = {file for file in files_of(new) if now[file] != self._before.get(file)}
        gone = (files_of(self._old) - files_of(new)) & self._there.keys()
        if self._store.files(self._name) != self._there:
            raise OutputError(
                f"{self._store.name}/{self._name} has changed meanwhile: another run is at work "
                "there, and what it wrote stays"
            )
        if changed or gone:
            between = _between(self._old, new, changed | gone)
            content = write_json(self._folder.parent / "between.json", between.model_dump())
            self._put({NAME: content})
        self._put({file: self._folder / file for file in sorted(changed)})
        self._remove(*sorted(gone))
        if new is None:
            self._remove(NAME)
        else:
            self._put({NAME: self._folder / NAME})

    def _put(self, files: Mapping[str, Path]) -> None:
        self._store.put({f"{self._name}/{file}": path for file, path in files.items()})

    def _remove(self, *files: str) -> None:
        self._store.remove(f"{self._name}/{file}" for file in files)


def _between(old: Record | None, new: Record | None, touched: Set[str]) -> Record:
    """Return the record for the time in which files of a case are replaced or removed.

    The runs of these files count as one that has to be done again, and that lists them all. Others
    stay as they are.
    """
    before, after = ([] if record is None else record.runs for record in (old, new))
    kept = [run for run in after if run in before and touched.isdisjoint(run.files)]
    others = [run for run in (*before, *after) if run not in kept]
    files = dict.fromkeys(name for run in others for name in run.files)
    undone = others[-1].model_copy(update={"key": "", "files": list(files)})
    keys = {run.key for run in kept}
    records = [record for record in (old, new) if record is not None]
    return records[-1].model_copy(
        update={
            "key": "",
            "runs": [*kept, undone],
            "files": {name: file for record in records for name, file in record.files.items()},
            "explanations": [entry for entry in records[-1].explanations if entry.run in keys],
        }
    )


def _snapshot(folder: Path) -> dict[str, About]:
    """Return all files of a case, which has no folder where nothing is there yet."""
    files = {_relative(file, folder): file for file in folder.rglob("*") if file.is_file()}
    return {name: _about(file) for name, file in files.items() if is_plain(name)}


def _about(file: Path) -> About:
    about = file.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()
