"""Taskiq on Redis: its stream broker acknowledges, its list queue does not. Tasks are coroutines."""

from __future__ import annotations

import asyncio
import os

from taskiq_redis import ListQueueBroker, RedisStreamBroker

from benchmarks.marks import mark

_url = os.environ["PENSTOCK_BENCH_REDIS"]
broker = RedisStreamBroker(_url) if os.environ["PENSTOCK_BENCH_TASKIQ"] == "stream" else ListQueueBroker(_url)


@broker.task
async def noop(n: int) -> None:
    mark()


@broker.task
async def work(sent_at: float, seconds: float) -> None:
    mark(sent_at)
    if seconds:
        await asyncio.sleep(seconds)


send_noop, send_work = noop.kiq, work.kiq
