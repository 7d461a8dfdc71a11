"""What a worker counts. Children report through the parent."""

from __future__ import annotations

from functools import cache
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker.frames import Finished, Outcome

RUN_SECONDS_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600)
NAMESPACES_MAX = 200

_OUTCOMES = {
    number: name.removeprefix("TASK_OUTCOME_STATUS_").lower() for name, number in pb.TaskOutcomeStatus.items()
}
_RELEASES = {
    number: name.removeprefix("RELEASE_REASON_").lower() for name, number in pb.ReleaseReason.items()
}


class Metrics:
    """The worker's Prometheus metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.slots = Gauge("penstock_worker_slots", "Child processes by state.", ["state"], registry=registry)
        self.waiting = Gauge(
            "penstock_worker_waiting_tasks", "Claimed tasks that have not started.", registry=registry
        )
        self._run_seconds = Histogram(
            "penstock_worker_run_seconds",
            "Time in a child, from pick-up to outcome.",
            ["namespace"],
            buckets=RUN_SECONDS_BUCKETS,
            registry=registry,
        )
        self._outcomes = Counter(
            "penstock_worker_outcomes", "How executions ended.", ["outcome"], registry=registry
        )
        self._released = Counter(
            "penstock_worker_released_tasks", "Tasks given back unstarted.", ["reason"], registry=registry
        )
        self._reports = Counter(
            "penstock_worker_reports",
            "Outcomes and releases by the broker's answer.",
            ["answer"],
            registry=registry,
        )
        self._report_failures = Counter(
            "penstock_worker_report_failures",
            "Reports that were not answered, by code; sent again.",
            ["code"],
            registry=registry,
        )
        self._fetches = Counter(
            "penstock_worker_fetches", "GetTasks calls.", ["broker", "result"], registry=registry
        )
        self._revoked = Counter(
            "penstock_worker_revoked_claims",
            "Claims the broker took back, by reason.",
            ["reason"],
            registry=registry,
        )
        self._child_restarts = Counter(
            "penstock_worker_child_restarts",
            "Child processes replaced, by cause.",
            ["cause"],
            registry=registry,
        )
        self._namespaces: dict[str, Histogram] = {}
        # Looking a label up costs more than counting, and both are done for every task.
        self._outcome = cache(self._outcomes.labels)
        self._report = cache(self._reports.labels)

    def ended(self, finished: Finished) -> None:
        """A child finished a task."""
        namespace = finished.namespace
        histogram = self._namespaces.get(namespace)
        if histogram is None:
            label = namespace if len(self._namespaces) < NAMESPACES_MAX else "other"
            histogram = self._run_seconds.labels(label)
            if label == namespace:
                self._namespaces[namespace] = histogram
        histogram.observe(finished.run_seconds)

    def settled(self, outcome: Outcome) -> None:
        if outcome.release_reason:
            self._released.labels(_RELEASES[outcome.release_reason]).inc()
        else:
            self._outcome(_OUTCOMES[outcome.status]).inc()

    def reported(self, answer: str) -> None:
        self._report(answer).inc()

    def report_failed(self, code: str, reports: int) -> None:
        self._report_failures.labels(code).inc(reports)

    def fetched(self, broker: str, result: str) -> None:
        self._fetches.labels(broker, result).inc()

    def revoked(self, reason: str) -> None:
        self._revoked.labels(reason).inc()

    def child_restarted(self, cause: str) -> None:
        self._child_restarts.labels(cause).inc()

    def serve(self, address: str, port: int) -> WSGIServer:
        """Serve `/metrics` from a thread.

        Raises: OSError when the port is taken.
        """
        server, _thread = start_http_server(port, address, registry=self.registry)
        return server
