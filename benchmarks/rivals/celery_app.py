"""Celery on Redis, set for many short tasks that must not be lost.

`task_acks_late` is its at-least-once mode; for short tasks its manual recommends a prefetch of 64 to 128.
"""

from __future__ import annotations

import os
import time

from celery import Celery

from benchmarks.marks import mark

app = Celery("bench", broker=os.environ["PENSTOCK_BENCH_REDIS"])
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=int(os.environ.get("PENSTOCK_BENCH_PREFETCH", "64")),
)


@app.task(name="bench.noop")
def noop(n: int) -> None:
    mark()


@app.task(name="bench.work")
def work(sent_at: float, seconds: float) -> None:
    mark(sent_at)
    if seconds:
        time.sleep(seconds)


send_noop, send_work = noop.delay, work.delay
