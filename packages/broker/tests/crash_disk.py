"""A disk in memory that can lose power, fail, fill up, lie and be slow, under the real store.

    disk = CrashDisk()
    with disk.mounted():                        # what `Database` opens now is on this disk
        store = open_store(path, clock)
    ...
    disk.power_cut(random.Random(seed))         # what was not synced is lost, in part, or torn
    abandon(store.database)                     # the dead process: its file descriptors go
    with disk.mounted():
        store = open_store(path, clock)         # the real code finds what a real disk would hold

It is an SQLite VFS. Only the database, its WAL and its journals are on it; the lock file beside them is a
real one, so ``path`` lies in a real folder. Use one disk for each broker.

- ``power_cut(rng, how)``: the content becomes one that a disk may hold after a power cut, see ``HOWS``.
  ``kill()``: the process died, the machine did not: all that was written stays.
  Both make every open file dead: its calls fail with an I/O error.
- ``before``: called with a ``Call`` before every I/O call. It may raise ``io_error(call)`` or ``disk_full()``
  (see ``Failing``), sleep (a slow disk), or crash the disk.
  A sync that fails also forgets what it should have written, as Linux does: see ``Forget``.
- ``capacity``: bytes that fit, of all files together; a write beyond it is cut there and fails as full.
- ``lies``: a sync reports success and makes nothing durable.
- ``CrashDisk(journal=True)`` keeps every change, and ``mark(thing)`` puts a word of the test's between
  them. ``crash_points(disk.journal)`` then gives the disk at every moment of that history, with what was
  marked until then, so that one run of a workload gives a crash after each of its writes and syncs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import apsw

from penstock_broker.store import database as database_module
from penstock_broker.store.database import Database

SECTOR_BYTES = 512
# What becomes of the writes that were not synced: none is there, all are, those up to some moment, any
# subset of them, or any subset in which some are there only in part.
HOWS = ("drop", "keep", "prefix", "subset", "torn")

_names = itertools.count()


class Call(NamedTuple):
    """An I/O call that is about to happen. ``kind``: open, read, write, sync, truncate, size, delete."""

    number: int
    kind: str
    path: str


class Write(NamedTuple):
    inode: int
    offset: int
    data: bytes


class Truncate(NamedTuple):
    inode: int
    size: int


class Sync(NamedTuple):
    inode: int


class Create(NamedTuple):
    inode: int
    path: str


class Delete(NamedTuple):
    path: str
    durable: bool


class Mark(NamedTuple):
    thing: object


class Forget(NamedTuple):
    """A sync failed, and the kernel takes what it could not write for written: programs see it, as long as
    the machine runs, but it is not on the disk and will not be."""

    inode: int


Change = Write | Truncate | Sync | Create | Delete | Forget
Entry = Change | Mark


def io_error(call: Call) -> Exception:
    """What SQLite's own VFS reports when the disk fails in such a call."""
    codes = {
        "open": apsw.SQLITE_CANTOPEN,
        "read": apsw.SQLITE_IOERR_READ,
        "write": apsw.SQLITE_IOERR_WRITE,
        "sync": apsw.SQLITE_IOERR_FSYNC,
        "truncate": apsw.SQLITE_IOERR_TRUNCATE,
        "size": apsw.SQLITE_IOERR_FSTAT,
        "delete": apsw.SQLITE_IOERR_DELETE,
    }
    return apsw.exception_for(codes[call.kind])


def disk_full() -> Exception:
    return apsw.exception_for(apsw.SQLITE_FULL)


class Failing:
    """For ``CrashDisk.before``: the ``at``-th call of these kinds fails, and ``times`` in all from it on
    (None: for good). ``failed``: how many did."""

    def __init__(
        self,
        kinds: Iterable[str],
        at: int,
        error: Callable[[Call], Exception] = io_error,
        times: int | None = 1,
    ) -> None:
        self._kinds = frozenset(kinds)
        self._wait = at
        self._error = error
        self._times = times
        self.failed = 0

    def __call__(self, call: Call) -> None:
        if call.kind not in self._kinds:
            return
        self._wait -= 1
        if self._wait < 0 and (self._times is None or self.failed < self._times):
            self.failed += 1
            raise self._error(call)


@dataclass
class Inode:
    """A file: as programs see it, as it surely is on the disk, and what lies between."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Write | Truncate] = field(default_factory=list)


class Contents:
    """What a disk holds, and may hold after a crash."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.inodes: dict[int, Inode] = {}
        self.names: dict[str, int] = {}
        self.durable_names: dict[str, int] = {}
        for number, (path, data) in enumerate((files or {}).items(), 1):
            self.inodes[number] = Inode(bytearray(data), bytearray(data))
            self.names[path] = self.durable_names[path] = number

    def apply(self, change: Change) -> None:
        match change:
            case Write(inode) | Truncate(inode):
                _carry_out(self.inodes[inode].data, change)
                self.inodes[inode].pending.append(change)
            case Sync(inode):
                file = self.inodes[inode]
                for waiting in file.pending:
                    _carry_out(file.durable, waiting)
                file.pending.clear()
                if inode not in self.durable_names.values():
                    # SQLite's own VFS syncs the folder with the first sync of a file it made.
                    self.durable_names = dict(self.names)
            case Forget(inode):
                self.inodes[inode].pending.clear()
            case Create(inode, path):
                self.inodes[inode] = Inode()
                self.names[path] = inode
            case Delete(path, durable):
                self.names.pop(path, None)
                if durable:
                    self.durable_names.pop(path, None)

    def image(self, rng: random.Random, how: str) -> dict[str, bytes]:
        """The files after a power cut now. ``how``: one of ``HOWS``."""
        files = {}
        for path in {**self.names, **self.durable_names}:
            now, before = self.names.get(path), self.durable_names.get(path)
            inode = {"keep": now, "drop": before}.get(how, rng.choice((now, before)))
            if inode is not None:
                files[path] = bytes(_after_crash(self.inodes[inode], rng, how))
        return files

    def files(self) -> dict[str, bytes]:
        """The files as programs see them."""
        return {path: bytes(self.inodes[inode].data) for path, inode in self.names.items()}

    def size(self) -> int:
        return sum(len(self.inodes[inode].data) for inode in self.names.values())


def _carry_out(data: bytearray, change: Write | Truncate) -> None:
    if isinstance(change, Truncate):
        del data[change.size :]
        return
    _, offset, written = change
    if offset > len(data):
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(written)] = written


def _after_crash(file: Inode, rng: random.Random, how: str) -> bytearray:
    if how == "keep":
        return file.data
    data = bytearray(file.durable)
    if how == "drop":
        return data
    kept = file.pending
    if how == "prefix":
        kept = kept[: rng.randint(0, len(kept))]
    else:
        share = rng.choice((0.1, 0.5, 0.9, 0.98))
        kept = [change for change in kept if rng.random() < share]
    for change in kept:
        if how == "torn" and isinstance(change, Write) and rng.random() < 0.3:
            for part in _torn(change, rng):
                _carry_out(data, part)
        else:
            _carry_out(data, change)
    return data


def _torn(write: Write, rng: random.Random) -> list[Write]:
    """Some of its sectors, or its beginning up to some byte, or its end."""
    inode, offset, data = write
    cut = rng.randint(0, len(data))
    match rng.randrange(3):
        case 0:
            return [Write(inode, offset, data[:cut])]
        case 1:
            return [Write(inode, offset + cut, data[cut:])]
        case _:
            sectors = range(0, len(data), SECTOR_BYTES)
            return [
                Write(inode, offset + at, data[at : at + SECTOR_BYTES])
                for at in sectors
                if rng.random() < 0.5
            ]


class CrashPoint(NamedTuple):
    """A moment of a disk's history. ``change``: the last one before it; ``marks``: what was marked so far."""

    number: int
    change: Change
    contents: Contents
    marks: list[object]


def crash_points(journal: Iterable[Entry], files: Mapping[str, bytes] | None = None) -> Iterator[CrashPoint]:
    """The disk after each change; the contents and marks are those of the moment, until the next is taken.
    ``files``: what was on it from the beginning."""
    contents, marks = Contents(files), []
    number = 0
    for entry in journal:
        if isinstance(entry, Mark):
            marks.append(entry.thing)
            continue
        contents.apply(entry)
        number += 1
        yield CrashPoint(number, entry, contents, marks)


class CrashDisk(apsw.VFS):
    """See the head of this module. ``files``: what is on it from the beginning."""

    def __init__(self, files: Mapping[str, bytes] | None = None, *, journal: bool = False) -> None:
        self.name = f"crash-disk-{next(_names)}"
        self.contents = Contents(files)
        self.before: Callable[[Call], None] = lambda call: None
        self.capacity: int | None = None
        self.lies = False
        self.journal: list[Entry] = []
        self.calls = 0
        # Files opened before a crash belong to a dead process.
        self.life = 0
        self._keeps_journal = journal
        super().__init__(self.name, "")

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Databases opened meanwhile are on this disk."""
        usual, database_module.VFS = database_module.VFS, self.name
        try:
            yield
        finally:
            database_module.VFS = usual

    def mark(self, thing: object) -> None:
        if self._keeps_journal:
            self.journal.append(Mark(thing))

    def kill(self) -> None:
        """The process dies; what it wrote stays, as durable as it was."""
        self.life += 1

    def power_cut(self, rng: random.Random, how: str = "torn") -> None:
        """The machine dies."""
        self.life += 1
        self.contents = Contents(self.contents.image(rng, how))

    def call(self, kind: str, path: str) -> None:
        """About to happen."""
        self.calls += 1
        self.before(Call(self.calls, kind, path))

    def change(self, change: Change) -> None:
        """Has happened."""
        self.contents.apply(change)
        if self._keeps_journal:
            self.journal.append(change)

    # -- what SQLite calls

    def xOpen(self, name, flags):  # noqa: N802 - the names are SQLite's
        path = name.filename() if isinstance(name, apsw.URIFilename) else name or ""
        self.call("open", path)
        inode = self.contents.names.get(path)
        if inode is None:
            if not flags[0] & apsw.SQLITE_OPEN_CREATE:
                raise apsw.exception_for(apsw.SQLITE_CANTOPEN)
            inode = max(self.contents.inodes, default=0) + 1
            self.change(Create(inode, path))
        flags[1] = flags[0]
        return OpenFile(self, path, inode)

    def xDelete(self, filename, syncdir):  # noqa: N802
        self.call("delete", filename)
        if filename not in self.contents.names:
            raise apsw.exception_for(apsw.SQLITE_IOERR_DELETE_NOENT)
        self.change(Delete(filename, bool(syncdir) and not self.lies))

    def xAccess(self, pathname, flags):  # noqa: N802
        return pathname in self.contents.names

    def xFullPathname(self, name):  # noqa: N802
        return name


class OpenFile:
    """A file that SQLite has open."""

    def __init__(self, disk: CrashDisk, path: str, inode: int) -> None:
        self._disk = disk
        self._path = path
        self._inode = inode
        self._life = disk.life

    def _call(self, kind: str) -> bytearray:
        if self._life != self._disk.life:
            raise apsw.exception_for(apsw.SQLITE_IOERR)
        self._disk.call(kind, self._path)
        # It may have crashed just now.
        if self._life != self._disk.life:
            raise apsw.exception_for(apsw.SQLITE_IOERR)
        return self._disk.contents.inodes[self._inode].data

    def xRead(self, amount, offset):  # noqa: N802
        return bytes(self._call("read")[offset : offset + amount])

    def xWrite(self, data, offset):  # noqa: N802
        content, disk = self._call("write"), self._disk
        grows = max(0, offset + len(data) - len(content))
        room = grows if disk.capacity is None else max(0, disk.capacity - disk.contents.size())
        written = bytes(data)[: len(data) - max(0, grows - room)]
        if written:
            disk.change(Write(self._inode, offset, written))
        if len(written) < len(data):
            raise disk_full()

    def xTruncate(self, newsize):  # noqa: N802
        self._call("truncate")
        self._disk.change(Truncate(self._inode, newsize))

    def xSync(self, flags):  # noqa: N802
        try:
            self._call("sync")
        except apsw.IOError:
            if self._life == self._disk.life:
                self._disk.change(Forget(self._inode))
            raise
        if not self._disk.lies:
            self._disk.change(Sync(self._inode))

    def xFileSize(self):  # noqa: N802
        return len(self._call("size"))

    def xLock(self, level):  # noqa: N802
        pass

    def xUnlock(self, level):  # noqa: N802
        pass

    def xCheckReservedLock(self):  # noqa: N802
        return False

    def xFileControl(self, op, pointer):  # noqa: N802
        return False

    def xSectorSize(self):  # noqa: N802
        return 4096

    def xDeviceCharacteristics(self):  # noqa: N802
        # As on Linux: a write changes no byte beside those it names, also when the power fails.
        return apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE

    def xClose(self):  # noqa: N802
        pass


def abandon(database: Database) -> None:
    """What the kernel does for a process that died: its connection and its lock go, nothing is written.

    After ``power_cut`` or ``kill``; on a disk that lives it would copy the WAL back.
    """
    with suppress(apsw.Error):
        database.connection.close(True)
    database.release_lock()
