"""The application whose tasks are measured. Where they go is in PENSTOCK_KAFKA and PENSTOCK_TOPIC."""

from __future__ import annotations

import struct
import time
from pathlib import Path

from benchmarks.marks import mark
from penstock_client import App, Fixed, Retry, TaskContext

BACKOFF_SECONDS = 2.0


class FailedOnce(Exception):
    """As many do, and succeed the second time."""


app = App("bench", strict_kwargs="off")
bench = app.namespace("bench", retry=None)


@bench.task(name="bench.noop")
def noop(n: int) -> None:
    mark()


@bench.task(name="bench.work")
def work(sent_at: float, seconds: float) -> None:
    mark(sent_at)
    if seconds:
        time.sleep(seconds)


@bench.task(name="bench.due")
def due(due_at: float) -> None:
    mark(due_at)


@bench.task(name="bench.again", bind=True, retry=Retry(max_attempts=2, backoff=Fixed(BACKOFF_SECONDS)))
def again(ctx: TaskContext, failures: str, n: int) -> None:
    """Fails once; its second start is due a back-off after that."""
    with Path(failures).open("r+b") as file:
        file.seek(8 * n)
        if ctx.attempt == 1:
            file.write(struct.pack("d", time.time()))
            raise FailedOnce
        (failed_at,) = struct.unpack("d", file.read(8))
    mark(failed_at + BACKOFF_SECONDS)
