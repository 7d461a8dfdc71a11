"""A database that must not be used any more is moved aside, never deleted."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import structlog

from penstock_broker.clock import Clock

log = structlog.get_logger("store")


def set_aside(path: Path, why: str, clock: Clock, label: str = "quarantined") -> Path:
    """Move a closed database with its log to ``<path>.<label>-<time>``, so that a new store can start.

    ``why``: one clause for the log. Where it is now; raises OSError when it cannot be moved.
    """
    wal = _wal_of(path)
    stamp = datetime.fromtimestamp(clock.wall_ms() / 1000, UTC).strftime("%Y%m%dT%H%M%S")
    to = path.with_name(f"{path.name}.{label}-{stamp}")
    number = 1
    while to.exists() or _wal_of(to).exists():
        number += 1
        to = path.with_name(f"{path.name}.{label}-{stamp}.{number}")
    # An index of the log, made from it.
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    # A database without its log looks whole, so the log has both names until its database has the new one.
    # Killed in between, one that is found beside no database is deleted by SQLite as the new one begins.
    if wal.exists():
        _link(wal, _wal_of(to))
        _sync(path.parent)
    path.rename(to)
    _sync(path.parent)
    wal.unlink(missing_ok=True)
    _sync(path.parent)
    log.error("the database was set aside", why=why, database=str(path), now=str(to))
    return to


def _wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _link(file: Path, name: Path) -> None:
    """Give a file another name, or what has it where a file system has no such links."""
    try:
        os.link(file, name)
    except OSError:
        with file.open("rb") as source, name.open("xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _sync(folder: Path) -> None:
    """What is renamed after it comes after it, whatever a power cut leaves."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
