"""The ledger: what is unfinished here, recorded in Kafka, so that the loss of this disk loses no task.

A record says only what is durable, and may lag behind by half a second: what was taken since is found
from the offsets that the group has committed, and runs again. docs/adr/0007 has the reasons.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import structlog
from confluent_kafka import KafkaException

from penstock_broker.config import Settings
from penstock_broker.errors import FatalError, OldDatabase, Replaced
from penstock_broker.ingest.ledger_log import Fenced, LedgerLog
from penstock_broker.ingest.ledger_records import (
    Account,
    Head,
    Record,
    Taken,
    head_record,
    parts_of,
    range_record,
    read_account,
    segment_record,
)
from penstock_broker.ingest.ledger_restore import Left, find_left, restore
from penstock_broker.ingest.ownership import Me
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.ledger import Segment, segment_key, segment_of
from penstock_broker.store.writer import StoreStopped

log = structlog.get_logger("ledger")

T = TypeVar("T")

# With the time a write takes: half a second.
RECORD_EVERY_SECONDS = 0.4
RETRY_SECONDS = 1.0
LOOK_AGAIN_SECONDS = 5.0
# A Kafka that has just been made needs a while for its first transaction.
PATIENCE_MS = 20_000
# A new store that begins without a ledger restores nothing later, and one that was adopted would start what
# its heir runs: one answer is not enough for that.
LOOKS_FOR_THE_TOPIC = 3
# An idle broker says that it lives.
HEARTBEAT_SECONDS = 10.0
# The group is asked this often whether it still has a broker.
LOOK_SECONDS = 0.5
STOP_SECONDS_MAX = 1.0

# Of the store's meta: how far the restore of a new store is, and the sequence of the last record.
RESTORE, SEQUENCE = "restore", "ledger_sequence"

_WAYS_OUT = (
    "put the database back that this broker had last; or start it with `penstock-broker serve --reconcile`,"
    " which sets this one aside and restores from the ledger what is unfinished"
)


class Snapshot(NamedTuple):
    """A change of segments and ranges, and the names of their sources, as they were when it was taken."""

    segments: dict[int, Segment]
    ranges: dict[int, Taken]
    # source id -> (topic, partition, topic id)
    names: dict[int, tuple[str, int, str]]


class Ledger:
    """Everything on the event loop; every call to Kafka on a thread of its own.

    ``start``, ``open`` and ``stop`` once each; ``recorded`` from the start on.
    """

    def __init__(self, store: Inflight, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.me = Me(settings.broker_id, store.store_id)
        self.log = self.log_of(settings.broker_id)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        # Written here, read by anybody.
        self.is_open = False
        self.off = False
        self.written_at_ms = self._made_at_ms = store.clock.mono_ms()
        self.unrestorable = 0
        # When it was last said of a restore that it goes on.
        self._said_ms = 0
        # Why the broker must not go on.
        self.fatal: FatalError | None = None
        self._sequence = int(store.database.meta(SEQUENCE) or 0)  # type: ignore[call-overload]
        # When the first change came that is not recorded, and the first that came after the last snapshot.
        self._dirty_at: int | None = None
        self._changed_at: int | None = None
        self._opened = asyncio.Event()
        # Every topic's consumer waits for it.
        self._opening = asyncio.Lock()
        self._wake = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []
        # Records to write with the next ones, in one transaction; an adopter's on the adopted one.
        self._more: list[Record] = []
        self._failed = False
        # Records in the topic that are nobody's.
        self._strange = 0
        store.hold_at_most_once(True)
        store.doubt_age()
        store.recorded = self.recorded
        store.writer.on_committed.append(self._look)

    def log_of(self, broker_id: str) -> LedgerLog:
        """The ledger, to be written as that broker."""
        return LedgerLog(self.settings, self.store.clock, broker_id)

    async def call(self, what: Callable[..., T], *arguments: object) -> T:
        """Have it done on the ledger's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, what, *arguments)

    # -- opening

    async def open(self, on_known: Callable[[], None]) -> None:
        """Make sure that this store is the one the ledger speaks of, and restore what a lost one held.

        Returns when partitions may be read. ``on_known`` is called when it is known that this broker
        may serve what it has. Tries until Kafka answers. Raises OldDatabase, Replaced.
        """
        async with self._opening:
            await self._open_once(on_known)
        on_known()

    async def _open_once(self, on_known: Callable[[], None]) -> None:
        while not self._opened.is_set():
            try:
                if await self._open(on_known):
                    return
            except KafkaException as error:
                self._say_failed(error.args[0].str())
            except Fenced as error:
                self._say_failed(str(error))
            on_known()
            await asyncio.sleep(RETRY_SECONDS)

    async def _open(self, on_known: Callable[[], None]) -> bool:
        """One attempt; whether it succeeded."""
        if not await self._is_there():
            await self._go_without("the topic does not exist")
            return True
        refused = None
        try:
            await self.call(self.log.fence)
        except KafkaException as error:
            refused = error
        account = await self.read(self.me.broker_id)
        self._check(account)
        left = await find_left(self, account, self.me.broker_id) if self.restores() else []
        if refused is not None:
            patient = self.store.clock.mono_ms() < self._made_at_ms + PATIENCE_MS
            if account.head is not None or left or patient:
                on_known()
                raise refused
            await self._go_without(f"Kafka takes no transactions: {refused.args[0].str()}")
            return True
        on_known()
        if self.restores():
            await self._restore(account, left)
        self._begin(account)
        await self._write_once()
        self._set_opened()
        return True

    def _set_opened(self) -> None:
        self._opened.set()
        self.store.known_new()

    async def _is_there(self) -> bool:
        for look in range(LOOKS_FOR_THE_TOPIC):
            if look:
                await asyncio.sleep(RETRY_SECONDS)
            if await self.call(self.log.is_there):
                return True
        return False

    async def read(self, broker_id: str) -> Account:
        """What the ledger says of a broker of this pool. Raises FatalError when that cannot be read."""
        records = await self.call(self.log.read)
        strange = [key for key, _ in records if parts_of(key) is None]
        if strange and not self._strange:
            log.warning(
                "records in the ledger's topic are no broker's: they are passed over",
                topic=self.settings.kafka_ledger_topic,
                count=len(strange),
                first_key=strange[0][:100],
                hint="only brokers may write to the topic: ask who else does",
            )
        self._strange = len(strange)
        return read_account(records, self.settings.kafka_consumer_group, broker_id)

    def restores(self) -> bool:
        """Whether this store has not yet got what a lost one may have held."""
        return self._is_empty() or self.store.database.meta(RESTORE) == "begun"

    def _is_empty(self) -> bool:
        """Whether this store has got nothing yet, neither from a lost one nor from the log."""
        return self.store.database.meta(RESTORE) is None and not self.store.memory.unfinished.ranges

    def _check(self, account: Account) -> None:
        """Raises OldDatabase or Replaced when this broker must not go on with this store."""
        head = account.head
        if head is None:
            return
        successor = head.successor
        if successor == self.me:
            # It has taken over, and was stopped before its first record.
            return
        if successor is not None:
            self._check_successor(successor, head)
        elif head.store_id == self.me.store_id:
            if head.sequence > self._sequence:
                raise OldDatabase(
                    f"the database {self.store.database.path} is an old copy: it has written"
                    f" {self._sequence} records, and the ledger has {head.sequence} of it",
                    _WAYS_OUT,
                )
        elif not self._is_empty():
            raise OldDatabase(
                f"the database {self.store.database.path} (store {self.me.store_id}) is not the one that"
                f" broker {self.me.broker_id!r} had last (store {head.store_id})",
                _WAYS_OUT,
            )

    def _check_successor(self, successor: Me, head: Head) -> None:
        # Nor does a restore go on after somebody else has taken over: what it has stored is run there, too.
        if not self._is_empty():
            by = (
                f"a new database of its own (store {successor.store_id})"
                if successor.broker_id == self.me.broker_id
                else f"broker {successor.broker_id!r}"
            )
            raise Replaced(
                f"broker {self.me.broker_id!r} was adopted by {by}: what it held is run there",
                "its database is set aside; start it again, and it begins with an empty one",
            )
        if successor.broker_id != self.me.broker_id and not head.handed:
            raise FatalError(
                f"broker {successor.broker_id!r} has begun to adopt broker {self.me.broker_id!r},"
                " and has not finished",
                f"if it still does, wait; else repeat `penstock-broker adopt {self.me.broker_id}` there",
            )

    async def _go_without(self, why: str) -> None:
        if not self.off:
            log.error(
                "no ledger: if this broker loses its disk, it loses the tasks it holds",
                topic=self.settings.kafka_ledger_topic,
                why=why,
                hint="create it (compacted), or set create_missing_topics; it is looked for again",
            )
        self.off = True
        self._set_opened()
        self.store.hold_at_most_once(False)
        if self.restores():
            await self.store.set_meta(RESTORE, "done")
        for waiter in self._taken_waiters():
            if not waiter.done():
                waiter.set_result(None)

    # -- restoring

    async def _restore(self, account: Account, left: Sequence[Left]) -> None:
        head, had_another = account.head, bool(left) or account.head is not None
        if had_another:
            await self.succeed(self.log, head, self.me.broker_id)
        await self.store.set_meta(RESTORE, "begun")
        self._said_ms = self.store.clock.mono_ms()
        for part in left:
            await restore(self, part, "restored", partial(self._say_it_lives, head))
        if had_another:
            # Its process may live still, cut off from here: as long as the group has it, it takes more.
            await self._outlive(head)
            for part in await find_left(self, account, self.me.broker_id):
                await restore(self, part, "restored", partial(self._say_it_lives, head))
        await self.store.set_meta(RESTORE, "done")

    async def _outlive(self, head: Head | None) -> None:
        """Until the group has let go of whoever had this broker's name."""
        until = self.store.clock.mono_ms() + 1000 * self.settings.kafka_session_timeout_seconds + PATIENCE_MS
        while not await self.is_gone(self.me.broker_id, HEARTBEAT_SECONDS):
            await self._say_it_lives(head)
            if self.store.clock.mono_ms() > until:
                self._say_failed(
                    f"broker {self.me.broker_id!r} is still in the consumer group"
                    f" {self.settings.kafka_consumer_group!r}, with the database before this one: stop it"
                )

    async def is_gone(self, broker_id: str, seconds_max: float) -> bool:
        """Whether a broker can commit no offsets any more, so that what it took is known for good; waits for
        it so long. Raises KafkaException."""
        until = self.store.clock.mono_ms() + 1000 * seconds_max
        while await self.call(self.log.is_member, broker_id):
            if self.store.clock.mono_ms() > until:
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True

    async def _say_it_lives(self, head: Head | None) -> None:
        """Now and then while this store restores: to whoever would adopt this broker. Raises Fenced when
        somebody has begun to."""
        if self.store.clock.mono_ms() - self._said_ms >= HEARTBEAT_SECONDS * 1000:
            await self.succeed(self.log, head, self.me.broker_id)
            self._said_ms = self.store.clock.mono_ms()

    async def succeed(self, into: LedgerLog, head: Head | None, broker_id: str) -> None:
        """Say that this store takes over from a broker's: whoever still writes as it stops."""
        now = self.store.clock.wall_ms()
        before = head or Head("", 0, 0, now)
        record = head_record(
            self.settings.kafka_consumer_group,
            broker_id,
            before._replace(successor=self.me, handed=False, written_at=now),
        )
        await self.call(into.write, [record])

    # -- recording

    def _begin(self, account: Account) -> None:
        """All of ours is written first: what the ledger says of it may be from before the last stop."""
        unfinished = self.store.memory.unfinished
        for topic, partition, number in account.segments:
            unfinished.dirty.add(segment_key(self.store.source(topic, partition).id, number))
        unfinished.dirty.update(unfinished.keys())
        unfinished.dirty_ranges.update(unfinished.ranges)

    def start(self) -> None:
        """Record, once it is opened."""
        self._task = asyncio.create_task(self._run(), name="ledger")

    async def failed(self) -> None:
        """Ends, with the cause, when the broker must not go on: Replaced, OldDatabase, FatalError."""
        await asyncio.shield(self._task)

    async def _run(self) -> None:
        try:
            await self._opened.wait()
            await self._record()
        except FatalError as error:
            self.fatal = error
            self.store.writer.refuse()
            raise

    async def _record(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self.is_open:
                self.store.memory.unfinished.tidy()
            if self.off:
                await asyncio.sleep(LOOK_AGAIN_SECONDS)
                with contextlib.suppress(KafkaException):
                    if await self.call(self.log.is_there):
                        # And it takes transactions.
                        await self.call(self.log.fence)
                        self.off = False
                continue
            begun = loop.time()
            try:
                if not self.is_open:
                    await self._reopen()
                await self._write_once()
            except Fenced as error:
                # Taken over, or given up by Kafka: the record says which.
                self.is_open = False
                self._say_failed(str(error))
                with contextlib.suppress(KafkaException):
                    self._check(await self.read(self.me.broker_id))
            except KafkaException as error:
                self.is_open = False
                self._say_failed(error.args[0].str())
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await self._rest(begun)

    async def _rest(self, begun: float) -> None:
        """Until something has changed and the last write is long enough ago, or somebody waits for one."""
        loop = asyncio.get_running_loop()
        self._wake.clear()
        unfinished = self.store.memory.unfinished
        if not (self._waiters or unfinished.dirty or unfinished.dirty_ranges):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(begun + HEARTBEAT_SECONDS - loop.time()):
                    await self._wake.wait()
        while not self._waiters and (pause := begun + RECORD_EVERY_SECONDS - loop.time()) > 0:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    async def _reopen(self) -> None:
        """Somebody may have taken over meanwhile, or has; or Kafka was only away."""
        await self.call(self.log.fence)
        account = await self.read(self.me.broker_id)
        self._check(account)
        self._begin(account)

    def _look(self) -> None:
        """A tick was committed."""
        unfinished = self.store.memory.unfinished
        if unfinished.dirty or unfinished.dirty_ranges:
            now = self.store.clock.mono_ms()
            self._changed_at = now if self._changed_at is None else self._changed_at
            self._dirty_at = now if self._dirty_at is None else self._dirty_at
            self._wake.set()

    async def _write_once(self) -> None:
        """One transaction with what has changed; the head in any case."""
        unfinished = self.store.memory.unfinished
        if unfinished.dirty or unfinished.dirty_ranges:
            self._sequence += 1
            await self.store.set_meta(SEQUENCE, self._sequence)
        waiters, more = self._taken_waiters(), self._more
        self._more = []
        taken, self._changed_at = self._take(), None
        try:
            await self.call(self._write, taken, more)
        except BaseException:
            unfinished.dirty.update(taken.segments)
            unfinished.dirty_ranges.update(taken.ranges)
            self._waiters = waiters + self._waiters
            self._more = more + self._more
            raise
        self._dirty_at = self._changed_at
        self._say_written()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _take(self) -> Snapshot:
        """What has changed, and from now on counts as written."""
        unfinished = self.store.memory.unfinished
        segments = {key: unfinished.segment(key) for key in unfinished.dirty}
        ranges = {id: Taken(*unfinished.ranges[id][2:5]) for id in unfinished.dirty_ranges}
        unfinished.dirty, unfinished.dirty_ranges = set(), set()
        # Here, since a source may have another name by the time it is written: what has ended under the old
        # one must not stay there.
        sources = self.store.memory.partitions
        of = (sources[id] for id in {*ranges, *(segment_of(key)[0] for key in segments)})
        names = {source.id: (source.topic, source.partition, source.topic_id) for source in of}
        return Snapshot(segments, ranges, names)

    def _write(self, taken: Snapshot, more: Sequence[Record]) -> None:
        """On the ledger's thread."""
        group, broker_id = self.settings.kafka_consumer_group, self.me.broker_id
        head = Head(self.me.store_id, self.store.epoch, self._sequence, self.store.clock.wall_ms())
        records = [head_record(group, broker_id, head), *more]
        for id, part in taken.ranges.items():
            topic, partition, topic_id = taken.names[id]
            records.append(range_record(group, broker_id, topic, partition, part, topic_id))
        for key, segment in taken.segments.items():
            id, number = segment_of(key)
            topic, partition, _ = taken.names[id]
            records.append(segment_record(group, broker_id, (topic, partition, number), segment))
        self.log.write(records)

    def _say_written(self) -> None:
        self.written_at_ms = self.store.clock.mono_ms()
        self.is_open = True
        self.store.hold_at_most_once(False)
        if self._failed:
            log.info("the ledger can be used again", topic=self.settings.kafka_ledger_topic)
        self._failed = False

    def _say_failed(self, error: str) -> None:
        self.store.hold_at_most_once(True)
        if not self._failed:
            log.warning(
                "the ledger cannot be used; until it can, at-most-once tasks wait, and if the disk is lost,"
                " what has finished meanwhile runs again",
                topic=self.settings.kafka_ledger_topic,
                error=error,
            )
        self._failed = True

    # -- for those who depend on it

    async def recorded(self) -> None:
        """Resolves when all that is durable now is in the ledger; at once if there is none."""
        await self.store.committed()
        if self.off:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._wake.set()
        await waiter

    async def record_with(self, more: Sequence[Record]) -> None:
        """As ``recorded``, with ``more`` in the same transaction."""
        self._more += more
        await self.recorded()

    def _taken_waiters(self) -> list[asyncio.Future[None]]:
        waiters, self._waiters = self._waiters, []
        return waiters

    async def stop(self) -> None:
        """Record what is durable, if it can be done in a moment."""
        self._task.cancel()
        # If it has failed, ``failed`` has told.
        await asyncio.gather(self._task, return_exceptions=True)
        if self.is_open:
            with contextlib.suppress(TimeoutError, StoreStopped, KafkaException, Fenced):
                async with asyncio.timeout(STOP_SECONDS_MAX):
                    await self._write_once()
        self.log.close()
        self.thread.shutdown(wait=False, cancel_futures=True)

    def age_seconds(self) -> float:
        """For how long a change has not been recorded."""
        since = self._dirty_at
        return 0.0 if since is None else (self.store.clock.mono_ms() - since) / 1000
