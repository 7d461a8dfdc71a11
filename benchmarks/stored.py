"""Brokers that hold many rows: filled through Kafka by a broker as it is shipped, and stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fill import fill
from benchmarks.harness import Bench
from benchmarks.processes import broker, kafka_settings, new_topic, wait_until

FILL_SECONDS_MAX = 600.0


@dataclass(frozen=True)
class Stored:
    """The folder and the settings of a broker that can be started again, and what filling it was like."""

    folder: Path
    topic: str
    settings: dict[str, str]
    rows: int
    rss_mb: float
    rows_per_second: float


def stored(bench: Bench, rows: int, *, body: int = 300, application: str = "bench") -> Stored:
    """Made once in a session for each shape. Who works on it leaves as many rows as there were."""
    name = f"stored-{rows}-{body}-{application}"
    found = bench.keep(name, lambda: make(bench, bench.folder / name, rows, body, application))
    assert isinstance(found, Stored)
    return found


def make(bench: Bench, folder: Path, rows: int, body: int, application: str) -> Stored:
    topic = new_topic(bench.kafka, 4)
    # The default, a million rows, would pause the intake just when the measurement begins.
    settings = {**kafka_settings(bench.kafka, topic), "MAX_PENDING_COUNT": "3000000"}
    fill(bench.kafka, topic, rows, body, application)
    with broker(folder, settings) as server:
        started = time.monotonic()
        wait_until(
            f"{rows} rows are stored", lambda: server.count("penstock_tasks") >= rows, FILL_SECONDS_MAX
        )
        seconds = time.monotonic() - started
        return Stored(folder, topic, settings, rows, server.process.memory_info().rss / 1e6, rows / seconds)
