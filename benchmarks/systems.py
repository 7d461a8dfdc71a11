"""Penstock and the systems it is compared with, each as a user would run it."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis

from benchmarks import marks
from benchmarks.harness import ROOT, Bench
from benchmarks.processes import (
    STALL_SECONDS_MAX,
    Meter,
    Script,
    broker,
    kafka_settings,
    new_topic,
    process,
    wait_until,
    worker,
)
from tests.kafka_server import free_port

CHILDREN = 2
PRODUCERS = 2
WARM_UP_TASKS = 400


@dataclass
class Running:
    """A system at work: started, warm, and empty."""

    parts: Mapping[str, Any]
    marks: Path
    _producer: Callable[..., Script]
    # Tasks sent, and not acknowledged yet as executed.
    unacknowledged: Callable[[], float]
    # Of Penstock's broker, since it was started.
    longest_tick_ms: Callable[[], float] = lambda: 0.0

    # So many marks are there when everything that was sent has been executed.
    expected: int = 0

    def producer(self, tasks: int, *options: object, **how: str) -> Script:
        """A producer of so many tasks, connected: it has sent one already."""
        self.expected += tasks + 1
        return self._producer(tasks, *options, **how).ready()

    def meter(self) -> Meter:
        return Meter(**self.parts)

    def wait_for_marks(self, seconds: float = STALL_SECONDS_MAX) -> None:
        wait_until(
            f"{self.expected} tasks have run", lambda: marks.count(self.marks) >= self.expected, seconds
        )

    def finish(self) -> float:
        """Wait until all that was sent has been executed and acknowledged; when that was."""
        self.wait_for_marks()
        wait_until("all outcomes are acknowledged", lambda: self.unacknowledged() == 0)
        return time.time()


def _warm(running: Running) -> Running:
    """One round through everything."""
    running.producer(WARM_UP_TASKS).go().result()
    running.finish()
    return running


def _folder(bench: Bench, name: str) -> Path:
    folder = bench.folder / f"{name}-{uuid.uuid4().hex[:8]}"
    (folder / "marks").mkdir(parents=True)
    return folder


@contextlib.contextmanager
def penstock(bench: Bench, partitions: int = 4) -> Iterator[Running]:
    """Kafka, one broker, one worker with two children; the producers send through Kafka."""
    folder = _folder(bench, "penstock")
    topic = new_topic(bench.kafka, partitions)
    sending = {"PENSTOCK_KAFKA": bench.kafka, "PENSTOCK_TOPIC": topic, marks.VARIABLE: str(folder / "marks")}
    with (
        broker(folder, kafka_settings(bench.kafka, topic)) as server,
        worker(server.address, CHILDREN, folder / "marks") as running,
    ):
        system = Running(
            {},
            folder / "marks",
            lambda *arguments, module="benchmarks.send": Script(module, *arguments, environment=sending),
            lambda: server.count("penstock_tasks"),
            server.longest_tick_ms,
        )
        _warm(system)
        system.parts = {
            "server": server.process,
            "kafka": bench.kafka_pid,
            "worker": running,
            "children": running.children(recursive=True),
        }
        yield system


def environment_python(name: str) -> str:
    python = ROOT / ".nox" / name / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{name} is not installed: nox -s bench makes its environment in .nox/{name}")
    return str(python)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[tuple[int, psutil.Popen]]:
    """Redis as Debian's package sets it up, on a port of its own."""
    configuration, port = Path("/etc/redis/redis.conf"), free_port()
    if not configuration.exists():
        raise SystemExit("Redis is not installed: apt-get install redis-server (elsewhere: its package, 7.0)")
    command = ["redis-server", str(configuration), "--port", str(port), "--dir", str(folder)]
    command += [
        "--daemonize",
        "no",
        "--supervised",
        "no",
        "--pidfile",
        "",
        "--logfile",
        str(folder / "redis.log"),
    ]
    with process(command) as running:
        with redis.Redis(port=port) as client:

            def answers() -> bool:
                with contextlib.suppress(redis.ConnectionError):
                    return bool(client.ping())
                return False

            wait_until("Redis answers", answers)
        yield port, running


@dataclass(frozen=True)
class Rival:
    """Another system: how its worker is started, and what Redis holds of tasks that are not acknowledged."""

    name: str
    command: Sequence[str]
    unacknowledged: Callable[[redis.Redis], float]
    environment: Mapping[str, str]

    @contextlib.contextmanager
    def running(self, bench: Bench) -> Iterator[Running]:
        folder = _folder(bench, self.name)
        python = environment_python(self.name)
        with redis_server(folder) as (port, server), redis.Redis(port=port) as client:
            environment = {
                "PENSTOCK_BENCH_REDIS": f"redis://127.0.0.1:{port}/0",
                marks.VARIABLE: str(folder / "marks"),
                "PYTHONPATH": str(ROOT),
                **self.environment,
            }
            log = folder / "worker.log"
            with process([python, "-m", *self.command], environment, log) as running:
                system = Running(
                    {},
                    folder / "marks",
                    lambda *arguments: Script(
                        "benchmarks.rivals.send",
                        self.name,
                        *arguments,
                        python=python,
                        environment=environment,
                    ),
                    lambda: self.unacknowledged(client),
                )
                _warm(system)
                system.parts = {
                    "server": server,
                    "worker": running,
                    "children": running.children(recursive=True),
                }
                yield system


def celery(prefetch: int = 64) -> Rival:
    command = ["celery", "-A", "benchmarks.rivals.celery_app", "worker"]
    command += ["--concurrency", str(CHILDREN), "--loglevel", "WARNING"]
    return Rival(
        "celery",
        command,
        lambda r: float(r.llen("celery") + r.hlen("unacked")),
        {"PENSTOCK_BENCH_PREFETCH": str(prefetch)},
    )


def dramatiq(threads: int = 8) -> Rival:
    command = ["dramatiq", "benchmarks.rivals.dramatiq_app"]
    command += ["--processes", str(CHILDREN), "--threads", str(threads)]
    return Rival("dramatiq", command, lambda r: float(r.hlen("dramatiq:default.msgs")), {})


def taskiq(kind: str, together: int = 100) -> Rival:
    command = ["taskiq", "worker", "benchmarks.rivals.taskiq_app:broker", "--workers", str(CHILDREN)]
    command += ["--max-async-tasks", str(together), "--log-level", "WARNING"]
    count = _stream_unacknowledged if kind == "stream" else lambda r: float(r.llen("taskiq"))
    return Rival("taskiq", command, count, {"PENSTOCK_BENCH_TASKIQ": kind})


def _stream_unacknowledged(client: redis.Redis) -> float:
    (group,) = client.xinfo_groups("taskiq")
    # Without a lag Redis does not know it, which it does while nothing is deleted.
    return float(group["pending"] + group["lag"])
