"""Where a cohort's results lie: in a folder of this machine, or at an address such as s3://bucket/a.

At an address a case is made on the machine that explains it. What its folder holds there is
fetched, the case is explained as in any folder, and what has changed is copied back. Before the
first file there is replaced, a record says that the case has to be done again; `case.json` comes
last. So a run that is killed leaves no case that counts as done too early, and no file that no
record lists.

To plan and to sum up, this machine has a folder with the records of all cases; of their other files
only the sizes are asked for.

Nothing at an address can be locked. Two runs at once may explain a case twice; one that sees that
the folder has changed leaves it as it is. Where both look at the same moment, both write the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Event, Thread

import psutil

from seg3dcam.cohort.plan import OWN, SETTINGS, log_file, note_file
from seg3dcam.errors import ConfigError, OutputError, some
from seg3dcam.files import (
    as_path,
    check_writable,
    in_scratch,
    scratch_folder,
    write_bytes,
    write_json,
    write_text,
)
from seg3dcam.files.remote import Place, is_address, is_url, place
from seg3dcam.files.store import Store, is_plain
from seg3dcam.job.folder import OccupiedError
from seg3dcam.job.record import NAME, Record, damaged, files_of, record_of

#: After so many seconds a store is given up that does not answer when a run is interrupted.
PATIENCE = 60

#: What tells whether a file of this machine is another one: its size, time and number.
About = tuple[int, int, int]


@contextmanager
def results_at(out: str | Place) -> Iterator[Here | Elsewhere]:
    """Give the results of a cohort, wherever they lie.

    Args:
        out: a path, or an address; also as the place of earlier results.

    Raises:
        ConfigError: results cannot go to such an address.
        OutputError: nothing can be written there.
    """
    if not isinstance(out, str | Path) and hasattr(out, "protocol"):
        if out.storage_options:
            raise ConfigError(
                f"out {out}: options of a store are not passed on to workers; give them in its own "
                "way, such as by environment variables"
            )
        out = str(out)
    if isinstance(out, str) and is_url(out):
        store = Store(out)
        with scratch_folder() as scratch:
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

    def keep(self) -> None:
        """Keep what belongs to no single case and has changed in `folder`."""

    def writing(self) -> AbstractContextManager[None]:
        """Let an error of writing in `folder` say what to do."""
        return nullcontext()

    def in_time(self, work: Callable[[], object]) -> None:
        """Do something; where it may take for ever, give it up after a while."""
        work()


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
    _given_up: Event = field(default_factory=Event)

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
        self._check_not_given_up()
        before = dict(self._there)
        self._there.clear()
        self._there.update(self.store.files())
        new = [name for name in wanted if self._there.get(name) not in (None, before.get(name))]
        contents = self.store.contents(new)
        self._check_not_given_up()
        changed = False
        for name in wanted:
            here = self.folder / name
            if name not in self._there:
                changed |= here.exists()
                here.unlink(missing_ok=True)
            elif name in contents and not (here.exists() and here.read_bytes() == contents[name]):
                changed = True
                with self.writing():  # many files, which nobody else reads: not one by one to disk
                    here.parent.mkdir(parents=True, exist_ok=True)
                    here.write_bytes(contents[name])
                self._kept[name] = _about(here)
        return changed

    def is_whole(self, name: str, record: Record, files: Iterable[str]) -> bool:
        sizes = {file: self._there.get(f"{name}/{file}", (None, ""))[0] for file in files}
        return all(f in record.files and size == record.files[f].bytes for f, size in sizes.items())

    def keep(self) -> None:
        places = [place for place in (self.folder / OWN, self.folder) if place.is_dir()]
        files = [file for place in places for file in place.iterdir() if file.is_file()]
        now = {_relative(file, self.folder): _about(file) for file in files}
        new = [name for name in now if is_plain(name) and now[name] != self._kept.get(name)]
        self._check_not_given_up()
        self.store.put({name: self.folder / name for name in new})
        self._kept.update(now)

    def writing(self) -> AbstractContextManager[None]:
        return in_scratch(self.folder)

    def in_time(self, work: Callable[[], object]) -> None:
        ended: Future[None] = Future()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                ended.set_exception(error)
            else:
                ended.set_result(None)

        Thread(target=run, daemon=True).start()
        if not wait([ended], PATIENCE).done:
            self._given_up.set()
            self._check_not_given_up()
        ended.result()

    def _check_not_given_up(self) -> None:
        """Raise OutputError where nobody waits any more: nothing is written behind a run."""
        if self._given_up.is_set():
            raise OutputError(f"{self.store.address} does not answer")


# ------------------------------------------------------------------------- a case at an address


def made_at(store: Store, name: str, make: Callable[[Path], str | None]) -> str | None:
    """Let a case be made on this machine, and copy it to the store of its cohort.

    Args:
        name: of the case.
        make: makes the case in a folder like that of a cohort; returns why it failed.

    Returns:
        why it failed.

    Raises:
        OccupiedError: another run has changed the case meanwhile.
        OutputError: the store, or this machine's temporary folder, cannot be read or written.
    """
    with scratch_folder() as folder, in_scratch(folder):
        log, note = log_file(folder, name), note_file(folder, name)
        # If nothing can be written there, that is found out before hours of work.
        write_text(log, "begun\n")
        _keep_notes(store, folder, log)
        for content in store.contents([_relative(note, folder)]).values():
            write_bytes(note, content)
        try:
            case = _Fetched(store, name, folder / name)
            error = make(folder)
            case.copy_back()
        except OccupiedError:
            raise  # the log is that of the other run
        except OutputError as raised:
            write_text(log, f"{log.read_text(encoding='utf-8')}{raised}\n")
            with suppress(OutputError):
                _keep_notes(store, folder, log)
            raise
        with suppress(OutputError) if error is None else nullcontext():
            # A case that is done is so with its notes or without.
            _keep_notes(store, folder, log, note)
        return None if error is None else error.replace(str(folder), store.address)


def _keep_notes(store: Store, folder: Path, *notes: Path) -> None:
    """Copy notes on a case there, with the address in place of the folder of this machine."""
    there = [note for note in notes if note.exists()]
    for note in there:
        text = note.read_text(encoding="utf-8", errors="replace")
        write_text(note, text.replace(str(folder), store.address))
    store.put({_relative(note, folder): note for note in there})


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
        # In a store a name may be a file and a folder; seg3dcam writes no such names.
        parents = {str(parent) for file in self._there for parent in PurePosixPath(file).parents}
        wanted = [file for file in self._there if file not in parents]
        store.get({f"{name}/{file}": folder / file for file in wanted})
        self._before, self._old = _snapshot(folder), record_of(folder)
        self._damaged_before = self._damaged(self._old)

    def copy_back(self) -> None:
        """Copy what has changed there, in such an order that a record never promises too much."""
        now, new = _snapshot(self._folder), record_of(self._folder)
        if now == self._before:
            return
        ours = files_of(self._old) | files_of(new) | {NAME}
        if lost := self._damaged(new) - self._damaged_before:
            raise OutputError(
                f"{some(sorted(lost), 3)} went from the folder for temporary files while the run "
                "went on: something else deletes there. Run it again, or let TMPDIR name another "
                "folder"
            )
        there = self._store.files(self._name)
        if any(there.get(file) != self._there.get(file) for file in ours):
            raise OccupiedError(f"{self._store.address}/{self._name} has changed meanwhile")
        changed = {f for f in files_of(new) if f in now and now[f] != self._before.get(f)}
        gone = (files_of(self._old) - files_of(new)) & there.keys()
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

    def _damaged(self, record: Record | None) -> set[str]:
        return set() if record is None else set(damaged(self._folder, record, files_of(record)))

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
