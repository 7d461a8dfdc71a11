"""What a broker whose disk is gone has left unfinished: found from its ledger and the group's offsets,
read again from the log, and stored here."""

from __future__ import annotations

import asyncio
import json
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import structlog

from penstock_broker.domain.activation import Activation, Status
from penstock_broker.domain.lifecycle import Event, Limits, decide
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.intake import Found
from penstock_broker.ingest.ledger_records import Account, Taken
from penstock_broker.ingest.ownership import Me, boundary
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.ledger import SEGMENT_OFFSETS, Segment, State, offsets_of

if TYPE_CHECKING:
    from penstock_broker.ingest.ledger import Ledger

log = structlog.get_logger("ledger")

# A node of Kafka that is coming up knows no topic: what is in none of so many answers is gone.
LOOKS = 5
LOOK_SECONDS = 1.0

# Rows are waited for that end and make room; if none has for so long, none may before this has ended.
ROOM_SECONDS_MAX = 30.0

_STORY_LOST = "its last error was lost with its broker's disk"


class Left(NamedTuple):
    """What is unfinished of one partition."""

    topic: str
    partition: int
    # What was taken begins here; from ``end`` on other brokers read.
    start: int
    end: int
    # Unfinished offsets, ascending; with ``within`` those that the log still has.
    offsets: Sequence[int]
    states: Mapping[int, State]
    # The ledger knows of those below; the others were taken since its last record, and some may be finished.
    recorded_to: int
    # Those that are no longer in the log, ascending.
    expired: Sequence[int] = ()
    # There was no ledger when they were taken: nothing says which at-most-once tasks have started.
    unrecorded: bool = False
    # Which topic of its name Kafka has now; "": not known.
    topic_id: str = ""
    # Its log is not there any more, and all of it is expired: one of its name, if there is one, is another.
    gone: bool = False

    def within(self, low: int, high: int) -> Left:
        """The same, with a log that begins at ``low`` and ends before ``high``."""
        there = [offset for offset in self.offsets if low <= offset < high]
        expired = [offset for offset in self.offsets if not low <= offset < high]
        return self._replace(offsets=there, expired=expired)


def left_of(
    topic: str, taken: Taken | None, segments: Mapping[int, Segment], found: Found, lost: Me
) -> Left | None:
    """What the broker with the store ``lost`` has left of a partition; None when it never had it.

    ``segments``: by number. What lies above the ledger's range, up to where the offsets and owners that
    the group has committed say that others begin, was taken after the last record: it is unfinished.
    """
    mine = next((owner.start for owner in found.owners if owner.me == lost), None)
    if taken is None and mine is None:
        return None
    unrecorded, taken = taken is None, taken or Taken(-1, -1, 0)
    bound = boundary(found.owners, found.committed, lost, assigned=False) or 0
    end = max(bound, taken.covered)
    offsets: list[int] = []
    states: dict[int, State] = {}
    for number in sorted(segments):
        first = number * SEGMENT_OFFSETS
        offsets += [offset for offset in offsets_of(first, segments[number]) if offset < end]
        states |= {first + n: state for n, state in segments[number].states.items()}
    start, recorded_to = taken.start, end
    if mine is not None and (begin := max(taken.next, mine)) < bound:
        start, recorded_to = start if begin == taken.next else mine, begin
        offsets += range(begin, bound)
    return Left(topic, found.partition, start, end, offsets, states, recorded_to, unrecorded=unrecorded)


async def find_left(ledger: Ledger, account: Account, broker_id: str) -> list[Left]:
    """What a broker has left, over all partitions. Raises KafkaException."""
    found = await _look_up(ledger, account)
    gone = account.ranges.keys() - found.keys()
    found |= {(topic, partition): Found(partition, None, ()) for topic, partition in gone}
    recorded = sorted({topic for topic, _ in account.topic_ids})
    ids = {topic: await ledger.call(ledger.log.topic_id, topic) for topic in recorded}
    lefts = []
    for (topic, partition), one in sorted(found.items()):
        taken, id = account.ranges.get((topic, partition)), ids.get(topic, "")
        segments = {n: s for (t, p, n), s in account.segments.items() if (t, p) == (topic, partition)}
        if id and account.topic_ids.get((topic, partition), id) != id:
            unfinished = [at for n in sorted(segments) for at in offsets_of(n * SEGMENT_OFFSETS, segments[n])]
            lefts.append(Left(topic, partition, -1, -1, (), {}, -1, unfinished, gone=True))
            taken, segments = None, {}
        lost = _lost_store(account, one, broker_id, ledger.me)
        left = left_of(topic, taken, segments, one, lost)
        if left is None:
            continue
        left = left._replace(topic_id=id, gone=(topic, partition) in gone)
        if left.gone:
            left = left.within(0, 0)
        elif left.offsets:
            # Only then: a partition without a leader, of which nothing is left, is in nobody's way.
            left = left.within(*await ledger.call(ledger.log.ends, topic, partition))
        lefts.append(left)
    return lefts


async def _look_up(ledger: Ledger, account: Account) -> dict[tuple[str, int], Found]:
    """What Kafka knows of everything that a broker may have taken from, but for what is not there."""
    consumed = {ledger.settings.kafka_topic, ledger.settings.kafka_overflow_topic}
    found: dict[tuple[str, int], Found] = {}
    topics = consumed | {topic for topic, _ in account.ranges}
    for look in range(LOOKS):
        if look:
            await asyncio.sleep(LOOK_SECONDS)
        for topic in sorted(topics):
            # Of those that are consumed all partitions: the first record may not have been written yet.
            partitions = None if topic in consumed else [p for t, p in account.ranges if t == topic]
            for one in await ledger.call(ledger.log.look_up, topic, partitions):
                found[topic, one.partition] = one
        topics = {topic for topic, _ in account.ranges.keys() - found.keys()}
        topics |= consumed - {topic for topic, _ in found}
        if not topics:
            break
    return found


def _lost_store(account: Account, found: Found, broker_id: str, me: Me) -> Me:
    """The store that the broker had: as recorded, or the newest that has committed under its name."""
    if account.head is not None and account.head.store_id:
        return Me(broker_id, account.head.store_id)
    named = (o.me for o in found.owners if o.me.broker_id == broker_id and o.me != me)
    return next(named, Me(broker_id, ""))


class _Room:
    """Whether there is room in the store for what is restored, or adopted."""

    def __init__(self, store: Inflight, term: str) -> None:
        self._store = store
        self._term = term
        self._said = ""
        # Since when so many rows are there (monotonic ms).
        self._rows, self._since = 0, 0

    def is_there(self) -> bool:
        """False: wait. It is said why."""
        limit, rows, now = self._store.limit(), self._store.memory.rows, self._store.clock.mono_ms()
        if not limit:
            self._said = ""
            return True
        if limit != self._said:
            self._said = limit
            log.warning(
                f"what is left of a lost disk waits to be {self._term}: a limit is reached",
                limit=limit,
                rows=rows,
                bytes=self._store.memory.bytes,
            )
            self._rows, self._since = rows, now
        if rows < self._rows:
            self._rows, self._since = rows, now
        return not self._store.disk_fails and now - self._since >= ROOM_SECONDS_MAX * 1000


async def _nothing() -> None: ...


async def restore(
    ledger: Ledger,
    left: Left,
    term: str,
    before_batch: Callable[[], Awaitable[None]] = _nothing,
    progress: str = "",
) -> int:
    """Store what is left of one partition; how many rows. ``term``: "restored" or "adopted".

    One that was interrupted goes on where it was: that is where the source goes on, or what the meta has
    under ``progress`` for an adoption, and of a log that is gone. Raises KafkaException, StoreStopped, and
    what ``before_batch`` raises.
    """
    store = ledger.store
    if left.gone:
        progress = progress or f"restore/{left.topic}/{left.partition}/gone"
        if store.database.meta(progress) is None:
            await store.set_meta(progress, 1)
            ledger.unrestorable += len(left.expired)
            _tell(left, term, 0, len(left.expired))
        return 0
    source = store.source(left.topic, left.partition)
    fresh = term == "restored"
    if left.topic_id and not source.topic_id:
        store.identify(source, left.topic_id)
    begin = source.next if fresh else int(store.database.meta(progress) or 0)  # type: ignore[call-overload]
    offsets = [offset for offset in left.offsets if offset >= begin]
    store.begin_restored(source, left.start if fresh else -1, left.end)
    admission = Admission(AdmissionLimits.of(ledger.settings))
    batches = ledger.log.messages(left.topic, left.partition, offsets) if offsets else iter(())
    # An offset without a message above what was recorded is none of a task.
    tasks = sorted((*left.expired, *(offset for offset in offsets if offset < left.recorded_to)))
    restored, missing, room = 0, 0, _Room(store, term)

    def count_missing(to: int, there: int) -> int:
        """Of the tasks from ``begin`` to ``to`` the log has only so many."""
        count = bisect_left(tasks, to) - bisect_left(tasks, begin) - there
        ledger.unrestorable += count
        return count

    while (batch := await ledger.call(next, batches, None)) is not None:
        await before_batch()
        while not room.is_there():
            await asyncio.sleep(LOOK_SECONDS)
            await before_batch()
        now, rows = store.clock.wall_ms(), []
        for message in batch:
            # Its age is judged as of when it was sent, or a long delay would begin anew.
            sent_at = message.sent_at if 0 < message.sent_at < now else now
            row = admission.admit(
                message.value, sent_at, source.id, message.offset, left.topic, left.partition
            )
            state = left.states.get(message.offset)
            # Taken since the last record it may be a copy, which was absorbed, of one that has started.
            absorbed = message.keyed and message.offset >= left.recorded_to
            if (left.unrecorded or absorbed) and row.at_most_once:
                state = State(row.attempts, row.lost, 0, None, True, None, row.max_attempts, 0)
            become(row, state, now, store.limits.lifecycle)
            rows.append(row)
        restored += len(rows)
        end = batch[-1].offset + 1
        taken, kept = ({source.id: end}, None) if fresh else ({}, (progress, end))
        await store.insert(rows, taken, term, kept)
        missing += count_missing(end, sum(message.offset < left.recorded_to for message in batch))
        begin = end
    taken, kept = ({source.id: left.end}, None) if fresh else ({}, (progress, left.end))
    await store.insert([], taken, term, kept)
    missing += count_missing(left.end, 0)
    _tell(left, term, restored, missing)
    return restored


def become(row: Activation, state: State | None, now: int, limits: Limits) -> None:
    """Make ``row``, as its message says, what it had become. ``now``: epoch ms."""
    if row.status is Status.DELAYED and row.ready_at <= now:
        row.status = Status.PENDING
    if state is None or row.status is Status.FORWARDING:
        return
    row.attempts, row.lost, row.given_back_at = state.attempts, state.lost, state.given_back_at
    row.max_attempts, row.retry_delay_ms = state.max_attempts, state.retry_delay_ms
    if state.reason is not None:
        row.status, row.reason = Status.FORWARDING, state.reason
        row.ready_at = state.due_at or row.ready_at
        row.error = json.dumps({"type": state.reason, "message": _STORY_LOST})
    elif state.claimed:
        # It may have started: what becomes of it is what becomes of one whose worker vanished.
        row.status = Status.PROCESSING
        change = decide(row, Event.LEASE_LOST, now, limits)
        row.status, row.reason, row.lost = change.status, change.reason, change.lost
        row.error = json.dumps({"type": "disk lost", "message": "its broker lost its disk after the claim"})
    elif state.due_at > now:
        row.status, row.ready_at = Status.DELAYED, state.due_at
    else:
        row.status = Status.PENDING


def _tell(left: Left, term: str, rows: int, missing: int) -> None:
    if rows:
        log.warning(
            f"unfinished tasks of a lost disk were {term}",
            topic=left.topic,
            partition=left.partition,
            tasks=rows,
            taken_since_the_last_record=max(0, left.end - left.recorded_to),
        )
    if missing:
        log.error(
            "unfinished tasks of a lost disk are lost: Kafka no longer holds them",
            topic=left.topic,
            partition=left.partition,
            tasks=missing,
            hint="its log is not there any more: the topic was deleted, or made anew"
            if left.gone
            else "the topic's retention is shorter than its backlog was old: raise retention.ms",
        )
