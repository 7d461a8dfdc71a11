"""Why a task is not running, and when it will: what the store knows, in words."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from penstock_broker.domain.activation import NO_SOURCE, Activation, Route, Status, route_of
from penstock_broker.domain.lifecycle import OUTCOMES, Event
from penstock_broker.store.finished import outcome_of
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.refusals import REFUSED_MS
from penstock_broker.store.unclaimable import UNASKED_MS
from penstock_protocol.v1 import admin_pb2

_OUTCOMES = {number: event.value for event, number in OUTCOMES.items()} | {
    OUTCOMES[Event.CANCEL]: "cancelled by an operator"
}
# After any other, something else became of the task.
_ENDS = frozenset(_OUTCOMES[OUTCOMES[event]] for event in (Event.COMPLETE, Event.IGNORE, Event.CANCEL))


def when(at: int) -> str:
    """Epoch ms as a person reads it, in UTC."""
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def span(ms: int) -> str:
    """A duration as a person says it."""
    seconds = max(0, ms) / 1000
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


class Explanation:
    """Findings about one task, the most important first."""

    def __init__(self, store: Inflight, answer: admin_pb2.ExplainTaskResponse) -> None:
        self._store = store
        self._answer = answer
        self._now = store.clock.wall_ms()

    def _say(self, code: str, text: str) -> None:
        self._answer.findings.add(code=code, text=text)

    def held(self, row: Activation, recorded: bool = False) -> None:
        """A row of the store. One that is claimed is memory's own; ``recorded``: no worker has it yet."""
        self._answer.known = True
        self._answer.state = row.status.name.lower()
        if recorded:
            self._say(
                "recorded",
                "it starts at most once: that it is to start is recorded first, and the next worker that asks"
                " for its namespace then has it",
            )
        elif row.status is Status.PROCESSING:
            self._processing(row)
        elif row.status is Status.DELAYED:
            self._paused(row)
            self._delayed(row)
        elif row.status is Status.PENDING:
            self._paused(row)
            self._pending(row)
        else:
            self._forwarding(row)
        if row.expires_at is not None and row.status in (Status.PENDING, Status.DELAYED):
            self._say("expires", f"it expires at {when(row.expires_at)}: it will not start after that")

    def _processing(self, row: Activation) -> None:
        mono = self._store.clock.mono_ms()
        whom = f"worker {row.worker}" if row.worker else "a worker"
        attempt = f"start {row.attempts + 1} of at most {max(1, row.max_attempts)}"
        if row.started:
            since = mono - row.started
            left = row.deadline_ms - since
            end = f"its deadline is in {span(left)}" if left > 0 else "its deadline has passed"
            text = f"it runs on {whom} since {when(self._now - since)} ({span(since)}), {attempt}; {end}"
            self._say("running", text)
        else:
            self._say("claimed", f"{whom} has fetched it and has not said yet that it started it, {attempt}")
        within = span(row.lease_until - mono)
        if row.tokenless:
            self._say("lease", f"its client (taskbroker v1) has to report its outcome within {within}")
        else:
            self._say("lease", f"its worker has to say within {within} that it still has it")

    def _paused(self, row: Activation) -> None:
        queue = self._store.memory.index.pairs[row.pair]
        if queue.paused_at is not None:
            self._say(
                "paused",
                f"its namespace is paused since {when(queue.paused_at)}; next: penstock namespaces resume"
                f" {queue.application}/{queue.namespace}",
            )

    def _delayed(self, row: Activation) -> None:
        until = f"{when(row.ready_at)}, in {span(row.ready_at - self._now)}"
        self._answer.runs_at = row.ready_at
        if row.given_back_at is not None:
            self._given_back(row, f"it is offered again at {until}")
        elif row.attempts or row.lost:
            start = f"start {row.attempts + 1} of at most {row.max_attempts}"
            self._say("back_off", f"its last start failed ({_error(row)}); {start} is at {until}")
        else:
            self._say("delayed", f"its producer delayed it until {until}")
        self._say("run_now", f"to start it now: penstock tasks retry {row.id}")

    def _given_back(self, row: Activation, then: str) -> None:
        dead_at = (row.given_back_at or 0) + self._store.limits.lifecycle.unknown_task_ms
        self._say(
            "given_back",
            f"a worker gave it back ({_error(row)}); {then}, and becomes a dead letter if none can run it"
            f" until {when(dead_at)}",
        )

    def _pending(self, row: Activation) -> None:
        store = self._store
        queue = store.memory.index.pairs[row.pair]
        if not store.memory.partitions.may_start(row):
            self._may_not_start(row)
        if not store.claiming:
            self._say("draining", "this broker is drained: it starts nothing more, and hands over what waits")
        unasked = store.clock.mono_ms() - store.memory.index.asked_at(queue)
        if unasked >= UNASKED_MS:
            self._say(
                "unasked",
                f"no worker has asked for {queue.application}/{queue.namespace} for {span(unasked)}, or since"
                " the broker started: is one running that serves it? next: penstock workers ls",
            )
        if row.given_back_at is not None:
            self._given_back(row, f"it is offered to others, and to that one after {span(REFUSED_MS)}")
        if self._answer.ahead:
            more = "at least " if self._answer.ahead >= self._answer.ahead_max else ""
            self._say("ahead", f"{more}{self._answer.ahead} tasks of its namespace are before it")
        elif not self._answer.findings:
            self._say("next", "it is the next of its namespace and starts when a worker has a free slot")
        if row.attempts or row.lost:
            self._say("failed_before", f"it has failed before ({_error(row)})")

    def _may_not_start(self, row: Activation) -> None:
        if row.source == NO_SOURCE:
            self._say(
                "unrecorded",
                "it starts at most once, so it waits until the ledger (kafka_ledger_topic) has been read:"
                " before that, nothing tells this database from an old copy, which may not know that it has"
                " started",
            )
            return
        source = self._store.memory.partitions[row.source]
        where = f"{source.topic}/{source.partition} at {row.offset}"
        if row.offset < source.covered:
            self._say(
                "unrecorded",
                "it starts at most once, so it waits until the ledger (kafka_ledger_topic) can be written",
            )
        elif source.disputed:
            self._say(
                "disputed",
                f"it came from {where}, and whether another broker has taken over that partition is not known"
                " until Kafka answers",
            )
        else:
            self._say(
                "cover",
                f"it starts at most once, so it waits until Kafka has acknowledged the offset commit that"
                f" passes {where}",
            )

    def _forwarding(self, row: Activation) -> None:
        route = route_of(row.reason)
        if route is Route.DEAD_LETTER:
            where = f"the dead letters: {row.reason} ({_error(row)})"
        elif route is Route.RETRY:
            where = f"the retry topic (kafka_retry_topic): its last start failed ({_error(row)})"
        else:
            where = f"another broker: {row.reason}"
        self._say("forwarding", f"it is on its way to {where}")
        partitions = self._store.memory.partitions
        if row.source != NO_SOURCE and not partitions[row.source].is_covered(row.offset, row.seq):
            self._say("cover", "it leaves once Kafka has acknowledged the offset commit that passes it")

    # -- not in the store

    def finished(self, id: str, id_hash: int, last: int) -> None:
        """An id of the de-duplication window, with its last claim and outcome, packed."""
        self._answer.known = True
        self._answer.state = "finished"
        outcome = _OUTCOMES.get(outcome_of(last))
        within = span(self._store.limits.dedup_window_ms)
        if outcome is None:
            text = (
                "it left without a report: expired, cancelled while it waited, discarded, or sent on through"
                " Kafka, where it may still wait (overflow of its namespace, retry topic, another broker)"
            )
        else:
            text = f"how its last start ended: {outcome}"
        if outcome not in _ENDS:
            text += f"; if it is a dead letter: penstock dlq show {id}"
            if outcome is not None:
                text += "; if it is none, it was discarded, sent on, or cancelled or expired while it waited"
        self._say("finished", f"it has left this broker within the last {within}; {text}")
        if self._store.is_held(id_hash):
            self._say(
                "cover", "its worker is answered once Kafka has acknowledged the offset that this depends on"
            )

    def dead(self, id: str, reason: str, at: int) -> None:
        """A dead letter that rests in the store."""
        self._answer.known = True
        self._answer.state = "dead letter"
        self._say(
            "dead_letter", f"it is a dead letter since {when(at)}: {reason}; next: penstock dlq show {id}"
        )

    def unknown(self, lag: int | None) -> None:
        """No trace of the id."""
        self._answer.state = "unknown"
        window = span(self._store.limits.dedup_window_ms)
        self._say("unknown", f"this broker has no such task, and had none within the last {window}")
        if lag:
            self._say("lag", f"{lag} messages of its partitions are still to be read from Kafka")
        self._say(
            "elsewhere",
            "it may never have been sent, be held by another broker of the pool, have finished longer ago, or"
            " be a dead letter on Kafka (penstock dlq show ID)",
        )


def _error(row: Activation) -> str:
    """The last error, on one line."""
    error = json.loads(row.error) if row.error else {}
    text = f"{error.get('type', '')}: {error.get('message', '')}".strip(": ").split("\n")[0][:200]
    return text or "no error was reported"
