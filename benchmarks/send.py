"""A producer: ``python -m benchmarks.send TASKS [--work SECONDS] [--rate N]``, through Kafka or a broker.

Prints one JSON line. Without a rate it sends as fast as it can. Where to is in PENSTOCK_KAFKA.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

from benchmarks.tasks import app, noop, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", type=int)
    parser.add_argument("--work", type=float, help="seconds that each task takes; else they are no-ops")
    parser.add_argument("--rate", type=float, help="tasks a second; latency is measured then")
    options = parser.parse_args()
    # Connected, as a process is that has sent before.
    noop.delay(0).wait(60)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    idle = cpu_seconds()
    first = time.time()
    for n in range(options.tasks):
        if options.rate:
            time.sleep(max(0.0, first + n / options.rate - time.time()))
            work.delay(time.time(), options.work or 0.0)
        elif options.work is not None:
            work.delay(0.0, options.work)
        else:
            noop.delay(n)
    if left := app.flush(60):
        raise SystemExit(f"{left} tasks were not acknowledged")
    figures = {"first": first, "last": time.time(), "cpu": cpu_seconds() - idle}
    sys.stdout.write(json.dumps(figures) + "\n")


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
