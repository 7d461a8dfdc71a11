"""The broker's metrics: one typed list. Names are ``penstock_`` + what + unit; labels are bounded."""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar
from wsgiref.simple_server import WSGIServer

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock_broker import __version__
from penstock_broker.errors import FatalError
from penstock_broker.logs import escaped

LABEL_CHARACTERS_MAX = 100
CHILDREN_MAX = 10_000
# Where label values go that come after the first CHILDREN_MAX.
OTHER = "other"

LATENCY_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0),
)
RPC_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
COMMIT_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ROW_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)

INTAKE_STATES = ("open", "throttled", "paused")

M = TypeVar("M", Counter, Gauge, Histogram)


def label(text: str) -> str:
    """A label value that is short and prints on one line."""
    return escaped(text[:LABEL_CHARACTERS_MAX])[:LABEL_CHARACTERS_MAX]


class Family(Generic[M]):
    """A metric with labels, of which only the first CHILDREN_MAX combinations get a series of their own."""

    def __init__(self, metric: M, width: int) -> None:
        self._metric: M = metric
        self._children: dict[tuple[str, ...], M] = {}
        self._others = (OTHER,) * width

    def labels(self, *values: str) -> M:
        """The series of these label values. Cheap; may be kept and used from then on."""
        child = self._children.get(values)
        if child is None:
            full = len(self._children) >= CHILDREN_MAX
            child = self._metric.labels(*(self._others if full else map(label, values)))
            if not full:
                self._children[values] = child
        return child

    def replace(self: Family[Gauge], series: Mapping[tuple[str, ...], float]) -> None:
        """Sets a gauge to exactly ``series``: what is not in it is gone, what looks the same is added up."""
        shown: dict[tuple[str, ...], float] = {}
        for values, value in series.items():
            labels = tuple(map(label, values))
            shown[labels] = shown.get(labels, 0.0) + value
        for labels in self._children.keys() - shown.keys():
            self._metric.remove(*labels)
            del self._children[labels]
        for labels, value in itertools.islice(shown.items(), CHILDREN_MAX):
            self.labels(*labels).set(value)


class Distribution(Collector):
    """A histogram that takes a whole batch at a time.

    prometheus_client's own takes 0.7 µs for each value, this 0.08: it is filled for every task. Filled by
    one thread, read by any.
    """

    def __init__(self, registry: CollectorRegistry, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe_all(self, values: Iterable[float]) -> None:
        bounds, counts, total = self._bounds, self._counts, 0.0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self._sum += total

    def collect(self) -> Iterable[Metric]:
        at_most = itertools.accumulate(list(self._counts))
        bounds = [*map(str, self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric([], buckets=list(zip(bounds, at_most, strict=True)), sum_value=self._sum)
        yield family

    def describe(self) -> Iterable[Metric]:
        yield HistogramMetricFamily(self._name, self._text)


class _BeforeScrape(Collector):
    """Registered first, so that what it calls can set gauges for the scrape under way."""

    def __init__(self) -> None:
        self.refreshers: list[Callable[[], None]] = []
        self._one_scrape = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        with self._one_scrape:
            for refresh in self.refreshers:
                self._call(refresh)
        return ()

    @staticmethod
    def _call(refresh: Callable[[], None]) -> None:
        try:
            refresh()
        except Exception:  # noqa: BLE001 - one gauge that cannot be read must not hide the others
            structlog.get_logger().exception("a metric could not be refreshed", refresh=repr(refresh))


class Metrics:
    """Every metric of one broker, in a registry of its own.

    Counters are incremented for a batch at a time. Gauges that need counting are best set by a
    function given to ``before_scrape``, which is called in the thread of the scrape.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._before_scrape = _BeforeScrape()
        self.registry.register(self._before_scrape)
        ProcessCollector(registry=self.registry)
        self._tasks()
        self._dispatch()
        self._intake()
        self._store()
        self._gauge("penstock_build_info", "Version of this broker; always 1.", "version").labels(
            __version__
        ).set(1)

    def _tasks(self) -> None:
        pair = ("application", "namespace")
        self.tasks = self._gauge("penstock_tasks", "Activations held, by state.", "state")
        self.pending = self._gauge("penstock_pending_tasks", "Activations that could run now.", *pair)
        self.oldest_pending = self._plain_gauge(
            "penstock_oldest_pending_seconds", "How long the first in the order of hand-out could have run."
        )
        self.unclaimable = self._gauge(
            "penstock_unclaimable_tasks", "Pending activations that no worker asks for.", *pair
        )
        self.added = self._counter("penstock_tasks_added", "Activations accepted.", *pair)
        self.restored = self._counter(
            "penstock_tasks_restored", "Activations taken over from a broker whose disk is gone.", *pair
        )
        self.finished = self._counter(
            "penstock_tasks_finished",
            "Activations gone, by the term of the books they ended in.",
            *pair,
            "outcome",
        )
        self.attempts = self._counter(
            "penstock_attempts", "Reports that were applied, by outcome.", "outcome"
        )
        self.deliveries_lost = self._plain_counter(
            "penstock_deliveries_lost", "Claims whose worker died, vanished or passed the deadline."
        )
        self.dead_letters = self._counter("penstock_dead_letters", "Dead letters, by reason.", "reason")
        self.dead_letters_resting = self._plain_gauge(
            "penstock_resting_dead_letters", "Dead letters kept in the store because Kafka did not take them."
        )
        self.books_difference = self._plain_gauge(
            "penstock_books_difference_tasks",
            "Activations that came in and are unaccounted for, summed up without their sign; must be 0.",
        )
        self.namespace_books_difference = self._gauge(
            "penstock_namespace_books_difference_tasks",
            "Activations accepted, minus ended, minus in flight, of each namespace; must be 0.",
            "application",
            "namespace",
        )
        self.paused = self._gauge(
            "penstock_paused_tasks",
            "Pending activations of namespaces that an operator has paused.",
            "application",
            "namespace",
        )

    def _dispatch(self) -> None:
        self.queue_latency = Distribution(
            self.registry,
            "penstock_queue_latency_seconds",
            "From when an activation could run to when it was claimed.",
            LATENCY_BUCKETS,
        )
        self.claims = self._counter("penstock_claims", "Requests for tasks, by hit or empty.", "result")
        self.claimed = self._plain_counter("penstock_claimed_tasks", "Activations handed out.")
        self.waiting = self._plain_gauge(
            "penstock_waiting_requests", "Requests for tasks that wait for work."
        )
        self.reports = self._counter(
            "penstock_reports",
            "Reports of outcomes, by answer: applied, duplicate, stale, unknown.",
            "answer",
        )
        self.rpc = self._histogram("penstock_rpc_seconds", "Time of a call.", RPC_BUCKETS, "method", "code")

    def _intake(self) -> None:
        self._intake_state = self._gauge(
            "penstock_intake_state", "1 for the state of the intake, and why.", "state", "reason"
        )
        self.intake("open")
        self.kafka_lag = self._gauge(
            "penstock_kafka_lag_messages", "Messages not read yet.", "topic", "partition"
        )
        self.kafka_commit_age = self._plain_gauge(
            "penstock_kafka_commit_age_seconds", "Since Kafka last acknowledged offsets."
        )
        self.kafka_partitions = self._plain_gauge("penstock_kafka_partitions", "Partitions assigned.")
        self.kafka_up = self._plain_gauge("penstock_kafka_up", "Whether Kafka can be reached.")
        self.duplicates = self._plain_counter(
            "penstock_duplicate_messages", "Messages taken before, recognised and dropped."
        )
        self.rejected = self._counter(
            "penstock_rejected_messages", "Messages that are no valid activation, by reason.", "reason"
        )
        self.forward_failures = self._counter(
            "penstock_forward_failures", "Messages that Kafka did not take; they are sent again.", "topic"
        )

        self.ledger_up = self._plain_gauge(
            "penstock_ledger_up", "Whether the loss of this broker's disk would lose no task."
        )
        self.ledger_age = self._plain_gauge(
            "penstock_ledger_age_seconds", "For how long a change of the store is not in the ledger."
        )
        self.unseen = self._plain_counter(
            "penstock_unseen_offsets",
            "Offsets that other brokers took, in which there was no time to look for ids that come again.",
        )
        self.unrestorable = self._plain_counter(
            "penstock_unrestorable_tasks", "Unfinished tasks of a lost disk that Kafka no longer held."
        )

    def _store(self) -> None:
        self.database_size = self._plain_gauge("penstock_database_bytes", "Size of the database.")
        self.wal_size = self._plain_gauge("penstock_wal_bytes", "Size of the write-ahead log.")
        self.quarantined = self._plain_gauge(
            "penstock_quarantined_tasks", "Tasks that were damaged on disk and are kept aside."
        )
        self.disk_errors = self._plain_counter(
            "penstock_disk_errors", "Times that the disk did not take a tick; it is tried again."
        )
        self.disk_free = self._plain_gauge("penstock_disk_free_bytes", "Free space where the database is.")
        self.commit_time = self._plain_histogram(
            "penstock_commit_seconds", "Time to make one tick durable.", COMMIT_BUCKETS
        )
        self.tick_rows = self._plain_histogram("penstock_tick_rows", "Rows written in one tick.", ROW_BUCKETS)

    def intake(self, state: str, reason: str = "") -> None:
        """Sets the state of the intake, one of INTAKE_STATES, and the limit or fault that is the reason."""
        if state not in INTAKE_STATES:
            raise ValueError(f"{state!r} is no state of the intake: {', '.join(INTAKE_STATES)}")
        self._intake_state.replace({(state, reason): 1.0})

    def before_scrape(self, refresh: Callable[[], None]) -> None:
        """``refresh`` is called as a scrape starts, in its thread, one at a time; it should read and set."""
        self._before_scrape.refreshers.append(refresh)

    def _counter(self, name: str, text: str, *labels: str) -> Family[Counter]:
        return Family(Counter(name, text, labels, registry=self.registry), len(labels))

    def _gauge(self, name: str, text: str, *labels: str) -> Family[Gauge]:
        return Family(Gauge(name, text, labels, registry=self.registry), len(labels))

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Family[Histogram]:
        return Family(Histogram(name, text, labels, buckets=buckets, registry=self.registry), len(labels))

    def _plain_counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)

    def _plain_gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def _plain_histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)


class Exposition:
    """Serves ``/metrics`` over HTTP in a thread of its own until closed."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def expose(metrics: Metrics, address: str, port: int, *, must: bool) -> Exposition | None:
    """Serves ``metrics`` on ``address:port``; None if the port is 0 (off).

    A port that cannot be listened on is a FatalError if somebody chose it (``must``); else it is
    logged, and None.
    """
    if port == 0:
        return None
    try:
        server, thread = start_http_server(port, address, metrics.registry)
    except OSError as error:
        problem = f"cannot serve metrics on {address}:{port}: {error.strerror or error}"
        if must:
            raise FatalError(
                problem, "set metrics_port (TASKBROKER_METRICS_PORT) to a free port, or to 0"
            ) from None
        structlog.get_logger().warning(
            f"{problem}; going on without. Set metrics_port to a free port, or to 0"
        )
        return None
    return Exposition(server, thread)
