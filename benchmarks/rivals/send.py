"""A producer of one of the other systems: ``python -m benchmarks.rivals.send SYSTEM TASKS [--rate N --work SECONDS]``.

Prints one JSON line. Without a rate it sends no-ops as fast as it can.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import resource
import sys
import time
from typing import Any

# Sends of an asyncio producer that are under way together.
TOGETHER = 64


def ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()


def pause_until(number: int, begun: float, rate: float) -> None:
    time.sleep(max(0.0, begun + number / rate - time.time()))


def send(app: Any, options: argparse.Namespace) -> float:
    begun = time.time()
    for n in range(options.tasks):
        if options.rate:
            pause_until(n, begun, options.rate)
            app.send_work(time.time(), options.work)
        else:
            app.send_noop(n)
    return begun


async def send_async(app: Any, options: argparse.Namespace) -> float:
    await app.broker.startup()
    ready()
    begun = time.time()
    if options.rate:
        for n in range(options.tasks):
            await asyncio.sleep(max(0.0, begun + n / options.rate - time.time()))
            await app.send_work(time.time(), options.work)
    else:
        for n in range(0, options.tasks, TOGETHER):
            await asyncio.gather(*(app.send_noop(m) for m in range(n, min(n + TOGETHER, options.tasks))))
    await app.broker.shutdown()
    return begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system")
    parser.add_argument("tasks", type=int)
    parser.add_argument("--rate", type=float, help="tasks a second")
    parser.add_argument("--work", type=float, default=0.0, help="seconds that each task takes")
    options = parser.parse_args()
    app = importlib.import_module(f"benchmarks.rivals.{options.system}_app")
    if options.system == "taskiq":
        first = asyncio.run(send_async(app, options))
    else:
        ready()
        first = send(app, options)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures = {"first": first, "last": time.time(), "cpu": usage.ru_utime + usage.ru_stime}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
