"""When tasks were sent and when they started: one file for each process, one line for each start."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple, TextIO

from penstock_client import TaskContext

DIRECTORY = "DEMO_STARTS"


class Start(NamedTuple):
    """One start of one task; times in seconds since the epoch, of one machine's clock."""

    stage: str
    attempt: int
    sent_at: float
    started_at: float

    @property
    def latency_seconds(self) -> float:
        return self.started_at - self.sent_at


def _open() -> TextIO | None:
    """Opened when a child imports the tasks, so that the files tell how many children are ready."""
    directory = os.environ.get(DIRECTORY)
    if directory is None:  # the producer
        return None
    return (Path(directory) / f"{os.getpid()}.txt").open("a", buffering=1)


_file = _open()


def note(ctx: TaskContext, stage: str) -> None:
    """To be called first in a task."""
    started_at = time.time()
    if _file is not None and ctx.received_at is not None:
        _file.write(f"{stage} {ctx.attempt} {ctx.received_at.timestamp():.6f} {started_at:.6f}\n")


def read(directory: Path) -> list[Start]:
    """All that was noted."""
    found = []
    for path in directory.glob("*.txt"):
        for line in path.read_text().splitlines():
            stage, attempt, sent_at, started_at = line.split()
            found.append(Start(stage, int(attempt), float(sent_at), float(started_at)))
    return found
