"""What the ledger says when, and what is restored of it: on a log in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from confluent_kafka import KafkaError, KafkaException
from ingest_helpers import running_store, task_bytes, until
from store_helpers import token_of
from structlog.testing import capture_logs

from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.departures import Departures
from penstock_broker.dispatch.service import Refused
from penstock_broker.domain.activation import Activation, Reason, Status
from penstock_broker.domain.lifecycle import Event
from penstock_broker.errors import FatalError, OldDatabase, Replaced
from penstock_broker.ingest import ledger as ledger_module
from penstock_broker.ingest import ledger_restore
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.intake import Found, Intake
from penstock_broker.ingest.ledger import Ledger
from penstock_broker.ingest.ledger_adopt import AdoptedHere, AdoptError, AdoptReport, adopt
from penstock_broker.ingest.ledger_log import Fenced, LedgerLog, Message
from penstock_broker.ingest.ledger_records import Account, Head, Record, head_record, read_account
from penstock_broker.ingest.ledger_restore import Left, restore
from penstock_broker.ingest.ownership import Me, Owner
from penstock_broker.ingest.parts import Ingest
from penstock_broker.metrics import Metrics
from penstock_broker.store.batch import Batch, Written
from penstock_broker.store.finished import Finished
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.ledger import offsets_of
from penstock_broker.store.limits import StoreLimits
from penstock_protocol.v1.activation_pb2 import RetryState, TaskActivation
from penstock_protocol.v1.admin_pb2 import DrainRequest, DrainResponse

GROUP = "penstock-tasks"
DAY_MS = 86_400_000


class Log:
    """The ledger's topic, and a partition of tasks, which outlive brokers."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.takes = threading.Event()
        self.takes.set()
        self.refuses = 0
        # Writes that have begun.
        self.begun = 0
        self.owners: tuple[Owner, ...] = ()
        # Whether the group still has whoever is asked for.
        self.has_member = False
        # Of each write the brokers whose records it has.
        self.writers: list[set[str]] = []
        # After a message of the partition: any, or this one, once.
        self.breaks = False
        self.breaks_after = -1
        self.broken = 0
        # So many more answers are of a node that does not know the topic.
        self.unknown = 0
        # Of the partition: offset -> message.
        self.tasks: dict[int, Message] = {}
        self.has_no_leader = False
        # What the group has committed; None: all.
        self.committed: int | None = None
        # Of its topic, as Kafka says; "": it has none.
        self.id = ""

    def write(self, records: Sequence[Record]) -> None:
        self.begun += 1
        assert self.takes.wait(30)
        if self.refuses:
            self.refuses -= 1
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        self.records += records
        self.writers.append({json.loads(key)[2] for key, _ in records if key.startswith(b'["')})

    def account(self, broker_id: str = "broker-1") -> Account:
        return read_account(self.records, GROUP, broker_id)

    def is_member(self, broker_id: str) -> bool:
        return self.has_member

    def read(self) -> list[Record]:
        return list(self.records)

    def is_there(self) -> bool:
        return True

    def fence(self) -> None: ...

    def close(self) -> None: ...

    def look_up(self, topic: str, partitions: Sequence[int] | None) -> list[Found]:
        if self.unknown:
            self.unknown -= 1
            return []
        end = len(self.tasks)
        committed = end if self.committed is None else self.committed
        return [Found(0, committed, self.owners)] if topic == "tasks" and self.tasks else []

    def ends(self, topic: str, partition: int) -> tuple[int, int]:
        if self.has_no_leader:
            raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
        return 0, len(self.tasks)

    def topic_id(self, topic: str) -> str:
        return self.id

    def messages(self, topic: str, partition: int, offsets: Sequence[int]) -> Iterator[list[Message]]:
        for offset in offsets:
            if offset in self.tasks:
                yield [self.tasks[offset]]
                if self.breaks or offset == self.breaks_after:
                    self.broken, self.breaks_after = self.broken + 1, -1
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


class Broker:
    """A store with its ledger, which reads one partition."""

    def __init__(self, store: Inflight, ledger: Ledger) -> None:
        self.store, self.ledger = store, ledger
        self.source = store.source("tasks", 0)
        if self.source.start < 0:
            store.begin_range(self.source, 0)
        self._admission = Admission(AdmissionLimits())

    async def take(self, first: int, end: int) -> None:
        """Until it is durable and covered; a message that is none of a task takes the last offset."""
        now = self.store.clock.wall_ms()
        rows = [
            self._admission.admit(task_bytes(f"{n}"), now, self.source.id, n) for n in range(first, end - 1)
        ]
        await self.store.insert(rows, {self.source.id: end})
        self.store.cover(self.source, end)
        await self.store.committed()

    async def finish(self) -> None:
        """All that it holds."""
        for row in self.store.claim(None, (), 1000, 1 << 20):
            self.store.settle(token_of(self.store, row), Event.COMPLETE, self.store.clock.wall_ms())
        await self.store.committed()

    async def restore(self, *offsets: int, **more: Any) -> list[Activation]:
        """What becomes of these."""
        end = offsets[-1] + 1
        left = Left("tasks", 0, 0, end, offsets, {}, end, ())
        before = set(self.store.memory.resident)
        await restore(self.ledger, left._replace(**more), "restored")
        rows = await self.store.read(
            lambda database: database.load([key[0] for key in database.positions() if key[0] not in before])
        )
        return sorted(rows, key=lambda row: row.offset)


@contextlib.asynccontextmanager
async def broker(
    path: Path, log: Log, killed: bool = False, broker_id: str = "broker-1"
) -> AsyncIterator[Broker]:
    """``killed``: it says nothing more at its end."""
    settings = Settings(kafka_topic="tasks", broker_id=broker_id, db_path=path)
    async with running_store(path) as store:
        ledger = Ledger(store, settings)
        ledger.log = log  # type: ignore[assignment]
        ledger.log_of = lambda broker_id: log  # type: ignore[assignment, method-assign, return-value]
        ledger.start()
        try:
            await ledger.open(lambda: None)
            await store.recorded()
            yield Broker(store, ledger)
        finally:
            ledger.is_open = ledger.is_open and not killed
            log.takes.set()
            await ledger.stop()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture(autouse=True)
def _waits_for_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(ledger_module, "HEARTBEAT_SECONDS", 3600)
    monkeypatch.setattr(ledger_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(ledger_restore, "LOOK_SECONDS", 0.01)


async def test_what_was_not_recorded_before_a_crash_is_at_the_next_start(path: Path, log: Log) -> None:
    async with broker(path, log, killed=True) as one:
        await one.take(0, 20)
        await one.store.recorded()
        log.takes.clear()
        await one.take(20, 25)
        await one.finish()
        log.refuses = 1000
    log.refuses = 0
    assert len(log.account().segments) == 1
    async with broker(path, log):
        account = log.account()
        assert account.segments == {}
        assert account.ranges["tasks", 0] == (0, 25, 25)


async def test_what_changes_while_it_is_written_is_written_next(path: Path, log: Log) -> None:
    """Also where no task came or went: a copy that was absorbed must not be restored as one."""
    async with broker(path, log) as one:
        await one.take(0, 10)
        await one.store.recorded()
        log.takes.clear()
        begun = log.begun
        await one.take(10, 15)
        await until(lambda: log.begun > begun)
        await one.take(15, 16)
        log.takes.set()
        await until(lambda: log.account().ranges["tasks", 0] == (0, 16, 16))


async def test_who_asks_while_it_is_written_waits_for_the_next(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        log.takes.clear()
        begun = log.begun
        first = asyncio.ensure_future(one.store.recorded())
        await until(lambda: log.begun > begun)
        await one.take(0, 10)
        second = asyncio.ensure_future(one.store.recorded())
        await asyncio.sleep(0.01)
        log.takes.set()
        await first
        await second
        assert log.account().ranges["tasks", 0] == (0, 10, 10)


async def test_what_is_not_durable_yet_is_waited_for(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        disk, write = threading.Event(), one.store.database.write

        def slow(batch: Batch) -> Written:
            disk.wait(30)
            return write(batch)

        one.store.database.write = slow  # type: ignore[method-assign]
        takes = asyncio.create_task(one.take(0, 10))
        await asyncio.sleep(0)
        waits = asyncio.ensure_future(one.store.recorded())
        await asyncio.sleep(0.05)
        told_too_soon = waits.done()
        disk.set()
        assert not told_too_soon
        await takes
        await waits
        assert log.account().segments


async def test_what_an_adopter_says_is_said_again_when_it_was_not_taken(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        log.refuses = 2
        await one.ledger.record_with([(b'["broker","other","void"]', b'{"penstock":1}')])
        assert (b'["broker","other","void"]', b'{"penstock":1}') in log.records


async def test_it_ends_at_the_moment_of_a_change(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        await one.take(0, 10)
    assert log.account().ranges["tasks", 0] == (0, 10, 10)


async def test_a_restored_task_is_due_when_it_was(path: Path, log: Log) -> None:
    """Though a producer's clock would not be believed that says so today."""
    async with broker(path, log) as one:
        sent_at = one.store.clock.wall_ms() - 9 * DAY_MS
        task = TaskActivation(id="a", taskname="t", delay=10 * 86_400)
        task.received_at.FromMilliseconds(sent_at)
        log.tasks[0] = Message(0, task.SerializeToString(), sent_at)
        (row,) = await one.restore(0)
        assert (row.received_at, row.ready_at) == (sent_at, sent_at + 10 * DAY_MS)


async def test_what_may_have_started_unrecorded_does_not_start_again(path: Path, log: Log) -> None:
    once = task_bytes("once", retry_state=RetryState(at_most_once=True))
    log.tasks |= {0: Message(0, once, 0), 1: Message(1, task_bytes("often"), 0)}
    async with broker(path, log) as one:
        rows = await one.restore(0, 1, unrecorded=True)
        assert [(row.status, row.reason) for row in rows] == [
            (Status.FORWARDING, Reason.START_UNKNOWN),
            (Status.PENDING, None),
        ]


async def test_what_may_be_a_copy_of_what_has_started_does_not_start(path: Path, log: Log) -> None:
    """Taken since the last record, and maybe absorbed: the ids that were known are lost with the disk."""
    once = RetryState(at_most_once=True)
    for n, (retry, keyed) in enumerate([(once, True), (once, True), (once, False), (None, True)]):
        log.tasks[n] = Message(n, task_bytes(f"{n}", retry_state=retry), 0, keyed)
    async with broker(path, log) as one:
        rows = await one.restore(0, 1, 2, 3, recorded_to=1)
        assert [row.reason for row in rows] == [None, Reason.START_UNKNOWN, None, None]


async def test_what_is_missing_is_counted_and_not_looked_for_again(path: Path, log: Log) -> None:
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in (0, 2)}
    async with broker(path, log) as one:
        rows = await one.restore(0, 2, 3, 6, end=9, recorded_to=6, expired=(1,))
        assert [row.offset for row in rows] == [0, 2]
        assert one.ledger.unrestorable == 2
        assert (one.source.start, one.source.next, one.source.covered) == (0, 9, 9)


@pytest.mark.parametrize("breaks_after", [-1, 0, 2])
async def test_what_is_missing_is_counted_once_though_the_restore_is_interrupted(
    path: Path, log: Log, breaks_after: int
) -> None:
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in (0, 2, 3, 4)}
    expired = Left("tasks", 1, 0, 100, (), {}, 100, tuple(range(100)))
    gone = Left("tasks", 2, -1, -1, (), {}, -1, (3, 4), gone=True)
    lefts = [expired, gone, Left("tasks", 0, 0, 5, (0, 1, 2, 3, 4), {}, 5, ())]
    async with broker(path, log) as one:
        log.breaks_after = breaks_after
        with contextlib.suppress(KafkaException):
            await one.ledger._restore(Account(), lefts)
        await one.ledger._restore(Account(), lefts)
        assert one.store.memory.rows == 4
        assert one.ledger.unrestorable == 103


async def test_what_came_over_grpc_starts_once_also_from_an_old_copy(path: Path, log: Log) -> None:
    """Nothing but the ledger tells that it is one, and Kafka may be away when it starts."""
    async with broker(path, log) as one:
        row = Admission(AdmissionLimits()).admit(
            task_bytes("once", retry_state=RetryState(at_most_once=True)), one.store.clock.wall_ms(), 0, -1
        )
        await one.store.insert([row])
    async with running_store(path) as store:
        ledger = Ledger(store, Settings(kafka_topic="tasks", broker_id="broker-1", db_path=path))
        ledger.log = log  # type: ignore[assignment]
        log.refuses = 1000
        ledger.start()
        opens = asyncio.create_task(ledger.open(lambda: None))
        await until(lambda: log.refuses < 1000)
        assert store.claim(None, (), 1, 1 << 20) == []
        log.refuses = 0
        await opens
        assert [row.id for row in store.claim(None, (), 1, 1 << 20)] == ["once"]
        await ledger.stop()


async def test_a_partition_without_a_leader_keeps_no_new_broker_from_beginning(path: Path, log: Log) -> None:
    """Of which it can have nothing: whoever reads it is another one."""
    async with broker(path, log) as another:
        log.owners, log.tasks[0] = (Owner(0, another.ledger.me, 1),), Message(0, task_bytes("0"), 0)
        log.has_no_leader = True
        begins = asyncio.create_task(_begin(path.with_name("new.sqlite"), log, "broker-2"))
        done, _ = await asyncio.wait([begins], timeout=3)
        begins.cancel()
        assert done


async def test_a_lost_disk_whose_broker_lives_on_is_restored_with_all_it_took(path: Path, log: Log) -> None:
    """Cut off with its old disk, it reads on and commits until the group lets go of it."""
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(20)}
    async with broker(path, log, killed=True) as cut_off:
        await cut_off.take(0, 11)
        await cut_off.store.recorded()
        log.owners, log.committed = (Owner(0, cut_off.ledger.me, 1),), 11
        log.has_member = True
        async with running_store(path.with_name("new.sqlite")) as store:
            new = Ledger(store, Settings(kafka_topic="tasks", broker_id="broker-1"))
            new.log = log  # type: ignore[assignment]
            new.start()
            opens = asyncio.create_task(new.open(lambda: None))
            await until(lambda: store.memory.rows == 10)
            await cut_off.take(11, 17)
            log.committed = 17
            await asyncio.sleep(0.1)
            assert not opens.done()
            log.has_member = False
            await opens
            offsets = await store.read(lambda database: [key[5] for key in database.positions()])
            # As the broker of this test reads, 10 is none of a task, and what it finds unrecorded may be.
            assert sorted(offsets) == [*range(10), *range(11, 17)]
            intake = Intake(store, "tasks", "broker-1", 6000)
            (begun,) = await intake.begin([Found(0, log.committed, log.owners)])
            assert begun.offset == 17
            await new.stop()
        with pytest.raises(OldDatabase):
            cut_off.ledger._check(log.account())


async def test_a_restore_goes_on_with_the_next(path: Path, log: Log) -> None:
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(6)}
    async with broker(path, log) as one:
        await one.take(0, 3)
        assert [row.offset for row in await one.restore(*range(6))] == [3, 4, 5]


async def test_a_lost_disk_that_comes_back_while_it_is_restored_is_refused(path: Path, log: Log) -> None:
    async with broker(path, log) as lost:
        await lost.take(0, 4)
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(3)}
    new = path.with_name("new.sqlite")
    await begin_to_restore(new, log)
    with pytest.raises(Replaced):
        await _begin(path, log)
    # The new one goes on where it was.
    async with broker(new, log) as heir:
        assert heir.store.memory.rows == 3


async def begin_to_restore(path: Path, log: Log) -> None:
    """A disk that was lost is restored from the ledger as far as the first message, and is lost again."""
    log.breaks, broken = True, log.broken
    begins = asyncio.create_task(_begin(path, log))
    await until(lambda: log.broken > broken)
    begins.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await begins
    log.breaks = False


async def test_an_adoption_that_is_repeated_goes_on_where_it_was(path: Path, log: Log) -> None:
    """However long ago that was, and whatever is still known of what it adopted then."""
    async with broker(path, log, killed=True) as gone:
        await gone.take(0, 5)
        await gone.store.recorded()
        log.owners = (Owner(0, gone.ledger.me, 1),)
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(5)}
    heir_path = path.with_name("heir.sqlite")
    async with broker(heir_path, log, broker_id="broker-2") as heir:
        log.breaks = True
        with pytest.raises(AdoptError, match="repeat"):
            await adopt(heir.ledger, [], "broker-1", force=True)
        # It is stored with the first of them.
        assert heir.store.memory.rows == 1
        await heir.finish()
        log.breaks = False
    async with broker(heir_path, log, broker_id="broker-2") as heir:
        heir.store.memory.finished = Finished(0, 0)
        assert (await adopt(heir.ledger, [], "broker-1", force=True)).adopted == 3
        assert heir.store.memory.rows == 3
        assert heir.store.imbalance() == 0
        # How far it was is of no use any more.
        kept = await heir.store.read(lambda d: d.connection.execute("SELECT key FROM meta").fetchall())
        assert not [key for (key,) in kept if str(key).startswith("adopt")]


async def test_how_far_an_adoption_is_becomes_durable_with_what_it_adopted(path: Path) -> None:
    """Though the tick before it had no room for that."""
    limits = StoreLimits(batch_rows_max=1)
    async with running_store(path, limits) as store:
        source, known, write = store.source("tasks", 0), [], store.database.write

        def noting(batch: Batch) -> Written:
            written = write(batch)
            known.append((len(batch.rows), store.database.meta("adopt")))
            return written

        store.database.write = noting  # type: ignore[method-assign]
        now, admission = store.clock.wall_ms(), Admission(AdmissionLimits())
        rows = [admission.admit(task_bytes(f"{n}"), now, source.id, n) for n in range(2)]
        first, second = store.insert(rows[:1]), store.insert(rows[1:], term="adopted", progress=("adopt", 2))
        await first
        await second
        assert [one for one in known if one[0]] == [(1, None), (1, 2)]


@contextlib.asynccontextmanager
async def heir_of_five(path: Path, log: Log) -> AsyncIterator[Broker]:
    """A broker that may adopt another one with five tasks; it has room for two."""
    async with broker(path, log, killed=True) as gone:
        await gone.take(0, 6)
        await gone.store.recorded()
        log.owners = (Owner(0, gone.ledger.me, 1),)
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(6)}
    async with broker(path.with_name("heir.sqlite"), log, broker_id="broker-2") as heir:
        heir.store.limits = replace(heir.store.limits, rows_max=2)
        yield heir


def _has(heir: Broker, rows: int) -> bool:
    return heir.store.memory.rows == rows


async def test_what_is_adopted_waits_for_room(path: Path, log: Log) -> None:
    async with heir_of_five(path, log) as heir:
        with capture_logs() as lines:
            adopts = asyncio.create_task(adopt(heir.ledger, [], "broker-1", force=True))
            for rows in (2, 2, 1):
                await until(partial(_has, heir, rows))
                await asyncio.sleep(0.05)
                assert heir.store.memory.rows == rows
                await heir.finish()
            assert (await adopts).adopted == 5
        assert [line["limit"] for line in lines if "waits to be adopted" in line["event"]] == [
            "max_pending_count"
        ] * 2


async def test_what_is_adopted_does_not_wait_for_what_nobody_ends(
    path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no worker; or they are tasks that wait for the end of this."""
    monkeypatch.setattr(ledger_restore, "ROOM_SECONDS_MAX", 0.05)
    async with heir_of_five(path, log) as heir:
        assert (await adopt(heir.ledger, [], "broker-1", force=True)).adopted == 5
        assert heir.store.memory.rows == 5


async def test_what_is_adopted_waits_for_space_on_the_disk(
    path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_restore, "ROOM_SECONDS_MAX", 0)
    async with heir_of_five(path, log) as heir:
        low = True
        space = SimpleNamespace(low=False, watch=lambda: low, close=lambda: None)
        heir.store.database.space = space  # type: ignore[assignment]
        heir.store.watch_disk()
        await heir.store.committed()
        adopts = asyncio.create_task(adopt(heir.ledger, [], "broker-1", force=True))
        await asyncio.sleep(0.1)
        assert heir.store.memory.rows == 0
        low = False
        heir.store.watch_disk()
        assert (await adopts).adopted == 5


@pytest.mark.parametrize("by_its_own_new_disk", [False, True])
async def test_a_restore_does_not_go_on_after_somebody_else_has_taken_over(
    path: Path, log: Log, by_its_own_new_disk: bool
) -> None:
    async with broker(path, log, killed=True) as lost:
        await lost.take(0, 4)
        await lost.store.recorded()
        log.owners = (Owner(0, lost.ledger.me, 1),)
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(4)}
    new = path.with_name("new.sqlite")
    await begin_to_restore(new, log)
    if by_its_own_new_disk:
        await begin_to_restore(path.with_name("newer.sqlite"), log)
        with pytest.raises(Replaced):
            await _begin(new, log)
        async with broker(path.with_name("newer.sqlite"), log) as heir:
            assert heir.store.memory.rows == 3
        with pytest.raises(OldDatabase):
            await _begin(new, log)
    else:
        async with broker(path.with_name("heir.sqlite"), log, broker_id="broker-2") as heir:
            assert (await adopt(heir.ledger, [], "broker-1", force=True)).adopted == 3
            with pytest.raises(Replaced):
                await _begin(new, log)


async def test_a_broker_that_restores_says_that_it_lives_and_notices_its_heir(
    path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with broker(path, log) as lost:
        await lost.take(0, 11)
        log.owners = (Owner(0, lost.ledger.me, 1),)
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(10)}
    monkeypatch.setattr(ledger_module, "HEARTBEAT_SECONDS", 0)
    heads: list[Head | None] = []
    write = log.write

    def noting(records: Sequence[Record]) -> None:
        write(records)
        heads.append(log.account().head)
        if len(heads) == 5:
            raise Fenced("an adopter has begun")

    log.write = noting  # type: ignore[method-assign]
    new = path.with_name("new.sqlite")
    async with running_store(new) as store:
        ledger = Ledger(store, Settings(kafka_topic="tasks", broker_id="broker-1", db_path=new))
        ledger.log = log  # type: ignore[assignment]
        with pytest.raises(Fenced):
            await ledger._open(lambda: None)
        ledger.thread.shutdown()
    # One when it begins, and then one before each message.
    assert len(heads) == 5
    assert all(head is not None and head.successor == ledger.me and not head.handed for head in heads)


async def test_a_broker_is_adopted_with_all_it_took_once_it_is_gone(path: Path, log: Log) -> None:
    async with broker(path, log, killed=True) as gone:
        await gone.take(0, 4)
        await gone.store.recorded()
        log.owners = (Owner(0, gone.ledger.me, 1),)
    # It took two more, and was lost before it said so.
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(6)}
    log.has_member = True
    async with broker(path.with_name("heir.sqlite"), log, broker_id="broker-2") as heir:
        adopts = asyncio.create_task(adopt(heir.ledger, [], "broker-1", force=True))
        await asyncio.sleep(0.1)
        assert heir.store.memory.rows == 0
        log.has_member = False
        assert await adopts == AdoptReport("broker-1", 1, 5, 0)
        assert heir.store.memory.rows == 5
        account = log.account()
        assert account.head is not None
        assert (account.head.successor, account.head.handed) == (heir.ledger.me, True)
        assert offsets_of(0, next(iter(log.account("broker-2").segments.values()))) == [0, 1, 2, 4, 5]
        # What the heir has is said with what the other has no more.
        handed = [writers for writers in log.writers if "broker-1" in writers][-2:]
        assert handed == [{"broker-1", "broker-2"}] * 2
    with pytest.raises(Replaced):
        await _begin(path, log)
    async with broker(path.with_name("new.sqlite"), log) as again:
        assert again.store.memory.rows == 0


@pytest.mark.parametrize("adopted", [True, False])
@pytest.mark.parametrize(
    ("before", "now"), [("a", "b"), ("a", "a"), ("", "b"), ("a", "")], ids=["anew", "same", "old", "no ids"]
)
async def test_a_topic_that_was_made_anew_is_not_taken_for_the_one_of_the_ledger(
    path: Path, log: Log, adopted: bool, before: str, now: str
) -> None:
    """Only where both are known."""
    async with broker(path, log, killed=True) as gone:
        if before:
            gone.store.identify(gone.source, before)
        await gone.take(0, 6)
        await gone.store.recorded()
    log.id = now
    log.tasks |= {n: Message(n, task_bytes(f"{now}-{n}"), 0) for n in range(9)}
    # They are another broker's to read.
    log.owners = (Owner(6, Me("other", "1"), 1),)
    anew = (before, now) == ("a", "b")
    heirs = "broker-2" if adopted else "broker-1"
    async with broker(path.with_name("heir.sqlite"), log, broker_id=heirs) as heir:
        if adopted:
            lost = 5 if anew else 0
            assert await adopt(heir.ledger, [], "broker-1", force=True) == AdoptReport(
                "broker-1", 1, 5 - lost, lost
            )
        source = heir.source
        if anew:
            assert (heir.store.memory.rows, heir.ledger.unrestorable) == (0, 5)
            assert (source.next, source.covered, source.topic_id) == (0, 0, "")
        else:
            assert (heir.store.memory.rows, heir.ledger.unrestorable) == (5, 0)
            assert (source.covered, source.topic_id) == (6, before and now)
        await heir.store.recorded()
        assert (("tasks", 0) in log.account().ranges) == (not anew or not adopted)
        assert log.account().segments.keys() == (set() if anew or adopted else {("tasks", 0, 0)})
        assert log.account(heirs).topic_ids.get(("tasks", 0), "") == source.topic_id


async def test_of_a_topic_made_anew_is_restored_what_was_taken_since(path: Path, log: Log) -> None:
    async with broker(path, log, killed=True) as lost:
        lost.store.identify(lost.source, "a")
        await lost.take(0, 6)
        await lost.store.recorded()
        # Committed of the new one, and not in the ledger yet.
        log.owners = (Owner(2, lost.ledger.me, 1),)
    log.id = "b"
    log.tasks |= {n: Message(n, task_bytes(f"b-{n}"), 0) for n in range(4)}
    async with broker(path.with_name("new.sqlite"), log) as new:
        assert sorted(row.id for row in new.store.memory.resident.values()) == ["b-2", "b-3"]
        assert (new.source.start, new.source.next, new.source.topic_id) == (2, 4, "b")
        assert new.ledger.unrestorable == 5


async def test_an_adoption_is_repeated_on_the_new_disk_of_who_has_begun_it(
    path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with broker(path, log, killed=True) as gone:
        await gone.take(0, 5)
        await gone.store.recorded()
        log.owners = (Owner(0, gone.ledger.me, 1),)
    once = RetryState(at_most_once=True)
    log.tasks |= {n: Message(n, task_bytes(f"{n}", retry_state=once if n < 2 else None), 0) for n in range(5)}

    def two(topic: str, partition: int, offsets: Sequence[int]) -> Iterator[list[Message]]:
        for n in offsets[:2]:
            yield [log.tasks[n]]
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    async with broker(path.with_name("one.sqlite"), log, killed=True, broker_id="broker-2") as one:
        with monkeypatch.context() as patch:
            patch.setattr(log, "messages", two)
            with pytest.raises(AdoptError, match="repeat the adoption"):
                await adopt(one.ledger, [], "broker-1", force=True)
        (started, _) = one.store.claim(None, (), 2, 1 << 20)
        one.store.settle(token_of(one.store, started), Event.COMPLETE, one.store.clock.wall_ms())
        await one.store.recorded()
    new = path.with_name("new.sqlite")
    async with broker(path.with_name("other.sqlite"), log, broker_id="broker-3") as other:
        with pytest.raises(AdoptError, match="'broker-2' has begun"):
            await adopt(other.ledger, [], "broker-1", force=True)
        async with broker(new, log, broker_id="broker-2") as heir:
            for fails in (True, False):
                with monkeypatch.context() as patch, contextlib.suppress(AdoptError):
                    if fails:
                        patch.setattr(log, "messages", lambda *asked: two("", 0, ()))
                    await adopt(heir.ledger, [], "broker-1", force=True)
            await heir.store.committed()
            starts = {row.id for row in heir.store.claim(None, (), 9, 1 << 20)}
            # What may have started is a dead letter.
            assert starts == {"2", "3"}
            assert heir.store.memory.rows == 4
            account = log.account()
            assert account.head is not None
            assert (account.head.successor, account.head.handed) == (heir.ledger.me, True)


async def test_nothing_is_adopted_into_a_topic_that_is_no_more(path: Path, log: Log) -> None:
    async with broker(path, log, killed=True) as gone:
        gone.store.identify(gone.source, "b")
        await gone.take(0, 6)
        await gone.store.recorded()
    log.id = "b"
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(6)}
    async with broker(path.with_name("heir.sqlite"), log, broker_id="broker-2") as heir:
        heir.store.identify(heir.source, "a")
        with pytest.raises(AdoptError, match="made anew"):
            await adopt(heir.ledger, [], "broker-1", force=True)
        assert heir.store.memory.rows == 0
        # It has noticed.
        heir.store.retire(heir.source, "tasks@a")
        assert (await adopt(heir.ledger, [], "broker-1", force=True)).adopted == 5


async def test_an_adopter_settles_its_own_rows_first_once_kafka_knows_their_partition(
    path: Path, log: Log
) -> None:
    async with broker(path, log, killed=True) as gone:
        await gone.take(0, 4)
        await gone.store.recorded()
        owner = Owner(2, gone.ledger.me, 1)
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(4)}
    async with broker(path.with_name("heir.sqlite"), log, broker_id="broker-2") as heir:
        # It read the first two, before the other one read on from there.
        rows = [heir._admission.admit(task_bytes(f"own-{n}"), 1, heir.source.id, n) for n in range(2)]
        await heir.store.insert(rows, {heir.source.id: 2})
        log.owners = (owner, Owner(0, heir.ledger.me, 1))
        look_up, unsure = log.look_up, [True] * 3

        def coming_up(topic: str, partitions: Sequence[int] | None) -> list[Found]:
            return [] if partitions is not None and unsure and unsure.pop() else look_up(topic, partitions)

        log.look_up = coming_up  # type: ignore[method-assign]
        intake = Intake(heir.store, "tasks", "broker-2", 6000)
        await adopt(heir.ledger, [intake], "broker-1", force=True)
        assert not unsure
        assert not heir.source.uncovered
        assert heir.store.memory.tally.dropped == 0


async def test_what_an_adopter_had_read_and_the_other_has_finished_is_not_run_again(
    path: Path, log: Log
) -> None:
    """It had read it first, and nothing of that was committed."""
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(4)}
    async with broker(path, log, killed=True) as gone:
        await gone.take(0, 5)
        await gone.finish()
        await gone.store.recorded()
        log.owners = (Owner(0, gone.ledger.me, 1),)
    async with broker(path.with_name("heir.sqlite"), log, broker_id="broker-2") as heir:
        rows = [heir._admission.admit(task_bytes(f"{n}"), 1, heir.source.id, n) for n in range(2)]
        await heir.store.insert(rows, {heir.source.id: 2})
        heir.store.dispute(heir.source)
        intake = Intake(heir.store, "tasks", "broker-2", 6000)
        await adopt(heir.ledger, [intake], "broker-1", force=True)
        assert heir.store.claim(None, (), 9, 1 << 20) == []
        assert (heir.store.memory.rows, heir.store.memory.tally.dropped) == (0, 2)


@pytest.mark.parametrize("answers", [1, ledger_restore.LOOKS - 1])
async def test_a_broker_is_not_adopted_empty_because_a_node_of_kafka_does_not_know_its_topic(
    path: Path, log: Log, answers: int
) -> None:
    async with broker(path, log, killed=True) as gone:
        await gone.take(0, 5)
        await gone.store.recorded()
        log.owners = (Owner(0, gone.ledger.me, 1),)
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(5)}
    async with broker(path.with_name("heir.sqlite"), log, broker_id="broker-2") as heir:
        # Of each look the first answer is on the topic, the second on its overflow.
        log.unknown = 2 * answers
        assert await adopt(heir.ledger, [], "broker-1", force=True) == AdoptReport("broker-1", 1, 4, 0)


async def test_what_was_left_of_a_topic_that_is_gone_is_counted(path: Path, log: Log) -> None:
    async with broker(path, log, killed=True) as gone:
        await gone.take(0, 5)
        await gone.store.recorded()
    # There is no such topic any more.
    async with broker(path.with_name("new.sqlite"), log, killed=True) as again:
        assert again.ledger.unrestorable == 4
        # Another one of its name is read from its beginning.
        assert again.store.memory.partitions.find("tasks", 0) is again.source
        assert (again.source.next, again.source.covered) == (0, 0)
    async with broker(path.with_name("third.sqlite"), log, broker_id="broker-3", killed=True) as gone:
        await gone.take(0, 5)
        await gone.store.recorded()
    async with broker(path.with_name("heir.sqlite"), log, broker_id="broker-2") as heir:
        assert await adopt(heir.ledger, [], "broker-3", force=True) == AdoptReport("broker-3", 1, 0, 4)
        assert heir.ledger.unrestorable == 4
        with pytest.raises(AdoptedHere):
            await adopt(heir.ledger, [], "broker-3", force=True)


async def test_an_adopted_broker_does_not_begin_without_the_ledger(path: Path, log: Log) -> None:
    """A node of Kafka that is coming up does not know it."""
    async with broker(path, log, killed=True) as gone:
        await gone.take(0, 4)
        await gone.store.recorded()
    async with broker(path.with_name("heir.sqlite"), log, broker_id="broker-2") as heir:
        await adopt(heir.ledger, [], "broker-1", force=True)
    answers = [True, False]
    log.is_there = lambda: answers.pop() if len(answers) > 1 else answers[0]  # type: ignore[method-assign]
    with pytest.raises(Replaced):
        await _begin(path, log)


async def _begin(path: Path, log: Log, broker_id: str = "broker-1") -> None:
    async with broker(path, log, broker_id=broker_id):
        pass


async def test_a_pool_without_a_ledger_begins_though_somebody_gave_up_waiting(tmp_path: Path) -> None:
    async with running_store(tmp_path / "store.sqlite") as store:
        ledger = Ledger(store, Settings(kafka_topic="tasks", db_path=tmp_path / "store.sqlite"))
        log = Log()
        log.is_there = lambda: False  # type: ignore[method-assign]
        ledger.log = log  # type: ignore[assignment]
        ledger.start()
        waiting = asyncio.ensure_future(store.recorded())
        await asyncio.sleep(0)
        waiting.cancel()
        opening = asyncio.create_task(ledger.open(lambda: None))
        await asyncio.wait({opening}, timeout=10)
        assert opening.done()
        assert opening.exception() is None
        assert ledger.off
        await ledger.stop()


async def test_while_there_is_no_ledger_what_is_finished_takes_no_memory(
    path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "LOOK_AGAIN_SECONDS", 0.01)
    log.is_there = lambda: False  # type: ignore[method-assign]
    async with broker(path, log) as one:
        await one.take(0, 10)
        await one.finish()
        await until(lambda: one.store.memory.unfinished.keys() == [])
        await one.take(10, 12)
        # It is all recorded when there is one.
        log.is_there = lambda: True  # type: ignore[method-assign]
        await until(lambda: log.account().ranges)
        assert [offsets_of(0, segment) for segment in log.account().segments.values()] == [[10]]


async def test_a_new_store_does_not_believe_one_answer_without_the_ledger(path: Path, log: Log) -> None:
    async with broker(path, log, killed=True) as one:
        await one.take(0, 4)
        await one.store.recorded()
        log.owners = (Owner(0, one.ledger.me, 1),)
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(3)}
    answers = [True, False]
    log.is_there = lambda: answers.pop() if len(answers) > 1 else answers[0]  # type: ignore[method-assign]
    async with broker(path.with_name("new.sqlite"), log) as heir:
        assert heir.store.memory.rows == 3


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(b"hello", id="no JSON"),
        pytest.param(b"5", id="no list"),
        pytest.param(b"[[]]", id="too short"),
        pytest.param(b'["broker","penstock-tasks",{}]', id="no name"),
    ],
)
async def test_what_is_no_brokers_record_is_passed_over(path: Path, log: Log, key: bytes) -> None:
    async with broker(path, log) as one:
        await one.take(0, 4)
        log.records.append((key, b"x"))
        log.refuses = 1
        await one.store.recorded()
        await one.take(4, 6)
        await one.store.recorded()
        assert log.account().ranges["tasks", 0] == (0, 6, 6)


@pytest.mark.parametrize(
    "value",
    [
        b"x",
        b"[]",
        b"{}",
        b'{"penstock":1,"more":1}',
        head_record("", "", Head("a", 1, 1, 1))[1].replace(b'"penstock":1', b'"penstock":2'),  # type: ignore[union-attr]
    ],
)
async def test_a_record_that_cannot_be_read_is_told_by_its_key(path: Path, log: Log, value: bytes) -> None:
    log.records.append((b'["broker","penstock-tasks","broker-1"]', value))
    with pytest.raises(
        FatalError, match=r'record \["broker", "penstock-tasks", "broker-1"\].* newer version'
    ):
        await _begin(path, log)
    async with broker(path, log, broker_id="broker-2") as two:
        with pytest.raises(AdoptError, match="newer version"):
            await adopt(two.ledger, [], "broker-1", force=True)


def test_after_a_write_that_failed_nothing_is_written_before_it_is_opened_again() -> None:
    """The one after it may have been on its way already."""
    with pytest.raises(Fenced):
        LedgerLog(Settings(kafka_topic="tasks"), SystemClock(), "broker-1").write([])


async def test_a_write_that_the_end_interrupts_is_made_once_more(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        await one.take(0, 10)
        await one.store.recorded()
        log.takes.clear()
        begun = log.begun
        # Copies were absorbed: nothing but the range has changed.
        one.store.insert([], {one.source.id: 15})
        await until(lambda: log.begun > begun)
        log.refuses = 1
    assert log.account().ranges["tasks", 0] == (0, 15, 10)


async def test_who_was_adopted_during_an_outage_notices_before_it_writes(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        await one.take(0, 4)
        await one.store.recorded()
        head = log.account().head
        assert head is not None
        begun, log.refuses = log.begun, 1
        log.records.append(head_record(GROUP, "broker-1", head._replace(successor=Me("broker-2", "2"))))
        asked = asyncio.ensure_future(one.store.recorded())
        await until(lambda: asked.done() or one.ledger.fatal is not None)
        assert isinstance(one.ledger.fatal, Replaced)
        assert log.begun == begun + 1
        asked.cancel()


async def test_after_an_outage_all_is_written_again(path: Path, log: Log) -> None:
    """The topic may have been made anew."""
    async with broker(path, log) as one:
        await one.take(0, 4)
        await one.store.recorded()
        log.records.clear()
        log.refuses = 1
        await one.store.recorded()
        assert log.account().ranges == {("tasks", 0): (0, 4, 4)}
        assert [offsets_of(0, segment) for segment in log.account().segments.values()] == [[0, 1, 2]]


async def test_until_it_is_written_the_ledger_is_not_up_and_a_change_grows_older(
    path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka lets it be opened and read, and takes no record."""
    async with broker(path, log) as one:
        await one.take(0, 4)
        await one.store.recorded()
        assert (one.ledger.is_open, one.ledger.age_seconds()) == (True, 0)
        seen: list[tuple[bool, float]] = []
        write = log.write

        def look(records: Sequence[Record]) -> None:
            seen.append((one.ledger.is_open, one.ledger.age_seconds()))
            write(records)

        monkeypatch.setattr(log, "write", look)
        log.refuses = 3
        await one.finish()
        await one.store.recorded()
        assert [is_open for is_open, _ in seen[1:4]] == [False] * 3
        assert [age >= 0.01 * n for n, (_, age) in enumerate(seen[:4])] == [True] * 4
        assert (one.ledger.is_open, one.ledger.age_seconds()) == (True, 0)


async def test_what_changes_while_it_is_written_is_as_old_as_it_is(path: Path, log: Log) -> None:
    async with broker(path, log) as one:
        log.takes.clear()
        begun = log.begun
        await one.take(0, 4)
        await until(lambda: log.begun > begun)
        await asyncio.sleep(0.2)
        await one.take(4, 6)
        assert one.ledger.age_seconds() >= 0.2
        log.takes.set()
        await until(lambda: log.account().ranges)
        assert 0 < one.ledger.age_seconds() < 0.2
        await one.store.recorded()
        assert one.ledger.age_seconds() == 0


async def test_what_has_ended_under_a_name_has_ended_there(path: Path, log: Log) -> None:
    """Its topic is found to be made anew just before the record is written."""
    async with broker(path, log) as one:
        await one.take(0, 4)
        await one.store.recorded()
        assert [where[0] for where in log.account().segments] == ["tasks"]
        goes_on = threading.Event()
        one.ledger.thread.submit(goes_on.wait, 30)
        await one.finish()
        asked = asyncio.ensure_future(one.store.recorded())
        await until(lambda: not one.store.memory.unfinished.dirty)
        one.store.retire(one.source, "tasks@old")
        goes_on.set()
        await asked
        assert log.account().segments == {}


async def test_a_broker_is_not_drained_while_it_restores(path: Path, log: Log, tmp_path: Path) -> None:
    """It would stop restoring, and say that nothing is left."""
    async with broker(path, log, killed=True) as lost:
        await lost.take(0, 4)
        await lost.store.recorded()
    log.tasks |= {n: Message(n, task_bytes(f"{n}"), 0) for n in range(3)}
    settings = Settings(kafka_topic="tasks", broker_id="broker-1", db_path=tmp_path / "new.sqlite")
    async with running_store(settings.db_path) as store:
        ingest = Ingest(settings, store, Metrics())
        ingest.ledger = ledger = Ledger(store, settings)
        ledger.log = log  # type: ignore[assignment]
        drain = partial(Departures(ingest).drain, DrainRequest().SerializeToString())
        ledger.start()
        # Nobody knows yet what it may have lost.
        with pytest.raises(Refused, match="what a lost disk may have held: drain it when it has"):
            await drain()
        log.breaks = True
        opening = asyncio.create_task(ledger.open(lambda: None))
        await until(lambda: log.broken)
        with pytest.raises(Refused) as refused:
            await drain()
        assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert ingest.drain_report() is None
        log.breaks = False
        await opening
        assert [of.tasks for of in DrainResponse.FromString(await drain()).left] == [3]
        await ledger.stop()
