"""The broker and the worker as processes: started, watched, asked for numbers, stopped whatever happens."""

from __future__ import annotations

import signal
import socket
import subprocess
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

STOP_SECONDS_MAX = 10.0
LAST_LINES = 8


class DemoFailed(Exception):
    """The cause; ``log`` is where to read more."""

    def __init__(self, cause: str, log: Path | None = None) -> None:
        super().__init__(cause)
        self.cause, self.log = cause, log

    def last_lines(self) -> list[str]:
        if self.log is None or not self.log.exists():
            return []
        return self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]


class Part:
    """One process, its output in a file."""

    def __init__(
        self, name: str, command: Sequence[str], *, directory: Path, environment: Mapping[str, str], log: Path
    ) -> None:
        self.name, self.log = name, log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C must reach the demo alone: it stops the others in order.
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises DemoFailed when it has ended."""
        code = self._process.poll()
        if code is not None:
            raise DemoFailed(f"the {self.name} has ended before the demo: {how_it_ended(code)}", self.log)

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that does not help; the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def how_it_ended(code: int) -> str:
    """The exit code of a process, in words."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


class Counts(NamedTuple):
    """What the broker says on its /metrics."""

    done: int = 0
    dead: int = 0
    serving: bool = False


def counts(metrics_port: int) -> Counts:
    """Ask the broker; one that does not answer yet counts nothing."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as response:
            text = response.read().decode()
    except OSError:
        return Counts()
    done = dead = 0.0
    for family in text_string_to_metric_families(text):
        if family.name == "penstock_tasks_finished":
            for sample in family.samples:
                outcome = sample.labels.get("outcome", "")
                done += sample.value if outcome.startswith("done") else 0
                dead += sample.value if outcome.startswith("dead:") else 0
    return Counts(int(done), int(dead), serving=True)


def free_ports(number: int) -> list[int]:
    """Free ports of this machine, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    try:
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()
