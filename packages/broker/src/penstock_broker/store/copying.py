"""A copy of the database, made in steps by SQLite between two ticks.

It copies over the connection that writes: a page that is changed after it was copied, SQLite changes in the
copy, too. So the copy is the database as of the commit before its last step.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import apsw

STEP_PAGES = 256
_BACKUP = re.compile(r"\.backup-\d+")
_OTHERS = re.compile(r"-wal|-shm|-journal|\.(lock|reserve|suspect)")


class CannotCopy(Exception):
    """It says why, for whoever asked."""


def backup_of(database: Path, number: int) -> Path:
    """The copy with this number that a broker makes."""
    return database.with_name(f"{database.name}.backup-{number}")


def is_own(database: Path, path: Path) -> bool:
    """Whether a broker would take ``path`` for a file of its own."""
    if path.parent.resolve() != database.parent.resolve() or not path.name.startswith(database.name):
        return False
    rest = path.name.removeprefix(database.name)
    return bool(_BACKUP.fullmatch(rest) or _OTHERS.fullmatch(rest))


def forget_backups(database: Path) -> None:
    """Delete what nobody has fetched, or a broker that was killed has not finished."""
    for path in database.parent.iterdir():
        if path.name.startswith(database.name) and _BACKUP.fullmatch(path.name.removeprefix(database.name)):
            with suppress(OSError):
                path.unlink()


def size_of(connection: apsw.Connection) -> int:
    """Of the database, what is in its WAL included."""
    return int(connection.pragma("page_count")) * int(connection.pragma("page_size"))


def require_room(folder: Path, needed: int) -> None:
    """Raises CannotCopy."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < needed:
        raise CannotCopy(f"a backup needs {needed:,} bytes in {folder}, and {free:,} are free")


class Copy:
    """Made at ``path``, where nothing may be; used by the thread that uses ``source``."""

    def __init__(self, source: apsw.Connection, path: Path) -> None:
        self.path = path
        try:
            # SQLite opens the file once more: closing this one earlier would drop its locks.
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CannotCopy(f"cannot write {path}: {error.strerror}") from None
        try:
            self._to = apsw.Connection(str(path))
            # What is not finished is deleted: it needs no journal of its own.
            self._to.pragma("journal_mode", "OFF")
            self._to.pragma("synchronous", "OFF")
            self._backup = self._to.backup("main", source, "main")
        except apsw.Error as error:
            os.close(self._file)
            path.unlink()
            raise CannotCopy(f"cannot write {path}: {error}") from None

    def step(self) -> tuple[int, int]:
        """(pages that are copied, pages of all); equal once it is finished and durable. Raises CannotCopy."""
        try:
            done = self._backup.step(STEP_PAGES)
            pages, left = self._backup.page_count, self._backup.remaining
            if done:
                self._backup.close()
                self._to.close()
            # At once what each step wrote: a tick's sync may have to wait for what is not written yet.
            os.fdatasync(self._file)
        except (apsw.Error, OSError) as error:
            raise CannotCopy(f"the backup has failed: {error}") from None
        return (pages, pages) if done else (min(pages - left, pages - 1), pages)

    def close(self) -> None:
        """Let go of the file once it is finished."""
        os.close(self._file)

    def drop(self) -> None:
        """Delete what there is of it."""
        with suppress(apsw.Error):
            self._backup.close(True)
        with suppress(apsw.Error):
            self._to.close(True)
        with suppress(OSError):
            os.close(self._file)
            self.path.unlink()
