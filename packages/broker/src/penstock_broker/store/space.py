"""Space on the disk of the database: the intake pauses before there is none, and a reserve keeps claims,
outcomes and dead letters going when somebody else has filled it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger("store")

# Held in a file of its own, and given up when the disk is full: more than the write-ahead log can take.
# As much again must be free for the intake to be open. On a small disk each is a share of it.
RESERVE_BYTES = 96 * 1024 * 1024
SMALL_DISK_SHARE = 4


def reserve_of(database: Path) -> Path:
    return database.with_name(database.name + ".reserve")


class Space:
    """Used on the writer's thread, and before its first tick."""

    def __init__(self, database: Path) -> None:
        self.path = reserve_of(database)
        disk = os.statvfs(database.parent)
        self.reserve_bytes = min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // SMALL_DISK_SHARE)
        # Whether the intake should pause.
        self.low = False
        self._held = False

    def watch(self) -> bool:
        """Whether there is too little; takes the reserve (back) when there is enough."""
        free = self._free()
        if not self._held and free >= 2 * self.reserve_bytes:
            self._take()
            free = self._free()
        margin = self.reserve_bytes // 4 if self.low else 0
        self.low = not self._held or free < self.reserve_bytes + margin
        return self.low

    def _free(self) -> int:
        disk = os.statvfs(self.path.parent)
        return disk.f_bavail * disk.f_frsize

    def _take(self) -> None:
        try:
            with self.path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.reserve_bytes)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            log.warning("the reserve for a full disk cannot be allocated", error=error.strerror)
        else:
            self._held = True

    def give_up(self) -> bool:
        """The disk is full: let what must go on have the reserve. False when there is none left."""
        if not self._held:
            return False
        self._held = False
        self.low = True
        self.path.unlink(missing_ok=True)
        log.error(
            "the disk is full: its reserve is used so that tasks in flight can end; free some space",
            path=str(self.path.parent),
            reserve_bytes=self.reserve_bytes,
        )
        return True

    def close(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
