"""Metrics: their names, their bounds, and that a scrape says what was counted."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingest_helpers import running_store
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from penstock_broker.config import Settings
from penstock_broker.dispatch.waiting import Waiting
from penstock_broker.errors import FatalError
from penstock_broker.ingest.parts import Ingest
from penstock_broker.metrics import CHILDREN_MAX, LATENCY_BUCKETS, OTHER, Distribution, Metrics, expose, label
from penstock_broker.observe import Observer

UNITS = {
    "seconds",
    "bytes",
    "tasks",
    "letters",
    "messages",
    "requests",
    "rows",
    "partitions",
    "total",
    "state",
    "info",
}
BARE = {"penstock_tasks", "penstock_kafka_up", "penstock_ledger_up"}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


def test_names_have_the_prefix_and_a_unit_and_are_described(metrics: Metrics) -> None:
    ours = [family for family in metrics.registry.collect() if not family.name.startswith("process_")]
    assert len(ours) > 25
    for family in ours:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert re.fullmatch(r"penstock_[a-z_]+", name)
        assert name in BARE or name.rsplit("_", 1)[1] in UNITS, name
        assert family.documentation.endswith("."), name


def test_a_batch_is_counted_at_once(metrics: Metrics) -> None:
    metrics.finished.labels("shop", "payments", "done").inc(64)
    metrics.finished.labels("shop", "payments", "done").inc(1)
    assert (
        value(
            metrics, "penstock_tasks_finished_total", application="shop", namespace="payments", outcome="done"
        )
        == 65
    )
    assert metrics.finished.labels("a", "b", "c") is metrics.finished.labels("a", "b", "c")


def test_label_values_are_capped_and_the_rest_is_still_counted(metrics: Metrics) -> None:
    for number in range(CHILDREN_MAX + 5):
        metrics.added.labels("app", f"namespace-{number}").inc()
    text = generate_latest(metrics.registry).decode()
    assert text.count("\npenstock_tasks_added_total{") == CHILDREN_MAX + 1
    assert value(metrics, "penstock_tasks_added_total", application=OTHER, namespace=OTHER) == 5


@given(st.text())
def test_label_values_print_on_one_line_and_are_short(text: str) -> None:
    assert label(text).isprintable()
    assert len(label(text)) <= 10 * 100


def test_hostile_label_values_cannot_forge_a_line(metrics: Metrics) -> None:
    metrics.dead_letters.labels('x"} 1\npenstock_forged_total 99\n\x1b[2J').inc()
    text = generate_latest(metrics.registry).decode()
    assert "\npenstock_forged_total" not in text
    assert "\x1b" not in text


def test_a_gauge_can_be_replaced_as_a_whole(metrics: Metrics) -> None:
    metrics.pending.replace({("a", "x"): 1, ("a", "y"): 2})
    metrics.pending.replace({("a", "y"): 3})
    assert value(metrics, "penstock_pending_tasks", application="a", namespace="y") == 3
    assert value(metrics, "penstock_pending_tasks", application="a", namespace="x") is None


def test_the_intake_is_in_one_state(metrics: Metrics) -> None:
    assert value(metrics, "penstock_intake_state", state="open", reason="") == 1
    metrics.intake("throttled", "max_pending_count")
    assert value(metrics, "penstock_intake_state", state="throttled", reason="max_pending_count") == 1
    assert value(metrics, "penstock_intake_state", state="open", reason="") is None
    with pytest.raises(ValueError, match="is no state of the intake: open, throttled, paused"):
        metrics.intake("broken")


@given(st.lists(st.floats(min_value=0, max_value=10_000)))
def test_a_distribution_counts_every_value_in_its_bucket(values: list[float]) -> None:
    registry = CollectorRegistry()
    distribution = Distribution(registry, "x_seconds", "Text.", LATENCY_BUCKETS)
    distribution.observe_all(values[: len(values) // 2])
    distribution.observe_all(values[len(values) // 2 :])
    [family] = text_string_to_metric_families(generate_latest(registry).decode())
    counted = {s.labels["le"]: s.value for s in family.samples if s.name == "x_seconds_bucket"}
    assert counted.pop("+Inf") == len(values)
    assert counted == {str(bound): sum(v <= bound for v in values) for bound in LATENCY_BUCKETS}
    assert next(s.value for s in family.samples if s.name == "x_seconds_sum") == pytest.approx(sum(values))


def test_latency_is_measured_from_a_millisecond_to_an_hour() -> None:
    assert LATENCY_BUCKETS[0] == 0.001
    assert LATENCY_BUCKETS[-1] == 3600
    assert list(LATENCY_BUCKETS) == sorted(set(LATENCY_BUCKETS))


def test_gauges_are_refreshed_for_the_scrape_under_way(metrics: Metrics) -> None:
    def broken() -> None:
        raise RuntimeError("cannot read")

    metrics.before_scrape(broken)
    metrics.before_scrape(lambda: metrics.oldest_pending.set(4.5))
    assert value(metrics, "penstock_oldest_pending_seconds") == 4.5


def test_scrapes_do_not_refresh_at_the_same_time(metrics: Metrics) -> None:
    other = threading.Thread(target=generate_latest, args=(metrics.registry,))
    waited: list[bool] = []

    def refresh() -> None:
        if threading.current_thread() is other:
            return
        other.start()
        # Were it not held off, it would have ended long before.
        other.join(timeout=0.5)
        waited.append(other.is_alive())

    metrics.before_scrape(refresh)
    generate_latest(metrics.registry)
    other.join(timeout=30)
    assert waited == [True]
    assert not other.is_alive()


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def test_the_endpoint_answers_until_it_is_closed(metrics: Metrics) -> None:
    port = free_port()
    exposition = expose(metrics, "127.0.0.1", port, must=True)
    assert exposition is not None
    assert exposition.port == port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert "penstock_build_info{" in answer.read().decode()
    exposition.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)


def test_port_zero_is_off(metrics: Metrics) -> None:
    assert expose(metrics, "127.0.0.1", 0, must=True) is None


def test_a_port_in_use_is_an_error_only_if_somebody_chose_it(metrics: Metrics, taken: int) -> None:
    assert expose(metrics, "127.0.0.1", taken, must=False) is None
    with pytest.raises(FatalError, match=rf"127\.0\.0\.1:{taken}: Address already in use") as refused:
        expose(metrics, "127.0.0.1", taken, must=True)
    assert "TASKBROKER_METRICS_PORT" in refused.value.hint


def test_an_address_that_is_not_ours_is_an_error(metrics: Metrics) -> None:
    with pytest.raises(FatalError, match=r"cannot serve metrics on 192\.0\.2\.1:"):
        expose(metrics, "192.0.2.1", free_port(), must=True)


async def test_what_was_lost_is_counted_once(metrics: Metrics, tmp_path: Path) -> None:
    def told() -> list[float | None]:
        names = ("penstock_deliveries_lost_total", "penstock_unrestorable_tasks_total")
        return [value(metrics, name) for name in names]

    async with running_store(tmp_path / "store.sqlite") as store:
        Observer(metrics, store, Waiting(store, 1 << 20))
        ingest = Ingest(Settings(db_path=tmp_path / "store.sqlite"), store, metrics)
        ledger: Any = SimpleNamespace(is_open=True, age_seconds=lambda: 0.0, unrestorable=3)
        ingest.ledger, store.memory.tally.lost = ledger, 2
        for _ in range(2):
            assert await asyncio.to_thread(told) == [2, 3]
        ledger.unrestorable, store.memory.tally.lost = 4, 7
        assert await asyncio.to_thread(told) == [7, 4]
