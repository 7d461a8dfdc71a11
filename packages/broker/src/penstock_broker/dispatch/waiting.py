"""Workers that wait for work, and their match with rows that become ready."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock_broker.domain.activation import NO_SOURCE, PROCESSING, Activation
from penstock_broker.store.database import DiskFailing
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.writer import StoreStopped

# A call waits so long for claims to be recorded, well below the 5 s for which our workers wait for an
# answer; beside the calls it may take two writes of the ledger, of 5 s each.
ANSWER_SECONDS_MAX = 3.0
RECORD_SECONDS_MAX = 12.0
# Recorded claims go back when their worker does not ask for them within this time.
KEPT_SECONDS_MAX = 5.0


class Wanted(NamedTuple):
    """What a worker serves. No application: any; no namespaces: all of the application's."""

    application: str | None
    namespaces: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Waiter:
    rows_max: int
    worker: str
    future: asyncio.Future[list[Activation]]


@dataclass(slots=True, eq=False)
class _Once:
    """At-most-once claims for one worker. They are handed out when they are ``durable``."""

    rows: list[Activation]
    durable: bool = False
    task: asyncio.Task[None] = field(init=False)


class Waiting:
    """Long polls, grouped by what they want and answered first come, first served.

    At-most-once claims are made durable beside the calls, so that nothing else waits for it: a worker has
    them with a later answer.
    """

    def __init__(self, store: Inflight, bytes_max: int) -> None:
        self._store = store
        self._bytes_max = bytes_max
        # Ordered sets: whoever gives up leaves at once.
        self._waiters: dict[Wanted, dict[_Waiter, None]] = {}
        # One a worker: until it has these, it claims no more of them.
        self._once: dict[tuple[Wanted, str], _Once] = {}
        self._closed = False
        # Told how many rows each match handed out.
        self.on_claimed: Callable[[list[Activation]], None] = lambda rows: None
        store.writer.on_committed.append(self._match)

    def __len__(self) -> int:
        return sum(len(waiters) for waiters in self._waiters.values())

    def claim(
        self,
        wanted: Wanted,
        rows_max: int,
        worker: str = "",
        tokenless: bool = False,
        at_most_once: bool = True,
    ) -> list[Activation]:
        """What is ready now."""
        if self._closed:
            return []
        rows = self._store.claim(
            wanted.application,
            wanted.namespaces,
            rows_max,
            self._bytes_max,
            worker,
            tokenless,
            at_most_once,
        )
        self.on_claimed(rows)
        return rows

    def _take(self, wanted: Wanted, rows_max: int, worker: str) -> list[Activation]:
        """What may be handed out now."""
        once = self._once.get((wanted, worker))
        if once is not None and once.durable:
            ready = still_claimed(once.rows)
            rows, once.rows = ready[:rows_max], ready[rows_max:]
            if not once.rows:
                del self._once[wanted, worker]
                once.task.cancel()
            if rows:
                self._store.start_leases(rows)
                return rows
            once = None
        rows = self.claim(wanted, rows_max, worker, at_most_once=once is None)
        if once is None and any(row.at_most_once for row in rows):
            self._keep(wanted, worker, [row for row in rows if row.at_most_once])
            rows = [row for row in rows if not row.at_most_once]
        return rows

    def _keep(self, wanted: Wanted, worker: str, rows: list[Activation]) -> None:
        once = self._once[wanted, worker] = _Once(rows)
        once.task = asyncio.create_task(self._record((wanted, worker), once))

    async def _record(self, key: tuple[Wanted, str], once: _Once) -> None:
        try:
            with contextlib.suppress(TimeoutError, StoreStopped, DiskFailing):
                await self.make_durable(once.rows, RECORD_SECONDS_MAX, KEPT_SECONDS_MAX)
                once.durable = True
                self._answer(*key)
                await asyncio.sleep(KEPT_SECONDS_MAX)
        finally:
            if self._once.get(key) is once:
                del self._once[key]
            self._store.release(once.rows)

    async def make_durable(
        self, rows: Sequence[Activation], seconds_max: float, kept_seconds: float = 0.0
    ) -> None:
        """At-most-once claims are in the rows, and in the ledger, before they are handed out, which is at
        most ``kept_seconds`` later. If it fails they go back. Raises TimeoutError, StoreStopped, DiskFailing.
        """
        self._store.start_leases(rows, round((seconds_max + kept_seconds) * 1000))
        try:
            async with asyncio.timeout(seconds_max):
                from_log = any(row.source != NO_SOURCE for row in rows)
                durable = self._store.recorded() if from_log else self._store.committed()
                await self._store.answerable(durable)
        except BaseException:
            self._store.release(rows)
            raise
        self._store.start_leases(still_claimed(rows), round(kept_seconds * 1000))

    def _answer(self, wanted: Wanted, worker: str) -> None:
        """At-most-once claims of a worker are durable: it has them now, if it waits."""
        for waiter in self._waiters.get(wanted, ()):
            if waiter.worker == worker and not waiter.future.done():
                if rows := self._take(wanted, waiter.rows_max, worker):
                    waiter.future.set_result(rows)
                break

    async def wait(self, wanted: Wanted, rows_max: int, seconds: float, worker: str = "") -> list[Activation]:
        """What is ready now, or becomes ready within ``seconds``; empty when nothing did.

        Cancelled after its match, the claims go back.
        """
        rows = self._take(wanted, rows_max, worker)
        if (wanted, worker) in self._once:
            seconds = max(seconds, ANSWER_SECONDS_MAX)
        if rows or self._closed or seconds <= 0:
            return rows
        waiter = _Waiter(rows_max, worker, asyncio.get_running_loop().create_future())
        self._waiters.setdefault(wanted, {})[waiter] = None
        timer = asyncio.get_running_loop().call_later(seconds, self._give_up, waiter)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled():
                self._store.release(waiter.future.result())
            raise
        finally:
            timer.cancel()
            self._leave(wanted, waiter)

    def _leave(self, wanted: Wanted, waiter: _Waiter) -> None:
        if (waiters := self._waiters.get(wanted)) is not None:
            waiters.pop(waiter, None)
            if not waiters:
                del self._waiters[wanted]

    @staticmethod
    def _give_up(waiter: _Waiter) -> None:
        if not waiter.future.done():
            waiter.future.set_result([])

    def _match(self) -> None:
        """Hand out what is ready to those who wait, shared among them."""
        if not self._store.memory.index.rows:
            return
        for wanted in list(self._waiters):
            waiters = self._waiters[wanted]
            for waiter in list(waiters):
                if waiter.future.done():
                    del waiters[waiter]
                    continue
                share = max(1, -(-self._store.memory.index.rows // len(waiters)))
                rows = self._take(wanted, min(waiter.rows_max, share), waiter.worker)
                if rows:
                    del waiters[waiter]
                    waiter.future.set_result(rows)
                elif not self._store.memory.index.any_ready(*wanted):
                    break

    def close(self) -> None:
        """Answer every poll empty and claim nothing any more."""
        self._closed = True
        for once in self._once.values():
            self._store.release(once.rows)
            once.task.cancel()
        for waiters in self._waiters.values():
            for waiter in waiters:
                self._give_up(waiter)
        self._waiters.clear()


def still_claimed(rows: Sequence[Activation]) -> list[Activation]:
    """Without those that were cancelled, became another broker's, or lost their lease, before they could be
    handed out."""
    return [row for row in rows if row.status is PROCESSING]
