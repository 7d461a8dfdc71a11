"""A Kafka for tests: the one in PENSTOCK_KAFKA, else Apache Kafka from its Java packages, else a mock.

``python -m tests.kafka_server [--port N]`` runs one until Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from confluent_kafka import KafkaException, Producer, Uuid
from confluent_kafka.admin import AdminClient

VERSION = "4.1.0"
JAVA_MIN = 17
START_SECONDS_MAX = 60

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>penstock</groupId><artifactId>kafka-for-tests</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>2.24.3</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-core</artifactId><version>2.24.3</version></dependency>
  </dependencies>
</project>
"""

_CLUSTER = str(Uuid(1, 1))

_LOG4J = """Configuration:
  Appenders: {Console: {name: console, PatternLayout: {pattern: "%d %p %c{1} %m%n"}}}
  Loggers: {Root: {level: warn, AppenderRef: {ref: console}}}
"""

_PROPERTIES = """\
process.roles=broker,controller
node.id={id}
controller.quorum.bootstrap.servers={controllers}
listeners=PLAINTEXT://127.0.0.1:{port},BEHIND://127.0.0.1:{behind},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},BEHIND://127.0.0.1:{before}
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,BEHIND:PLAINTEXT
log.dirs={folder}/data
auto.create.topics.enable=false
num.partitions=1
default.replication.factor={replicas}
offsets.topic.replication.factor={replicas}
offsets.topic.num.partitions=1
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
"""


class KafkaUnavailable(Exception):
    """There is no Kafka to test with; the text says how to get one."""


class Kafka(Protocol):
    """What every kind has. ``real``: not a mock. ``owned``: it may be stopped and started."""

    address: str
    real: bool
    owned: bool


class ForeignKafka:
    """One that somebody else runs."""

    real, owned = True, False

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            AdminClient({"bootstrap.servers": address, "log_level": 0}).list_topics(timeout=10)
        except KafkaException as error:
            raise KafkaUnavailable(
                f"PENSTOCK_KAFKA is {address}, where no Kafka answers: {error.args[0].str()}. Start it, or"
                " unset PENSTOCK_KAFKA to have one started here"
            ) from None


class MockKafka:
    """librdkafka's mock cluster: other processes reach it, but it drops data beyond 5 MiB a partition."""

    real, owned = False, False

    def __init__(self) -> None:
        self._cluster = Producer({"bootstrap.servers": "unused", "test.mock.num.brokers": 1})
        broker = next(iter(self._cluster.list_topics(timeout=10).brokers.values()))
        self.address = f"{broker.host}:{broker.port}"


class Voter:
    """Of a cluster: where one of its controllers is."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.directory = str(Uuid(2, id))


class JavaKafka:
    """Apache Kafka, one node, in a folder of its own. Stops and starts on the same port and data."""

    real, owned = True, True

    def __init__(self, port: int = 0, voters: Sequence[Voter] = (), id: int = 1) -> None:
        """``voters``: of a cluster of several nodes; this is the one with ``id``."""
        self._jars = jars()
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-kafka-"))
        self._port = port or free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        # A proxy that a test puts on the first of these ports forwards to the second.
        self.before_port, self.behind_port = free_port(), free_port()
        voters = voters or [Voter(id)]
        properties = _PROPERTIES.format(
            id=id,
            port=self._port,
            before=self.before_port,
            behind=self.behind_port,
            controllers=",".join(voter.address for voter in voters),
            controller=next(voter.port for voter in voters if voter.id == id),
            replicas=len(voters),
            folder=self._folder,
        )
        (self._folder / "server.properties").write_text(properties)
        (self._folder / "log4j2.yaml").write_text(_LOG4J)
        initial = ",".join(f"{v.id}@{v.address}:{v.directory}" for v in voters)
        self._java(
            "kafka.tools.StorageTool", "format", "-t", _CLUSTER, "--initial-controllers", initial,
            "-c", str(self._folder / "server.properties"),
        )  # fmt: skip

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the Java process while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    def _command(self, *arguments: str) -> list[str]:
        settings = f"-Dlog4j2.configurationFile={self._folder / 'log4j2.yaml'}"
        return ["java", "-Xmx512m", "-cp", f"{self._jars}/*", settings, *arguments]

    def _java(self, *arguments: str) -> str:
        done = subprocess.run(self._command(*arguments), capture_output=True, text=True, check=False)
        if done.returncode:
            raise KafkaUnavailable(f"{' '.join(arguments[:2])} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self) -> None:
        """Returns when it answers."""
        self.launch()
        self.await_answer()

    def launch(self) -> None:
        with (self._folder / "kafka.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command("kafka.Kafka", str(self._folder / "server.properties")),
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for us; it is stopped when those that use it are.
                process_group=0,
            )

    def await_answer(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            if not self.running:
                break
            with contextlib.suppress(OSError, KafkaException):
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                AdminClient({"bootstrap.servers": self.address, "log_level": 0}).list_topics(timeout=2)
                return
            time.sleep(0.1)
        self.kill()
        said = (self._folder / "kafka.log").read_text()[-3000:]
        raise KafkaUnavailable(
            f"Kafka did not start within {START_SECONDS_MAX} s; its log ends with:\n{said}"
        )

    def stop(self) -> None:
        """As an operator stops it."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def pause(self) -> None:
        """It stops answering, with its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def jars() -> Path:
    """The folder with Kafka's jars, downloaded once with Maven. Raises KafkaUnavailable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "penstock" / f"kafka-{VERSION}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (cache / "complete").exists():
            _need("java")
            return cache / "libs"
        _need("java")
        _need("mvn")
        say(f"Downloading Apache Kafka {VERSION} to {cache} (once, 43 MB)")
        (cache / "pom.xml").write_text(_POM)
        goal = ("dependency:copy-dependencies", "-DoutputDirectory=libs", "-DincludeScope=runtime")
        copied = subprocess.run(
            ["mvn", "-q", "-B", *goal], cwd=cache, capture_output=True, text=True, check=False
        )
        if copied.returncode:
            said = (copied.stdout + copied.stderr)[-4000:]
            raise KafkaUnavailable(f"Maven could not download Kafka:\n{said}")
        (cache / "complete").touch()
        return cache / "libs"


def _need(program: str) -> None:
    """Raises KafkaUnavailable when it is not installed, or is a Java that is too old."""
    remedy = f"apt-get install openjdk-{JAVA_MIN}-jre-headless maven"
    if shutil.which(program) is None:
        raise KafkaUnavailable(f"{program} is not installed: {remedy}")
    if program == "java":
        said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
        # "17.0.15", and "1.8.0" for the old ones.
        version = re.search(r'version "(\d+)', said)
        if version is None or int(version[1]) < JAVA_MIN:
            found = said.splitlines()[0] if said else "nothing"
            raise KafkaUnavailable(
                f"Java {JAVA_MIN} or newer is needed, `java -version` says {found}: {remedy}"
            )


_ports_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, different at each call.

    Below those that the system gives to outgoing connections, so that what listens here can be stopped
    and finds its port free when it starts again. Of several processes that run tests each has its own:
    between this call and the start of what will listen are seconds.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.randrange(15_000 + own, 32_000, processes)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            if port not in _ports_given:
                _ports_given.add(port)
                return port


def say(text: str) -> None:
    sys.stderr.write(f"kafka for tests: {text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def kafka_server(port: int = 0) -> Iterator[ForeignKafka | JavaKafka | MockKafka]:
    """A running Kafka, of the best kind there is; gone afterwards if it is ours.

    Raises KafkaUnavailable when PENSTOCK_KAFKA_REQUIRED is set and there is no real one.
    """
    if address := os.environ.get("PENSTOCK_KAFKA"):
        say(f"using the one at {address} (PENSTOCK_KAFKA)")
        yield ForeignKafka(address)
        return
    try:
        java = JavaKafka(port)
    except KafkaUnavailable as unavailable:
        if os.environ.get("PENSTOCK_KAFKA_REQUIRED", "") not in ("", "0"):
            raise
        say("=" * 80)
        say(f"NO REAL KAFKA: {unavailable}")
        say("Going on with librdkafka's mock cluster. What needs a real one is not tested.")
        say("=" * 80)
        yield MockKafka()
        return
    try:
        java.start()
        yield java
    finally:
        java.remove()


@contextlib.contextmanager
def kafka_cluster(nodes: int) -> Iterator[list[JavaKafka]]:
    """A running cluster in which each node has everything. Raises KafkaUnavailable."""
    voters = [Voter(1 + n) for n in range(nodes)]
    cluster = [JavaKafka(voters=voters, id=voter.id) for voter in voters]
    try:
        for node in cluster:
            node.launch()
        for node in cluster:
            node.await_answer()
        yield cluster
    finally:
        for node in cluster:
            node.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a Kafka for development until Ctrl-C.")
    parser.add_argument("--port", type=int, default=9092)
    port = parser.parse_args().port
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt), kafka_server(port) as kafka:
        say(f"ready at {kafka.address}; Ctrl-C stops it and removes its data")
        signal.pause()


if __name__ == "__main__":
    try:
        main()
    except KafkaUnavailable as unavailable:
        say(str(unavailable))
        sys.exit(1)
