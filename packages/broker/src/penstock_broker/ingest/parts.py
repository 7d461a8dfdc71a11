"""All of ingest put together, for one broker."""

from __future__ import annotations

import asyncio
from functools import partial

from penstock_broker.config import Settings
from penstock_broker.domain.activation import Activation, Route
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.consumer import KafkaConsumer
from penstock_broker.ingest.dead_letters import Letter, letter
from penstock_broker.ingest.direct import Direct
from penstock_broker.ingest.drain import Drain, DrainReport
from penstock_broker.ingest.forwarder import Compose, Forwarder
from penstock_broker.ingest.intake import keep_orphans
from penstock_broker.ingest.ledger import Ledger
from penstock_broker.ingest.ledger_adopt import AdoptError, AdoptReport, adopt
from penstock_broker.ingest.overflow import Overflow
from penstock_broker.ingest.publisher import Publisher
from penstock_broker.ingest.sent_on import sent_on
from penstock_broker.metrics import Metrics
from penstock_broker.store.inflight import Inflight
from penstock_protocol.v1 import admin_pb2


class Ways:
    """Where rows that must leave go, and as what."""

    def __init__(self, settings: Settings, store: Inflight) -> None:
        self._settings = settings
        self._store = store

    def all(self) -> dict[Route, Compose]:
        ways: dict[Route, Compose] = {
            Route.DEAD_LETTER: self.dead_letter,
            Route.HAND_OVER: self.hand_over,
            Route.OVERFLOW: self.overflow,
        }
        if self._settings.kafka_retry_topic is not None:
            ways[Route.RETRY] = partial(self.retry, self._settings.kafka_retry_topic)
        return ways

    def dead_letter(self, row: Activation, trimmed: bool) -> Letter:
        source = self._store.memory.partitions.get(row.source)
        return letter(row, source, self._settings.kafka_deadletter_topic, trimmed)

    def hand_over(self, row: Activation, trimmed: bool) -> Letter:
        """To the topic it came from; what came over gRPC, or from one that is no longer consumed, to ours."""
        settings, source = self._settings, self._store.memory.partitions.get(row.source)
        overflow = source is not None and source.topic == settings.kafka_overflow_topic
        topic = settings.kafka_overflow_topic if overflow else settings.kafka_topic
        return sent_on(row, topic, row.id, settings.broker_id)

    def overflow(self, row: Activation, trimmed: bool) -> Letter:
        key = f"{row.application}/{row.namespace}"
        return sent_on(row, self._settings.kafka_overflow_topic, key, self._settings.broker_id)

    def retry(self, topic: str, row: Activation, trimmed: bool) -> Letter:
        return sent_on(row, topic, row.id, self._settings.broker_id)


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
        self.ledger: Ledger | None = None
        self._adopting = asyncio.Lock()
        self.overflow: KafkaConsumer | None = None
        self.forwarders: list[Forwarder] = []
        self._publisher: Publisher | None = None
        self._drain: Drain | None = None
        self._draining = asyncio.Lock()
        # What the counters were told.
        self._told: dict[str, int] = {}
        metrics.before_scrape(self._refresh)

    async def start(self) -> None:
        """Raises FatalError when the consumed topic does not exist, was never read and may not be created."""
        settings, store = self._settings, self._store
        if settings.ingest == "kafka":
            keep_orphans(store, settings.kafka_topic, settings.kafka_overflow_topic)
            self.ledger = Ledger(store, settings)
            self.ledger.start()
            self.consumer = KafkaConsumer(store, settings, self.ledger)
            await self.consumer.start()
            self.overflow = Overflow(store, settings, self.ledger).consumer
            await self.overflow.start(seconds=0)
            self._publisher = Publisher(settings)
        else:
            keep_orphans(store)
        self._forward()

    def _forward(self) -> None:
        """Let leave what must."""
        ways = Ways(self._settings, self._store)
        with_kafka = ways.all() if self._publisher is not None else {}
        for route in Route:
            publisher = self._publisher if route in with_kafka else None
            compose = with_kafka.get(route, ways.dead_letter)
            self.forwarders.append(Forwarder(self._store, route, publisher, compose, self._count_failures))
            self.forwarders[-1].start()

    def _count_failures(self, topic: str, count: int) -> None:
        self._metrics.forward_failures.labels(topic).inc(count)

    def _consumers(self) -> list[KafkaConsumer]:
        return [consumer for consumer in (self.consumer, self.overflow) if consumer is not None]

    async def adopt(self, broker_id: str, force: bool) -> AdoptReport:
        """Take over what another broker of the pool, which never returns, has left. Raises AdoptError."""
        if self.ledger is None or self.consumer is None:
            raise AdoptError("this broker consumes no topic, so it has no ledger")
        async with self._adopting:
            return await adopt(self.ledger, [c.intake for c in self._consumers()], broker_id, force)

    async def failed(self) -> None:
        """Ends when a part of ingest has, with its error; a broker without it must not go on."""
        parts = [asyncio.create_task(forwarder.failed()) for forwarder in self.forwarders]
        parts += [asyncio.create_task(self._consume(consumer)) for consumer in self._consumers()]
        if self.ledger is not None:
            parts.append(asyncio.create_task(self.ledger.failed()))
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
        if self.ledger is not None and self.ledger.fatal is not None:
            # Others end because of it.
            raise self.ledger.fatal
        for part in done:
            part.result()

    async def _consume(self, consumer: KafkaConsumer) -> None:
        await consumer.run()
        if self.direct.draining:
            # It has been told to end; the broker goes on with what it holds.
            await asyncio.Event().wait()

    # -- the end

    async def stop_intake(self) -> None:
        """Take nothing more from Kafka, and commit what is durable."""
        await asyncio.gather(*(consumer.stop() for consumer in self._consumers()))

    async def drain(self, grace_seconds: float) -> DrainReport:
        """Take nothing more, finish what is held for ``grace_seconds``, hand over the rest to its topic.

        Ends when the store is empty, or nothing more can leave: the report says why. May be called again.
        Raises StoreStopped.
        """
        async with self._draining:
            if self._drain is None:
                self.direct.draining, self._store.taking = True, False
                await self.stop_intake()
                self._drain = Drain(self._store, self.forwarders, can_hand_over=self.consumer is not None)
            return await self._drain.run(grace_seconds)

    def restores(self) -> bool:
        """Whether a lost disk may have held tasks that are not here yet: a drain would not know of them."""
        return self.ledger is not None and self.ledger.restores()

    def drain_report(self) -> DrainReport | None:
        """How far a drain is; None when there is none, or it is still leaving its consumer group."""
        return self._drain.report() if self._drain is not None else None

    async def stop(self) -> None:
        """Let what is on its way out arrive, for a moment."""
        await asyncio.gather(*(forwarder.stop() for forwarder in self.forwarders))
        if self._publisher is not None:
            await self._publisher.stop()
        if self.ledger is not None:
            await self.ledger.stop()

    def lag(self) -> int | None:
        """Messages of its partitions that this broker has still to read; None while that is not known."""
        if self.consumer is None or not self.consumer.lags:
            return None
        return sum(self.consumer.lags.values())

    def describe(self, status: admin_pb2.GetStatusResponse) -> None:
        """What an operator is told of Kafka, and of dead letters that do not leave."""
        status.forward_alarm = "; ".join(f.alarm for f in self.forwarders if f.alarm)
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
        for consumer in self._consumers():
            refused += consumer.admission.refused
            metrics.duplicates.inc(self._since(f"replayed {consumer.topic}", consumer.replayed))
            metrics.unseen.inc(self._since(f"unseen {consumer.topic}", consumer.unseen))
        if self.consumer is not None:
            metrics.kafka_up.set(self.consumer.connected)
            metrics.kafka_partitions.set(len(self.consumer.assignment))
            metrics.kafka_commit_age.set(self.consumer.last_commit_age_seconds())
            metrics.kafka_lag.replace(
                {
                    (consumer.topic, str(partition)): lag
                    for consumer in self._consumers()
                    for partition, lag in consumer.lags.items()
                }
            )
        if (ledger := self.ledger) is not None:
            metrics.ledger_up.set(ledger.is_open)
            metrics.ledger_age.set(ledger.age_seconds())
            metrics.unrestorable.inc(self._since("unrestorable", ledger.unrestorable))
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
