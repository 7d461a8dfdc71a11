"""The application whose tasks are measured. Where they go is in PENSTOCK_KAFKA and PENSTOCK_TOPIC."""

from __future__ import annotations

import time

from benchmarks.marks import mark
from penstock_client import App, Fixed, Retry, TaskContext

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


@bench.task(name="bench.again", bind=True, retry=Retry(max_attempts=2, backoff=Fixed(2.0)))
def again(ctx: TaskContext, marks: str) -> None:
    """Fails once; the second time it notes how much later than its back-off it was started."""
    raise NotImplementedError
