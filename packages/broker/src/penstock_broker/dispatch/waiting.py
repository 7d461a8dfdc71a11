"""Workers that wait for work, and their match with rows that become ready."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from penstock_broker.domain.activation import NO_SOURCE, PROCESSING, Activation
from penstock_broker.store.database import DiskFailing
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.writer import StoreStopped

# A call waits so long for claims to be recorded, well below the 5 s for which our workers wait for an
# answer; beside the calls it may take two writes of the ledger, of 5 s each.
ANSWER_SECONDS_MAX = 3.0
RECORD_SECONDS_MAX = 12.0


class Wanted(NamedTuple):
    """What a worker serves. No application: any; no namespaces: all of the application's."""

    application: str | None
    namespaces: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Waiter:
    rows_max: int
    worker: str
    future: asyncio.Future[list[Activation]]


class _Recording(NamedTuple):
    """At-most-once claims of one worker that are being made durable."""

    rows: list[Activation]
    task: asyncio.Task[None]


class Waiting:
    """Long polls, grouped by what they want and answered first come, first served.

    At-most-once claims are made durable beside the calls, so that nothing else waits for it. Then they are
    kept, and whoever asks next for their namespace has them before all else: what is recorded names no
    worker. They go back when the worker that they were claimed for is not heard of for a lease.
    """

    def __init__(self, store: Inflight, bytes_max: int) -> None:
        self._store = store
        self._bytes_max = bytes_max
        # Ordered sets: whoever gives up leaves at once.
        self._waiters: dict[Wanted, dict[_Waiter, None]] = {}
        # One a worker: until these are kept, it claims no more of them.
        self._recording: dict[tuple[Wanted, str], _Recording] = {}
        # Durable at-most-once claims that nobody has yet, by pair and seq. The pair whose turn is next comes
        # first.
        self._kept: dict[int, dict[int, Activation]] = {}
        self._look: asyncio.TimerHandle | None = None
        # Calls that wait, by the id of their request.
        self._requests: dict[str, _Waiter] = {}
        self._closed = False
        # Whether a worker was heard of since then (monotonic ms).
        self.heard_since: Callable[[str, int], bool] = lambda worker, since: False
        # Told how many rows each match handed out.
        self.on_claimed: Callable[[list[Activation]], None] = lambda rows: None
        store.writer.on_committed.append(self._match)

    def __len__(self) -> int:
        return sum(len(waiters) for waiters in self._waiters.values())

    def holds(self, row: Activation) -> bool:
        """Whether a row is claimed, and no worker has it yet."""
        recording = (one.seq for recording in self._recording.values() for one in recording.rows)
        return row.seq in self._kept.get(row.pair, ()) or row.seq in recording

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
        if self._kept and (rows := self._take_kept(wanted, rows_max, worker)):
            return rows
        may_record = (wanted, worker) not in self._recording
        rows = self.claim(wanted, rows_max, worker, at_most_once=may_record)
        if may_record and any(row.at_most_once for row in rows):
            once = [row for row in rows if row.at_most_once]
            task = asyncio.create_task(self._record(wanted, worker, once))
            self._recording[wanted, worker] = _Recording(once, task)
            rows = [row for row in rows if not row.at_most_once]
        return rows

    # -- at-most-once claims

    async def make_durable(self, rows: Sequence[Activation], seconds_max: float) -> list[Activation]:
        """At-most-once claims are in the rows, and in the ledger, before they are handed out: those that
        may be, now. If it fails they go back. Raises TimeoutError, StoreStopped, DiskFailing.
        """
        self._store.start_leases(rows, round(seconds_max * 1000))
        try:
            async with asyncio.timeout(seconds_max):
                from_log = any(row.source != NO_SOURCE for row in rows)
                durable = self._store.recorded() if from_log else self._store.committed()
                await self._store.answerable(durable)
        except BaseException:
            self._store.release(rows)
            raise
        startable = self._store.startable(rows)
        self._store.start_leases(startable)
        return startable

    async def _record(self, wanted: Wanted, worker: str, rows: list[Activation]) -> None:
        try:
            with contextlib.suppress(TimeoutError, StoreStopped, DiskFailing):
                self._keep(await self.make_durable(rows, RECORD_SECONDS_MAX))
        finally:
            del self._recording[wanted, worker]
        self._answer(wanted, worker)

    def _keep(self, rows: list[Activation]) -> None:
        for row in rows:
            self._kept.setdefault(row.pair, {})[row.seq] = row
        # A lease to be handed out in, and the one that begins then.
        self._store.start_leases(rows, self._store.limits.lease_ms)
        self._look_later()

    def _look_later(self) -> None:
        if self._kept and self._look is None:
            seconds = self._store.limits.lease_ms / 3000
            self._look = asyncio.get_running_loop().call_later(seconds, self._look_through)

    def _look_through(self) -> None:
        """Kept claims stay as long as their worker is heard of, and may be handed out."""
        self._look = None
        mono, lease_ms = self._store.clock.mono_ms(), self._store.limits.lease_ms
        rows = self._store.startable(row for kept in self._kept.values() for row in kept.values())
        heard = [row for row in rows if self.heard_since(row.worker, mono - lease_ms)]
        self._store.start_leases(heard, lease_ms)
        self._store.release([row for row in rows if row.lease_until <= mono + lease_ms])
        self._kept = {
            pair: left
            for pair, kept in self._kept.items()
            if (left := {seq: row for seq, row in kept.items() if row.status is PROCESSING})
        }
        self._look_later()

    def _take_kept(self, wanted: Wanted, rows_max: int, worker: str) -> list[Activation]:
        taken: list[Activation] = []
        mono, size = self._store.clock.mono_ms(), 0
        for pair in self._kept_for(wanted):
            if len(taken) >= rows_max:
                break
            kept = self._kept.pop(pair)
            rows: list[Activation] = []
            for row in kept.values():
                if len(taken) + len(rows) >= rows_max or size >= self._bytes_max:
                    break
                if not self._store.refusals.by(row.seq, worker, mono):
                    rows.append(row)
                    size += row.size
            for row in rows:
                del kept[row.seq]
            if kept:
                self._kept[pair] = kept
            taken += self._store.startable(rows)
        for row in taken:
            row.worker = worker
        self._store.start_leases(taken)
        return taken

    def _kept_for(self, wanted: Wanted) -> list[int]:
        """The pairs of which claims are kept for a worker."""
        index, (application, namespaces) = self._store.memory.index, wanted
        if application is None:
            return list(self._kept)
        if namespaces:
            queues = (index.pair(application, namespace) for namespace in dict.fromkeys(namespaces))
            return [queue.pair for queue in queues if queue is not None and queue.pair in self._kept]
        return [pair for pair in self._kept if index.pairs[pair].application == application]

    def _give_back_stopped(self) -> None:
        """Kept claims of what an operator paused, or drains."""
        pairs, claiming = self._store.memory.index.pairs, self._store.claiming
        for pair in [pair for pair in self._kept if not claiming or pairs[pair].paused_at is not None]:
            self._store.release(self._kept.pop(pair).values())

    def _answer(self, wanted: Wanted, worker: str) -> None:
        """More is kept: the worker that it was claimed for has it now, if it waits; else whoever does."""
        for waiter in self._waiters.get(wanted, ()) if self._kept else ():
            if waiter.worker == worker and not waiter.future.done():
                if rows := self._take(wanted, waiter.rows_max, worker):
                    waiter.future.set_result(rows)
                break
        if self._kept:
            self._match()

    # -- waiting

    async def wait(
        self, wanted: Wanted, rows_max: int, seconds: float, worker: str = "", request: str = ""
    ) -> list[Activation]:
        """What is ready now, or becomes ready within ``seconds``; empty when nothing did.

        Cancelled after its match, the claims go back.
        """
        rows = self._take(wanted, rows_max, worker)
        if (wanted, worker) in self._recording:
            seconds = max(seconds, ANSWER_SECONDS_MAX)
        if rows or self._closed or seconds <= 0:
            return rows
        waiter = _Waiter(rows_max, worker, asyncio.get_running_loop().create_future())
        self._waiters.setdefault(wanted, {})[waiter] = None
        if request:
            self._requests[request] = waiter
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
            if self._requests.get(request) is waiter:
                del self._requests[request]

    async def end(self, request: str) -> None:
        """A request is repeated: nobody hears the call with it any more, should one wait still. What that was
        given at this moment it has then."""
        if (waiter := self._requests.get(request)) is not None:
            self._give_up(waiter)
            await asyncio.sleep(0)

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
        index = self._store.memory.index
        if self._kept:
            self._give_back_stopped()
        elif not index.rows:
            return
        kept = sum(map(len, self._kept.values()))
        for wanted in list(self._waiters):
            waiters = self._waiters[wanted]
            # What is left may start at most once: it is for those who may claim more of that.
            only_once = False
            for waiter in list(waiters):
                if waiter.future.done():
                    del waiters[waiter]
                    continue
                recording = (wanted, waiter.worker) in self._recording
                if only_once and recording:
                    continue
                share = max(1, -(-(index.rows + kept) // len(waiters)))
                rows = self._take(wanted, min(waiter.rows_max, share), waiter.worker)
                if rows:
                    del waiters[waiter]
                    waiter.future.set_result(rows)
                elif not (index.any_ready(*wanted) or self._kept_for(wanted)):
                    break
                only_once = only_once or (recording and not rows)

    def close(self) -> None:
        """Answer every poll empty and claim nothing any more."""
        self._closed = True
        for recording in self._recording.values():
            self._store.release(recording.rows)
            recording.task.cancel()
        for kept in self._kept.values():
            self._store.release(kept.values())
        self._kept.clear()
        if self._look is not None:
            self._look.cancel()
        for waiters in self._waiters.values():
            for waiter in waiters:
                self._give_up(waiter)
        self._waiters.clear()


def still_claimed(rows: Sequence[Activation]) -> list[Activation]:
    """Without those that were cancelled, became another broker's, or lost their lease, before they could be
    handed out."""
    return [row for row in rows if row.status is PROCESSING]
