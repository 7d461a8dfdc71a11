"""Brokers and workers as real processes, killed at the end whatever happens; and the books of a test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from confluent_kafka import Consumer, Message
from confluent_kafka.admin import AdminClient, NewTopic
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from penstock_client import App
from tests.e2e import tasks
from tests.kafka_server import free_port

ROOT = Path(__file__).parents[2]
SERVE_SECONDS_MAX = 30.0
EXIT_SECONDS_MAX = 15.0


def eventually(what: str, condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until ``condition`` holds; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


class Process:
    """A process with its log."""

    def __init__(
        self,
        name: str,
        folder: Path,
        command: Sequence[str],
        environment: dict[str, str],
        within: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._command = [*within, sys.executable, *command]
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self.environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL: no chance to say goodbye."""
        if self.process is not None and self.running:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def terminate(self, seconds: float = EXIT_SECONDS_MAX) -> int:
        """SIGTERM; the exit code. Fails when it does not end in time."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float = EXIT_SECONDS_MAX) -> int:
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {seconds} s") from None

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""


class Broker(Process):
    """One broker, with a database of its own; ``start`` again after ``kill`` restarts it."""

    def __init__(self, name: str, folder: Path, settings: dict[str, str]) -> None:
        self.port, self.metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.database = folder / f"{name}.sqlite"
        values = {
            "DB_PATH": str(self.database),
            "GRPC_PORT": str(self.port),
            "METRICS_PORT": str(self.metrics_port),
            "BROKER_ID": f"{name}-{self.port}",
            "KAFKA_SESSION_TIMEOUT_SECONDS": "6",
            **settings,
        }
        environment = {f"TASKBROKER_{key}": value for key, value in values.items()}
        super().__init__(name, folder, ["-m", "penstock_broker", "serve"], environment)

    def start(self, serving: bool = True) -> None:
        super().start()
        if serving:
            eventually(f"{self.name} serves", self.is_serving, SERVE_SECONDS_MAX)

    def is_serving(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self.process.returncode}:\n{self.text()}")
        with contextlib.suppress(grpc.RpcError), grpc.insecure_channel(self.address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=2)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False

    def metrics(self) -> dict[str, float]:
        """Sample name with its labels -> value."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        return {
            s.name
            + (
                "{" + ",".join(f"{k}={v}" for k, v in sorted(s.labels.items())) + "}" if s.labels else ""
            ): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    def held(self) -> int:
        """Activations in the store."""
        return int(sum(v for k, v in self.metrics().items() if k.startswith("penstock_tasks{")))

    def done(self, namespace: str) -> int:
        """Activations of the test application that ended done here, since the broker started."""
        labels = f"application=e2e,namespace={namespace},outcome=done"
        return int(self.metrics()[f"penstock_tasks_finished_total{{{labels}}}"])

    def check_books(self) -> None:
        assert self.metrics()["penstock_books_difference_tasks"] == 0


class Execution(NamedTuple):
    what: str
    id: str
    attempt: int
    namespace: str
    at: float
    pid: int


@dataclass
class Letter:
    """A dead letter as Kafka has it."""

    key: str
    value: bytes
    headers: dict[str, str]


class Pool:
    """Brokers, workers and topics of one test."""

    def __init__(self, folder: Path, kafka: str | None) -> None:
        self.folder = folder
        self.kafka = kafka
        self.records = folder / "records"
        self.records.mkdir()
        self.topic = f"e2e-{uuid.uuid4().hex[:10]}"
        self.processes: list[Process] = []
        self._apps: list[App] = []

    # -- making

    def create_topic(self, partitions: int, topic: str | None = None) -> str:
        admin = AdminClient({"bootstrap.servers": self.kafka or ""})
        name = topic or self.topic
        new = [NewTopic(name, partitions)]
        new += [NewTopic(f"{name}-{beside}", 1) for beside in ("dlq", "overflow")]
        if topic is None:
            new.append(NewTopic(f"{name}-ledger", 1, config={"cleanup.policy": "compact"}))
        for future in admin.create_topics(new).values():
            future.result(30)
        return name

    def broker(self, name: str = "broker", *, start: bool = True, **settings: str) -> Broker:
        if self.kafka is None:
            settings = {"INGEST": "grpc", **settings}
        else:
            own = {"KAFKA_TOPIC": self.topic, "KAFKA_LEDGER_TOPIC": f"{self.topic}-ledger"}
            settings = {"KAFKA_CLUSTER": self.kafka, **own, **settings}
        broker = Broker(name, self.folder, settings)
        self.processes.append(broker)
        if start:
            broker.start()
        return broker

    def drain(self, broker: Broker, grace_seconds: float) -> Process:
        """``penstock-broker drain``, started."""
        command = ["-m", "penstock_broker", "drain", "--grace-seconds", str(grace_seconds)]
        draining = Process(f"drain-{len(self.processes)}", self.folder, command, broker.environment)
        self.processes.append(draining)
        draining.start()
        return draining

    def worker(
        self,
        brokers: Sequence[Broker | str],
        *,
        name: str = "worker",
        slots: int = 2,
        namespaces: Sequence[str] = ("main",),
        within: Sequence[str] = (),
        **environment: str,
    ) -> Process:
        """``brokers``, or their addresses; ``within`` is a command that runs the worker."""
        hosts = [broker if isinstance(broker, str) else broker.address for broker in brokers]
        command = ["-m", "penstock_worker", "run", "tests.e2e.tasks:app", "--concurrency", str(slots)]
        command += ["--rpc-host-list", ",".join(hosts), "--grace-seconds", "5"]
        for namespace in namespaces:
            command += ["--namespace", namespace]
        records = {tasks.RECORDS: str(self.records)}
        worker = Process(name, self.folder, command, {**records, **environment}, within)
        self.processes.append(worker)
        worker.start()
        return worker

    def app(self, **how: Any) -> App:
        """A producer."""
        if "broker" not in how:
            how = {"kafka": self.kafka, "topic": self.topic, **how}
        app = tasks.make_app(**how)
        self._apps.append(app)
        return app

    def close(self) -> None:
        for app in self._apps:
            app.close()
        for process in self.processes:
            process.kill()

    # -- the books

    def executions(self) -> list[Execution]:
        found = []
        for path in self.records.glob("*.log"):
            # The last line may be on its way.
            whole, _, _ = path.read_text().rpartition("\n")
            for line in whole.splitlines():
                what, id, attempt, namespace, at = line.split(" ")
                found.append(Execution(what, id, int(attempt), namespace, float(at), int(path.stem)))
        return found

    def ended(self) -> Counter[str]:
        """How often each id ran to its end."""
        return Counter(e.id for e in self.executions() if e.what == "end")

    def started(self) -> Counter[str]:
        return Counter(e.id for e in self.executions() if e.what == "start")

    def await_all(self, ids: Sequence[str], seconds: float = 90.0) -> Counter[str]:
        """Wait until each id has run to its end; nothing else may have. How often each did."""
        wanted = set(ids)
        eventually(f"all of {len(wanted)} tasks have run", lambda: wanted <= self.ended().keys(), seconds)
        ended = self.ended()
        assert ended.keys() == wanted
        return ended

    def await_empty(self, *brokers: Broker, seconds: float = 60.0) -> None:
        """Wait until the brokers hold nothing; then their books balance."""
        for broker in brokers:
            eventually(f"{broker.name} is empty", lambda b=broker: b.held() == 0, seconds)  # type: ignore[misc]
            broker.check_books()

    def dead_letters(self, count: int, topic: str | None = None, seconds: float = 30.0) -> list[Letter]:
        """The first ``count`` dead letters; fails when there are fewer.

        Each once: a broker that dies before it has noted that one was sent sends it again, under the same
        forward id.
        """
        letters: dict[str, Letter] = {}
        consumer = Consumer(
            {
                "bootstrap.servers": self.kafka or "",
                "group.id": uuid.uuid4().hex,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
            }
        )
        consumer.subscribe([f"{topic or self.topic}-dlq"])
        deadline = time.monotonic() + seconds
        try:
            while len(letters) < count and time.monotonic() < deadline:
                message = consumer.poll(0.2)
                if message is not None and message.error() is None:
                    letter = _letter(message)
                    letters.setdefault(letter.headers["penstock-forward-id"], letter)
        finally:
            consumer.close()
        assert len(letters) >= count, f"{len(letters)} of {count} dead letters within {seconds} s"
        return list(letters.values())


def _letter(message: Message) -> Letter:
    given: Any = message.headers() or ()
    headers = {name: (value or b"").decode("utf-8", "replace") for name, value in given}
    return Letter(str(message.key() or b"", "utf-8", "replace"), message.value() or b"", headers)


@contextlib.contextmanager
def pool(folder: Path, kafka: str | None) -> Iterator[Pool]:
    """A pool whose processes end with the test."""
    made = Pool(folder, kafka)
    try:
        yield made
    finally:
        made.close()
