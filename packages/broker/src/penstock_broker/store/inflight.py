"""The inflight store: the domain verbs, on the event loop.

A verb decides by the lifecycle against memory, changes memory, and adds the write to the tick
that is being gathered. What it answers may leave the broker once that tick is committed.
"""

from __future__ import annotations

import asyncio
import copy
import json
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from penstock_broker.clock import Clock
from penstock_broker.domain.activation import NO_SOURCE, Activation, Reason, Status, hash_id
from penstock_broker.domain.lifecycle import OUTCOMES, Change, Event, Limits, decide
from penstock_broker.domain.token import ClaimToken
from penstock_broker.store.batch import Answer, Batch, PageRequest, Report, Written, move, wake_at
from penstock_broker.store.cover import Cover, Source
from penstock_broker.store.database import Database
from penstock_broker.store.finished import Finished, last_of, pack, unpack
from penstock_broker.store.index import PairQueue, ReadyIndex
from penstock_broker.store.leases import Leases
from penstock_broker.store.schema import INLINE_BODY_BYTES_MAX

T = TypeVar("T")

# A sequence number is the boot epoch and a count: unique over restarts without being stored.
SEQ_BITS = 36
PAIRS_MAX = 10_000
PAGE_ROWS_MAX = 1024
PAGE_BYTES_MAX = 4 * 1024 * 1024
# A pair's rows in memory are refilled below this many.
LOW_WATER_ROWS = 512

Handoff = Callable[[Callable[[Batch], Written], Batch], Awaitable[Written]]


class StoreStopped(Exception):
    """The store no longer writes: the broker is stopping, or has failed."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds of the store. Bytes count bodies."""

    rows_max: int = 1_000_000
    bytes_max: int = 8 * 1024**3
    window_rows_max: int = 100_000
    window_bytes_max: int = 64 * 1024**2
    batch_rows_max: int = 4096
    dedup_window_ms: int = 3_600_000
    dedup_ids_max: int = 2_000_000
    dead_letters_rest_max: int = 10_000
    # A claim without a heartbeat for this long is lost.
    lease_ms: int = 15_000
    # What a worker gets beyond the deadline before the broker takes a task back by itself.
    grace_ms: int = 3_000
    lifecycle: Limits = field(default_factory=Limits)


@dataclass(slots=True)
class _Intake:
    rows: list[Activation]
    taken: Mapping[int, int]
    stored: asyncio.Future[None]


@dataclass(slots=True)
class Tally:
    """Counts since the start that no row keeps."""

    duplicates: int = 0
    dropped: int = 0
    lost: int = 0
    answers: dict[Answer, int] = field(default_factory=lambda: dict.fromkeys(Answer, 0))


class Inflight:
    """Every method is called on the event loop; ``run`` hands ticks to the writer."""

    def __init__(self, database: Database, clock: Clock, limits: StoreLimits, handoff: Handoff) -> None:
        self.database = database
        self.clock = clock
        self.limits = limits
        self.epoch = database.epoch
        self.store_id = database.store_id
        self.tally = Tally()
        self.index = ReadyIndex(limits.window_rows_max, limits.window_bytes_max)
        self.finished = Finished(limits.dedup_window_ms, limits.dedup_ids_max)
        self.leases = Leases()
        self.cover_waits = Cover(self._start_covered)
        # Settled under an offset that is not covered: reports on them, repeated ones too, wait.
        self._held: dict[int, tuple[Source, int]] = {}
        # What memory holds of the rows: those in the index, and those claimed.
        self.resident: dict[int, Activation] = {}
        # Every row: id hash -> seq.
        self.live: dict[int, int] = {}
        # Per pair, rows by status (index is the status).
        self.counts: dict[int, list[int]] = {}
        self.rows = 0
        self.bytes = 0
        self.books: dict[tuple[int, str], int] = {}
        self.dead_letters_resting = 0
        self._handoff = handoff
        self._batch = Batch()
        self._done: asyncio.Future[None] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._waking = False
        self.failure: BaseException | None = None
        self._intake: deque[_Intake] = deque()
        self._intake_rows = 0
        self._intake_bytes = 0
        self._paused = ""
        self._low: set[int] = set()
        self._outbox: deque[int] = deque()
        self._next_seq = self.epoch << SEQ_BITS
        self._stamp = 0
        self._next_wake_at: int | None = None
        self._sources: dict[int, Source] = {}
        self._source_ids: dict[tuple[str, int], int] = {}
        self._on_room: list[Callable[[], None]] = []
        self._on_outbox: list[Callable[[], None]] = []
        # Called when rows became ready to be claimed.
        self.on_ready: Callable[[], None] = lambda: None
        # Called when something is due earlier than before.
        self.on_due: Callable[[], None] = lambda: None
        self._load()

    # -- start

    def _load(self) -> None:
        """Rebuild memory from the rows."""
        now = self.clock.wall_ms()
        self.finished.load(now, self.database.finished())
        for pair, application, namespace in self.database.pairs():
            self.index.add_pair(pair, application, namespace)
            self.counts[pair] = [0] * 5
        for source in self.database.sources():
            id, topic, partition, start, next_, covered = source
            self._sources[id] = Source(id, topic, partition, start, next_, covered)
            self._source_ids[topic, partition] = id
        for pair, status, rows, size in self.database.counts():
            self.counts[pair][status] = rows
            self.rows += rows
            self.bytes += size
            if status == Status.PENDING:
                self.index.pairs[pair].spilled = rows
                self._low.add(pair)
        for seq, status, id, source, offset in self.database.keys():
            id_hash = hash_id(id)
            self.live[id_hash] = seq
            if status == Status.FORWARDING:
                self._outbox.append(seq)
            if source != NO_SOURCE and offset >= self._sources[source].covered:
                self._sources[source].uncovered.append((offset, seq, id_hash))
        for loaded in self._sources.values():
            loaded.uncovered = deque(sorted(loaded.uncovered))
        mono = self.clock.mono_ms()
        for row in self.database.processing():
            row.id_hash = hash_id(row.id)
            row.lease_until = mono + row.deadline_ms + self.limits.lease_ms
            self.resident[row.seq] = row
            self.leases.add(row)
        self.books = self.database.books()
        self.dead_letters_resting = self.database.dead_letter_count()
        self._stamp = self.database.last_ready_at() + 1
        self._next_wake_at = self.database.next_wake_at(0)

    # -- the tick

    async def run(self) -> None:
        """Write ticks until ``stop``; a failed tick stops the store for good.

        Raises what the database raised: nothing after it was acknowledged.
        """
        while self.work_waits() or not self._stopping:
            await self._wake.wait()
            self._wake.clear()
            while self.work_waits():
                await self.tick()

    async def tick(self) -> None:
        """Write what has gathered in one transaction, then let out what depended on it."""
        batch, done, intakes = self._take_batch()
        self._writing = done
        try:
            written = await self._handoff(self.database.write, batch)
            self._committed(batch, written, intakes)
        except BaseException as error:
            self._fail(error, done, intakes)
            raise
        self._writing = None
        if not done.done():
            done.set_result(None)

    def stop(self) -> None:
        """Write what is gathered, then return from ``run``. No new rows are accepted."""
        self._stopping = True
        self._wake.set()

    def work_waits(self) -> bool:
        """Whether the next tick would do anything."""
        return bool(self._batch) or bool(self._intake) or self._due_now() or bool(self._low_pairs())

    def _due_now(self) -> bool:
        due = self._next_wake_at is not None and self._next_wake_at <= self.clock.wall_ms()
        return due and not self._stopping

    def _low_pairs(self) -> list[PairQueue]:
        if self._stopping:
            return []
        queues = (self.index.pairs[pair] for pair in self._low)
        return [q for q in queues if q.spilled and not q.paging and len(q.ready) < LOW_WATER_ROWS]

    def _take_batch(self) -> tuple[Batch, asyncio.Future[None], list[_Intake]]:
        batch, done = self._batch, self._done or asyncio.get_running_loop().create_future()
        self._stamp_batch(batch)
        self._resolve_reports(batch)
        if self._due_now():
            batch.due_at = self.clock.wall_ms()
            self._next_wake_at = None
        intakes: list[_Intake] = []
        while self._intake and (not intakes or len(batch.rows) < self.limits.batch_rows_max):
            intake = self._intake.popleft()
            intakes.append(intake)
            self._prepare(intake, batch)
        for queue in self._low_pairs():
            rows, size = self.index.room(queue)
            queue.paging = True
            batch.pages.append(
                PageRequest(
                    queue.pair,
                    queue.tail_ready_at,
                    queue.tail_seq,
                    min(rows, PAGE_ROWS_MAX),
                    min(size, PAGE_BYTES_MAX),
                )
            )
        self._low.clear()
        for key, n in batch.books.items():
            self.books[key] = self.books.get(key, 0) + n
        self._stamp = batch.stamp + (2 if batch.reenters() else 0)
        self._batch, self._done = Batch(), None
        return batch, done, intakes

    def _stamp_batch(self, batch: Batch) -> int:
        if not batch.stamp:
            batch.stamp = max(self.clock.wall_ms(), self._stamp)
        return batch.stamp

    def _resolve_reports(self, batch: Batch) -> None:
        """Reports on rows that memory took in since they arrived are decided against memory."""
        cold = []
        for report in batch.reports:
            row = self.resident.get(report.seq)
            if row is None:
                cold.append(report)
            else:
                self._apply_report(row, report)
        batch.reports = cold

    def _apply_report(self, row: Activation, report: Report) -> None:
        if (report.claim is None or report.claim == row.claim) and row.status in report.only:
            if report.max_attempts is not None:
                row.max_attempts = report.max_attempts
            self._change(
                row, report.event, report.now, report.retry_delay_ms, report.error, report.outcome
            )
            report.answer = Answer.APPLIED

    def _prepare(self, intake: _Intake, batch: Batch) -> None:
        """New rows get their place in the order, in memory if there is room."""
        for row in intake.rows:
            batch.count(row.pair, "accepted")
            if row.status is Status.PENDING:
                row.ready_at = batch.stamp
                if not self.index.reserve(self.index.pairs[row.pair], row):
                    self._low.add(row.pair)
            batch.rows.append(row)
        for source_id, next_ in intake.taken.items():
            source = self._sources[source_id]
            if next_ > source.next:
                source.next = next_
            self._write_source(source, batch)

    def _committed(self, batch: Batch, written: Written, intakes: list[_Intake]) -> None:
        """What the tick wrote becomes visible: index first, then everybody who waits for it."""
        for row in batch.rows:
            if row.status is Status.PENDING:
                if not row.spilled:
                    self._enter(row)
                if row.expires_at is not None:
                    self._wake_earlier(row.expires_at)
            elif row.status is Status.FORWARDING:
                self._outbox.append(row.seq)
            else:
                self._wake_earlier(wake_at(row.status, row.ready_at, row.expires_at))
        for report in batch.reports:
            self._reported(report)
        for pair, rows in written.due.items():
            counts = self.counts[pair]
            counts[Status.DELAYED] -= rows
            counts[Status.PENDING] += rows
            self.index.pairs[pair].spilled += rows
            self._low.add(pair)
        self._waking = False
        self._wake_earlier(written.next_wake_at)
        self._expire(written.expired)
        for then in batch.then:
            then()
        for pair, paged in written.pages.items():
            self._paged(self.index.pairs[pair], paged)
        for intake in intakes:
            if not intake.stored.done():
                intake.stored.set_result(None)
        if batch.moves or batch.rows or batch.reports:
            self._notify_outbox()
        self._check_room()
        if self.index.rows:
            self.on_ready()
        self.on_due()

    def _reported(self, report: Report) -> None:
        row, change = report.row, report.change
        if row is None or change is None:
            return
        row.id_hash = hash_id(row.id)
        self._count_change(row, change)
        if row.status is Status.PENDING:
            self.index.pairs[row.pair].spilled -= 1
        self._hold(row)
        if change.status is Status.GONE:
            self._left(row, last_of(row, report.outcome))
            self.books[row.pair, change.term] = self.books.get((row.pair, change.term), 0) + 1
        elif change.status is Status.PENDING:
            self.index.pairs[row.pair].spilled += 1
            self._low.add(row.pair)
        elif change.status is Status.FORWARDING:
            self._outbox.append(row.seq)
        elif change.status is Status.DELAYED:
            self._wake_earlier(change.ready_at)

    def _expire(self, seqs: Iterable[int]) -> None:
        now = self.clock.wall_ms()
        for seq in seqs:
            row = self.resident.get(seq)
            if row is None:
                only = frozenset((Status.PENDING, Status.DELAYED))
                self._report(Report(Event.EXPIRE, now, seq, only=only))
            elif row.status is Status.PENDING:
                self._change(row, Event.EXPIRE, now)

    def _paged(self, queue: PairQueue, rows: list[Activation]) -> None:
        queue.paging = False
        if not rows and queue.spilled:
            raise AssertionError(
                f"{queue.spilled} pending rows of {queue.application}/{queue.namespace} are in no page of the rows"
            )
        for row in rows:
            row.id_hash = hash_id(row.id)
            # What was dropped while the page was read is counted there.
            if self.live.get(row.id_hash) == row.seq:
                self.index.page_in(queue, row)
                self._enter(row)
        if queue.spilled:
            self._low.add(queue.pair)

    def _enter(self, row: Activation) -> None:
        """A stored row whose room is reserved takes its place in the order of hand-out."""
        queue = self.index.pairs[row.pair]
        if self.live.get(row.id_hash) != row.seq:
            self.index.unreserve(queue, row)
            return
        self.resident[row.seq] = row
        self.index.enter(queue, row, self._ready_to_start(row))

    def _ready_to_start(self, row: Activation) -> bool:
        """An at-most-once row waits, outside the order, until nobody else can read it again."""
        if not row.at_most_once or row.source == NO_SOURCE:
            return True
        source = self._sources[row.source]
        if source.is_covered(row.offset):
            return True
        source.held_starts.append(row)
        return False

    def _start_covered(self, row: Activation) -> None:
        queue = self.index.pairs[row.pair]
        if row.status is Status.PENDING:
            self.index.enter(queue, row)
            asyncio.get_running_loop().call_soon(self.on_ready)
        else:
            self.index.unreserve(queue, row)

    def _fail(self, error: BaseException, done: asyncio.Future[None], intakes: list[_Intake]) -> None:
        """Fail-stop: nothing that depends on a tick that did not happen is answered."""
        self.failure = error
        self._stopping = True
        waiting = [done, *(i.stored for i in intakes), *(i.stored for i in self._intake)]
        if self._done is not None:
            waiting.append(self._done)
        for future in waiting:
            if not future.done():
                future.set_exception(StoreStopped("the store has stopped"))
                future.exception()

    def committed(self) -> Awaitable[None]:
        """Resolves when everything done so far is durable. Raises StoreStopped when it will not be."""
        if self.failure is not None:
            raise StoreStopped("the store has stopped")
        if self._batch or self._intake:
            if self._done is None:
                self._done = asyncio.get_running_loop().create_future()
            self._wake.set()
            return asyncio.shield(self._done)
        if self._writing is not None:
            return asyncio.shield(self._writing)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def wake(self) -> None:
        """A delay or an expiry is due: look at it in the next tick."""
        self._waking = True
        self._wake.set()

    # -- insert

    def room(self) -> int:
        """Rows that may still be accepted; 0 while the intake is paused."""
        rows = self.limits.rows_max - self.rows
        if self._stopping or rows <= 0 or self.bytes >= self.limits.bytes_max:
            self._paused = self._paused or ("bytes" if rows > 0 else "rows")
            return 0
        return 0 if self._paused else rows

    def intake_state(self) -> tuple[str, str]:
        """("OPEN" or "PAUSED", the limit that is reached)."""
        self.room()
        return ("PAUSED", self._paused) if self._paused else ("OPEN", "")

    def on_room(self, callback: Callable[[], None]) -> None:
        """Call back when a paused intake has room again."""
        self._on_room.append(callback)

    def _check_room(self) -> None:
        if not self._paused or self._stopping:
            return
        limits = self.limits
        if self.rows <= limits.rows_max * 19 // 20 and self.bytes <= limits.bytes_max * 19 // 20:
            self._paused = ""
            for callback in self._on_room:
                callback()

    def known(self, id: str) -> bool:
        """Whether an id is in flight here or was within the de-duplication window."""
        id_hash = hash_id(id)
        return id_hash in self.live or self.finished.get(id_hash) is not None

    def insert(
        self, activations: Sequence[Activation], taken: Mapping[int, int] | None = None
    ) -> asyncio.Future[None]:
        """Accept activations, in order; resolves when they are durable.

        An id that is here, or was within the window, is absorbed and counted. ``taken``: source id ->
        next offset, stored in the same transaction. The limits are the caller's to keep (``room``).
        """
        if self.failure is not None or self._stopping:
            raise StoreStopped("the store has stopped")
        now = self.clock.wall_ms()
        rows = [row for row in activations if self._accept(row, now)]
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._intake.append(_Intake(rows, taken or {}, stored))
        self._wake.set()
        return stored

    def _accept(self, row: Activation, now: int) -> bool:
        id_hash = row.id_hash = hash_id(row.id)
        if row.id and (id_hash in self.live or self.finished.get(id_hash) is not None):
            self.tally.duplicates += 1
            return False
        queue = self._queue_of(row)
        row.pair = queue.pair
        row.seq = self._next_seq
        self._next_seq += 1
        if row.status is not Status.FORWARDING and row.expires_at is not None and row.expires_at <= now:
            change = decide(row, Event.EXPIRE, now, self.limits.lifecycle)
            row.status, row.reason = change.status, change.reason
            if change.status is Status.GONE:
                self._count(queue.pair, "accepted")
                self._count(queue.pair, change.term)
                value = pack(0, OUTCOMES[Event.EXPIRE])
                self.finished.add(now, id_hash, value)
                self._batch.finished.extend((id_hash, value))
                return False
        self.live[id_hash] = row.seq
        self.counts[queue.pair][row.status] += 1
        self.rows += 1
        self.bytes += row.size
        if row.source != NO_SOURCE:
            self._sources[row.source].uncovered.append((row.offset, row.seq, id_hash))
        return True

    def _queue_of(self, row: Activation) -> PairQueue:
        queue = self.index.pair(row.application, row.namespace)
        if queue is not None:
            return queue
        if len(self.counts) >= PAIRS_MAX:
            row.status, row.reason = Status.FORWARDING, Reason.INVALID
            row.error = f"namespace {row.namespace!r} of {row.application!r}: more than {PAIRS_MAX} namespaces here"
            row.application = row.namespace = ""
            if (queue := self.index.pair("", "")) is not None:
                return queue
        pair = len(self.counts) + 1
        self._batch.new_pairs.append((pair, row.application, row.namespace))
        self.counts[pair] = [0] * 5
        return self.index.add_pair(pair, row.application, row.namespace)

    # -- claim

    def claim(
        self,
        application: str | None,
        namespaces: tuple[str, ...],
        rows_max: int,
        bytes_max: int,
        tokenless: bool = False,
    ) -> list[Activation]:
        """Claim the next rows for a worker. Their lease starts now; a client without tokens has
        no heartbeat, so its lease ends after the deadline and the grace.

        A row whose ``at_most_once`` is set may be handed out once ``committed`` resolves. The
        caller drops the body of a row when it has been sent.
        """
        claimed: list[Activation] = []
        now, mono = self.clock.wall_ms(), self.clock.mono_ms()
        while len(claimed) < rows_max and bytes_max > 0:
            taken = self.index.take(application, namespaces, rows_max - len(claimed), bytes_max)
            if not taken:
                break
            for row in taken:
                bytes_max -= row.size
                self._low.add(row.pair)
                if row.expires_at is not None and row.expires_at <= now:
                    self._change(row, Event.EXPIRE, now)
                    continue
                self._count_change(row, decide(row, Event.CLAIM, now, self.limits.lifecycle))
                row.status = Status.PROCESSING
                row.claim_epoch = self.epoch
                row.tokenless = tokenless
                row.started = 0
                row.lease_until = mono + (
                    row.deadline_ms + self.limits.grace_ms if tokenless else self.limits.lease_ms
                )
                self.leases.add(row)
                self._batch.claims.append(row.seq)
                claimed.append(row)
        if claimed:
            self._wake.set()
        return claimed

    def holds(self, seq: int, claim: int) -> bool:
        """Whether that claim is still the row's."""
        row = self.resident.get(seq)
        return row is not None and row.status is Status.PROCESSING and row.claim == claim

    def release(self, rows: Iterable[Activation]) -> None:
        """Claims that were not handed out after all go back."""
        for row in rows:
            if row.status is Status.PROCESSING:
                self._change(row, Event.RELEASE, self.clock.wall_ms())

    # -- settle

    def settle(
        self,
        token: ClaimToken,
        event: Event,
        now: int,
        retry_delay_ms: int | None = None,
        error: str | None = None,
    ) -> Answer | Report:
        """Report an outcome, or give back, under a claim token.

        An answer may be told once ``committed`` resolves and ``covered`` says so; a Report has its
        answer only when committed.
        """
        if self.database.nonces.get(token.epoch) != token.nonce:
            return Answer.UNKNOWN
        row = self.resident.get(token.seq)
        if row is None:
            return self._settle_absent(token, event, now, retry_delay_ms, error)
        if row.claim != token.claim:
            same = row.claim == token.claim + 1 and row.last_outcome == OUTCOMES[event]
            return Answer.DUPLICATE if same else Answer.STALE
        if row.status is Status.PROCESSING:
            if row.claim_epoch != token.epoch:
                return Answer.STALE
        elif token.epoch == self.epoch:
            return Answer.STALE
        self._change(row, event, now, retry_delay_ms, error, OUTCOMES[event])
        return Answer.APPLIED

    def _settle_absent(
        self, token: ClaimToken, event: Event, now: int, retry_delay_ms: int | None, error: str | None
    ) -> Answer | Report:
        if self.live.get(token.id_hash) == token.seq:
            return self._report(
                Report(
                    event,
                    now,
                    token.seq,
                    token.claim,
                    OUTCOMES[event],
                    retry_delay_ms=retry_delay_ms,
                    error=error,
                )
            )
        last = self.finished.get(token.id_hash)
        if last is not None and unpack(last) == (token.claim, OUTCOMES[event]):
            return Answer.DUPLICATE
        return Answer.STALE

    def settle_by_id(
        self,
        id_hash: int,
        event: Event,
        now: int,
        max_attempts: int | None = None,
        retry_delay_ms: int | None = None,
    ) -> Answer | Report:
        """Report an outcome by the hash of an id, for clients without tokens (taskbroker v1).

        COMPLETE settles what is processing or pending; RETRY and FAIL only what is processing under
        a claim without token, or pending because a restart lost its claim.
        """
        seq = self.live.get(id_hash)
        if seq is None:
            return Answer.UNKNOWN
        only = frozenset((Status.PROCESSING, Status.PENDING))
        forgotten = seq >> SEQ_BITS < self.epoch
        row = self.resident.get(seq)
        if row is None:
            if event is not Event.COMPLETE and not forgotten:
                return Answer.STALE
            return self._report(
                Report(
                    event,
                    now,
                    seq,
                    outcome=OUTCOMES[event],
                    only=only,
                    retry_delay_ms=retry_delay_ms,
                    max_attempts=max_attempts,
                )
            )
        if event is not Event.COMPLETE:
            restored = row.status is Status.PROCESSING and row.claim_epoch < self.epoch
            allowed = row.tokenless or restored or (row.status is Status.PENDING and forgotten)
            if not allowed:
                return Answer.STALE
        if max_attempts is not None:
            row.max_attempts = max_attempts
        self._change(row, event, now, retry_delay_ms, outcome=OUTCOMES[event])
        return Answer.APPLIED

    def extend(self, token: ClaimToken, started: bool) -> Answer:
        """A heartbeat: APPLIED when the claim is held, from now for another lease.

        The deadline counts from the first heartbeat that says ``started``; past it and the grace
        the lease is no longer extended, whatever the worker says.
        """
        if self.database.nonces.get(token.epoch) != token.nonce:
            return Answer.UNKNOWN
        row = self.resident.get(token.seq)
        if row is None or row.claim != token.claim:
            return Answer.STALE
        mono = self.clock.mono_ms()
        lease_until = mono + self.limits.lease_ms
        if row.status is Status.PENDING and token.epoch < self.epoch:
            return self._reclaim(row, token, lease_until)
        if row.status is not Status.PROCESSING or row.claim_epoch != token.epoch:
            return Answer.STALE
        if started and not row.started:
            row.started = mono
        if not row.started or mono <= row.started + row.deadline_ms + self.limits.grace_ms:
            row.lease_until = lease_until
        return Answer.APPLIED

    def _reclaim(self, row: Activation, token: ClaimToken, lease_until: int) -> Answer:
        """A claim that a restart had forgotten is re-established by its worker's heartbeat."""
        claimed = copy.copy(row)
        self._void(row)
        self._count_change(
            claimed, decide(claimed, Event.CLAIM, self.clock.wall_ms(), self.limits.lifecycle)
        )
        claimed.status = Status.PROCESSING
        claimed.claim_epoch = token.epoch
        claimed.lease_until = lease_until
        claimed.body = None
        self.resident[claimed.seq] = claimed
        self.leases.add(claimed)
        self._batch.calls.append(lambda database: database.reclaim(claimed.seq, token.epoch))
        self._wake.set()
        return Answer.APPLIED

    def lapse(self, mono: int) -> int:
        """Claims whose worker has vanished go back or to the dead letters. How many."""
        now, lapsed = self.clock.wall_ms(), 0
        for row in self.leases.lapsed(mono):
            evidence = '{"type":"lease lost","message":"no heartbeat and no report in time"}'
            self._change(row, Event.LEASE_LOST, now, error=evidence)
            lapsed += 1
        return lapsed

    def postpone_leases(self, gap_ms: int) -> None:
        """The broker itself stood still: no claim is judged for that time."""
        for row in self.resident.values():
            if row.status is Status.PROCESSING:
                row.lease_until += gap_ms

    async def covered(self, id_hash: int) -> bool:
        """Wait until no other broker could run again what was reported on. False: one does."""
        held = self._held.get(id_hash)
        return True if held is None else await self.cover_waits.wait(*held)

    def is_held(self, id_hash: int) -> bool:
        return id_hash in self._held

    def _change(
        self,
        row: Activation,
        event: Event,
        now: int,
        retry_delay_ms: int | None = None,
        error: str | None = None,
        outcome: int = 0,
    ) -> None:
        """One event on a row that memory holds. It leaves memory, whatever becomes of it.

        ``outcome``: the number of what was reported; 0 for what time or the broker causes.
        """
        change = decide(row, event, now, self.limits.lifecycle, retry_delay_ms)
        batch = self._batch
        self.tally.lost += change.lost - row.lost
        self._count_change(row, change)
        self._hold(row)
        if change.status is Status.GONE:
            batch.gone.append(row.seq)
            if row.size > INLINE_BODY_BYTES_MAX:
                batch.gone_payloads.append(row.seq)
            last = last_of(row, outcome)
            batch.finished.extend((row.id_hash, last))
            self._count(row.pair, change.term)
            self._left(row, last)
        else:
            ready_at = change.ready_at
            if change.status is Status.PENDING:
                ready_at = self._stamp_batch(batch) + 1
                self.index.pairs[row.pair].spilled += 1
                self._low.add(row.pair)
            batch.moves.append(move(row, change, outcome, ready_at, error))
            if change.status is Status.FORWARDING:
                self._outbox.append(row.seq)
            elif change.status is Status.DELAYED:
                self._wake_earlier(ready_at)
            elif row.expires_at is not None:
                self._wake_earlier(row.expires_at)
        self._void(row)
        self._wake.set()

    def _void(self, row: Activation) -> None:
        """Memory forgets a row; a place it still has in the order is void."""
        del self.resident[row.seq]
        row.status = Status.GONE
        row.body = None

    def _left(self, row: Activation, last: int) -> None:
        self.live.pop(row.id_hash, None)
        self.finished.add(self.clock.wall_ms(), row.id_hash, last)
        self.rows -= 1
        self.bytes -= row.size

    def _hold(self, row: Activation) -> None:
        if row.source != NO_SOURCE:
            source = self._sources[row.source]
            if not source.is_covered(row.offset):
                self._held[row.id_hash] = (source, row.offset)

    def _report(self, report: Report) -> Report:
        self._batch.reports.append(report)
        self._wake.set()
        return report

    def _count(self, pair: int, term: str, n: int = 1) -> None:
        self._batch.count(pair, term, n)

    def _count_change(self, row: Activation, change: Change) -> None:
        counts = self.counts[row.pair]
        counts[row.status] -= 1
        if change.status is not Status.GONE:
            counts[change.status] += 1

    # -- time

    def next_wake_at(self) -> int | None:
        """Wall clock (epoch ms) at which a delay or an expiry is due; None while a tick looks at it."""
        return None if self._waking else self._next_wake_at

    def _wake_earlier(self, at: int | None) -> None:
        if at is not None and (self._next_wake_at is None or at < self._next_wake_at):
            self._next_wake_at = at

    def forget_finished(self) -> None:
        """Drop what is outside the de-duplication window."""
        before = self.finished.forget(self.clock.wall_ms())
        if before is not None:
            self._batch.calls.append(lambda database: database.forget_finished(before))
            self._wake.set()

    # -- sources and cover

    def source(self, topic: str, partition: int) -> Source:
        """The record of a topic partition, made on first use."""
        id = self._source_ids.get((topic, partition))
        if id is None:
            id = len(self._sources) + 1
            self._source_ids[topic, partition] = id
            self._sources[id] = Source(id, topic, partition)
            self._write_source(self._sources[id], self._batch)
        return self._sources[id]

    def sources(self) -> Iterable[Source]:
        return self._sources.values()

    def begin_range(self, source: Source, start: int) -> None:
        """This broker reads the partition from ``start`` on: a new range."""
        source.start = source.next = start
        self._write_source(source, self._batch)

    def cover(self, source: Source, offset: int) -> None:
        """An acknowledged commit of this broker passed everything below ``offset``."""
        for id_hash in self.cover_waits.advance(source, offset):
            self._held.pop(id_hash, None)
        self._write_source(source, self._batch)

    def _write_source(self, source: Source, batch: Batch) -> None:
        batch.sources[source.id] = (
            source.topic,
            source.partition,
            source.start,
            source.next,
            source.covered,
        )

    def drop_uncovered(self, source: Source, boundary: int) -> asyncio.Future[int]:
        """Uncovered rows at or above ``boundary`` are read again by another broker: forget them here.

        Resolves to how many were dropped; reports on them are STALE.
        """
        boundary = max(boundary, source.covered)
        for row in source.held_starts:
            if row.offset >= boundary:
                self.index.unreserve(self.index.pairs[row.pair], row)
        dropped = self.cover_waits.drop(source, boundary)
        self._write_source(source, self._batch)
        seqs = array("q")
        for seq, id_hash in dropped:
            self._held.pop(id_hash, None)
            if self.live.get(id_hash) == seq:
                del self.live[id_hash]
                seqs.append(seq)
        result: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        queued = self._drop_queued(source, boundary)
        in_order = {seq for seq in seqs if seq in self.resident}
        for seq in in_order:
            self._void(self.resident[seq])
        rows: list[Activation] = []

        def delete(database: Database) -> None:
            rows.extend(database.load(seqs))
            gone = array("q", (row.seq for row in rows))
            database.delete(gone, gone)

        def count() -> None:
            for row in rows:
                self._forget(row)
                self._count(row.pair, "dropped")
                if row.status is Status.PENDING and row.seq not in in_order:
                    self.index.pairs[row.pair].spilled -= 1
            self.tally.dropped += len(rows) + queued
            if not result.done():
                result.set_result(len(rows) + queued)

        self._batch.calls.append(delete)
        self._batch.then.append(count)
        self._wake.set()
        return result

    def _drop_queued(self, source: Source, boundary: int) -> int:
        """Rows that wait for their first tick are dropped before it."""
        dropped = 0
        for intake in self._intake:
            mine = [r for r in intake.rows if r.source == source.id and r.offset >= boundary]
            if mine:
                intake.rows = [r for r in intake.rows if r not in mine]
            if intake.taken.get(source.id, 0) > boundary:
                intake.taken = {**intake.taken, source.id: boundary}
            for row in mine:
                self._forget(row)
            dropped += len(mine)
        return dropped

    def _forget(self, row: Activation) -> None:
        self.counts[row.pair][row.status] -= 1
        self.rows -= 1
        self.bytes -= row.size

    # -- outbox

    def outbox_size(self) -> int:
        """Rows that must leave through the log, those in its hands included."""
        return sum(counts[Status.FORWARDING] for counts in self.counts.values())

    def on_outbox(self, callback: Callable[[], None]) -> None:
        """Call back when rows wait to be forwarded."""
        self._on_outbox.append(callback)

    def _notify_outbox(self) -> None:
        if self._outbox:
            for callback in self._on_outbox:
                callback()

    async def take_outbox(self, limit: int) -> list[Activation]:
        """Rows to forward, oldest first, with their bodies; each is handed out once until returned."""
        seqs = [self._outbox.popleft() for _ in range(min(limit, len(self._outbox)))]
        rows = await self.load(seqs)
        for row in rows:
            row.id_hash = hash_id(row.id)
        return rows

    def return_outbox(self, rows: Sequence[Activation]) -> None:
        """Not acknowledged: they will be taken again."""
        self._outbox.extendleft(row.seq for row in reversed(rows))

    def forwarded(self, rows: Sequence[Activation]) -> asyncio.Future[None]:
        """The log acknowledged these: they leave. Resolves when durable."""
        now = self.clock.wall_ms()
        for row in rows:
            self.resident[row.seq] = row
            self._change(row, Event.FORWARDED, now)
        return asyncio.ensure_future(self.committed())

    def rest_dead_letters(self, rows: Sequence[Activation]) -> asyncio.Future[None]:
        """Keep dead letters that cannot leave through Kafka in the store, with their story.

        Beyond the bound they stay in the outbox.
        """
        room = max(0, self.limits.dead_letters_rest_max - self.dead_letters_resting)
        rest = list(rows[:room])
        self.return_outbox(rows[room:])
        self.dead_letters_resting += len(rest)
        now = self.clock.wall_ms()
        letters = [(r.seq, now, r.pair, r.id, r.taskname, r.reason, self._story(r), r.body) for r in rest]
        self._batch.calls.append(lambda database: database.rest_dead_letters(letters))
        return self.forwarded(rest)

    def _story(self, row: Activation) -> str:
        source = self._sources.get(row.source)
        return json.dumps(
            {
                "topic": source.topic if source else None,
                "partition": source.partition if source else None,
                "offset": row.offset if source else None,
                "attempts": row.attempts,
                "deliveries_lost": row.lost,
                "received_at": row.received_at,
                "error": json.loads(row.error) if row.error else None,
            }
        )

    # -- reading

    async def load(self, seqs: Sequence[int]) -> list[Activation]:
        """Rows with their bodies, read in the writer's order."""
        return await self.read(lambda database: database.load(seqs)) if seqs else []

    async def read(self, query: Callable[[Database], T]) -> T:
        """Run a bounded query in the next tick."""
        result: list[T] = []
        self._batch.calls.append(lambda database: result.append(query(database)))
        await self.committed()
        return result[0]

    def pending(self) -> list[tuple[str, str, int]]:
        """(application, namespace, pending rows) of every pair that has any."""
        return [
            (q.application, q.namespace, self.counts[q.pair][Status.PENDING])
            for q in self.index.pairs.values()
            if self.counts[q.pair][Status.PENDING]
        ]

    def imbalance(self) -> int:
        """Accepted minus ended minus in flight, over all namespaces: 0 unless something is lost."""
        accepted = sum(len(intake.rows) for intake in self._intake)
        ended = 0
        for books in (self.books, self._batch.books):
            for (_, term), n in books.items():
                if term == "accepted":
                    accepted += n
                else:
                    ended += n
        return accepted - ended - self.rows
