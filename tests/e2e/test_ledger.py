"""Disks are lost, put back and taken over under load: nothing is lost, and nothing that the ledger knows to
be finished runs again."""

from __future__ import annotations

import asyncio
import shutil
import signal
import threading

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from penstock_broker.clock import SystemClock
from penstock_broker.config import Settings
from penstock_broker.ingest.ledger_adopt import AdoptError, AdoptReport
from penstock_broker.ingest.ledger_log import LedgerLog
from penstock_broker.ingest.ledger_records import Account, read_account
from penstock_broker.server import Broker as InProcess
from penstock_broker.store.ledger import SEGMENT_OFFSETS, offsets_of
from penstock_protocol.v1.activation_pb2 import TaskActivation
from tests.e2e.harness import Broker, Pool, eventually
from tests.e2e.raw_worker import Acknowledgements, RawWorker
from tests.e2e.test_faults import Producing, raw_workers
from tests.kafka_server import free_port


def settings_of(pool: Pool, broker_id: str, **fields: object) -> Settings:
    values: dict[str, object] = {
        "kafka_cluster": pool.kafka,
        "kafka_topic": pool.topic,
        "kafka_ledger_topic": f"{pool.topic}-ledger",
        "kafka_session_timeout_seconds": 6,
        "broker_id": broker_id,
        "db_path": pool.folder / f"{broker_id}.sqlite",
        "grpc_port": free_port(),
        "metrics_port": 0,
    }
    return Settings(**(values | fields))  # type: ignore[arg-type]


def broker_id_of(broker: Broker) -> str:
    return f"{broker.name}-{broker.port}"


def account_of(pool: Pool, broker_id: str) -> Account:
    """What the ledger says of a broker."""
    settings = settings_of(pool, "reader")
    log = LedgerLog(settings, SystemClock(), "reader")
    return read_account(log.read(), settings.kafka_consumer_group, broker_id)


def positions(pool: Pool, partitions: int, count: int) -> dict[str, tuple[int, int]]:
    """Where each of ``count`` activations is in the log: id -> (partition, offset)."""
    consumer = Consumer({"bootstrap.servers": pool.kafka or "", "group.id": "positions"})
    consumer.assign([TopicPartition(pool.topic, n, 0) for n in range(partitions)])
    found: dict[str, tuple[int, int]] = {}
    while len(found) < count:
        message = consumer.poll(20)
        assert message is not None, f"{len(found)} of {count} are in the log"
        id = TaskActivation.FromString(message.value() or b"").id
        found[id] = message.partition() or 0, message.offset() or 0
    consumer.close()
    return found


def finished(account: Account, topic: str, at: tuple[int, int]) -> bool:
    """Whether the ledger says that the task there is finished."""
    partition, offset = at
    taken = account.ranges.get((topic, partition))
    if taken is None or not taken.start <= offset < taken.next:
        return False
    number = offset // SEGMENT_OFFSETS
    segment = account.segments.get((topic, partition, number))
    return segment is None or offset not in offsets_of(number * SEGMENT_OFFSETS, segment)


def recorded(pool: Pool, broker: Broker) -> tuple[int, int]:
    """How many tasks the ledger knows of a broker, and how many of them are unfinished."""
    account = account_of(pool, broker_id_of(broker))
    taken = sum(taken.next - taken.start for taken in account.ranges.values())
    return taken, sum(sum(segment.offsets or b"") for segment in account.segments.values())


def some_finished(pool: Pool, broker: Broker) -> bool:
    taken, unfinished = recorded(pool, broker)
    return taken > unfinished


def dead_letters_of(broker: Broker) -> int:
    """How many have left since its database was new."""
    return int(broker.metrics().get("penstock_dead_letters_total{reason=start_unknown}", 0))


def lose_disk(broker: Broker) -> None:
    for path in broker.database.parent.glob(broker.database.name + "*"):
        path.unlink()


def check_run_again(
    books: Acknowledgements, account: Account, pool: Pool, at: dict[str, tuple[int, int]]
) -> int:
    """What was acknowledged and handed out again is only what the ledger did not know. How many."""
    again = {violation.split(" ")[0] for violation in books.violations}
    known = [id for id in again if finished(account, pool.topic, at[id])]
    assert known == [], "the ledger knew that these were finished"
    return len(again)


@pytest.mark.timeout(180)
def test_a_broker_loses_its_disk_under_load(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(4)
    broker = kafka_pool.broker()
    books = Acknowledgements()
    app = kafka_pool.app()
    sent = [app.tasks["raw.noop"].delay().id for _ in range(10_000)]
    producing = Producing(kafka_pool, "raw.noop", 300)
    producing.start()
    workers = raw_workers([broker], books, each=2)
    accounts = []
    for share in (0.2, 0.5):
        eventually(f"{share:.0%} done", lambda share=share: len(books.acknowledged) >= share * len(sent))  # type: ignore[misc]
        eventually("some of it recorded", lambda: some_finished(kafka_pool, broker))
        broker.kill()
        lose_disk(broker)
        accounts.append(account_of(kafka_pool, broker_id_of(broker)))
        broker.start()
    sent += producing.stop()
    eventually("all acknowledged", lambda: books.acknowledged == set(sent), 60)
    kafka_pool.await_empty(broker)
    for worker in workers:
        worker.stop()
    at = positions(kafka_pool, 4, len(sent))
    again = check_run_again(books, accounts[0], kafka_pool, at)
    assert any(finished(accounts[0], kafka_pool.topic, place) for place in at.values())
    print(f"{again} of {len(sent)} acknowledged tasks ran again after two lost disks")
    assert "tasks of a lost disk were restored" in broker.text()
    assert broker.metrics()["penstock_unrestorable_tasks_total"] == 0


@pytest.mark.timeout(120)
def test_a_malformed_database_is_set_aside_and_its_tasks_are_restored(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker()
    books = Acknowledgements()
    ids = {kafka_pool.app().tasks["raw.noop"].delay().id for _ in range(300)}
    eventually("all recorded", lambda: recorded(kafka_pool, broker) == (300, 300))
    assert broker.terminate() == 0
    content = bytearray(broker.database.read_bytes())
    for page in range(2, len(content) // 4096):
        content[page * 4096 : page * 4096 + 12] = b"no b-tree..."
    broker.database.write_bytes(content)
    broker.start()
    (kept,) = broker.database.parent.glob(f"{broker.database.name}.quarantined-*[0-9]")
    assert kept.read_bytes() == content
    (worker,) = raw_workers([broker], books)
    eventually("all acknowledged", lambda: books.acknowledged == ids)
    worker.stop()
    assert books.violations == []
    assert "the database was set aside" in broker.text()
    assert "tasks of a lost disk were restored" in broker.text()


@pytest.mark.timeout(120)
def test_the_ledger_is_empty_when_all_is_done_and_a_lost_disk_restores_nothing(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker()
    books = Acknowledgements()
    app = kafka_pool.app()
    ids = {app.tasks["raw.noop"].delay().id for _ in range(500)}
    (worker,) = raw_workers([broker], books)
    eventually("all acknowledged", lambda: books.acknowledged == ids)
    eventually("and recorded", lambda: recorded(kafka_pool, broker) == (500, 0))
    broker.kill()
    lose_disk(broker)
    broker.start()
    ids |= {app.tasks["raw.noop"].delay().id for _ in range(100)}
    eventually("the new ones are acknowledged", lambda: books.acknowledged == ids)
    worker.stop()
    assert books.violations == []


@pytest.mark.timeout(120)
def test_an_old_copy_of_the_database_is_refused_or_reconciled(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker()
    books = Acknowledgements()
    app = kafka_pool.app()
    ids = {app.tasks["raw.noop"].delay().id for _ in range(600)}
    eventually("all taken", lambda: broker.held() == 600)
    assert broker.terminate() == 0
    copy = broker.database.with_suffix(".copy")
    shutil.copy(broker.database, copy)
    broker.start()
    # Few at a time, so that it is not done before it is stopped.
    worker = RawWorker(broker.address, books, batch=2)
    worker.start()
    eventually("half done", lambda: len(books.acknowledged) >= 300)
    worker.stop()
    assert broker.terminate() == 0
    lose_disk(broker)
    shutil.copy(copy, broker.database)
    before = set(books.acknowledged)
    broker.start(serving=False)
    assert broker.wait(30) == 1
    assert "is an old copy" in broker.text()
    assert "--reconcile" in broker.text()
    assert broker.database.exists()
    broker._command.append("--reconcile")
    broker.start()
    assert list(broker.database.parent.glob("broker.sqlite.old-*"))
    (worker,) = raw_workers([broker], books)
    eventually("all acknowledged", lambda: books.acknowledged == ids)
    kafka_pool.await_empty(broker)
    worker.stop()
    assert books.violations == []
    assert len(before) < 600


async def _adopting(settings: Settings, broker_id: str, force: bool, until: threading.Event) -> AdoptReport:
    """A broker in this process that adopts another, and serves until told to stop."""
    broker = InProcess(settings, SystemClock())
    await broker.start()
    stopping = asyncio.Event()
    running = asyncio.create_task(broker.run_until(stopping))
    try:
        while broker.ingest.ledger is None or not broker.ingest.ledger.is_open:  # noqa: ASYNC110 - written by a thread
            await asyncio.sleep(0.05)
        report = await broker.ingest.adopt(broker_id, force)
        while not until.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.05)
        assert broker.store.imbalance() == 0
        return report
    finally:
        stopping.set()
        await asyncio.gather(running, return_exceptions=True)
        await broker.stop()


@pytest.mark.timeout(180)
def test_a_broker_is_adopted_and_the_one_that_returns_stops(kafka_pool: Pool) -> None:
    """The first stands still, is adopted, and wakes up: it acknowledges nothing more, and ends."""
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker()
    books = Acknowledgements()
    app = kafka_pool.app()
    ids = {app.tasks["raw.noop"].delay().id for _ in range(3_000)}
    workers = [RawWorker(broker.address, books, batch=2)]
    workers[0].start()
    eventually("all are recorded", lambda: recorded(kafka_pool, broker)[0] == 3_000)
    eventually("many as finished", lambda: recorded(kafka_pool, broker)[1] < 2_500)
    assert broker.process is not None
    broker.process.send_signal(signal.SIGSTOP)
    account = account_of(kafka_pool, broker_id_of(broker))
    heir = settings_of(kafka_pool, "heir")
    done = threading.Event()
    refused: list[str] = []
    reports: list[AdoptReport] = []

    def serve() -> None:
        async def both() -> None:
            try:
                await _adopting(heir, broker_id_of(broker), False, done)
            except AdoptError as error:
                refused.append(str(error))
            reports.append(await _adopting(heir, broker_id_of(broker), True, done))

        asyncio.run(both())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    eventually(
        "it is adopted",
        lambda: (head := account_of(kafka_pool, broker_id_of(broker)).head) is not None and head.handed,
        60,
    )
    assert "seems to live" in refused[0]
    broker.process.send_signal(signal.SIGCONT)
    assert broker.wait(30) == 1
    assert "was adopted by broker 'heir'" in broker.text()
    assert list(broker.database.parent.glob("broker.sqlite.adopted-*"))
    workers.append(RawWorker(heir.grpc_address, books))
    workers[-1].start()
    eventually("all acknowledged", lambda: books.acknowledged == ids, 60)
    after = account_of(kafka_pool, broker_id_of(broker))
    assert after.head is not None
    assert after.head.successor is not None
    assert after.head.successor.broker_id == "heir"
    assert after.segments == {}
    # It starts with nothing, and takes part again.
    broker.start()
    workers[0].stop()
    workers += raw_workers([broker], books)
    more = {app.tasks["raw.noop"].delay().id for _ in range(500)}
    eventually("all of the new ones, too", lambda: books.acknowledged == ids | more, 60)
    done.set()
    for worker in workers[1:]:
        worker.stop()
    thread.join(30)
    assert 0 < reports[0].adopted < 2_500
    assert reports[0].lost == 0
    check_run_again(books, account, kafka_pool, positions(kafka_pool, 2, len(ids | more)))


@pytest.mark.timeout(120)
def test_at_most_once_tasks_start_at_most_once_when_the_disk_is_lost(kafka_pool: Pool) -> None:
    kafka_pool.create_topic(2)
    broker = kafka_pool.broker()
    books = Acknowledgements()
    ids = {f"once-{n}" for n in range(2_000)}
    producer = Producer({"bootstrap.servers": kafka_pool.kafka})
    for id in ids:
        activation = TaskActivation(id=id, application="e2e", namespace="raw", taskname="raw.noop")
        activation.retry_state.at_most_once = True
        producer.produce(kafka_pool.topic, activation.SerializeToString())
    assert producer.flush(30) == 0
    workers = [RawWorker(broker.address, books, batch=3) for _ in range(2)]
    for worker in workers:
        worker.start()
    buried = 0
    for share in (0.2, 0.5):
        eventually(f"{share:.0%} done", lambda share=share: len(books.acknowledged) >= share * len(ids))  # type: ignore[misc]
        buried += dead_letters_of(broker)
        broker.kill()
        lose_disk(broker)
        broker.start()
    eventually("all is restored", lambda: broker.metrics()["penstock_ledger_up"] == 1)
    kafka_pool.await_empty(broker)
    for worker in workers:
        worker.stop()
    assert set(books.handed_out.values()) == {1}
    # Of what is not done, it was not known whether it had started.
    unknown = ids - books.acknowledged
    letters = kafka_pool.dead_letters(buried + dead_letters_of(broker))
    assert {letter.headers["penstock-reason"] for letter in letters} <= {"start_unknown"}
    dead = {TaskActivation.FromString(letter.value).id for letter in letters}
    assert unknown <= dead
    print(f"{len(unknown)} of {len(ids)} are not known to have started, {len(dead)} dead letters")
