"""Brokers and workers as a user starts them, with their output kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.waiting import until
from tests.kafka_server import free_port

ROOT = Path(__file__).parents[2]
# Settings of whoever runs the tests, which are none of the tests' business.
FOREIGN = ("TASKBROKER_", "PENSTOCK_")


def clean_environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return inherited | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


class Program:
    """A command that can be started, ended and started again. All of its output is in one file."""

    def __init__(self, name: str, command: Sequence[str], settings: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self.command = list(command)
        self.environment = clean_environment() | dict(settings)
        self.log_path = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        # Whether its end would be a surprise.
        self.expected = False

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        self.expected = True

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        return self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.expected = False
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process alone: what it has started must notice by itself."""
        self.send(signal.SIGKILL)
        self.wait(10)

    def wait(self, seconds: float) -> int:
        """Its exit code. AssertionError when it does not end in time."""
        assert self.process is not None
        self.expected = False
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {seconds} s\n{self.log()[-2000:]}") from None

    def terminate(self, seconds: float) -> int:
        """SIGTERM; the exit code."""
        self.send(signal.SIGTERM)
        return self.wait(seconds)

    def destroy(self) -> None:
        """Whatever is left of it and of its children ends now."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.expected = False

    def assert_as_expected(self) -> None:
        assert self.running or not self.expected, f"{self.name} has ended:\n{self.log()[-3000:]}"


class Metrics:
    """One scrape of a broker."""

    def __init__(self, text: str) -> None:
        self.samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


class Broker(Program):
    """``settings`` are TASKBROKER_ settings, without the prefix."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, str]) -> None:
        self.port, self.metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.database = folder / f"{name}.sqlite"
        given = {
            "BROKER_ID": name,
            "DB_PATH": str(self.database),
            "GRPC_PORT": str(self.port),
            "METRICS_PORT": str(self.metrics_port),
            "KAFKA_SESSION_TIMEOUT_SECONDS": "6",
            **settings,
        }
        environment = {f"TASKBROKER_{setting}": value for setting, value in given.items()}
        super().__init__(name, [sys.executable, "-m", "penstock_broker", "serve"], environment, folder)

    def serving(self) -> bool:
        """What grpc.health.v1 says."""
        with grpc.insecure_channel(self.address) as channel, contextlib.suppress(grpc.RpcError):
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
            return answer.status == health_pb2.HealthCheckResponse.SERVING
        return False

    def await_serving(self) -> None:
        def serving() -> bool:
            self.assert_as_expected()
            return self.serving()

        until(serving, lambda: f"{self.name} serves\n{self.log()[-3000:]}")

    def restart(self) -> None:
        self.start()
        self.await_serving()

    def metrics(self) -> Metrics:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            return Metrics(answer.read().decode())


class Worker(Program):
    """A worker of the application in tasks.py."""

    def __init__(
        self, name: str, folder: Path, brokers: Sequence[str], slots: int, settings: Mapping[str, str]
    ) -> None:
        command = [
            *(sys.executable, "-m", "penstock_worker", "run", "tests.e2e.tasks:app"),
            *("--rpc-host-list", ",".join(brokers), "--concurrency", str(slots)),
        ]
        super().__init__(name, command, settings, folder)
        self.slots = slots

    def children(self) -> list[psutil.Process]:
        """The processes that execute tasks, and what they have started."""
        return psutil.Process(self.pid).children(recursive=True)
