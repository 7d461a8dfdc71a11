"""The event loop's side of ingest: what is read is stored, what is stored is committed, what is
committed is covered; and whose the rows of a partition are when it comes and goes.

The consumer's thread calls in here in batches. Nothing in here waits for Kafka.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from penstock_broker.domain.activation import Activation
from penstock_broker.ingest.gate import Gate
from penstock_broker.ingest.membership import Membership
from penstock_broker.ingest.ownership import (
    Me,
    Owner,
    Start,
    boundary,
    choose_start,
    encode,
    record_owner,
    unknown_from,
)
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.partitions import Source
from penstock_broker.store.writer import StoreStopped

log = structlog.get_logger("ingest")

# Commits follow each other no faster; the first after a pause leaves at once.
COMMIT_PAUSE_SECONDS = 0.02
COMMIT_RETRY_SECONDS = 0.5
# A partition that leaves waits this long for the ticks that hold its rows.
LEAVE_SECONDS_MAX = 5.0


class Found(NamedTuple):
    """What Kafka knows of a partition for this group."""

    partition: int
    # None: the group has no offset.
    committed: int | None
    owners: tuple[Owner, ...]
    # First offset and end of the log; -1 when not asked.
    low: int = -1
    high: int = -1


class Position(NamedTuple):
    """An offset to commit."""

    partition: int
    offset: int
    metadata: str


class Begun(NamedTuple):
    """Where to read a partition, and the source its rows belong to."""

    partition: int
    source: int
    offset: int


class Tail(NamedTuple):
    """[first, end) of a partition: taken by other brokers, so that its ids are not known here."""

    partition: int
    # The source that its rows belong to.
    source: int
    first: int
    end: int


@dataclass(slots=True)
class Reading:
    """A partition that is assigned to this broker."""

    source: Source
    owners: tuple[Owner, ...]
    metadata: str
    # Everything below is durable, so it may be committed.
    durable: int
    # Our last acknowledged commit; -1 while the group does not know that we read it.
    acknowledged: int = -1
    # On its way in or out: no commit is started for it.
    held: bool = True

    def due(self) -> bool:
        return self.durable > self.acknowledged and not self.held

    def position(self) -> Position:
        return Position(self.source.partition, self.durable, self.metadata)


class Intake:
    """Rows into the store, offsets out of it. Every method is called on the event loop.

    ``session_ms``: the group's session timeout. ``reset``: where to start when nothing is known, "earliest"
    or "latest".
    """

    def __init__(
        self,
        store: Inflight,
        topic: str,
        broker_id: str,
        session_ms: int,
        reset: str = "earliest",
        room: Callable[[], int] | None = None,
    ) -> None:
        self.store = store
        self.topic = topic
        # Messages that may be taken now.
        self._room = room or store.room
        # Told what was inserted.
        self.on_inserted: Callable[[Sequence[Activation]], None] = lambda rows: None
        # Given offsets to commit, one call at a time, each answered by ``commit_done``.
        self.commit: Callable[[Sequence[Position]], None] = lambda positions: None
        self.me = Me(broker_id, store.store_id)
        self.gate = Gate(*store.memory.index.share())
        self.membership = Membership(store.clock, session_ms)
        # Assigned partitions; the metrics read it too.
        self.readings: dict[int, Reading] = {}
        # Partitions with uncovered rows that are not ours to read: to be resolved from what Kafka knows.
        self.unresolved: frozenset[int] = frozenset()
        self.offsets_skipped = 0
        self.commits_failed = 0
        self.committed_at_ms = store.clock.mono_ms()
        self._reset = reset
        # Which topic of its name it is; "" while Kafka has not said.
        self._topic_id = ""
        self._committing = False
        # Commits refused in a row.
        self._failed = 0
        self._timer: asyncio.TimerHandle | None = None
        self._storing: set[asyncio.Future[None]] = set()
        self._stopped = False
        self.open()
        store.on_room(self.open)
        store.writer.on_committed.append(lambda: self.gate.lead(*store.memory.lead()))
        store.before_claim.append(self._doubt)
        self._find_unresolved()

    def open(self) -> None:
        """There may be room, or more of it."""
        self.gate.open(self._room())

    # -- taking

    def deliver(self, rows: list[Activation], size: int, taken: Mapping[int, tuple[int, int]]) -> None:
        """Store what was read. ``taken``: partition -> (source id, next offset to read)."""
        try:
            stored = self.store.insert(rows, dict(taken.values()))
        except StoreStopped:
            return
        self._storing.add(stored)
        self.on_inserted(rows)
        readings = [(self.readings.get(p), p, next_) for p, (_, next_) in taken.items()]

        def done(stored: asyncio.Future[None]) -> None:
            self._storing.discard(stored)
            if stored.cancelled() or stored.exception() is not None:
                return
            for reading, partition, next_ in readings:
                # One that went, and maybe came back, does not hold these rows any more.
                if reading is not None and reading is self.readings.get(partition):
                    reading.durable = max(reading.durable, next_)
            self.commit_soon()
            self.gate.stored(len(rows), size, self._room())

        stored.add_done_callback(done)

    # -- committing

    def commit_soon(self) -> None:
        """Commit what is durable, unless a commit is under way: its end starts the next."""
        if not (self._committing or self._stopped or self._timer is not None):
            self._commit_due()

    def _commit_due(self) -> None:
        positions = [r.position() for r in self.readings.values() if r.due()]
        if not positions:
            return
        self._committing = True
        self.commit(positions)

    @property
    def committing(self) -> bool:
        """Whether a commit is under way, whose effect is not known yet."""
        return self._committing

    @property
    def busy(self) -> bool:
        """Whether a commit is under way or follows soon. Read by the poll thread, which carries it out:
        each write below leaves no moment in which it could look idle."""
        return self._committing or self._timer is not None or self.gate.in_flight

    def commit_done(self, answers: Iterable[tuple[int, int, str | None]]) -> None:
        """What became of a commit: (partition, offset, error or None)."""
        failed, taken = "", False
        for partition, offset, error in answers:
            if error is None:
                self._acknowledge(partition, offset)
                taken = True
            elif partition in self.readings:
                failed = error
        if taken and self.membership.acknowledged():
            for reading in self.readings.values():
                self.store.settle_dispute(reading.source)
        self._count_failure(failed)
        if not self._stopped:
            pause = COMMIT_RETRY_SECONDS if failed else COMMIT_PAUSE_SECONDS
            self._timer = asyncio.get_running_loop().call_later(pause, self._paused_enough)
        self._committing = False

    def _doubt(self, mono: int) -> None:
        """Before anything is handed out at ``mono``: uncovered rows are not while others may have them."""
        if self.membership.in_doubt(mono):
            for reading in self.readings.values():
                self.store.dispute(reading.source)

    def _count_failure(self, error: str) -> None:
        """Say it once when commits fail, and once when they no longer do."""
        failed_before, self._failed = self._failed, self._failed + 1 if error else 0
        if error:
            self.commits_failed += 1
            # One refusal alone is what a rebalance does to a commit that was on its way.
            if self._failed == 2:
                log.warning("offset commits fail; they are repeated", topic=self.topic, error=error)
        elif failed_before >= 2:
            log.info("offset commits succeed again", topic=self.topic)

    def _paused_enough(self) -> None:
        self._commit_due()
        self._timer = None

    def _acknowledge(self, partition: int, offset: int) -> None:
        self.committed_at_ms = self.store.clock.mono_ms()
        source = self.store.source(self.topic, partition)
        if offset > source.next:
            # Of a topic that was made anew since.
            return
        reading = self.readings.get(partition)
        if reading is not None:
            reading.acknowledged = max(reading.acknowledged, offset)
        self.store.cover(source, offset)

    # -- partitions that come

    async def tails(self, found: Sequence[Found]) -> list[Tail]:
        """These partitions are assigned: what others have taken of them, to be looked through before they
        begin."""
        tails = []
        for partition in found:
            source = self.store.source(self.topic, partition.partition)
            # What another broker reads again is not known here any more.
            self._say_whose(source, partition, assigned=True)
            first = unknown_from(partition.owners, partition.committed, source.next, self.me)
            if first is not None and partition.committed is not None:
                tails.append(Tail(partition.partition, source.id, first, partition.committed))
        return tails

    async def begin(self, found: Sequence[Found]) -> list[Begun]:
        """These partitions are assigned: say what is ours of them, and where to go on reading.

        Returns when it is durable, so that no commit that names us as the owner can be older.
        """
        begun = [self._begin(partition) for partition in found]
        # The ledger names this range before a commit does: else its loss could not be told from nothing,
        # and a broker that was adopted meanwhile learns it before it takes anything.
        await self.store.recorded()
        self._find_unresolved()
        return begun

    def _begin(self, found: Found) -> Begun:
        source = self.store.source(self.topic, found.partition)
        self._say_whose(source, found, assigned=True)
        start = choose_start(found.owners, found.committed, (source.start, source.next), self.me)
        return self._begin_at(self._within_log(start, found), source, found)

    async def begin_inside(self, found: Sequence[Found]) -> list[Begun]:
        """These are assigned and being read, but what comes next is not in their log (any more)."""
        begun = []
        for partition in found:
            source = self.store.source(self.topic, partition.partition)
            start = self._within_log(Start(source.next, source.next, continues=True), partition)
            begun.append(self._begin_at(start, source, partition))
        await self.store.committed()
        return begun

    def _begin_at(self, start: Start, source: Source, found: Found) -> Begun:
        assert start.offset is not None
        assert start.since is not None
        if start.skipped:
            self.offsets_skipped += start.skipped
            log.error(
                "offsets were skipped: nobody here has read them",
                topic=self.topic,
                partition=found.partition,
                first=source.next,
                count=start.skipped,
            )
        if not start.continues:
            self.store.begin_range(source, start.offset)
        if self._topic_id:
            self.store.identify(source, self._topic_id)
        owners = record_owner(found.owners, start.since, self.me, self.store.epoch)
        self.readings[found.partition] = Reading(source, owners, encode(owners), durable=start.offset)
        return Begun(found.partition, source.id, start.offset)

    def _within_log(self, start: Start, found: Found) -> Start:
        """``start`` made definite: by the reset policy where nothing is known, and inside the log."""
        if start.offset is None:
            offset = found.low if self._reset == "earliest" else found.high
            return Start(offset, offset, continues=False)
        if found.low < 0 or found.low <= start.offset <= found.high:
            return start
        if start.offset > found.high:
            log.error(
                "the log ends before what was already read: the topic was made anew or has lost data;"
                " it is read from its beginning",
                topic=self.topic,
                partition=found.partition,
                read_to=start.offset,
                log_end=found.high,
            )
        return Start(found.low, found.low, continues=False, skipped=max(0, found.low - start.offset))

    def begun(self, partitions: Iterable[int]) -> None:
        """They are being read: let the group know that they are ours."""
        for partition in partitions:
            if partition in self.readings:
                self.readings[partition].held = False
        self.commit_soon()

    # -- a topic that is made anew

    async def topic_is(self, id: str) -> bool:
        """Kafka says which topic of its name this one is. True: another one than what was read of it; then
        all of its partitions are to be begun again, with ``begin_anew``."""
        key = f"topic_id/{self.topic}"
        before = self.store.database.meta(key)
        # What was restored, or adopted, may be of another one than this broker has read.
        old = [s for s in self._sources() if (s.topic_id or before or id) != id]
        anew = bool(old) or before not in (None, id)
        if anew:
            log.error(
                "the topic was made anew: it is read from its beginning; what is here of the old one is kept",
                topic=self.topic,
                old=before or old[0].topic_id,
                new=id,
            )
            for source in old:
                self.store.retire(source, f"{self.topic}@{source.topic_id or before}")
            self.readings.clear()
        self._topic_id = id
        for source in self._sources():
            self.store.identify(source, id)
        if before != id:
            await self.store.set_meta(key, id)
        self._find_unresolved()
        return anew

    def _sources(self) -> list[Source]:
        return [source for source in self.store.sources() if source.topic == self.topic]

    async def begin_anew(self, found: Sequence[Found]) -> list[Begun]:
        """These are of a topic that was made anew: nothing that is known of their offsets holds any more."""
        begun = []
        for partition in found:
            start = Start(partition.low, partition.low, continues=False)
            source = self.store.source(self.topic, partition.partition)
            begun.append(self._begin_at(start, source, partition))
        await self.store.committed()
        return begun

    # -- partitions that go

    async def leave(self, partitions: Iterable[int]) -> list[Position]:
        """These are being revoked: what is durable of them, to be committed before they go."""
        for partition in partitions:
            if partition in self.readings:
                self.readings[partition].held = True
        await self._stored()
        leaving = (self.readings[p] for p in partitions if p in self.readings)
        return [reading.position() for reading in leaving]

    async def _stored(self) -> None:
        """What was delivered is durable, or takes too long."""
        if self._storing:
            await asyncio.wait(self._storing, timeout=LEAVE_SECONDS_MAX)

    async def left(self, positions: Iterable[Position], refused: str | None) -> None:
        """They are gone, their last commit acknowledged or ``refused``."""
        for position in positions:
            self.readings.pop(position.partition, None)
            source = self.store.source(self.topic, position.partition)
            if refused is None:
                self.store.cover(source, position.offset)
                self.store.drop_uncovered(source, position.offset)
            else:
                self.store.dispute(source)
        if refused is not None:
            log.warning("the last commit of revoked partitions failed", topic=self.topic, error=refused)
        await self._settled()

    async def lost(self, partitions: Iterable[int]) -> None:
        """Another broker may read these already. Nothing can be committed any more."""
        for partition in partitions:
            self.readings.pop(partition, None)
            self.store.dispute(self.store.source(self.topic, partition))
        await self._settled()

    async def resolve(self, found: Iterable[Found]) -> None:
        """Say what is ours of partitions that are not assigned to us."""
        for partition in found:
            if partition.partition not in self.readings:
                source = self.store.source(self.topic, partition.partition)
                self._say_whose(source, partition, assigned=False)
        await self._settled()

    async def _settled(self) -> None:
        await self.store.committed()
        self._find_unresolved()

    def _say_whose(self, source: Source, found: Found, assigned: bool) -> None:
        """Drop what another broker reads again; the rest is ours for good."""
        bound = boundary(found.owners, found.committed, self.me, assigned)
        if bound is None:
            self.store.cover(source, found.committed or 0)
            self.store.settle_dispute(source)
            return
        dropped = sum(offset >= bound for offset, _, _ in source.uncovered)
        self.store.drop_uncovered(source, bound)
        self.store.cover(source, bound)
        self.store.settle_dispute(source)
        if dropped:
            log.warning(
                "another broker reads rows of this one again; they were dropped here",
                topic=self.topic,
                partition=found.partition,
                count=dropped,
                from_offset=bound,
            )

    def _find_unresolved(self) -> None:
        self.unresolved = frozenset(
            source.partition
            for source in self.store.sources()
            if source.topic == self.topic and source.uncovered and source.partition not in self.readings
        )

    # -- the end

    async def finish(self) -> None:
        """Nothing is delivered any more; when it returns, what was is durable, and no commit is started."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._stored()

    async def commit_rest(self) -> None:
        """The last commit, once no other is under way."""
        self._commit_due()


def keep_orphans(store: Inflight, *topics: str) -> int:
    """Rows of other topics, which this broker no longer consumes, are its own from now on. How many rows.

    Nobody can say any more whether another broker reads them again: better twice than never.
    """
    kept = 0
    for source in store.sources():
        if source.topic not in topics and source.uncovered:
            kept += len(source.uncovered)
            store.cover(source, max(source.next, source.uncovered[-1][0] + 1))
    return kept
