"""A database that must not be used any more is moved aside, never deleted."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import structlog

from penstock_broker.clock import Clock

log = structlog.get_logger("store")


def set_aside(path: Path, why: str, clock: Clock, label: str = "quarantined") -> Path:
    """Move a closed database with its log to ``<path>.<label>-<time>``, so that a new store can start.

    ``why``: one clause for the log. Where it is now; raises OSError when it cannot be moved.
    """
    stamp = datetime.fromtimestamp(clock.wall_ms() / 1000, UTC).strftime("%Y%m%dT%H%M%S")
    to = path.with_name(f"{path.name}.{label}-{stamp}")
    number = 1
    while to.exists():
        number += 1
        to = path.with_name(f"{path.name}.{label}-{stamp}.{number}")
    # The log first: without its database it means nothing, while a database without its log looks whole.
    for suffix in ("-shm", "-wal", ""):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(to.with_name(to.name + suffix))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    log.error("the database was set aside", why=why, database=str(path), now=str(to))
    return to
