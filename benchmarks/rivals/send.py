"""A producer of another system: ``python -m benchmarks.rivals.send SYSTEM TASKS [--work S] [--rate N]``.

Prints one JSON line. Without a rate it sends as fast as it can.
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


def ready() -> tuple[float, float]:
    """Wait for the word; the time, and the CPU used so far."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    return time.time(), cpu_seconds()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def one(app: Any, number: int, options: argparse.Namespace) -> Any:
    """Send it; of an asyncio producer, what is to be awaited."""
    if options.rate:
        return app.send_work(time.time(), options.work or 0.0)
    return app.send_noop(number) if options.work is None else app.send_work(0.0, options.work)


def send(app: Any, options: argparse.Namespace) -> tuple[float, float]:
    # Connected, as a process is that has sent before.
    app.send_noop(0)
    begun = ready()
    for n in range(options.tasks):
        if options.rate:
            time.sleep(max(0.0, begun[0] + n / options.rate - time.time()))
        one(app, n, options)
    return begun


async def send_async(app: Any, options: argparse.Namespace) -> tuple[float, float]:
    await app.broker.startup()
    await app.send_noop(0)
    begun = ready()
    if options.rate:
        for n in range(options.tasks):
            await asyncio.sleep(max(0.0, begun[0] + n / options.rate - time.time()))
            await one(app, n, options)
    else:
        for n in range(0, options.tasks, TOGETHER):
            numbers = range(n, min(n + TOGETHER, options.tasks))
            await asyncio.gather(*(one(app, m, options) for m in numbers))
    await app.broker.shutdown()
    return begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system")
    parser.add_argument("tasks", type=int)
    parser.add_argument("--work", type=float, help="seconds that each task takes; else they are no-ops")
    parser.add_argument("--rate", type=float, help="tasks a second; latency is measured then")
    options = parser.parse_args()
    app = importlib.import_module(f"benchmarks.rivals.{options.system}_app")
    if options.system == "taskiq":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            first, idle = runner.run(send_async(app, options))
    else:
        first, idle = send(app, options)
    figures = {"first": first, "last": time.time(), "cpu": cpu_seconds() - idle}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
