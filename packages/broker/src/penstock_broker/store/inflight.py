"""The inflight store: the domain verbs, on the event loop.

A verb decides by the lifecycle against memory, changes memory, and adds the write to the tick that
is being gathered. What it answers may leave the broker once that tick is committed.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import structlog

from penstock_broker.clock import Clock
from penstock_broker.domain.activation import (
    CONTENT_BITS,
    CONTENT_MASK,
    DELAYED,
    FORWARDING,
    GONE,
    NO_SOURCE,
    PENDING,
    PROCESSING,
    Activation,
    Reason,
    hash_id,
)
from penstock_broker.domain.conflict import in_conflict, refuse_conflict
from penstock_broker.domain.lifecycle import OUTCOMES, Event, decide
from penstock_broker.domain.token import ClaimToken
from penstock_broker.store.batch import Answer, Report, keep_said, repeated
from penstock_broker.store.control import Control
from penstock_broker.store.database import HEARTBEATS_OF, Database
from penstock_broker.store.finished import (
    has_ended,
    is_elsewhere,
    is_report,
    last_of,
    place,
    taken_elsewhere,
)
from penstock_broker.store.index import PairQueue
from penstock_broker.store.limits import StoreLimits
from penstock_broker.store.memory import Memory
from penstock_broker.store.outbox import Outbox
from penstock_broker.store.partitions import Source
from penstock_broker.store.refusals import Refusals
from penstock_broker.store.unclaimable import Unclaimable
from penstock_broker.store.writer import Handoff, StoreStopped, Writer

log = structlog.get_logger("store")

T = TypeVar("T")

# A sequence number is the boot epoch and a count: unique over restarts without being stored.
SEQ_BITS = 36
PAIRS_MAX = 10_000
# Rows that one claim passes over because the worker has given them back (beyond it gets them again), or
# because they may start at most once (beyond it gets no others).
PASSED_ROWS_MAX = 64
# A namespace of which nothing has met the overflow for so long is out of it.
OVERFLOW_CALM_MS = 10_000

# Why the intake pauses -> how it is said.
_LIMITS = {"rows": "max_pending_count", "bytes": "pending_bytes_max", "disk": "the disk is full or fails"}

_LEASE_LOST = '{"type":"lease lost","message":"no heartbeat and no report in time"}'


class Inflight:
    """Every method is called on the event loop; ``writer.run`` hands ticks to the database."""

    def __init__(self, database: Database, clock: Clock, limits: StoreLimits, handoff: Handoff) -> None:
        self.database = database
        self.clock = clock
        self.limits = limits
        self.epoch = database.epoch
        self.store_id = database.store_id
        self.memory = Memory(database, clock, limits)
        self.writer = Writer(self.memory, handoff)
        self.outbox = Outbox(self.memory, self.writer)
        self.refusals = Refusals()
        self.unclaimable = Unclaimable(self.memory, limits.unclaimable_ms)
        self.control = Control(self.memory, self.writer)
        self._next_seq = self.epoch << SEQ_BITS
        self._paused = ""
        self._on_room: list[Callable[[], None]] = []
        # Pairs that hold their share.
        self._overflowing: set[int] = set()
        # Given the monotonic time before anything is handed out.
        self.before_claim: list[Callable[[int], None]] = []
        # Whether anything is taken in, and whether anything is handed out: a broker that is drained does
        # neither.
        self.taking = self.claiming = True
        # Awaited before an at-most-once claim is handed out: resolves when the ledger has it.
        self.recorded: Callable[[], Awaitable[None]] = self.committed
        self.writer.on_committed += [self._check_room, self._check_shares]
        self.writer.on_trouble.append(self._tell_room)

    def committed(self) -> asyncio.Future[None]:
        """Resolves when everything done so far is durable. Raises StoreStopped when it will not be."""
        return self.writer.committed()

    def answerable(self, durable: Awaitable[None]) -> asyncio.Future[None]:
        """``durable`` (of ``committed`` or ``insert``) for a caller who can repeat: it raises DiskFailing as
        soon as the disk fails. What was asked for may happen all the same, once it recovers."""
        return self.writer.answerable(durable)

    def watch_disk(self) -> None:
        """Look at the free space, also when nothing is written."""
        self.memory.batch.calls.append(lambda database: None)
        self.memory.work.set()

    def require_disk(self) -> None:
        """Raises DiskFailing while the disk takes nothing."""
        if self.writer.trouble is not None:
            raise self.writer.trouble

    # -- limits

    def room(self) -> int:
        """Rows that may still be accepted; 0 while the intake is paused."""
        rows = self.limits.rows_max - self.memory.rows
        if not self._paused and (limit := self._limit_reached(rows)):
            self._paused = limit
            log.warning(
                "intake paused: a limit is reached",
                limit=_LIMITS[limit],
                rows=self.memory.rows,
                bytes=self.memory.bytes,
            )
        return rows if self.taking and not (self._paused or self.writer.stopping) else 0

    def _limit_reached(self, rows: int) -> str:
        if self.disk_fails:
            return "disk"
        if rows <= 0:
            return "rows"
        return "bytes" if self.memory.bytes >= self.limits.bytes_max else ""

    def limit(self) -> str:
        """The limit that is reached, as a setting or what else it is; empty: none."""
        self.room()
        return _LIMITS.get("disk" if self.disk_fails else self._paused, "")

    @property
    def disk_fails(self) -> bool:
        """Whether the disk is full, nearly so, or fails."""
        return self.memory.disk_low or self.writer.trouble is not None

    def intake_state(self) -> tuple[str, str]:
        """("OPEN" or "PAUSED", the limit that is reached, or "drain")."""
        if not self.taking:
            return ("PAUSED", "drain")
        self.room()
        return ("PAUSED", self._paused) if self._paused else ("OPEN", "")

    def on_room(self, callback: Callable[[], None]) -> None:
        """Call back when a paused intake has room again (a twentieth of the limit), or the disk fails."""
        self._on_room.append(callback)

    def _check_room(self) -> None:
        if self.memory.disk_low and not self._paused:
            self._tell_room()
        if not self._paused or self.memory.disk_low:
            return
        rows, size = self.limits.rows_max * 19 // 20, self.limits.bytes_max * 19 // 20
        if self.memory.rows <= rows and self.memory.bytes <= size:
            self._paused = ""
            log.info("intake open again", rows=self.memory.rows, bytes=self.memory.bytes)
            self._tell_room()

    def _tell_room(self) -> None:
        for callback in self._on_room:
            callback()

    # -- insert

    def content_of(self, id: str) -> int | None:
        """The content of the activation with this id that is in flight here or was within the
        de-duplication window; None when there is none."""
        return self._content_of(hash_id(id))

    def _content_of(self, id_hash: int) -> int | None:
        known = self.memory.live.get(id_hash)
        if known is None:
            known = self.memory.finished.get(id_hash)
        return None if known is None else known & CONTENT_MASK

    def insert(
        self,
        activations: Sequence[Activation],
        taken: Mapping[int, int] | None = None,
        term: str = "accepted",
        progress: tuple[str, int] | None = None,
    ) -> asyncio.Future[None]:
        """Accept activations, in order; resolves when they are durable.

        One that is here, or was within the window, is absorbed and counted; another one with its id is
        in conflict with it, and becomes a dead letter. ``taken``: source id ->
        next offset, stored in the same transaction, and so is ``progress``, a key of the meta and its value.
        ``term``: one of ARRIVALS. The limits are the caller's to keep (``room``). Raises StoreStopped.
        """
        if self.writer.stopping:
            raise StoreStopped
        now = self.clock.wall_ms()
        rows = [row for row in activations if self._accept(row, now, term)]
        return self.writer.add(rows, taken or {}, term, progress)

    def _accept(self, row: Activation, now: int, term: str) -> bool:
        """Number and count a row; False when there is nothing to store."""
        memory = self.memory
        if not row.id_hash:
            row.id_hash = hash_id(row.id)
        known = self._content_of(row.id_hash)
        if (known is not None or row.sent_on) and self._is_known(row, known, now, term):
            memory.tally.duplicates += 1
            return False
        queue = memory.latest
        if queue is None or queue.namespace != row.namespace or queue.application != row.application:
            queue = memory.latest = self._pair_of(row, now)
        row.pair = queue.pair
        row.seq = self._next_seq
        self._next_seq += 1
        expired = row.expires_at is not None and row.expires_at <= now
        if expired and row.status is not FORWARDING:
            change = decide(row, Event.EXPIRE, now, self.limits.lifecycle)
            row.status, row.reason, row.ready_at = change.status, change.reason, change.ready_at
            if change.status is GONE:
                memory.batch.count(row.pair, term)
                memory.batch.count(row.pair, change.term)
                last = last_of(row, 0)
                memory.finished.add(now, row.id_hash, last)
                memory.batch.finished.extend((row.id_hash, last))
                return False
        if row.status is not FORWARDING:
            # None can hold more than its share while all together do not.
            crowded = memory.rows >= memory.share_rows_max or memory.bytes >= memory.share_bytes_max
            if crowded and row.source != NO_SOURCE and memory.share_room(row.pair) <= 0:
                change = decide(row, Event.OVERFLOW, now, self.limits.lifecycle)
                row.status, row.reason = change.status, change.reason
                self._overflows(row.pair)
            else:
                memory.held_bytes[row.pair] += row.size
        memory.live[row.id_hash] = row.seq << CONTENT_BITS | row.content
        memory.counts[row.pair][row.status] += 1
        memory.rows += 1
        memory.bytes += row.size
        if row.source != NO_SOURCE:
            memory.partitions.took(row)
        return True

    def _is_known(self, row: Activation, known: int | None, now: int, term: str) -> bool:
        """Whether a row is absorbed: its id is ``known`` (the content that was seen under it), or a broker
        has sent it on. One in conflict becomes a dead letter."""
        if known is not None and term != "accepted" and self._was_elsewhere(row.id_hash):
            # This very one is restored, or adopted.
            known = None
        if known is not None and in_conflict(row, known):
            refuse_conflict(row, now)
            row.id_hash = hash_id(row.id)
            known = self._content_of(row.id_hash)
        return self._is_copy(row, now) if row.sent_on else known is not None

    def _was_elsewhere(self, id_hash: int) -> bool:
        """Whether an id that is known is so only because another broker has taken it."""
        return id_hash not in self.memory.live and self.memory.finished.left(id_hash) is None

    def _is_copy(self, row: Activation, now: int) -> bool:
        """Whether what a broker sent on is here already.

        Its id may be in the window, of this very broker, and even in the row that has just left: what
        came back from the log is what goes on, unless it has ended. A copy of it is known by the forward id.
        """
        memory, here = self.memory, place(row.source, row.offset)
        first = memory.finished.get(row.sent_on)
        if first not in (None, here) or has_ended(memory.finished.get(row.id_hash)):
            return True
        memory.finished.add(now, row.sent_on, here)
        entry = memory.live.get(row.id_hash)
        if entry is None or entry >> CONTENT_BITS in memory.forwarding:
            return False
        memory.batch.finished.extend((row.sent_on, here))
        return True

    def _overflows(self, pair: int) -> None:
        self.memory.overflowed_at[pair] = self.clock.mono_ms()
        if pair in self._overflowing:
            return
        self._overflowing.add(pair)
        queue = self.memory.index.pairs[pair]
        log.warning(
            "a namespace holds its share of the store (namespace_share_max); what more comes of it waits"
            " in the overflow topic, other namespaces go on",
            application=queue.application,
            namespace=queue.namespace,
            rows=sum(self.memory.counts[pair][PENDING:FORWARDING]),
            bytes=self.memory.held_bytes[pair],
        )

    def has_share_room(self, pair: int) -> bool:
        """Whether a namespace that was over its share has room again: a twentieth of it."""
        memory = self.memory
        size = memory.share_bytes_max - memory.held_bytes[pair]
        return memory.share_room(pair) * 20 >= memory.share_rows_max and size * 20 >= memory.share_bytes_max

    def _check_shares(self) -> None:
        if not self._overflowing:
            return
        # While its overflow is worked off it has room and holds its share by turns, many times a second.
        calm, at = self.clock.mono_ms() - OVERFLOW_CALM_MS, self.memory.overflowed_at
        for pair in [pair for pair in self._overflowing if at[pair] <= calm and self.has_share_room(pair)]:
            self._overflowing.discard(pair)
            queue = self.memory.index.pairs[pair]
            log.info(
                "a namespace has room in its share again",
                application=queue.application,
                namespace=queue.namespace,
            )

    def _pair_of(self, row: Activation, now: int) -> PairQueue:
        queue = self.pair(row.application, row.namespace)
        if queue is None:
            row.die(Reason.INVALID, now)
            row.error = f'{{"type":"invalid","message":"more than {PAIRS_MAX} namespaces on this broker"}}'
            row.application = row.namespace = ""
            queue = self.memory.index.pair("", "") or self._new_pair("", "")
        return queue

    def pair(self, application: str, namespace: str) -> PairQueue | None:
        """The pair of these names, made on first use; None when there are too many."""
        queue = self.memory.index.pair(application, namespace)
        if queue is None and len(self.memory.counts) < PAIRS_MAX:
            queue = self._new_pair(application, namespace)
        return queue

    def _new_pair(self, application: str, namespace: str) -> PairQueue:
        pair = len(self.memory.counts) + 1
        self.memory.batch.new_pairs.append((pair, application, namespace))
        return self.memory.add_pair(pair, application, namespace)

    def remember(self, source: int, ids: Mapping[int, int], forwards: Mapping[int, int]) -> None:
        """Other brokers have taken these of a source: what comes again under their ids is absorbed.

        ``ids``: id hash -> content; ``forwards``: hash of a forward id -> offset. Older parts of a log come
        after newer ones: the oldest counts, but what was here goes before all.
        """
        memory, now = self.memory, self.clock.wall_ms()
        news = []
        for id_hash, content in ids.items():
            known = memory.finished.get(id_hash)
            if id_hash not in memory.live and (known is None or is_elsewhere(known)):
                news.append((id_hash, taken_elsewhere(content)))
        for forward, offset in forwards.items():
            first, here = memory.finished.get(forward), place(source, offset)
            if first is None or here < first:
                news.append((forward, here))
        for pair in news:
            memory.finished.add(now, *pair)
            memory.batch.finished.extend(pair)
        memory.work.set()

    # -- claim

    def claim(
        self,
        application: str | None,
        namespaces: tuple[str, ...],
        rows_max: int,
        bytes_max: int,
        worker: str = "",
        tokenless: bool = False,
        at_most_once: bool = True,
    ) -> list[Activation]:
        """Claim the next rows for a worker, but for what it gave back as unknown within the last minute.
        Their lease starts now.

        A row whose ``at_most_once`` is set may be handed out once ``committed`` resolves; without
        ``at_most_once`` such rows are passed over. The caller drops the body of a row when it has been sent.
        """
        claimed: list[Activation] = []
        memory = self.memory
        now, mono = self.clock.wall_ms(), self.clock.mono_ms()
        memory.index.ask(application, namespaces, mono)
        if not self.claiming or self.writer.trouble is not None:
            return claimed
        for look in self.before_claim:
            look(mono)
        passed: list[Activation] = []
        while len(claimed) < rows_max and bytes_max > 0 and (at_most_once or len(passed) < PASSED_ROWS_MAX):
            taken = memory.index.take(application, namespaces, rows_max - len(claimed), bytes_max)
            if not taken:
                break
            for row in taken:
                memory.low.add(row.pair)
                if row.expires_at is not None and row.expires_at <= now:
                    memory.change(row, Event.EXPIRE, now)
                    continue
                if not memory.partitions.may_start(row):
                    memory.hold_back(row)
                    continue
                if row.at_most_once and not at_most_once:
                    passed.append(row)
                    continue
                given_back = row.given_back_at is not None and len(passed) < PASSED_ROWS_MAX
                if given_back and self.refusals.by(row.seq, worker, mono):
                    passed.append(row)
                    continue
                bytes_max -= row.size
                memory.claimed(row, now)
                row.claim_epoch = self.epoch
                row.tokenless = tokenless
                row.worker = worker
                row.started = 0
                memory.batch.claims.append(row.seq)
                claimed.append(row)
        if passed:
            self._pass_over(passed, claimed, application, namespaces)
        if claimed:
            self.start_leases(claimed)
            memory.work.set()
        return claimed

    def asked(self, application: str | None, namespaces: tuple[str, ...]) -> None:
        """A worker has asked for tasks of these, whether there are any for it or not."""
        self.memory.index.ask(application, namespaces, self.clock.mono_ms())

    def _pass_over(
        self,
        passed: Sequence[Activation],
        claimed: Sequence[Activation],
        application: str | None,
        namespaces: tuple[str, ...],
    ) -> None:
        """Rows that are for others keep their places; and a pair that was handed out nothing of has its turn
        still: those others may come by seldom."""
        index, had_turn = self.memory.index, {row.pair for row in claimed}
        for row in reversed(passed):
            queue = index.pairs[row.pair]
            index.put_back(queue, row)
            if application is not None and row.pair not in had_turn:
                index.give_turn_back(queue, named=bool(namespaces))
                had_turn.add(row.pair)

    def start_leases(self, claimed: Sequence[Activation], wait_ms: int = 0) -> None:
        """A lease starts when the claim is handed out: now, or within ``wait_ms``.

        A client without tokens has no heartbeat: its lease ends after the deadline and the grace.
        """
        lease_ms, grace_ms = self.limits.lease_ms, self.limits.grace_ms
        start = self.clock.mono_ms() + wait_ms
        for row in claimed:
            row.lease_until = start + (row.deadline_ms + grace_ms if row.tokenless else lease_ms)
        self.memory.leases.add(claimed)
        # Those of one call are of one kind.
        if claimed and claimed[0].tokenless and self.database.meta(HEARTBEATS_OF):
            self.memory.batch.calls.append(lambda database: database.set_meta(HEARTBEATS_OF, 0))

    def release(self, rows: Iterable[Activation]) -> None:
        """Claims that were not handed out after all go back, each to its place in the order."""
        if claimed := [row for row in rows if row.status is PROCESSING]:
            self.memory.unclaim(claimed, self.clock.wall_ms())

    def startable(self, rows: Iterable[Activation]) -> list[Activation]:
        """Those of claims that were kept for a while that may be handed out still: not what has expired, nor
        what an operator has paused, or drains, meanwhile. What became of others is settled."""
        now, pairs = self.clock.wall_ms(), self.memory.index.pairs
        startable, back = [], []
        for row in rows:
            if row.status is not PROCESSING:
                continue
            if row.expires_at is not None and row.expires_at <= now:
                self.memory.change(row, Event.EXPIRED_AT_START, now)
            elif not self.claiming or pairs[row.pair].paused_at is not None:
                back.append(row)
            else:
                startable.append(row)
        self.release(back)
        return startable

    async def claimed_again(self, claims: Sequence[tuple[int, int]]) -> list[Activation]:
        """Those of earlier (seq, claim) that are still held, with their bodies once more."""
        bodies = await self.read(lambda database: database.load_claimed([seq for seq, _ in claims]))
        rows = []
        for loaded in bodies:
            row = self.memory.resident.get(loaded.seq)
            if row is not None and row.status is PROCESSING and (row.seq, row.claim) in claims:
                row.body = loaded.body
                rows.append(row)
        self.start_leases(rows)
        return rows

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
        row = self.memory.resident.get(token.seq)
        if row is None:
            return self._settle_absent(token, event, now, retry_delay_ms, error)
        if row.id_hash != token.id_hash:
            return Answer.UNKNOWN
        if row.claim != token.claim:
            return repeated(row, token.claim, token.epoch, OUTCOMES[event])
        if not self._is_holder(row, token):
            return Answer.STALE
        row.claim_epoch = token.epoch
        self.memory.change(row, event, now, retry_delay_ms, error, OUTCOMES[event])
        return Answer.APPLIED

    def _is_holder(self, row: Activation, token: ClaimToken) -> bool:
        """Whether a token with the row's claim number is that of its claim, or of one that a restart
        forgot while nobody else has claimed the row since."""
        if row.status is PROCESSING:
            return row.claim_epoch == token.epoch
        return token.epoch < self.epoch

    def _settle_absent(
        self, token: ClaimToken, event: Event, now: int, retry_delay_ms: int | None, error: str | None
    ) -> Answer | Report:
        outcome = OUTCOMES[event]
        if self.memory.is_live(token.id_hash, token.seq) or token.seq in self.memory.forwarding:
            return self._report(
                Report(
                    event,
                    now,
                    token.seq,
                    token.claim,
                    token.epoch,
                    outcome,
                    # Unclaimed since the start, or it would be in memory.
                    frozenset((PENDING,)) if token.epoch < self.epoch else frozenset(),
                    retry_delay_ms,
                    error=error,
                )
            )
        last = self.memory.finished.get(token.id_hash)
        repeated = last is not None and is_report(last, token.epoch, token.seq, token.claim, outcome)
        return Answer.DUPLICATE if repeated else Answer.STALE

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
        entry = self.memory.live.get(id_hash)
        if entry is None:
            return Answer.UNKNOWN
        seq = entry >> CONTENT_BITS
        row = self.memory.resident.get(seq)
        # It was here at the start, and none has claimed it since: a restart may have lost its claim.
        before = None if event is Event.COMPLETE else self.epoch
        if row is None:
            if before is not None and seq >> SEQ_BITS >= before:
                return Answer.STALE
            only = frozenset((PENDING,))
            return self._report(
                Report(
                    event,
                    now,
                    seq,
                    outcome=OUTCOMES[event],
                    only=only,
                    retry_delay_ms=retry_delay_ms,
                    max_attempts=max_attempts,
                    before_epoch=before,
                )
            )
        forgotten = before is not None and max(row.claim_epoch, seq >> SEQ_BITS) < before
        if before is not None and not (row.tokenless or forgotten):
            return Answer.STALE
        keep_said(row, max_attempts, retry_delay_ms)
        self.memory.change(row, event, now, retry_delay_ms, outcome=OUTCOMES[event])
        return Answer.APPLIED

    def _report(self, report: Report) -> Report:
        self.memory.batch.reports.append(report)
        self.memory.work.set()
        return report

    async def covered(self, ids: Sequence[int]) -> list[bool]:
        """Of each of these id hashes, wait until no other broker could run again what was reported on.
        False: one does."""
        return await self.memory.partitions.covered(ids)

    def is_held(self, id_hash: int) -> bool:
        """Whether an answer on this id would have to wait for cover."""
        return self.memory.partitions.is_held(id_hash)

    def all_held(self, ids: Sequence[int]) -> list[int]:
        """Which of these ids, by their place, are held."""
        return self.memory.partitions.all_held(ids)

    # -- leases

    def extend(self, token: ClaimToken, started: bool, worker: str = "") -> Answer:
        """A heartbeat: APPLIED when the claim is held, by ``worker``, from now for another lease.

        The deadline counts from the first heartbeat that says ``started``; past it and the grace
        the lease is no longer extended, whatever the worker says.
        """
        if self.database.nonces.get(token.epoch) != token.nonce:
            return Answer.UNKNOWN
        row = self.memory.resident.get(token.seq)
        if row is None and token.epoch < self.epoch and self.memory.is_live(token.id_hash, token.seq):
            # Whether a restart forgot its claim is known when the row is in memory again; until then the
            # worker goes on.
            return Answer.APPLIED
        if row is None or row.claim != token.claim or not self._is_holder(row, token):
            return Answer.STALE
        if row.id_hash != token.id_hash:
            return Answer.UNKNOWN
        mono = self.clock.mono_ms()
        if row.status is PENDING:
            row = self._reclaim(row, token.epoch)
        row.worker = worker
        if started and not row.started:
            row.started = mono
        if not row.started or mono <= row.started + row.deadline_ms + self.limits.grace_ms:
            ended, row.lease_until = row.lease_until, mono + self.limits.lease_ms
            if row.lease_until < ended:
                # One of a restart may be longer: it is in a bucket that would be looked at too late.
                self.memory.leases.add((row,))
        return Answer.APPLIED

    def _reclaim(self, row: Activation, epoch: int) -> Activation:
        """A claim that a restart had forgotten is re-established by its worker's heartbeat."""
        memory, claimed = self.memory, copy.copy(row)
        memory.void(row)
        claimed.reserved = False
        memory.claimed(claimed, self.clock.wall_ms())
        claimed.claim_epoch = epoch
        claimed.body = None
        claimed.lease_until = self.clock.mono_ms()
        memory.resident[claimed.seq] = claimed
        memory.leases.add((claimed,))
        memory.batch.reclaims.append((claimed.seq, epoch))
        memory.work.set()
        return claimed

    def lapse(self, mono: int) -> int:
        """Claims whose worker has vanished go back or to the dead letters. How many."""
        now, lapsed = self.clock.wall_ms(), 0
        for row in self.memory.leases.lapsed(mono):
            self.memory.change(row, Event.LEASE_LOST, now, error=_LEASE_LOST)
            lapsed += 1
        return lapsed

    def postpone_leases(self, gap_ms: int) -> None:
        """The broker itself stood still: no claim is judged for that time."""
        for row in self.memory.resident.values():
            if row.status is PROCESSING:
                row.lease_until += gap_ms
                # The time to run, too: where a machine is suspended, its workers stand still as well.
                row.started += gap_ms if row.started else 0

    def forget_finished(self) -> None:
        """Drop what is outside the de-duplication window."""
        before = self.memory.finished.forget(self.clock.wall_ms())
        if before is not None:
            self.memory.batch.calls.append(lambda database: database.forget_finished(before))
            self.memory.work.set()

    # -- partitions and cover

    def source(self, topic: str, partition: int) -> Source:
        """The record of a topic partition, made on first use."""
        partitions = self.memory.partitions
        source = partitions.find(topic, partition)
        if source is None:
            source = Source(1 + sum(1 for _ in partitions.all()), topic, partition)
            partitions.add(source)
            self._write(source)
        return source

    def sources(self) -> Iterable[Source]:
        return self.memory.partitions.all()

    def begin_range(self, source: Source, start: int) -> None:
        """This broker reads the partition from ``start`` on: a new range."""
        source.start = source.next = start
        if start < source.covered:
            source.set_back(start, self._next_seq)
        for arrival in self.writer.arrivals:
            arrival.take_back(source.id, start)
        self._write(source)

    def cover(self, source: Source, offset: int) -> None:
        """An acknowledged commit of this broker passed everything below ``offset``."""
        starts = self.memory.partitions.cover(source, offset)
        self.memory.start_released(starts)
        self.memory.exits_released(source)
        self._write(source)

    def dispute(self, source: Source) -> None:
        """The partition is lost, or may be: until it is known whose its uncovered rows are, none of them
        starts."""
        source.disputed = True

    def settle_dispute(self, source: Source) -> None:
        """What another broker reads again was dropped; the rest is this broker's."""
        source.disputed = False
        self.memory.start_released(self.memory.partitions.released(source))
        self.memory.work.set()
        self._write(source)

    def begin_restored(self, source: Source, start: int, covered: int) -> None:
        """Rows of the partition below ``covered`` are restored, or adopted: no other broker reads them."""
        if start >= 0:
            source.start = start
        source.covered = max(source.covered, covered)
        self._write(source)

    def hold_at_most_once(self, hold: bool) -> None:
        """Whether the ledger cannot be written: until it can, no at-most-once row starts."""
        partitions = self.memory.partitions
        if partitions.unrecorded == hold:
            return
        partitions.unrecorded = hold
        for source in partitions.all():
            self.memory.start_released(partitions.released(source))
        self.memory.work.set()

    def doubt_age(self) -> None:
        """Whether this database is an old copy is not known: what came over gRPC and starts at most once
        waits for ``known_new``. What came from the log waits for the ledger in any case."""
        self.memory.partitions.maybe_old = True

    def known_new(self) -> None:
        """It is no old copy, as far as can be known."""
        self.memory.start_released(self.memory.partitions.known_new())
        self.memory.work.set()

    def set_meta(self, key: str, value: str | int) -> Awaitable[None]:
        """Keep a value of the store as a whole; resolves when durable."""
        self.memory.batch.calls.append(lambda database: database.set_meta(key, value))
        return self.committed()

    def forget_meta(self, keys: Sequence[str]) -> Awaitable[None]:
        """Values of the store as a whole that are of no use any more."""
        self.memory.batch.calls.append(lambda database: database.forget_meta(keys))
        return self.committed()

    def identify(self, source: Source, topic_id: str) -> None:
        """Which topic of its name the source is of."""
        if source.topic_id != topic_id:
            source.topic_id = topic_id
            self._write(source)

    def retire(self, source: Source, topic: str) -> None:
        """The log of a partition is gone, and another one has its name. What was taken of it is this
        broker's for good, under the name ``topic``."""
        name, partition = source.topic, source.partition
        self.memory.partitions.rename(source, topic)
        # No other topic ever has that name.
        source.topic_id = ""
        self.cover(source, max(source.next, *(offset + 1 for offset, _, _ in source.uncovered), 0))
        self.settle_dispute(source)
        self.memory.unfinished.rename(source.id, self.source(name, partition).id)

    def _write(self, source: Source) -> None:
        self.memory.batch.sources[source.id] = source.record()
        self.memory.work.set()

    def drop_uncovered(self, source: Source, boundary: int) -> asyncio.Future[int]:
        """Uncovered rows at or above ``boundary`` are read again, by another broker or by this one should
        the partition come back: forget them here.

        Resolves to how many were dropped; reports on them are STALE.
        """
        memory, boundary = self.memory, max(boundary, source.covered)
        memory.batch.left += [place(source.id, at) for at, _, _ in source.uncovered if at >= boundary]
        dropped = memory.partitions.drop(source, boundary)
        self._write(source)
        seqs: list[int] = []
        for seq, id_hash in dropped:
            if memory.is_live(id_hash, seq):
                del memory.live[id_hash]
                seqs.append(seq)
            elif seq in memory.forwarding:
                seqs.append(seq)
            else:
                memory.unfinish(id_hash)
            memory.forwarding.discard(seq)
        memory.dropping.update(seqs)
        queued = self._drop_queued(source, boundary)
        in_memory = {seq for seq in seqs if seq in memory.resident}
        for seq in in_memory:
            memory.void(memory.resident[seq])
        result: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        rows: list[Activation] = []
        batch = memory.batch

        def delete(database: Database) -> None:
            rows[:] = database.load(seqs, bodies=False)
            database.delete(seqs, seqs)
            for row in rows:
                batch.count(row.pair, "dropped")

        def account() -> None:
            memory.dropping.difference_update(seqs)
            for row in rows:
                memory.forget(row)
                memory.add_to_books({(row.pair, "dropped"): 1})
                if row.status is PENDING and row.seq not in in_memory:
                    memory.index.pairs[row.pair].spilled -= 1
            memory.tally.dropped += len(rows) + queued
            if not result.done():
                result.set_result(len(rows) + queued)

        memory.batch.calls.append(delete)
        memory.batch.then.append(account)
        return result

    async def hand_over(self, rows_max: int, running: bool) -> int:
        """Pending and delayed rows leave for another broker, ``running`` ones too, but for those that must
        not start twice. How many; durable."""
        memory, refused = self.memory, self.outbox.refused
        found = await self.read(lambda database: database.may_leave(running, rows_max + len(refused)))
        now, states = self.clock.wall_ms(), frozenset((PENDING, DELAYED, PROCESSING))
        seqs = [seq for seq in found if seq not in refused]
        for seq in seqs:
            row = memory.resident.get(seq)
            if row is None:
                memory.batch.reports.append(Report(Event.HAND_OVER, now, seq, only=states))
            elif row.status is PENDING or (running and not row.at_most_once):
                memory.change(row, Event.HAND_OVER, now)
        memory.work.set()
        await self.committed()
        return len(seqs)

    def _drop_queued(self, source: Source, boundary: int) -> int:
        """Rows that wait for their first tick are dropped before it."""
        dropped = 0
        for arrival in self.writer.arrivals:
            mine = [row for row in arrival.rows if row.source == source.id and row.offset >= boundary]
            if mine:
                arrival.rows = [row for row in arrival.rows if row not in mine]
            arrival.take_back(source.id, boundary)
            for row in mine:
                self.memory.forget(row)
            dropped += len(mine)
        return dropped

    # -- reading

    async def read(self, query: Callable[[Database], T]) -> T:
        """Run a bounded query in the next tick."""
        result: list[T] = []

        def ask(database: Database) -> None:
            result[:] = [query(database)]

        self.memory.batch.calls.append(ask)
        await self.answerable(self.committed())
        return result[0]

    async def aside(self, work: Callable[[Database], T]) -> T:
        """Run ``work`` between two ticks, also while the disk takes nothing. Raises StoreStopped."""
        return await self.writer.aside(work)

    def pending(self) -> list[tuple[str, str, int]]:
        """(application, namespace, pending rows) of every pair that has any to hand out."""
        counts = self.memory.counts
        return [
            (queue.application, queue.namespace, counts[queue.pair][PENDING])
            for queue in self.memory.index.pairs.values()
            if queue.paused_at is None and counts[queue.pair][PENDING]
        ]

    def imbalance(self) -> int:
        """By how much the books of all pairs are wrong: 0 unless something is lost."""
        return sum(map(abs, self.control.balances().values()))
