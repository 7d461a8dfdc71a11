"""Who has the database: the side file ``<db_path>.lock``, flocked before SQLite opens anything."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from penstock_broker.errors import FatalError

# What it says of one that only looks into the database of a broker that is stopped.
LOOKING = "penstock-broker db"


class InUse(FatalError):
    """Somebody else has the database. ``looking``: a command that only looks into it."""

    def __init__(self, path: Path, holder: str) -> None:
        process, _, by = holder.partition(" ")
        self.looking = by == LOOKING
        super().__init__(
            f"the database {path} is in use by {by or 'another broker'} (process {process or 'unknown'})",
            "try again when it has ended"
            if self.looking
            else "each broker needs a database of its own: stop the other one, or set another db_path"
            " (TASKBROKER_DB_PATH)",
        )


def lock_of(database: Path) -> Path:
    return database.with_name(database.name + ".lock")


def take(database: Path, by: str = "") -> int:
    """A descriptor that holds the lock until it is closed. ``by``: who, if not a broker.

    Raises InUse, or FatalError when there can be no such file.
    """
    try:
        lock = os.open(lock_of(database), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise FatalError(
            f"cannot open the database {database}: {error.strerror}",
            "set db_path (TASKBROKER_DB_PATH) to a file in a directory this user can write to",
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(lock, 100, 0).decode("ascii", "replace").strip()
        os.close(lock)
        raise InUse(database, holder) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()} {by}".strip().encode() + b"\n", 0)
    return lock
