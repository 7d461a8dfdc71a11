"""The chores, in one table, and the loop that sleeps until the first of them is due."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from penstock_broker.store.inflight import Inflight

log = structlog.get_logger("upkeep")

# A broker that stood still for longer judges no lease by that time.
STALL_MS = 1_000
SLEEP_MS_MAX = 60_000
# While there are leases, so that the time the broker stood still is known to half a second.
WATCH_MS = 500
FORGET_EVERY_MS = 60_000
# Each tick looks as well; this is for when there is none.
LOOK_AT_DISK_EVERY_MS = 2_000


@dataclass(frozen=True, slots=True)
class Chore:
    """``due``: monotonic ms at which to run next, or None. ``run`` is given the monotonic time."""

    name: str
    due: Callable[[], int | None]
    run: Callable[[int], None]


class Upkeep:
    """Runs chores when they are due; nothing is polled."""

    def __init__(self, store: Inflight) -> None:
        self._store = store
        self._clock = store.clock
        self._forget_at = self._clock.mono_ms() + FORGET_EVERY_MS
        self._look_at_disk_at = self._clock.mono_ms()
        self._sleeping_until = 0
        self._earlier = asyncio.Event()
        self.chores = (
            Chore("delays and expiry", self._wake_due, lambda mono: store.writer.wake()),
            Chore("leases", store.memory.leases.next_due, self._lapse),
            Chore("de-duplication window", lambda: self._forget_at, self._forget),
            Chore("disk space", lambda: self._look_at_disk_at, self._look_at_disk),
            Chore("unclaimable", lambda: store.unclaimable.look_at, store.unclaimable.look),
        )
        store.writer.on_committed.append(self._reconsider)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            now = self._clock.mono_ms()
            for chore in self.chores:
                due = chore.due()
                if due is not None and due <= now:
                    chore.run(now)
            # What is due since long was only learned just now: that is no time the broker stood still.
            self._sleeping_until = max(now, self._next_due(now))
            await self._sleep(self._sleeping_until)

    async def _sleep(self, until: int) -> None:
        """Until then, or until something is due earlier."""
        self._earlier.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(until - self._clock.mono_ms(), 0) / 1000):
                await self._earlier.wait()
        overslept = self._clock.mono_ms() - until
        if overslept > STALL_MS:
            log.warning("the broker stood still; leases are moved by that time", seconds=overslept / 1000)
            self._store.postpone_leases(overslept)

    def _next_due(self, now: int) -> int:
        dues = [due for chore in self.chores if (due := chore.due()) is not None]
        watch = SLEEP_MS_MAX if self._store.memory.leases.next_due() is None else WATCH_MS
        return min([now + watch, *dues])

    def _reconsider(self) -> None:
        """After a tick: wake up if something became due before the time we sleep until."""
        if self._next_due(self._clock.mono_ms()) < self._sleeping_until:
            self._earlier.set()

    def _wake_due(self) -> int | None:
        at = self._store.writer.next_due()
        return None if at is None else at - self._clock.wall_ms() + self._clock.mono_ms()

    def _lapse(self, mono: int) -> None:
        if lapsed := self._store.lapse(mono):
            log.warning("claims whose worker vanished were taken back", claims=lapsed)

    def _look_at_disk(self, mono: int) -> None:
        self._store.watch_disk()
        self._look_at_disk_at = mono + LOOK_AT_DISK_EVERY_MS

    def _forget(self, mono: int) -> None:
        self._store.forget_finished()
        self._forget_at = mono + FORGET_EVERY_MS
