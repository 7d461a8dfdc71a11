"""A pool: a topic, its brokers and workers, a producer, and the books of what became of each task."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from penstock_client import App, TaskRef
from tests.e2e.dead_letters import DeadLetters
from tests.e2e.ledger import Ledger
from tests.e2e.processes import Broker, Program, Worker
from tests.e2e.tasks import APPLICATION, LEDGER, Tasks
from tests.e2e.waiting import until

T = TypeVar("T")

STATES = ("pending", "delayed", "processing", "forwarding")


class Pools:
    """Everything one test has started."""

    def __init__(self, folder: Path, kafka: str) -> None:
        self.folder = folder
        self.kafka = kafka
        self.programs: list[Program] = []
        self.closing = ExitStack()
        pages = folder / "ledger"
        pages.mkdir()
        self.ledger = Ledger(pages)

    def pool(self, partitions: int = 4) -> Pool:
        """A pool on a topic of its own, and a topic for its dead letters."""
        topic = f"e2e-{uuid.uuid4().hex[:12]}"
        create_topics(self.kafka, {topic: partitions, f"{topic}-dlq": 1})
        return Pool(self, topic)

    def name(self, kind: str) -> str:
        return f"{kind}-{sum(program.name.startswith(kind) for program in self.programs)}"

    def until(self, condition: Callable[[], T], what: str | Callable[[], str], seconds: float = 60) -> T:
        """As ``waiting.until``, but over at once when a program ended that should run."""

        def checked() -> T:
            for program in self.programs:
                program.assert_as_expected()
            return condition()

        return until(checked, what, seconds)

    def close(self) -> None:
        self.closing.close()
        for program in self.programs:
            program.destroy()

    def assert_no_traceback(self) -> None:
        """Whatever happened, no broker said it with a traceback."""
        for program in self.programs:
            if isinstance(program, Broker):
                assert "Traceback (most recent call last)" not in program.log(), program.name


def create_topics(kafka: str, partitions: dict[str, int]) -> None:
    admin = AdminClient({"bootstrap.servers": kafka})
    topics = [NewTopic(topic, num_partitions=count) for topic, count in partitions.items()]
    for created in admin.create_topics(topics).values():
        created.result(30)


class Pool:
    """``settings`` are TASKBROKER_ settings without the prefix, for all of its brokers."""

    def __init__(self, pools: Pools, topic: str) -> None:
        self.pools = pools
        self.topic = topic
        self.brokers: list[Broker] = []
        self.workers: list[Worker] = []
        self.tasks = self.client()
        self.dead_letters = DeadLetters(pools.kafka, f"{topic}-dlq")
        pools.closing.callback(self.dead_letters.close)

    # -- starting

    def client(self, application: str = APPLICATION, **settings: object) -> Tasks:
        """The tasks of a producer with settings of its own."""
        given: dict[str, object] = {"kafka": self.pools.kafka, "topic": self.topic, **settings}
        if given.get("broker"):
            del given["kafka"]
        # A Kafka that is away for a while must not fail what was sent.
        app = App(application, strict_kwargs="off", delivery_timeout_seconds=120, **given)  # type: ignore[arg-type]
        self.pools.closing.callback(app.close)
        return Tasks(app)

    def start_brokers(self, count: int = 1, **settings: str) -> list[Broker]:
        """Started together; returns when all serve."""
        brokers = [self.add_broker(**settings) for _ in range(count)]
        for broker in brokers:
            broker.start()
        for broker in brokers:
            broker.await_serving()
        return brokers

    def add_broker(self, **settings: str) -> Broker:
        """A broker of this pool that is not started."""
        kafka = {"KAFKA_CLUSTER": self.pools.kafka, "KAFKA_TOPIC": self.topic}
        broker = Broker(self.pools.name("broker"), self.pools.folder, {**kafka, **settings})
        self.brokers.append(broker)
        self.pools.programs.append(broker)
        return broker

    def start_workers(self, count: int = 1, slots: int = 2, **settings: str) -> list[Worker]:
        """Workers that serve all brokers there are now. They need a moment until they fetch."""
        environment = {LEDGER: str(self.pools.ledger.folder), **settings}
        addresses = [broker.address for broker in self.brokers]
        workers = []
        for _ in range(count):
            worker = Worker(self.pools.name("worker"), self.pools.folder, addresses, slots, environment)
            self.pools.programs.append(worker)
            worker.start()
            workers.append(worker)
        self.workers += workers
        return workers

    # -- sending

    def send(self, send: Callable[[int], TaskRef], count: int) -> list[str]:
        """``count`` tasks, each safe in Kafka or in the broker; their ids."""
        refs = [send(number) for number in range(count)]
        for ref in refs:
            ref.wait(120)
        return [ref.id for ref in refs]

    def produce(self, values: Iterable[bytes | None], partition: int = 0) -> None:
        """These very bytes, in this order."""
        producer = Producer({"bootstrap.servers": self.pools.kafka})
        for value in values:
            producer.produce(self.topic, value, partition=partition)
        assert producer.flush(30) == 0

    # -- the books

    @property
    def ledger(self) -> Ledger:
        return self.pools.ledger.refresh()

    def until(self, condition: Callable[[], T], what: str | Callable[[], str], seconds: float = 60) -> T:
        return self.pools.until(condition, what, seconds)

    def total(self, metric: str, **labels: str) -> float:
        """Over all brokers that run."""
        return sum(broker.metrics().total(metric, **labels) for broker in self.brokers if broker.running)

    def await_stored(self, count: int) -> None:
        """Until this many tasks are held by the brokers."""
        self.until(lambda: self.held() >= count, lambda: f"{count} tasks are stored, not {self.held()}")

    def held(self) -> int:
        return int(sum(self.total("penstock_tasks", state=state) for state in STATES))

    def await_ended(self, ids: Sequence[str], seconds: float = 90) -> None:
        """Until each of these tasks has returned from an execution."""
        wanted = set(ids)

        def missing() -> str:
            left = sorted(wanted - self.ledger.ended)
            return f"{len(left)} of {len(wanted)} tasks end, e.g. {left[:3]}; {self.state()}"

        self.until(lambda: wanted <= self.ledger.ended, missing, seconds)

    def state(self) -> str:
        states = {state: self.total("penstock_tasks", state=state) for state in STATES}
        return f"held by brokers: {states}"

    def await_drained(self, seconds: float = 60) -> None:
        """Until the brokers hold nothing. Then their books must balance."""
        self.until(lambda: self.held() == 0, lambda: f"the brokers hold nothing; {self.state()}", seconds)
        for broker in self.brokers:
            if broker.running:
                difference = broker.metrics().total("penstock_books_difference_tasks")
                assert difference == 0, f"the books of {broker.name} differ by {difference}"

    def await_partitions(self, brokers: Sequence[Broker], count: int) -> None:
        """Until these brokers read this many partitions, each of them at least one."""

        def assigned() -> list[int]:
            return [int(broker.metrics().total("penstock_kafka_partitions")) for broker in brokers]

        self.until(
            lambda: sum(assigned()) == count and all(assigned()),
            lambda: f"{count} partitions are shared by {len(brokers)} brokers, not {assigned()}",
        )


def first(items: Iterable[T], count: int) -> list[T]:
    return list(itertools.islice(items, count))
