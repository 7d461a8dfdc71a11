"""``penstock status``: is it healthy, how far behind, drained when?"""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from penstock_client.cli.brokers import Broker, Brokers
from penstock_client.cli.failures import WRONG, Failure
from penstock_client.cli.options import DEFAULT_BROKERS, BrokersOption, OutputOption
from penstock_client.cli.output import Output, plain, say, show_facts, show_json, size, span
from penstock_protocol.v1 import admin_pb2 as pb

# Why it is paused, and what to do.
_INTAKE = {
    "disk": "the disk is nearly full, or fails; free space, and it opens by itself",
    "rows": "max_pending_count is reached; it opens as tasks end",
    "bytes": "pending_bytes_max is reached; it opens as tasks end",
    "drain": "the broker is drained, and goes; next: penstock-broker drain says how far it is",
}


def status(
    rpc_host_list: BrokersOption = DEFAULT_BROKERS,
    output: OutputOption = Output.TABLE,
    sample: Annotated[
        float,
        typer.Option(min=0, max=60, help="Seconds between two readings for the rates; 0: none."),
    ] = 1.0,
) -> None:
    """Show whether the brokers are healthy, how far behind they are, and when they will be drained.

    Exits with 1 if one is not healthy or its books do not balance, with 3 if one does not answer.

    Example: penstock status --rpc-host-list broker-0:50051,broker-1:50051 -o json
    """
    with Brokers(rpc_host_list) as brokers:
        first = _read(brokers)
        if sample:
            time.sleep(sample)
        second = _read(brokers) if sample else first
        shown = []
        for broker, (at, now) in second.items():
            before_at, before = first.get(broker, (at, now))
            shown.append((broker, now, *_rates(before, now, at - before_at)))
        if output is Output.JSON:
            show_json([_json(*entry) for entry in shown])
        else:
            for entry in shown:
                _show(*entry)
        brokers.complete()
        wrong = [broker.address for broker, now, *_ in shown if not now.healthy or now.books_difference]
        if wrong:
            raise Failure(f"not healthy: {', '.join(wrong)}", code=WRONG)


def _read(brokers: Brokers) -> dict[Broker, tuple[float, pb.GetStatusResponse]]:
    answers = brokers.each("GetStatus", pb.GetStatusRequest(), pb.GetStatusResponse)
    return {broker: (time.monotonic(), answer) for broker, answer in answers}


def _rates(
    before: pb.GetStatusResponse, now: pb.GetStatusResponse, seconds: float
) -> tuple[float | None, float | None, float | None]:
    """Tasks added and finished a second, and seconds until all that need not wait for their time are done;
    None: not known, or never."""
    if seconds <= 0 or before.store_id != now.store_id:
        return None, None, None
    added, ended = (now.accepted - before.accepted) / seconds, (now.ended - before.ended) / seconds
    backlog = sum(count.tasks for count in now.states if count.state != "delayed")
    if not backlog:
        return added, ended, 0.0
    return added, ended, backlog / (ended - added) if ended > added else None


def _json(
    broker: Broker,
    now: pb.GetStatusResponse,
    added: float | None,
    ended: float | None,
    drained: float | None,
) -> dict[str, Any]:
    values = plain(now)
    values["states"] = {count.state: count.tasks for count in now.states}
    return {
        "address": broker.address,
        **values,
        "added_per_second": added,
        "finished_per_second": ended,
        "drained_in_seconds": drained,
        "attention": _attention(now),
    }


def _show(
    broker: Broker,
    now: pb.GetStatusResponse,
    added: float | None,
    ended: float | None,
    drained: float | None,
) -> None:
    health = "healthy" if now.healthy else "NOT HEALTHY"
    say(f"{now.broker_id} at {broker.address}: {health}, {now.version}, up {span(now.uptime_seconds)}")
    states = ", ".join(f"{count.tasks:,} {count.state}" for count in now.states)
    facts: list[tuple[str, object]] = [
        ("  tasks", states),
        ("  room", f"{now.rows:,} of {now.rows_max:,} tasks, {size(now.bytes)} of {size(now.bytes_max)}"),
        ("  oldest", f"pending for {span(now.oldest_pending_seconds)}"),
    ]
    if added is not None and ended is not None:
        when = f"drained in {span(drained)}" if drained else "not draining" if drained is None else "drained"
        facts.append(("  rates", f"{added:,.0f}/s added, {ended:,.0f}/s finished: {when}"))
    facts.append(("  intake", now.intake_state + (f": {now.intake_reason}" if now.intake_reason else "")))
    if now.HasField("kafka"):
        facts.append(("  kafka", _kafka(now.kafka)))
    facts += [
        ("  workers", f"{now.workers} seen lately, {now.waiting_requests} requests wait for work"),
        ("  books", "they balance" if not now.books_difference else f"WRONG BY {now.books_difference}"),
        ("  database", f"{size(now.database_bytes)}, its log {size(now.wal_bytes)}"),
        ("  disk", f"{size(now.disk_free_bytes)} free"),
    ]
    show_facts(facts)
    for line in _attention(now):
        say(f"  ! {line}")


def _kafka(kafka: pb.KafkaStatus) -> str:
    if not kafka.connected:
        return f"{kafka.topic} at {kafka.address}: NOT CONNECTED"
    lags = [partition.lag for partition in kafka.partitions if partition.HasField("lag")]
    lag = f"{sum(lags):,} messages behind" if lags else "lag not known yet"
    return f"{kafka.topic} at {kafka.address}: {len(kafka.partitions)} partitions, {lag}"


def _attention(now: pb.GetStatusResponse) -> list[str]:
    """What somebody should look at."""
    lines = []
    if now.unclaimable:
        lines.append(
            f"{now.unclaimable:,} pending tasks that no worker asks for; next: penstock namespaces ls"
        )
    if now.paused_namespaces:
        lines.append(f"{now.paused_namespaces} namespaces are paused; next: penstock namespaces ls")
    if now.forward_alarm:
        lines.append(f"what must leave for Kafka does not: {now.forward_alarm}")
    if now.dead_letters_resting:
        lines.append(f"{now.dead_letters_resting:,} dead letters rest in the store; next: penstock dlq ls")
    if now.intake_state != "open":
        why = _INTAKE.get(now.intake_reason, f"the limit {now.intake_reason} is reached")
        lines.append(f"the intake is {now.intake_state}: {why}")
    if now.HasField("kafka") and not now.kafka.connected:
        lines.append("Kafka cannot be reached; what is stored is served on")
    return lines
