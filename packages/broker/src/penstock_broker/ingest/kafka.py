"""How the Kafka clients are configured, and what their errors mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import KafkaError

from penstock_broker.config import Settings

# Messages fetched ahead, in KiB, over all partitions.
QUEUED_KIB_MAX = 16 * 1024
STATISTICS_MS = 2000
# A member of a group hears from Kafka at every heartbeat.
SILENT_US = 5_000_000
# So many statistics in a row.
LOST_AFTER = 3
RESTART = "restart the broker; nothing that is stored is lost"

Config = dict[str, object]


def _common(settings: Settings, on_error: Callable[[KafkaError], None]) -> Config:
    return {
        "bootstrap.servers": settings.kafka_cluster,
        "client.id": settings.broker_id,
        "error_cb": on_error,
        # librdkafka repeats itself on stderr while a cluster is away; ``on_error`` says it once.
        "log_level": 2,
        "reconnect.backoff.max.ms": 2000,
        "topic.metadata.refresh.interval.ms": 30_000,
        "socket.keepalive.enable": True,
    }


def consumer_config(
    settings: Settings, on_error: Callable[[KafkaError], None], on_commit: object, on_statistics: object
) -> Config:
    session_ms = int(settings.kafka_session_timeout_seconds * 1000)
    return _common(settings, on_error) | {
        "group.id": settings.kafka_consumer_group,
        # Static membership: a restart within the session timeout moves no partition.
        "group.instance.id": settings.broker_id,
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": session_ms,
        "heartbeat.interval.ms": min(3000, session_ms // 3),
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # Where to start is decided here; the client reports an offset outside the log.
        "auto.offset.reset": "error",
        "queued.max.messages.kbytes": QUEUED_KIB_MAX,
        "fetch.queue.backoff.ms": 10,
        "on_commit": on_commit,
        **statistics_config(on_statistics),
    }


def statistics_config(on_statistics: object) -> Config:
    return {"statistics.interval.ms": STATISTICS_MS, "stats_cb": on_statistics}


class Connections:
    """What the statistics of one client say of its connections."""

    def __init__(self) -> None:
        self.up = False
        # Kafka has said nothing for a while, though there may be connections.
        self.silent = False
        # It knows no server to connect to and will learn of none: only another client can go on. A server
        # that stood still names no server of its cluster for a moment, not even itself, and the client
        # forgets all it knew (librdkafka 2.13 and later; its issue 5301).
        self.lost = False
        self._without = 0

    def look(self, statistics: Mapping[str, Any]) -> None:
        """``statistics``: what librdkafka tells, as its STATISTICS.md describes it."""
        brokers = list(statistics["brokers"].values())
        connected = [b for b in brokers if b["state"] == "UP"]
        self.up = any(b["nodeid"] >= 0 for b in connected)
        self.silent = not any(0 <= b["rxidle"] < SILENT_US for b in connected)
        # One from bootstrap.servers is tried again and again, and so is one that is only away.
        servers = [b for b in brokers if b["source"] in ("configured", "learned")]
        knows_none = all(b["source"] == "learned" and b["state"] == "INIT" for b in servers)
        # For a moment it can look so as well while one after the other is tried.
        self._without = self._without + 1 if knows_none else 0
        self.lost = self._without >= LOST_AFTER


def producer_config(
    settings: Settings, on_error: Callable[[KafkaError], None], on_statistics: object, delivery_ms_max: int
) -> Config:
    return _common(settings, on_error) | {
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": 5,
        # What Kafka refuses as too large is Kafka's to say.
        "message.max.bytes": min(settings.message_bytes_max + 1024 * 1024, 1_000_000_000),
        "queue.buffering.max.kbytes": 64 * 1024,
        "delivery.timeout.ms": delivery_ms_max,
        **statistics_config(on_statistics),
    }


def admin_config(settings: Settings) -> dict[str, str | int | float | bool]:
    return {"bootstrap.servers": settings.kafka_cluster, "client.id": settings.broker_id, "log_level": 2}


def ledger_producer_config(settings: Settings, transactional_id: str) -> Config:
    return {
        "bootstrap.servers": settings.kafka_cluster,
        "client.id": settings.broker_id,
        "log_level": 2,
        "transactional.id": transactional_id,
        # Until then a broker that vanished in the middle of a write keeps others from reading.
        "transaction.timeout.ms": 10_000,
        "message.timeout.ms": 10_000,
        "linger.ms": 0,
        "compression.type": "lz4",
        "message.max.bytes": 16 * 1024 * 1024,
        "socket.keepalive.enable": True,
    }


def reader_config(settings: Settings, outside: str, topic: str = "") -> Config:
    """A consumer that is told what to read and joins no group. ``outside``: auto.offset.reset;
    ``topic``: of which the offsets are asked for that its group has committed."""
    return {
        "bootstrap.servers": settings.kafka_cluster,
        "client.id": settings.broker_id,
        "log_level": 2,
        # Its offsets are looked up, never committed.
        "group.id": settings.group_of(topic),
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "enable.partition.eof": True,
        "isolation.level": "read_committed",
        # The end of what is read is told at once.
        "fetch.wait.max.ms": 20,
        "auto.offset.reset": outside,
        "queued.max.messages.kbytes": QUEUED_KIB_MAX,
    }
