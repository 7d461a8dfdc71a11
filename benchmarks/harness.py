"""What every benchmark needs: a broker process, load generators, CPU and memory of each, results on file."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.kafka_server import free_port

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


@dataclass
class BrokerProcess:
    """A broker as a user runs it, watched."""

    address: str
    process: psutil.Popen

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def rss_bytes(self) -> int:
        return int(self.process.memory_info().rss)


@contextlib.contextmanager
def broker(settings: Mapping[str, str]) -> Iterator[BrokerProcess]:
    """A broker with these TASKBROKER_ settings (without the prefix), on a fresh database."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        port = free_port()
        environment = {
            **os.environ,
            "TASKBROKER_DB_PATH": f"{folder}/inflight.sqlite",
            "TASKBROKER_GRPC_PORT": str(port),
            "TASKBROKER_METRICS_PORT": "0",
            "TASKBROKER_LOG_LEVEL": "warning",
            **{f"TASKBROKER_{name}": value for name, value in settings.items()},
        }
        process = psutil.Popen([sys.executable, "-m", "penstock_broker", "serve"], env=environment)
        try:
            _wait_until_serving(f"127.0.0.1:{port}", process)
            yield BrokerProcess(f"127.0.0.1:{port}", process)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except psutil.TimeoutExpired:
                process.kill()


def _wait_until_serving(address: str, process: psutil.Popen, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    with grpc.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise SystemExit(f"the broker ended with {process.returncode} before it served")
            with contextlib.suppress(grpc.RpcError):
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(0.02)
    raise SystemExit(f"no broker served on {address} within {seconds} s")


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def machine() -> dict[str, str]:
    return {
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: version(name) for name in ("apsw", "confluent-kafka", "grpcio", "protobuf")},
    }


def save(name: str, figures: Mapping[str, object]) -> Path:
    """Write a dated result file."""
    RESULTS.mkdir(exist_ok=True)
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path = RESULTS / f"{day}-{name}.json"
    path.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
    return path
