"""The processes of a benchmark, as a user runs them, and what each costs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import psutil
from confluent_kafka.admin import AdminClient, NewTopic
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from benchmarks.harness import ROOT, NotWithinError
from tests.kafka_server import free_port

SERVE_SECONDS_MAX = 120.0
STALL_SECONDS_MAX = 60.0
LOOK_SECONDS = 0.02


def wait_until(what: str, condition: Callable[[], object], seconds: float = STALL_SECONDS_MAX) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise NotWithinError(f"not within {seconds:g} s: {what}")
        time.sleep(LOOK_SECONDS)


def find(program: str, pattern: str) -> Path | None:
    """On the path, or where its package puts it: the newest."""
    if found := shutil.which(program):
        return Path(found).resolve()
    return max(Path("/").glob(f"{pattern}/{program}".lstrip("/")), default=None)


@contextlib.contextmanager
def process(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    **options: Any,
) -> Iterator[psutil.Popen]:
    """A process that ends with the block: SIGTERM, and SIGKILL if that does not help."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log else None
        options = {"cwd": ROOT, **options}
        started = psutil.Popen(
            list(command), env={**os.environ, **(environment or {})}, stdout=output, stderr=output, **options
        )
        try:
            yield started
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                started.terminate()
            try:
                started.wait(20)
            except psutil.TimeoutExpired:
                for child in started.children(recursive=True):
                    child.kill()
                started.kill()
                started.wait()


@dataclass
class Broker:
    """A broker, watched."""

    address: str
    process: psutil.Popen
    metrics_port: int
    serving_seconds: float

    def _samples(self, metric: str) -> list[Sample]:
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read().decode()
        families = text_string_to_metric_families(text)
        return [sample for family in families for sample in family.samples if sample.name == metric]

    def count(self, metric: str) -> float:
        """The sum of a metric over all its labels."""
        return sum(sample.value for sample in self._samples(metric))

    def longest_tick_ms(self) -> float:
        """None of its transactions has taken longer, as far as the histogram's buckets tell."""
        buckets = self._samples("penstock_commit_seconds_bucket")
        ticks = max(sample.value for sample in buckets)
        return 1000 * min(float(sample.labels["le"]) for sample in buckets if sample.value == ticks)


@contextlib.contextmanager
def broker(folder: Path, settings: Mapping[str, str], port: int = 0) -> Iterator[Broker]:
    """A broker with these settings (names without TASKBROKER_) and its database in ``folder``.

    It keeps its identity when it is started again on the same folder.
    """
    port, metrics_port = port or free_port(), free_port()
    environment = {
        "TASKBROKER_DB_PATH": f"{folder}/broker.sqlite",
        "TASKBROKER_GRPC_PORT": str(port),
        "TASKBROKER_METRICS_PORT": str(metrics_port),
        "TASKBROKER_BROKER_ID": folder.name,
        "TASKBROKER_LOG_LEVEL": "warning",
        **{f"TASKBROKER_{name}": value for name, value in settings.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with process([sys.executable, "-m", "penstock_broker", "serve"], environment) as running:
        address = f"127.0.0.1:{port}"
        _wait_until_serving(address, running)
        yield Broker(address, running, metrics_port, time.monotonic() - started)


@contextlib.contextmanager
def standing_still(running: psutil.Process | psutil.Popen) -> Iterator[None]:
    """The process does nothing inside the block: what it finds afterwards was there before it looked.

    Short of Kafka's session timeout, 10 s, nobody takes it for dead.
    """
    running.suspend()
    try:
        yield
    finally:
        running.resume()


def _wait_until_serving(address: str, running: psutil.Popen) -> None:
    with grpc.insecure_channel(address, (("grpc.initial_reconnect_backoff_ms", 20),)) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)

        def serves() -> bool:
            if running.poll() is not None:
                raise SystemExit(f"the broker ended with {running.returncode} before it served")
            with contextlib.suppress(grpc.RpcError):
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
            return False

        wait_until(f"the broker serves on {address}", serves, SERVE_SECONDS_MAX)


def kafka_settings(kafka: str, topic: str) -> dict[str, str]:
    return {"KAFKA_CLUSTER": kafka, "KAFKA_TOPIC": topic, "CREATE_MISSING_TOPICS": "1"}


def new_topic(kafka: str, partitions: int) -> str:
    topic = f"bench-{uuid.uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": kafka})
    new = [NewTopic(topic, partitions, 1), NewTopic(f"{topic}-dlq", 1, 1)]
    for future in admin.create_topics(new).values():
        future.result(30)
    return topic


@contextlib.contextmanager
def worker(address: str, children: int, marks: Path) -> Iterator[psutil.Popen]:
    """A worker with benchmarks/tasks.py, ready; its children leave their marks in ``marks``."""
    command = [sys.executable, "-m", "penstock_worker", "run", "benchmarks.tasks:app"]
    command += ["--rpc-host-list", address, "--concurrency", str(children), "--grace-seconds", "2"]
    command += ["--log-level", "error"]
    with process(command, {"PENSTOCK_BENCH_MARKS": str(marks)}) as running:
        yield running


class Program:
    """A part of a benchmark in a process of its own: prints one JSON line when it is done.

    It says ``ready`` first, and starts when it is told to ``go``.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.name = name
        self.pid = self._process.pid

    def ready(self) -> Self:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line != "ready\n":
            raise SystemExit(f"{self.name} did not get ready: {line}{self._process.stdout.read()}")
        return self

    def go(self) -> Self:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self

    def line(self) -> dict[str, Any]:
        """What it prints when it is done, if it stays afterwards."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended before it was done")
        return dict(json.loads(line))

    def result(self) -> dict[str, Any]:
        output, _ = self._process.communicate()
        if self._process.returncode:
            raise SystemExit(f"{self.name} ended with {self._process.returncode}: {output}")
        return dict(json.loads(output.splitlines()[-1]))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Script(Program):
    """A module that is run by an interpreter."""

    def __init__(
        self, module: str, *arguments: object, python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        command = [python, "-m", module, *map(str, arguments)]
        super().__init__(module, command, {"PYTHONPATH": str(ROOT), **(environment or {})})


class Meter:
    """CPU seconds of named processes since it was made; memory as it is when asked.

    A process that appears later (a child that replaced another) is not counted.
    """

    def __init__(self, **parts: psutil.Process | Sequence[psutil.Process] | int | None) -> None:
        self._parts = {name: _processes(part) for name, part in parts.items() if part is not None}
        self._begun = {name: _cpu(part) for name, part in self._parts.items()}

    def cpu_seconds(self) -> dict[str, float]:
        return {name: _cpu(part) - self._begun[name] for name, part in self._parts.items()}

    def cpu_us(self, tasks: int) -> dict[str, float]:
        """Per task, as figures of a case."""
        return {f"{name}_cpu_us": seconds / tasks * 1e6 for name, seconds in self.cpu_seconds().items()}

    def rss_mb(self) -> dict[str, float]:
        return {
            f"{name}_rss_mb": sum(p.memory_info().rss for p in part) / 1e6
            for name, part in self._parts.items()
        }


def _processes(part: psutil.Process | Sequence[psutil.Process] | int) -> list[psutil.Process]:
    if isinstance(part, int):
        return [psutil.Process(part)]
    return list(part) if isinstance(part, Sequence) else [part]


def _cpu(part: Sequence[psutil.Process]) -> float:
    return float(sum(sum(p.cpu_times()[:2]) for p in part))
