"""The single writer: everything that waits becomes one transaction, a tick; then what depended on it
is let out."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from penstock_broker.domain.activation import (
    DELAYED,
    FORWARDING,
    PENDING,
    Activation,
)
from penstock_broker.store.batch import (
    TICK_BYTES_MAX,
    Answer,
    Batch,
    PageRequest,
    Written,
    keep_said,
    repeated,
    wake_at,
)
from penstock_broker.store.database import Database, DiskFailing
from penstock_broker.store.finished import place
from penstock_broker.store.ledger import state_of
from penstock_broker.store.memory import Memory

log = structlog.get_logger("store")

PAGE_ROWS_MAX = 1024
PAGE_BYTES_MAX = 4 * 1024 * 1024
# A tick that the disk did not take is written again after pauses between these.
RETRY_SECONDS_MIN = 0.05
RETRY_SECONDS_MAX = 1.0
# No disk that works takes so long for a tick.
TICK_MS_MAX = 10_000
# A tick waits at most so long for those who are expected to take part in it.
GATHER_SECONDS = 0.001

T = TypeVar("T")

# Carries out a tick, ``handoff(database.write, batch)``, or what is done between two, ``handoff(work,
# database)``, where waiting for the disk holds up nobody: one after the other.
Handoff = Callable[[Callable[[Any], Any], Any], Awaitable[Any]]


class StoreStopped(Exception):
    """The store no longer writes: the broker is stopping, or has failed."""

    def __init__(self) -> None:
        super().__init__("the store has stopped")


@dataclass(slots=True)
class Arrival:
    """Accepted rows that wait for their tick. ``taken``: source id -> next offset, stored with them, and so
    is ``progress``, a key of the meta and its value.

    ``term``: how they came in, for the books.
    """

    rows: list[Activation]
    taken: Mapping[int, int]
    term: str
    stored: asyncio.Future[None]
    progress: tuple[str, int] | None = None

    def take_back(self, source: int, end: int) -> None:
        """Of that source no more counts as taken than what is below ``end``."""
        if self.taken.get(source, 0) > end:
            self.taken = {**self.taken, source: end}


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Writer:
    """Gathers, writes, releases."""

    def __init__(self, memory: Memory, handoff: Handoff) -> None:
        self._memory = memory
        self._handoff = handoff
        self.arrivals: deque[Arrival] = deque()
        self.stopping = False
        self.failed = False
        # Why the tick under way cannot be written; None while the disk takes what it is given.
        self.trouble: DiskFailing | None = None
        # Called when it begins.
        self.on_trouble: list[Callable[[], None]] = []
        # Who is told at once.
        self._impatient: set[asyncio.Future[None]] = set()
        # Who waits for what is being gathered, and for the tick that is being written (None: there is none).
        # Each has a future of its own: whoever gives up, or is told at once, ends it for nobody else.
        self._gathered: list[asyncio.Future[None]] = []
        self._writing: list[asyncio.Future[None]] | None = None
        self._waking = False
        # When the tick that is being written began (monotonic ms); None: there is none.
        self._began_at: int | None = None
        # How many were answered by the last tick or waited for the next one when it ended (monotonic ms).
        self._expected, self._ended_at = 0, 0
        # Resolves when so many wait for the next one.
        self._complete: asyncio.Future[None] | None = None
        # Called after each commit.
        self.on_committed: list[Callable[[], None]] = []

    async def run(self) -> None:
        """Write ticks until ``stop``. A tick that the disk does not take is written again until it does;
        one that fails otherwise stops the store for good.

        Raises what the database raised: nothing after it was acknowledged.
        """
        while self.work_waits() or not self.stopping:
            await self._memory.work.wait()
            self._memory.work.clear()
            await self.catch_up()

    async def catch_up(self) -> None:
        """Write ticks until nothing waits for one."""
        while self.work_waits():
            await self._wait_for_others()
            await self.tick()

    async def _wait_for_others(self) -> None:
        """Those who were answered just now are on their way back, and to share a transaction is worth
        waiting for (docs/adr/0003): until as many wait as are expected, or for a millisecond.

        Where none is expected, what the loop is about to do still takes part in the tick, and after that the
        writer's thread gets the GIL at once.
        """
        if len(self._gathered) >= self._expected or self._memory.clock.mono_ms() - self._ended_at > 1:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        self._complete = complete = loop.create_future()
        timer = loop.call_later(GATHER_SECONDS, _resolve, complete)
        try:
            await complete
        finally:
            timer.cancel()
            self._complete = None

    def stop(self) -> None:
        """Write what is gathered, then return from ``run``."""
        self.stopping = True
        self._memory.work.set()

    def work_waits(self) -> bool:
        """Whether the next tick would do anything."""
        if self._memory.batch or self.arrivals:
            return True
        return not self.stopping and (self._due() or bool(self._memory.low_pairs()))

    def _due(self) -> bool:
        at = self._memory.next_wake_at
        return at is not None and at <= self._memory.clock.wall_ms()

    def add(
        self,
        rows: list[Activation],
        taken: Mapping[int, int],
        term: str,
        progress: tuple[str, int] | None = None,
    ) -> asyncio.Future[None]:
        """Rows for the next ticks, in order; resolves when they are durable."""
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.arrivals.append(Arrival(rows, taken, term, stored, progress))
        self._memory.work.set()
        return stored

    def committed(self) -> asyncio.Future[None]:
        """Resolves when everything done so far is durable. Raises StoreStopped when it will not be."""
        if self.failed:
            raise StoreStopped
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._memory.batch or self.arrivals:
            self._gathered.append(future)
            self._memory.work.set()
            if self._complete is not None and len(self._gathered) >= self._expected:
                _resolve(self._complete)
        elif self._writing is not None:
            self._writing.append(future)
        else:
            future.set_result(None)
        return future

    def hangs(self) -> bool:
        """Whether the disk has not answered for longer than one that works."""
        began_at = self._began_at
        return began_at is not None and self._memory.clock.mono_ms() - began_at > TICK_MS_MAX

    def answerable(self, durable: Awaitable[None]) -> asyncio.Future[None]:
        """``durable``, but raises DiskFailing as soon as the disk fails."""
        future = durable if isinstance(durable, asyncio.Future) else _future_of(durable)
        if not future.done():
            if self.trouble is not None:
                future.set_exception(self.trouble)
            else:
                self._impatient.add(future)
                future.add_done_callback(self._impatient.discard)
        return future

    async def aside(self, work: Callable[[Database], T]) -> T:
        """What ``work`` returns, done between two ticks, outside of any transaction: also while the disk
        takes nothing. It must leave none open. Raises StoreStopped."""
        if self.stopping or self.failed:
            raise StoreStopped
        answer: T = await self._handoff(work, self._memory.database)
        return answer

    # -- delays and expiries

    def next_due(self) -> int | None:
        """Wall clock at which a delay or an expiry is due; None while a tick is about to look."""
        return None if self._waking else self._memory.next_wake_at

    def wake(self) -> None:
        """One is due: look at it in the next tick."""
        self._waking = True
        self._memory.work.set()

    # -- a tick

    async def tick(self) -> None:
        """Write what has gathered in one transaction, then let out what depended on it."""
        batch, arrivals = self._gather()
        waiting, self._gathered = self._gathered, []
        self._writing, self._began_at = waiting, self._memory.clock.mono_ms()
        try:
            written = await self._write(batch)
            self._release(batch, written)
        except BaseException:
            self._fail([*waiting, *(arrival.stored for arrival in arrivals)])
            raise
        self._writing = self._began_at = None
        for future in (*(arrival.stored for arrival in arrivals), *waiting):
            _resolve(future)
        self._expected = len(waiting) + len(self._gathered)
        self._ended_at = self._memory.clock.mono_ms()
        for callback in self.on_committed:
            callback()

    async def _write(self, batch: Batch) -> Written:
        """Carry out a tick. While the disk fails it has not happened, and no tick after it can."""
        pause = RETRY_SECONDS_MIN
        while True:
            try:
                written: Written = await self._handoff(self._memory.database.write, batch)
            except DiskFailing as failing:
                if self.stopping:
                    raise
                self._tell_trouble(failing)
            else:
                if self.trouble is not None:
                    self.trouble = None
                    log.info("the disk takes what is written again", database=str(self._memory.database.path))
                return written
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS_MAX)

    def _tell_trouble(self, failing: DiskFailing) -> None:
        self._memory.tally.disk_failures += 1
        begins, self.trouble = self.trouble is None, failing
        for waiting in self._impatient:
            if not waiting.done():
                waiting.set_exception(failing)
        if begins:
            log.error(
                "the disk does not take what is written: nothing is acknowledged, handed out or taken in"
                " until it does; it is tried again",
                database=str(self._memory.database.path),
                error=str(failing),
                full=failing.full,
            )
            for callback in self.on_trouble:
                callback()

    def _gather(self) -> tuple[Batch, list[Arrival]]:
        """What the tick will do; from now on the next one gathers."""
        memory = self._memory
        batch = memory.batch
        memory.stamp()
        batch.now = memory.clock.wall_ms()
        self._decide_reports(batch)
        if not self.stopping and self._due():
            batch.due_at = batch.now
            memory.next_wake_at = None
        arrivals: list[Arrival] = []
        size = 0
        # Claims and outcomes are all in; of new rows, as many as fit.
        while self.arrivals and (
            not arrivals or (len(batch.rows) < memory.limits.batch_rows_max and size < TICK_BYTES_MAX)
        ):
            arrivals.append(self.arrivals.popleft())
            size += self._prepare(arrivals[-1], batch)
        if not self.stopping:
            self._page(batch)
        memory.add_to_books(batch.books)
        memory.next_stamp = batch.stamp + (2 if batch.reenters() else 0)
        memory.batch = Batch()
        return batch, arrivals

    def _decide_reports(self, batch: Batch) -> None:
        """Reports on rows that memory took in since they arrived are decided here, against memory."""
        reports, batch.reports = batch.reports, []
        for report in reports:
            if report.seq in self._memory.dropping:
                continue
            row = self._memory.resident.get(report.seq)
            if row is None:
                batch.reports.append(report)
            elif report.claim not in (None, row.claim):
                report.answer = repeated(row, report.claim or 0, report.epoch, report.outcome)
            elif report.may_meet(row):
                if report.claim is None:
                    keep_said(row, report.max_attempts, report.retry_delay_ms)
                else:
                    row.claim_epoch = report.epoch
                self._memory.change(
                    row, report.event, report.now, report.retry_delay_ms, report.error, report.outcome
                )
                report.answer = Answer.APPLIED

    def _prepare(self, arrival: Arrival, batch: Batch) -> int:
        """New rows get their place in the order, and in memory if there is room. Their bytes."""
        memory, size = self._memory, 0
        for pair, rows in Counter([row.pair for row in arrival.rows]).items():
            batch.count(pair, arrival.term, rows)
        for row in arrival.rows:
            size += row.size
            if row.status is PENDING:
                row.ready_at = batch.stamp
                if not memory.index.reserve(memory.index.pairs[row.pair], row):
                    memory.low.add(row.pair)
            if row.sent_on:
                batch.finished.extend((row.sent_on, place(row.source, row.offset)))
        batch.rows += arrival.rows
        if arrival.term != "accepted":
            # What it has become is not in its message: without it the next loss of a disk forgets it.
            states = ((place(row.source, row.offset), state_of(row)) for row in arrival.rows if row.source)
            batch.kept += [(at, state) for at, state in states if state is not None]
        if (progress := arrival.progress) is not None:
            batch.calls.append(lambda database: database.set_meta(*progress))
        for source_id, next_ in arrival.taken.items():
            source = memory.partitions[source_id]
            source.next = max(source.next, next_)
            batch.sources[source_id] = source.record()
        return size

    def _page(self, batch: Batch) -> None:
        memory = self._memory
        for queue in memory.low_pairs():
            rows, size = memory.index.room(queue) or (1, 1)
            queue.paging, queue.came_back = True, 0
            batch.pages.append(
                PageRequest(
                    queue.pair,
                    queue.tail_ready_at,
                    queue.tail_seq,
                    min(rows, PAGE_ROWS_MAX),
                    min(size, PAGE_BYTES_MAX),
                )
            )
        memory.low.clear()

    def _release(self, batch: Batch, written: Written) -> None:
        """What the tick wrote becomes visible in memory."""
        memory = self._memory
        # In one tick an offset may be reported on, then dropped, then read again and stored anew.
        memory.unfinished.kept(batch.kept)
        memory.unfinished.left(batch.left)
        memory.unfinished.took(batch.rows)
        memory.unfinished.ranged(batch.sources)
        memory.disk_low = written.disk_low
        memory.set_aside(written.damaged)
        for row in batch.rows:
            if row.status is PENDING and not row.spilled:
                memory.enter(row)
            elif row.status is FORWARDING:
                memory.depart(row)
            if row.expires_at is not None or row.status is DELAYED:
                memory.wake_earlier(wake_at(row.status, row.ready_at, row.expires_at))
        for report in batch.reports:
            memory.reported(report)
        for pair, rows in written.due.items():
            memory.counts[pair][DELAYED] -= rows
            memory.counts[pair][PENDING] += rows
            memory.index.pairs[pair].spilled += rows
            memory.low.add(pair)
        if batch.due_at is not None:
            self._waking = False
        memory.wake_earlier(written.next_wake_at)
        memory.expire(written.expired)
        for then in batch.then:
            then()
        for pair, paged in written.pages.items():
            memory.paged(memory.index.pairs[pair], paged, bool(written.damaged))

    def refuse(self) -> None:
        """Another broker has these rows: what is done here from now on is written, and told to nobody."""
        self.failed = True
        _refuse(self._gathered)

    def _fail(self, waiting: list[asyncio.Future[None]]) -> None:
        """Fail-stop: nothing that depends on a tick that did not happen is answered."""
        self.failed = self.stopping = True
        _refuse([*waiting, *(arrival.stored for arrival in self.arrivals), *self._gathered])


def _refuse(waiting: list[asyncio.Future[None]]) -> None:
    for future in waiting:
        if not future.done():
            future.set_exception(StoreStopped())
            future.exception()  # whoever waits is told; nobody need wait


def _future_of(work: Awaitable[None]) -> asyncio.Future[None]:
    """Ends as ``work`` does, which goes on if it ends earlier."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    asyncio.ensure_future(work).add_done_callback(end)
    return future
