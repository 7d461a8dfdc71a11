"""Dramatiq on Redis, with its own defaults."""

from __future__ import annotations

import os
import time

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks.marks import mark

dramatiq.set_broker(RedisBroker(url=os.environ["PENSTOCK_BENCH_REDIS"]))


@dramatiq.actor
def noop(n: int) -> None:
    mark()


@dramatiq.actor
def work(sent_at: float, seconds: float) -> None:
    mark(sent_at)
    if seconds:
        time.sleep(seconds)


send_noop, send_work = noop.send, work.send
