"""All of ingest put together, for one broker."""

from __future__ import annotations

import asyncio

from penstock_broker.config import Settings
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.consumer import KafkaConsumer
from penstock_broker.ingest.direct import Direct
from penstock_broker.ingest.forwarder import Forwarder
from penstock_broker.ingest.intake import keep_orphans
from penstock_broker.ingest.publisher import Publisher
from penstock_broker.metrics import Metrics
from penstock_broker.store.inflight import Inflight
from penstock_protocol.v1 import admin_pb2


class Ingest:
    """``start``, ``failed`` and ``stop_intake`` before ``stop``, once each, on the event loop.

    ``consumer`` is None when activations come over gRPC only.
    """

    def __init__(self, settings: Settings, store: Inflight, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self.direct = Direct(store, Admission(AdmissionLimits.of(settings)))
        self.consumer: KafkaConsumer | None = None
        self.forwarder: Forwarder | None = None
        # What the counters were told.
        self._told: dict[str, int] = {}
        metrics.before_scrape(self._refresh)

    async def start(self) -> None:
        """Raises FatalError when the consumed topic does not exist and may not be created."""
        settings, store = self._settings, self._store
        failures = self._metrics.forward_failures.labels(settings.kafka_deadletter_topic)
        if settings.ingest == "kafka":
            keep_orphans(store, settings.kafka_topic)
            self.consumer = KafkaConsumer(store, settings)
            await self.consumer.start()
            publisher = Publisher(settings, settings.kafka_deadletter_topic)
        else:
            keep_orphans(store, None)
            publisher = None
        self.forwarder = Forwarder(store, publisher, failures.inc)
        self.forwarder.start()

    async def failed(self) -> None:
        """Ends when a part of ingest has, with its error; a broker without it must not go on."""
        assert self.forwarder is not None
        parts = [asyncio.create_task(self.forwarder.failed())]
        if self.consumer is not None:
            parts.append(asyncio.create_task(self.consumer.run()))
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
        for part in done:
            part.result()

    async def stop_intake(self) -> None:
        """Take nothing more from Kafka, and commit what is durable."""
        if self.consumer is not None:
            await self.consumer.stop()

    async def stop(self) -> None:
        """Let what is on its way out arrive, for a moment."""
        if self.forwarder is not None:
            await self.forwarder.stop()

    def lag(self) -> int | None:
        """Messages of its partitions that this broker has still to read; None while that is not known."""
        if self.consumer is None or not self.consumer.lags:
            return None
        return sum(self.consumer.lags.values())

    def describe(self, status: admin_pb2.GetStatusResponse) -> None:
        """What an operator is told of Kafka, and of dead letters that do not leave."""
        if self.forwarder is not None:
            status.forward_alarm = self.forwarder.alarm
        if (consumer := self.consumer) is None:
            return
        kafka, settings = status.kafka, self._settings
        kafka.address, kafka.topic = settings.kafka_cluster, settings.kafka_topic
        kafka.consumer_group = settings.kafka_consumer_group
        kafka.deadletter_topic = settings.kafka_deadletter_topic
        kafka.connected = consumer.connected
        kafka.commit_age_seconds = consumer.last_commit_age_seconds()
        for partition in sorted(consumer.assignment):
            kafka.partitions.add(partition=partition, lag=consumer.lags.get(partition))

    def _refresh(self) -> None:
        """In the thread of a scrape: reads only."""
        metrics, refused = self._metrics, self.direct.admission.refused.copy()
        if (consumer := self.consumer) is not None:
            refused += consumer.admission.refused
            metrics.duplicates.inc(self._since("replayed", consumer.replayed))
            metrics.kafka_up.set(consumer.connected)
            metrics.kafka_partitions.set(len(consumer.assignment))
            metrics.kafka_commit_age.set(consumer.last_commit_age_seconds())
            metrics.kafka_lag.replace(
                {(consumer.topic, str(partition)): lag for partition, lag in consumer.lags.items()}
            )
        for reason, count in refused.items():
            metrics.rejected.labels(reason).inc(self._since(reason, count))

    def _since(self, name: str, total: int) -> int:
        """How much a total has grown since it was last told."""
        grown = total - self._told.get(name, 0)
        self._told[name] = total
        return grown


def build_ingest(settings: Settings, store: Inflight, metrics: Metrics) -> Ingest:
    """Ingest for a broker with these settings."""
    return Ingest(settings, store, metrics)
