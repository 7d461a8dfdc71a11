"""The disk of a machine: what is not synced may be lost, it may fail for a while, fill up, and be slow."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
from crash_disk import HOWS, Call, CrashDisk, io_error

from penstock_broker.store.space import reserve_of
from tests.sim.hub import Hub

# Small: the log, laid out in proportion, is copied again and again.
SIZE_BYTES = 1 << 25
BLOCK_BYTES = 4096


class Disk:
    """Where the database is. Writing takes time."""

    def __init__(self, hub: Hub, path: Path) -> None:
        self.hub = hub
        self.path = path
        self.slow = 1.0
        # Kinds of calls that fail, and how many of them; and whether the next sync does.
        self.failing: frozenset[str] = frozenset()
        self.failing_share = 1.0
        self.sync_fails = False
        # Kinds of calls that have failed since the broker was started.
        self.failed: set[str] = set()
        # Bytes that others have written.
        self.filled = 0
        # Of the reserve, while its file is there: an empty one stands for it.
        self._reserved = 0
        # Told of what was carried out.
        self.on_done: Callable[[Callable[..., Any], tuple[Any, ...]], None] = lambda func, args: None
        # The machine is to crash in the middle of a write, after so many I/O calls more.
        self._calls_left = 0
        self._crash: Callable[[], None] = lambda: None
        # It has: whoever still runs there is gone too.
        self.is_dark = False
        # The world looks: that is nothing that happens to the disk.
        self._looking = False
        self.use(CrashDisk())

    def use(self, files: CrashDisk) -> None:
        """These are what is on it from now on."""
        self.files = files
        files.before = self._before
        reserve_of(self.path).unlink(missing_ok=True)

    def carry_out(self, func: Callable[..., Any], *args: Any) -> Any:
        """On a thread: what the disk is needed for."""
        thread = self.hub.thread
        assert thread is not None
        thread.wait(self.hub.between(0.0001, 0.002) * self.slow)
        try:
            result = func(*args)
        except Exception:
            if not self.is_dark:
                raise
        if self.is_dark:
            self.go_down()
            thread.wait(None)
        self.on_done(func, args)
        thread.wait(self.hub.between(0.0, 0.001) * self.slow)
        return result

    @property
    def is_sound(self) -> bool:
        return self.slow == 1.0 and not (self.failing or self.filled)

    @contextlib.contextmanager
    def looked_at(self) -> Iterator[None]:
        """Within, what reads is no broker, and nothing fails."""
        before, self._looking = self._looking, True
        try:
            yield
        finally:
            self._looking = before

    def _before(self, call: Call) -> None:
        """An I/O call of a broker is about to happen."""
        if self._looking:
            return
        self.files.capacity = SIZE_BYTES - self._reserve() - self.filled
        fails = call.kind in self.failing and self.hub.chance(self.failing_share)
        if call.kind == "sync" and self.sync_fails:
            self.sync_fails, fails = False, True
        if fails:
            self.failed.add(call.kind)
            raise io_error(call)
        if self._calls_left and call.kind in ("write", "sync", "truncate"):
            self._calls_left -= 1
            if self._calls_left == 0:
                self.is_dark = True
                self.power_cut()

    # -- power

    def go_down(self) -> None:
        """Bring the machine down with it."""
        self.reset()
        self.hub.later(0, self._crash)

    def reset(self) -> None:
        self.is_dark = False
        self._calls_left = 0
        self.failed.clear()

    def crash_within(self, calls: int, crash: Callable[[], None]) -> None:
        """Lose power in the middle of a write; ``crash`` is to bring the machine down with it."""
        self._calls_left, self._crash = calls, crash

    def recover(self) -> None:
        """It fails no more, and does not lose power after all, if it has not yet."""
        self.slow, self.filled, self._calls_left = 1.0, 0, 0
        self.failing, self.sync_fails = frozenset(), False

    def power_cut(self) -> None:
        self.files.power_cut(self.hub.random, self.hub.random.choice(HOWS))

    # -- space

    def _reserve(self) -> int:
        return self._reserved if reserve_of(self.path).exists() else 0

    def room(self) -> int:
        return max(0, SIZE_BYTES - self._reserve() - self.filled - self.files.contents.size())

    def fill(self, leave: int) -> None:
        """Others write until only ``leave`` bytes are left."""
        self.filled += max(0, self.room() - leave)

    def statvfs(self) -> SimpleNamespace:
        free = self.room() // BLOCK_BYTES
        return SimpleNamespace(
            f_blocks=SIZE_BYTES // BLOCK_BYTES, f_frsize=BLOCK_BYTES, f_bavail=free, f_bfree=free
        )

    def allocate(self, size: int) -> None:
        """For the reserve. Raises OSError."""
        if self.room() < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._reserved = size

    # -- what the world sees of it

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Of a broker that is down: of a copy, as a broker would find it. Nothing when it is empty."""
        return query(self.files, self.path, sql)


def query(files: CrashDisk, path: Path, sql: str) -> list[tuple[Any, ...]]:
    copy = CrashDisk(files.contents.files())
    with contextlib.closing(apsw.Connection(str(path), vfs=copy.name)) as connection:
        connection.pragma("locking_mode", "exclusive")
        if not connection.execute("SELECT count(*) FROM sqlite_schema").get:
            return []
        return list(connection.execute(sql))
