"""The event loop's side of ingest: offsets follow the rows, and partitions come and go."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from ingest_helpers import running_store, task_bytes, until
from store_helpers import ManualClock

from penstock_broker.ingest import intake as intake_module
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.intake import COMMIT_PAUSE_SECONDS, Found, Intake, Position, Tail, keep_orphans
from penstock_broker.ingest.membership import STALL_MS
from penstock_broker.ingest.ownership import Me, Owner, decode
from penstock_broker.store.batch import Batch, Written
from penstock_broker.store.database import Database
from penstock_broker.store.inflight import Inflight

SESSION_MS = 10_000
OTHER = Owner(0, Me("broker-2", "0" * 8), 3)


class Kafka:
    """What an intake hands over to be committed; answered by the test."""

    def __init__(self) -> None:
        self.asked: list[list[Position]] = []

    def commit(self, positions: Sequence[Position]) -> None:
        self.asked.append(list(positions))

    def offsets(self) -> dict[int, int]:
        """Of the last commit asked for."""
        return {position.partition: position.offset for position in self.asked[-1]}


class Broker:
    def __init__(self, store: Inflight, broker_id: str = "broker-1", reset: str = "earliest") -> None:
        self.kafka = Kafka()
        self.store = store
        self.intake = Intake(store, "tasks", broker_id, SESSION_MS, reset)
        self.intake.commit = self.kafka.commit
        self._admission = Admission(AdmissionLimits())

    async def begin(self, *found: Found) -> list[int]:
        begun = await self.intake.begin(found)
        self.intake.begun([b.partition for b in begun])
        return [b.offset for b in begun]

    def deliver(self, first: int, end: int, partition: int = 0, prefix: str = "id") -> None:
        source = self.store.source("tasks", partition)
        rows = [
            self._admission.admit(task_bytes(f"{prefix}-{partition}-{n}"), 0, source.id, n)
            for n in range(first, end)
        ]
        size = sum(row.size for row in rows)
        self.intake.gate.take(len(rows), size)
        self.intake.deliver(rows, size, {partition: (source.id, end)})

    async def stored(self) -> None:
        await until(lambda: not self.intake.gate.in_flight)

    def answer(self, error: str | None = None) -> None:
        """Kafka's answer to the last commit."""
        self.intake.commit_done([(p.partition, p.offset, error) for p in self.kafka.asked[-1]])

    def commit_answered(self) -> None:
        """The last commit that was asked for is sent, and acknowledged."""
        self.intake.membership.sending()
        self.answer()

    def started(self, rows_max: int = 100) -> list[int]:
        """Offsets of what a worker gets now."""
        return [row.offset for row in self.store.claim(None, (), rows_max, 1 << 20)]

    async def asked(self, count: int) -> None:
        await until(lambda: len(self.kafka.asked) == count)

    async def offsets_held(self, partition: int = 0) -> list[int]:
        source = self.store.source("tasks", partition)

        def load(database: Database) -> list[int]:
            rows = database.load([key[0] for key in database.positions()])
            return sorted(row.offset for row in rows if row.source == source.id)

        return await self.store.read(load)

    @property
    def me(self) -> Me:
        return self.intake.me


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Inflight]:
    async with running_store(tmp_path / "store.sqlite") as store:
        yield store


def new(partition: int = 0, low: int = 0, high: int = 0) -> Found:
    """A partition that the group has no offset for."""
    return Found(partition, None, (), low, high)


async def test_a_new_partition_is_owned_before_anything_is_read(store: Inflight) -> None:
    broker = Broker(store)
    assert await broker.begin(new(low=5, high=9)) == [5]
    (position,) = broker.kafka.asked[-1]
    assert (position.partition, position.offset) == (0, 5)
    assert decode(position.metadata) == (Owner(5, broker.me, store.epoch),)


async def test_a_partition_begins_when_the_ledger_knows_of_it(store: Inflight) -> None:
    recorded = asyncio.Event()

    async def in_the_ledger() -> None:
        await recorded.wait()

    store.recorded = in_the_ledger
    broker = Broker(store)
    begins = asyncio.create_task(broker.begin(new()))
    await until(lambda: broker.intake.readings)
    broker.intake.commit_soon()
    await store.committed()
    await asyncio.sleep(COMMIT_PAUSE_SECONDS)
    assert not begins.done()
    assert not broker.kafka.asked
    recorded.set()
    assert await begins == [0]


async def test_what_others_have_taken_is_to_be_looked_through_before_a_partition_begins(
    store: Inflight,
) -> None:
    broker = Broker(store)
    source = store.source("tasks", 0)
    taken = Found(0, 9, (OTHER,))
    assert await broker.intake.tails([new(), taken._replace(owners=())]) == []
    assert await broker.intake.tails([taken]) == [Tail(0, source.id, 0, 9)]
    assert await broker.begin(taken) == [9]
    broker.answer()
    broker.deliver(9, 15)
    await broker.asked(2)
    broker.answer()
    # It takes three more, which are not committed before another one comes, and takes them, too.
    broker.deliver(15, 18)
    await broker.stored()
    await broker.intake.lost([0])
    mine, theirs = Owner(9, broker.me, 1), Owner(15, OTHER.me, 1)
    assert await broker.intake.tails([Found(0, 15, (mine,))]) == []
    assert await broker.intake.tails([Found(0, 40, (theirs, mine))]) == [Tail(0, source.id, 15, 40)]
    assert await broker.offsets_held() == list(range(9, 15))


async def test_latest_begins_at_the_end(store: Inflight) -> None:
    assert await Broker(store, reset="latest").begin(new(low=5, high=9)) == [9]


async def test_only_what_is_durable_is_committed_and_only_what_is_acknowledged_is_covered(
    store: Inflight,
) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    assert len(broker.kafka.asked) == 1
    await broker.stored()
    await broker.asked(2)
    assert broker.kafka.offsets() == {0: 10}
    source = store.source("tasks", 0)
    assert (source.next, source.covered, len(source.uncovered)) == (10, 0, 10)
    broker.answer()
    assert (source.covered, len(source.uncovered)) == (10, 0)


async def test_nothing_is_committed_while_its_tick_is_being_written(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    disk, write = threading.Event(), store.database.write

    def slow(batch: Batch) -> Written:
        disk.wait(30)
        return write(batch)

    store.database.write = slow  # type: ignore[method-assign]
    broker.deliver(0, 10)
    # However long the disk takes: the pause between commits is over many times.
    await asyncio.sleep(5 * COMMIT_PAUSE_SECONDS)
    assert len(broker.kafka.asked) == 1
    disk.set()
    await broker.asked(2)
    assert broker.kafka.offsets() == {0: 10}


async def test_nothing_is_committed_that_the_store_did_not_take(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with running_store(tmp_path / "store.sqlite") as store:
            broker = Broker(store)
            await broker.begin(new())
            broker.answer()

            def fail(batch: Batch) -> Written:
                raise ZeroDivisionError

            store.database.write = fail  # type: ignore[method-assign]
            broker.deliver(0, 10)
            await until(lambda: not broker.intake._storing)
            await asyncio.sleep(2 * COMMIT_PAUSE_SECONDS)
    assert len(broker.kafka.asked) == 1


async def test_one_commit_at_a_time_and_the_newest_wins(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new())
    for first in range(0, 30, 10):
        broker.deliver(first, first + 10)
        await broker.stored()
    assert len(broker.kafka.asked) == 1
    broker.answer()
    await broker.asked(2)
    assert broker.kafka.offsets() == {0: 30}
    assert broker.intake.committing
    broker.answer()
    await until(lambda: not broker.intake.busy)
    assert len(broker.kafka.asked) == 2


async def test_a_failed_commit_is_repeated_and_covers_nothing(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.asked(2)
    broker.answer("coordinator away")
    assert store.source("tasks", 0).covered == 0
    assert broker.intake.commits_failed == 1
    await broker.asked(3)
    assert broker.kafka.offsets() == {0: 10}
    broker.answer()
    assert store.source("tasks", 0).covered == 10


async def test_a_revoked_partition_is_committed_as_far_as_it_is_durable(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new(0), new(1))
    broker.answer()
    broker.deliver(0, 10)
    broker.deliver(0, 5, partition=1)
    (position,) = await broker.intake.leave([1])
    assert (position.partition, position.offset) == (1, 5)
    await broker.intake.left([position], None)
    assert store.source("tasks", 1).covered == 5
    assert list(broker.intake.readings) == [0]
    assert broker.intake.unresolved == frozenset()
    assert len(await broker.offsets_held(1)) == 5


async def test_what_a_slow_disk_takes_after_the_last_commit_is_dropped(
    store: Inflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "LEAVE_SECONDS_MAX", 0)
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.stored()
    broker.deliver(10, 20)
    positions = await broker.intake.leave([0])
    assert [position.offset for position in positions] == [10]
    await broker.intake.left(positions, None)
    await broker.stored()
    assert await broker.offsets_held() == list(range(10))


async def test_nothing_is_committed_for_a_partition_that_leaves(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new(0), new(1))
    broker.answer()
    leaving = asyncio.create_task(broker.intake.leave([1]))
    await asyncio.sleep(0)
    broker.deliver(0, 5, partition=1)
    broker.deliver(0, 10)
    await leaving
    await broker.asked(2)
    assert broker.kafka.offsets() == {0: 10}


async def test_nothing_is_committed_for_a_partition_that_was_lost(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new(0), new(1))
    broker.answer()
    broker.deliver(0, 5, partition=1)
    await broker.intake.lost([1])
    broker.deliver(0, 10)
    await broker.stored()
    await broker.asked(2)
    assert broker.kafka.offsets() == {0: 10}


async def test_a_commit_covers_its_own_partition_only(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new(0), new(1))
    broker.answer()
    broker.deliver(0, 5, partition=1)
    broker.deliver(0, 10)
    await broker.stored()
    broker.intake.commit_done([(0, 10, None), (1, 5, "not now")])
    assert [store.source("tasks", partition).covered for partition in (0, 1)] == [10, 0]
    assert len(store.source("tasks", 1).uncovered) == 5


async def test_rows_of_a_lost_partition_do_not_start_until_it_is_known_whose_they_are(
    store: Inflight,
) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 3)
    await broker.stored()
    await broker.intake.lost([0])
    assert store.claim(None, (), 9, 1 << 20) == []
    await broker.intake.resolve([Found(0, 2, (OTHER._replace(start=2), Owner(0, broker.me, store.epoch)))])
    assert sorted(row.offset for row in store.claim(None, (), 9, 1 << 20)) == [0, 1]


async def test_a_refused_last_commit_leaves_the_question_open(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    positions = await broker.intake.leave([0])
    await broker.intake.left(positions, "illegal generation")
    assert broker.intake.unresolved == {0}
    assert len(await broker.offsets_held()) == 10
    newer = (OTHER._replace(start=4), Owner(0, broker.me, store.epoch))
    await broker.intake.resolve([Found(0, 7, newer)])
    assert await broker.offsets_held() == [0, 1, 2, 3]
    assert broker.intake.unresolved == frozenset()
    assert store.source("tasks", 0).covered == 4
    assert store.imbalance() == 0


async def test_lost_partitions_are_resolved_from_the_committed_offset(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.stored()
    await broker.intake.lost([0])
    assert broker.intake.unresolved == {0}
    # The commit of 6 arrived; its answer did not.
    await broker.intake.resolve([Found(0, 6, (Owner(0, broker.me, store.epoch),))])
    assert await broker.offsets_held() == [0, 1, 2, 3, 4, 5]
    assert (store.source("tasks", 0).covered, store.source("tasks", 0).next) == (6, 6)


async def test_a_partition_that_is_assigned_is_not_resolved_as_if_it_were_not(store: Inflight) -> None:
    """It may have been assigned while it was looked up."""
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.stored()
    await broker.intake.resolve([Found(0, 3, (Owner(0, broker.me, store.epoch),))])
    assert await broker.offsets_held() == list(range(10))
    assert store.source("tasks", 0).next == 10


async def test_what_a_late_tick_brings_is_not_committed_when_the_partition_is_back(
    store: Inflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "LEAVE_SECONDS_MAX", 0)
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    disk, write = threading.Event(), store.database.write

    def slow(batch: Batch) -> Written:
        disk.wait(30)
        return write(batch)

    store.database.write = slow  # type: ignore[method-assign]
    broker.deliver(0, 10)
    leaves = asyncio.create_task(broker.intake.left(await broker.intake.leave([0]), None))
    await until(lambda: not broker.intake.readings)
    begins = asyncio.create_task(broker.begin(Found(0, 3, (OTHER, Owner(0, broker.me, store.epoch)))))
    await until(lambda: broker.intake.readings)
    disk.set()
    await leaves
    assert await begins == [3]
    await broker.stored()
    await broker.asked(2)
    assert broker.kafka.offsets() == {0: 3}


async def test_a_late_tick_does_not_move_a_partition_that_came_back(store: Inflight) -> None:
    """Rows that were dropped with the partition must never be passed by a commit."""
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.intake.lost([0])
    broker.deliver(10, 20)
    mine = (Owner(0, broker.me, store.epoch),)
    await broker.intake.resolve([Found(0, 3, mine)])
    assert await broker.begin(Found(0, 3, mine)) == [3]
    await broker.stored()
    await broker.asked(2)
    assert broker.kafka.offsets() == {0: 3}
    assert await broker.offsets_held() == [0, 1, 2]


async def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    async with running_store(tmp_path / "store.sqlite") as store:
        broker = Broker(store)
        await broker.begin(new())
        broker.answer()
        broker.deliver(0, 10)
        await broker.stored()
        me = broker.me
    async with running_store(tmp_path / "store.sqlite") as store:
        broker = Broker(store)
        assert broker.intake.unresolved == {0}
        # Committed up to 4: the rest is stored here, and nobody else has read it.
        assert await broker.begin(Found(0, 4, (Owner(0, me, 1),))) == [10]
        assert broker.intake.unresolved == frozenset()
        source = store.source("tasks", 0)
        assert (source.start, source.next, source.covered) == (0, 10, 4)
        (position,) = broker.kafka.asked[-1]
        assert position.offset == 10
        assert decode(position.metadata) == (Owner(0, me, 2),)
        broker.answer()
        assert source.covered == 10


async def test_another_disk_is_another_broker(tmp_path: Path, store: Inflight) -> None:
    broker = Broker(store)
    lost_disk = Owner(0, Me("broker-1", "f" * 8), 1)
    assert await broker.begin(Found(0, 40, (lost_disk,))) == [40]
    (position,) = broker.kafka.asked[-1]
    assert decode(position.metadata) == (Owner(40, broker.me, store.epoch), lost_disk)


async def test_an_offset_moved_ahead_is_an_alarm_with_a_count(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.stored()
    assert await broker.begin(Found(0, 15, (Owner(0, broker.me, store.epoch),))) == [15]
    assert broker.intake.offsets_skipped == 5
    assert len(await broker.offsets_held()) == 10


@pytest.mark.parametrize(("low", "high"), [(0, 10), (10, 10), (0, 30)])
async def test_without_an_offset_of_the_group_it_goes_on_where_it_was(
    store: Inflight, low: int, high: int
) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.stored()
    assert await broker.begin(Found(0, None, (), low, high)) == [10]
    assert broker.intake.offsets_skipped == 0


@pytest.mark.parametrize(("low", "high", "start", "skipped"), [(0, 3, 0, 0), (20, 30, 20, 10)])
async def test_an_offset_outside_the_log_goes_to_its_beginning(
    store: Inflight, low: int, high: int, start: int, skipped: int
) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.stored()
    (begun,) = await broker.intake.begin_inside([Found(0, 10, (), low, high)])
    assert begun.offset == start
    assert broker.intake.offsets_skipped == skipped
    assert len(await broker.offsets_held()) == 10


async def test_the_last_commit_waits_for_the_tick_and_nothing_follows_it(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.intake.finish()
    assert len(broker.kafka.asked) == 1
    await broker.intake.commit_rest()
    assert broker.kafka.offsets() == {0: 10}
    broker.answer()
    assert store.source("tasks", 0).covered == 10
    assert not broker.intake.busy


async def test_rows_of_another_topic_are_kept(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.stored()
    assert keep_orphans(store, "tasks") == 0
    assert keep_orphans(store, "other") == 10
    assert store.source("tasks", 0).covered == 10


async def test_rows_of_another_topic_are_kept_though_less_of_it_was_read_again(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new())
    broker.answer()
    broker.deliver(0, 10)
    await broker.stored()
    await broker.intake.begin_inside([Found(0, 10, (), 0, 3)])
    assert keep_orphans(store, "other") == 10
    assert not store.source("tasks", 0).uncovered


async def test_a_topic_that_was_made_anew_is_read_from_its_beginning(store: Inflight) -> None:
    broker = Broker(store)
    assert not await broker.intake.topic_is("old")
    assert await broker.begin(new(high=0)) == [0]
    broker.answer()
    broker.deliver(0, 5)
    await broker.asked(2)
    assert not await broker.intake.topic_is("old")
    assert await broker.intake.topic_is("new")
    # An acknowledgement that was on its way is none of the new topic's offsets.
    broker.answer()
    await asyncio.sleep(2 * COMMIT_PAUSE_SECONDS)
    assert len(broker.kafka.asked) == 2
    (begun,) = await broker.intake.begin_anew([new(low=2, high=9)])
    assert begun.offset == 2
    broker.answer()
    assert store.source("tasks", 0).covered <= 2
    old = store.source("tasks@old", 0)
    assert (old.next, old.covered, old.disputed) == (5, 5, False)
    assert not await broker.intake.topic_is("new")


async def test_of_what_is_taken_it_is_known_of_which_topic(store: Inflight) -> None:
    broker = Broker(store)
    await broker.begin(new())
    assert store.source("tasks", 0).topic_id == ""
    await broker.intake.topic_is("old")
    await broker.intake.begin([Found(1, None, (), 0, 9)])
    assert [store.source("tasks", p).topic_id for p in (0, 1)] == ["old", "old"]
    await broker.intake.topic_is("new")
    await broker.intake.begin_anew([new()])
    known = {(record[1], record[2]): record[-1] for record in store.database.sources()}
    assert known == {
        ("tasks", 0): "new", ("tasks", 1): "new", ("tasks@old", 0): "", ("tasks@old", 1): "",
    }  # fmt: skip


async def test_a_topic_is_another_one_than_what_was_restored_is_of(store: Inflight) -> None:
    """Made anew since; this broker has never read it."""
    broker = Broker(store)
    source = store.source("tasks", 0)
    store.begin_restored(source, 0, 6)
    store.identify(source, "old")
    assert await broker.intake.topic_is("new")
    (begun,) = await broker.intake.begin_anew([new(high=9)])
    assert begun.offset == 0
    assert store.source("tasks", 0).covered == 0
    assert store.source("tasks@old", 0).covered == 6
    assert not await broker.intake.topic_is("new")


# -- whether the group still takes this broker for a member


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def member(tmp_path: Path, clock: ManualClock) -> AsyncIterator[Broker]:
    """Reads partition 0, and has taken three rows of it that no acknowledged commit has passed."""
    async with running_store(tmp_path / "store.sqlite", clock=clock) as store:
        broker = Broker(store)
        await broker.begin(new())
        broker.commit_answered()
        broker.deliver(0, 3)
        await broker.asked(2)
        broker.intake.membership.sending()
        yield broker


async def test_a_member_starts_what_is_not_covered_yet(member: Broker) -> None:
    assert member.started() == [0, 1, 2]


@pytest.mark.parametrize("first", ["thread", "loop"])
async def test_a_broker_that_stood_still_starts_nothing_that_another_may_have_run(
    member: Broker, clock: ManualClock, first: str
) -> None:
    clock.advance(STALL_MS + 1)
    if first == "thread":
        member.intake.membership.turned()
    assert member.started() == []
    member.intake.membership.turned()
    assert member.started() == []
    # This commit was sent before.
    member.answer()
    member.deliver(3, 5)
    assert member.started() == [0, 1, 2]
    await member.asked(3)
    assert member.started() == []
    member.commit_answered()
    assert member.started() == [3, 4]
    member.deliver(5, 6)
    await member.asked(4)
    assert member.started() == [5]


async def test_a_broker_that_kafka_does_not_answer_starts_nothing_that_another_may_have_run(
    member: Broker, clock: ManualClock
) -> None:
    for _ in range(SESSION_MS // 2 // 500):
        clock.advance(500)
        member.intake.membership.turned()
    assert member.started(1) == [0]
    clock.advance(500)
    member.intake.membership.turned()
    assert member.started() == []
    member.commit_answered()
    assert member.started() == [1, 2]


async def test_a_commit_that_is_tried_again_waits_since_it_was_first_sent(
    member: Broker, clock: ManualClock
) -> None:
    for _ in range(SESSION_MS // 2 // 500 + 1):
        member.answer("timed out")
        member.intake.membership.sending()
        clock.advance(500)
        member.intake.membership.turned()
    assert member.started() == []


async def test_which_topic_it_is_and_where_it_begins_is_durable_before_it_is_read(store: Inflight) -> None:
    """Or after a power cut its offsets would be taken for those of the old one."""
    intake = Broker(store).intake
    for id in ("old", "new"):
        assert await intake.topic_is(id) == (id == "new")
        assert store.database.meta("topic_id/tasks") == id
        await intake.begin_anew([new(low=3, high=9)])
        assert not store.writer.work_waits()
        source = store.source("tasks", 0)
        begun = [record[:5] for record in await store.read(Database.sources)]
        assert (source.id, "tasks", 0, 3, 3) in begun
