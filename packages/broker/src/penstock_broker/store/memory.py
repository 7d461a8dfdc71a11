"""What memory knows of the rows, and the tick that is being gathered.

Everything here is rebuilt from the rows at the start, and equals them after each commit. ``change``
is the only place where a row that memory holds changes its state.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from penstock_broker.clock import Clock
from penstock_broker.domain.activation import (
    CONTENT_BITS,
    DELAYED,
    FORWARDING,
    GONE,
    NO_SOURCE,
    PENDING,
    PROCESSING,
    Activation,
    Route,
    hash_id,
    route_of,
)
from penstock_broker.domain.lifecycle import OUTCOMES, Change, Event, decide
from penstock_broker.store.batch import Answer, Batch, Damaged, Report, move
from penstock_broker.store.database import Database
from penstock_broker.store.finished import (
    OFFSET_BITS,
    VOID,
    Finished,
    last_of,
    place,
    position,
    unpack_position,
)
from penstock_broker.store.index import PairQueue, ReadyIndex
from penstock_broker.store.leases import Leases
from penstock_broker.store.ledger import Unfinished, state_after, state_of
from penstock_broker.store.limits import StoreLimits
from penstock_broker.store.partitions import Exit, Partitions, Source
from penstock_broker.store.schema import INLINE_BODY_BYTES_MAX

# A pair's rows in memory are refilled below this many.
LOW_WATER_ROWS = 512


@dataclass(slots=True)
class Tally:
    """Counts since the start that no row keeps."""

    # Activations whose id was known.
    duplicates: int = 0
    # Rows that became another broker's.
    dropped: int = 0
    # Deliveries whose worker died or vanished.
    lost: int = 0
    # Ticks that the disk did not take, each time they were tried.
    disk_failures: int = 0
    # Applied reports by the number of their outcome; 0 for what time or the broker caused.
    outcomes: list[int] = field(default_factory=lambda: [0] * (max(OUTCOMES.values()) + 1))
    answers: dict[Answer, int] = field(default_factory=lambda: dict.fromkeys(Answer, 0))


class Memory:
    """State of the store on the event loop."""

    def __init__(self, database: Database, clock: Clock, limits: StoreLimits) -> None:
        self.database = database
        self.clock = clock
        self.limits = limits
        self.tally = Tally()
        self.index = ReadyIndex(limits.window_rows_max, limits.window_bytes_max)
        self.finished = Finished(limits.dedup_window_ms, limits.dedup_ids_max)
        self.partitions = Partitions()
        self.unfinished = Unfinished()
        # Rows that memory holds: those in the index, and those claimed.
        self.resident: dict[int, Activation] = {}
        self.leases = Leases(self.resident)
        # Every row: id hash -> seq and content; of one that leaves and one that came back from the log, the
        # latter.
        self.live: dict[int, int] = {}
        # Rows that must leave.
        self.forwarding: set[int] = set()
        # Rows that became another broker's, until the tick that deletes them: nothing befalls them any more.
        self.dropping: set[int] = set()
        # Per pair, rows by status (the list's index is the status).
        self.counts: dict[int, list[int]] = {}
        self.rows = 0
        self.bytes = 0
        # Per pair, bytes of the rows that count towards its share: all but those that leave.
        self.held_bytes: dict[int, int] = {}
        # Per pair, when a record of it last went to, or was met in, the overflow: monotonic ms.
        self.overflowed_at: dict[int, int] = {}
        self.share_rows_max = max(1, int(limits.rows_max * limits.namespace_share_max))
        self.share_bytes_max = int(limits.bytes_max * limits.namespace_share_max)
        self.books: dict[tuple[int, str], int] = {}
        # The pair of the row that came last: mostly the next one's, too.
        self.latest: PairQueue | None = None
        # Pairs that may have to be paged in.
        self.low: set[int] = set()
        # Covered rows that leave, and that nobody has taken yet.
        self.outbox: dict[Route, deque[Exit]] = {route: deque() for route in Route}
        # Rows that were found damaged on disk, ever.
        self.quarantined = database.quarantined()
        # The disk is nearly full.
        self.disk_low = False
        # Wall clock at which the next delay or expiry is due.
        self.next_wake_at: int | None = None
        self.batch = Batch()
        # Set when there is something for the next tick.
        self.work = asyncio.Event()
        # The place in the order of hand-out from which on a new batch begins.
        self.next_stamp = 0
        self._load()

    def _load(self) -> None:
        left = self.finished.load(self.clock.wall_ms(), self.database.finished())
        for pair, application, namespace, paused_at in self.database.pairs():
            self.add_pair(pair, application, namespace).paused_at = paused_at
        for source in self.database.sources():
            self.partitions.add(Source(*source))
            self.unfinished.ranged({source[0]: source[1:]})
        for pair, status, rows, size in self.database.counts():
            self.counts[pair][status] = rows
            self.rows += rows
            self.bytes += size
            if status != FORWARDING:
                self.held_bytes[pair] += size
            if status == PENDING:
                self.index.pairs[pair].spilled = rows
                self.low.add(pair)
        self._load_rows()
        for id_hash, at in left:
            self._restore_uncovered(*unpack_position(at), 0, id_hash)
        for loaded in self.partitions.all():
            loaded.uncovered = deque(sorted(loaded.uncovered))
        self.books = self.database.books()
        self.next_stamp = self.database.last_ready_at() + 1
        self.next_wake_at = self.database.next_wake_at(0)
        if self.low:
            # The first tick pages them in; nothing else need happen for it.
            self.work.set()

    def _load_rows(self) -> None:
        for seq, status, id, content, source_id, offset, size, reason in self.database.positions():
            id_hash = hash_id(id)
            self.live[id_hash] = seq << CONTENT_BITS | content
            if status == FORWARDING:
                self._depart(seq, size, reason, source_id, offset)
            self._restore_uncovered(source_id, offset, seq, id_hash)
            self.unfinished.add(source_id, offset)
        for row in self.database.with_state():
            self.unfinished.kept([(place(row.source, row.offset), state_of(row))])
        mono = self.clock.mono_ms()
        for row in self.database.processing():
            row.id_hash = hash_id(row.id)
            # Whoever holds it gets the time to say so; a client without heartbeats, to report.
            heartbeats = row.claim_epoch == self.database.heartbeats_of
            row.lease_until = mono + self.limits.lease_ms + (0 if heartbeats else row.deadline_ms)
            self.resident[row.seq] = row
            self.leases.add((row,))

    def _restore_uncovered(self, source_id: int, offset: int, seq: int, id_hash: int) -> None:
        if source_id != NO_SOURCE and offset >= self.partitions[source_id].covered:
            self.partitions.restore(self.partitions[source_id], offset, seq, id_hash)

    def add_pair(self, pair: int, application: str, namespace: str) -> PairQueue:
        self.counts[pair] = [0] * 5
        self.held_bytes[pair] = 0
        queue = self.index.add_pair(pair, application, namespace)
        queue.asked_at = self.clock.mono_ms()
        return queue

    def seq_of(self, id_hash: int) -> int | None:
        """The row of an id; None: there is none."""
        entry = self.live.get(id_hash)
        return None if entry is None else entry >> CONTENT_BITS

    def is_live(self, id_hash: int, seq: int) -> bool:
        """Whether this row is here (and not gone, or another broker's)."""
        return self.live.get(id_hash, -1) >> CONTENT_BITS == seq

    # -- a change

    def change(
        self,
        row: Activation,
        event: Event,
        now: int,
        retry_delay_ms: int | None = None,
        error: str | None = None,
        outcome: int = 0,
        in_place: bool = False,
    ) -> None:
        """One event on a row that memory holds. It leaves memory, whatever becomes of it.

        ``outcome``: the number of what was reported; 0 for what time or the broker causes. ``in_place``: one
        that comes back keeps its place in the order.
        """
        change = decide(row, event, now, self.limits.lifecycle, retry_delay_ms)
        batch = self.batch
        held = self._account(row, change, outcome)
        if change.status is GONE:
            batch.gone.append(row.seq)
            if row.size > INLINE_BODY_BYTES_MAX:
                batch.gone_payloads.append(row.seq)
            last = last_of(row, outcome)
            batch.finished.extend((row.id_hash, last))
            if row.source != NO_SOURCE:
                batch.left.append(row.source << OFFSET_BITS | row.offset)
                if held:
                    batch.finished.extend((row.id_hash, position(row.source, row.offset)))
            batch.count(row.pair, change.term)
            self._left(row, last, now)
        else:
            back = change.status is PENDING
            ready_at = row.ready_at if in_place else self.stamp() + 1 if back else change.ready_at
            batch.moves.append(move(row, change, outcome, ready_at, error))
            if row.source != NO_SOURCE:
                batch.kept.append((place(row.source, row.offset), state_after(row, change)))
            self._stayed(row, change)
        self.void(row)
        self.work.set()

    def unclaim(self, rows: Sequence[Activation], now: int) -> None:
        """Claims that nobody was told of are undone. When that is durable, the rows have their places again:
        what memory holds behind them was ready after them."""
        for row in rows:
            self.change(row, Event.RELEASE, now, in_place=True)
        seqs = [row.seq for row in rows]
        back: list[Activation] = []

        def load(database: Database) -> None:
            back[:] = database.ready(seqs)

        self.batch.calls.append(load)
        self.batch.then.append(lambda: self._came_back(back))

    def _came_back(self, rows: Iterable[Activation]) -> None:
        places: dict[int, list[Activation]] = {}
        for row in rows:
            queue = self.index.pairs[row.pair]
            if row.seq in self.dropping:
                # While it was written: it stays spilled until it is gone, and its place is in no page.
                queue.came_back += 1
                continue
            row.id_hash = hash_id(row.id)
            self.index.page_in(queue, row)
            self.resident[row.seq] = row
            if self.partitions.may_start(row):
                places.setdefault(row.pair, []).append(row)
            else:
                self.partitions.hold_start(row)
        for pair, ready in places.items():
            self.index.take_places(self.index.pairs[pair], ready)

    def claimed(self, row: Activation, now: int) -> None:
        """A row of the index is handed out: the one event after which memory keeps it."""
        self._count(row, decide(row, Event.CLAIM, now, self.limits.lifecycle))
        row.status = PROCESSING
        if row.at_most_once and row.source != NO_SOURCE:
            self.batch.kept.append((place(row.source, row.offset), state_of(row)))

    def reported(self, report: Report) -> None:
        """A tick has changed a row that memory does not hold."""
        row, change = report.row, report.change
        if row is None or change is None:
            return
        row.id_hash = hash_id(row.id)
        self._account(row, change, report.outcome)
        if row.status is PENDING:
            self.index.pairs[row.pair].spilled -= 1
        at = place(row.source, row.offset)
        if change.status is GONE:
            self._left(row, last_of(row, report.outcome), report.now)
            if row.seq in self.dropping:
                # While this was written.
                self.unfinish(row.id_hash)
            self.add_to_books({(row.pair, change.term): 1})
            if row.source != NO_SOURCE:
                self.unfinished.left([at])
        else:
            self._stayed(row, change)
            if row.source != NO_SOURCE:
                self.unfinished.kept([(at, state_after(row, change))])

    def _account(self, row: Activation, change: Change, outcome: int) -> bool:
        """Whether it is not covered yet."""
        self.tally.outcomes[outcome] += 1
        self.tally.lost += change.lost - row.lost
        self._count(row, change)
        return self.partitions.hold(row)

    def _count(self, row: Activation, change: Change) -> None:
        counts = self.counts[row.pair]
        counts[row.status] -= 1
        if change.status is not GONE:
            counts[change.status] += 1
        if row.status is FORWARDING:
            self.forwarding.discard(row.seq)
            if change.status is not GONE and change.status is not FORWARDING:
                self.held_bytes[row.pair] += row.size
        elif change.status is GONE or change.status is FORWARDING:
            self.held_bytes[row.pair] -= row.size

    def _left(self, row: Activation, last: int, now: int) -> None:
        entry = self.live.pop(row.id_hash, -1)
        if entry >> CONTENT_BITS not in (-1, row.seq):
            self.live[row.id_hash] = entry  # of the one that has come back from the log
        self.finished.add(now, row.id_hash, last)
        self.rows -= 1
        self.bytes -= row.size

    def unfinish(self, id_hash: int) -> None:
        """It is gone, but nobody was told: if the log brings it back here, it is new."""
        self.finished.discard(id_hash)
        self.batch.finished.extend((id_hash, VOID))

    def _stayed(self, row: Activation, change: Change) -> None:
        """The row is only in the store now: whoever is to see it next must know."""
        if change.status is FORWARDING:
            self._depart(row.seq, row.size, change.reason, row.source, row.offset)
        elif change.status is DELAYED:
            self.wake_earlier(change.ready_at)
        else:
            queue = self.index.pairs[row.pair]
            queue.spilled += 1
            queue.came_back += 1
            self.low.add(row.pair)
        self.wake_earlier(row.expires_at)

    def depart(self, row: Activation) -> None:
        """A stored row must leave."""
        self._depart(row.seq, row.size, row.reason, row.source, row.offset)

    def _depart(self, seq: int, size: int, reason: str | None, source_id: int, offset: int) -> None:
        """It does when it is covered: until then another broker may read it, too, and send it."""
        if seq in self.dropping:
            return
        self.forwarding.add(seq)
        way_out = Exit(seq, size, route_of(reason))
        if source_id == NO_SOURCE or self.partitions[source_id].is_covered(offset, seq):
            self.outbox[way_out.route].append(way_out)
        else:
            self.partitions[source_id].held_exits.append((offset, way_out))

    def exits_released(self, source: Source) -> None:
        """More of this partition is covered: what is may leave."""
        if not source.held_exits:
            return
        held, source.held_exits = source.held_exits, []
        for offset, way_out in held:
            if source.is_covered(offset, way_out.seq):
                self.outbox[way_out.route].append(way_out)
            else:
                source.held_exits.append((offset, way_out))

    def void(self, row: Activation) -> None:
        """Memory forgets a row; a place it has in the order is void."""
        del self.resident[row.seq]
        if row.reserved:
            self.index.void(self.index.pairs[row.pair], row)
            self.low.add(row.pair)
        row.status = GONE
        row.body = None

    def set_aside(self, damaged: Sequence[Damaged]) -> None:
        """Rows were damaged on disk and are not there any more. In the ledger they stay unfinished: what
        is restored from there is whole."""
        if not damaged:
            return
        # By what each was called when it was whole.
        seqs = {seq for seq, *_ in damaged}
        for id_hash in [h for h, entry in self.live.items() if entry >> CONTENT_BITS in seqs]:
            del self.live[id_hash]
        for seq, pair, status, size in damaged:
            self.counts[pair][status] -= 1
            self.rows -= 1
            self.bytes -= size
            if status == FORWARDING:
                self.forwarding.discard(seq)
            else:
                self.held_bytes[pair] -= size
            if status == PENDING:
                self.index.pairs[pair].spilled -= 1
            self.add_to_books({(pair, "quarantined"): 1})
            self.quarantined += 1

    def forget(self, row: Activation) -> None:
        """A row is no longer counted: it was dropped, or never stored."""
        self.counts[row.pair][row.status] -= 1
        self.rows -= 1
        self.bytes -= row.size
        if row.status is not FORWARDING:
            self.held_bytes[row.pair] -= row.size

    # -- a namespace's share

    def share_room(self, pair: int) -> int:
        """Rows that a pair may still hold of its share; 0 or less when its rows or bytes reach it."""
        if self.held_bytes[pair] >= self.share_bytes_max:
            return 0
        _, pending, delayed, processing, _ = self.counts[pair]
        return self.share_rows_max - pending - delayed - processing

    def add_to_books(self, terms: dict[tuple[int, str], int]) -> None:
        for key, n in terms.items():
            self.books[key] = self.books.get(key, 0) + n

    # -- the order of hand-out

    def lead(self) -> tuple[int, int]:
        """How many more rows and bytes would enter memory if they were like those that came last; less than
        0: so many of them are spilled."""
        return self.index.share() if self.latest is None else self.index.lead(self.latest)

    def stamp(self) -> int:
        """The place in the order that new rows of the gathered tick get; rows that come back get the
        place after it, so that nothing ever enters before what memory holds."""
        if not self.batch.stamp:
            self.batch.stamp = max(self.clock.wall_ms(), self.next_stamp)
        return self.batch.stamp

    def low_pairs(self) -> list[PairQueue]:
        """Pairs to page in: little of them is in memory, more in the rows."""
        queues = (self.index.pairs[pair] for pair in self.low)
        return [
            q
            for q in queues
            if q.spilled and not q.paging and len(q.ready) < LOW_WATER_ROWS and self.index.room(q)
        ]

    def paged(self, queue: PairQueue, rows: list[Activation], damaged: bool = False) -> None:
        """The next spilled rows of a pair were read; ``damaged``: others were set aside."""
        queue.paging = False
        if not rows and queue.spilled > queue.came_back and not damaged:
            raise self.database.suspect(
                f"{queue.spilled} pending rows of {queue.application}/{queue.namespace} are in no page"
            )
        for row in rows:
            row.id_hash = hash_id(row.id)
            # What was dropped while the page was read is counted there.
            if row.seq not in self.dropping:
                self.index.page_in(queue, row)
                self.enter(row)
        if queue.spilled:
            self.low.add(queue.pair)

    def enter(self, row: Activation) -> None:
        """A stored row whose room is reserved takes its place in the order."""
        queue = self.index.pairs[row.pair]
        if row.seq in self.dropping:
            # While it was stored: until its row is gone it is one that memory does not hold.
            self.index.unreserve(queue, row)
            queue.spilled += 1
            # It may have been all that memory had of them.
            self.low.add(row.pair)
            return
        self.resident[row.seq] = row
        ready = self.partitions.may_start(row)
        self.index.enter(queue, row, ready)
        if not ready:
            self.partitions.hold_start(row)

    def hold_back(self, row: Activation) -> None:
        """A row whose turn has come may not start yet."""
        self.index.take_room(self.index.pairs[row.pair], row)
        self.partitions.hold_start(row)

    def start_released(self, rows: Iterable[Activation]) -> None:
        """Rows that had to wait take their place in the order."""
        for row in rows:
            if row.reserved:
                self.index.enter(self.index.pairs[row.pair], row)

    # -- time

    def wake_earlier(self, at: int | None) -> None:
        if at is not None and (self.next_wake_at is None or at < self.next_wake_at):
            self.next_wake_at = at

    def expire(self, seqs: Iterable[int]) -> None:
        """Rows whose expiry has passed."""
        now = self.clock.wall_ms()
        for seq in seqs:
            row = self.resident.get(seq)
            if row is None:
                only = frozenset((PENDING, DELAYED))
                self.batch.reports.append(Report(Event.EXPIRE, now, seq, only=only))
            elif row.status is PENDING:
                self.change(row, Event.EXPIRE, now)
