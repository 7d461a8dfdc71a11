"""A broker without Kafka as a process, and the commands of an operator."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def settings_in(folder: Path, secret: str) -> dict[str, str]:
    """The environment that is the settings of a broker."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("TASKBROKER_")}
    return kept | {
        "TASKBROKER_INGEST": "grpc",
        "TASKBROKER_GRPC_PORT": str(port),
        "TASKBROKER_METRICS_PORT": "0",
        "TASKBROKER_DB_PATH": str(folder / "b.sqlite"),
        "TASKBROKER_GRPC_SHARED_SECRET": secret,
    }


@contextmanager
def running(environment: dict[str, str], log: Path, *, kill: bool = False) -> Iterator[dict[str, str]]:
    """A broker with these settings runs meanwhile. ``kill``: it is not stopped in order."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock_broker", "serve"], env=environment, stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + 40
        while "serving" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield environment
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        assert process.wait(15) == (-signal.SIGKILL if kill else 0)
    finally:
        process.kill()
        process.wait()


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [sys.executable, "-m", "penstock_broker", *arguments],
        env=environment, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran
