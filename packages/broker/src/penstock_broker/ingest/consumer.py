"""The Kafka consumer: one thread that polls and never stops polling.

It takes what is there in batches, admits it, and hands whole batches to the event loop. Every
decision is the intake's (on the loop) or a pure function's; this is the shell around the client.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from penstock_broker.clock import Clock
from penstock_broker.config import Settings
from penstock_broker.errors import FatalError
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.ingest.intake import Begun, Found, Intake, Position
from penstock_broker.ingest.kafka import consumer_config
from penstock_broker.ingest.ownership import decode
from penstock_broker.ingest.taking import ReadMessage, Tracks
from penstock_broker.ingest.topics import ensure_topics
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.writer import StoreStopped

T = TypeVar("T")

log = structlog.get_logger("ingest")

BATCH_MESSAGES_MAX = 1024
POLL_SECONDS = 0.2
# While a commit is due: nothing else wakes the thread up for it.
POLL_BUSY_SECONDS = 0.002
# A store without room is waited for this long before the partitions are paused.
PAUSE_AFTER_SECONDS = 0.2
LOOKUP_SECONDS_MAX = 10.0
LOOP_SECONDS_MAX = 30.0
CHORES_EVERY_MS = 1000
START_SECONDS_MAX = 3.0
STOP_SECONDS_MAX = 5.0
COMMIT_LAST_MS_MAX = 3000
# Rows of partitions that were never assigned to us since the start are looked into after this.
SETTLE_MS_MAX = 20_000
RESTART = "restart the broker; nothing that is stored is lost"


class KafkaConsumer:
    """Takes a topic's activations into the store. Made, started and stopped on the event loop."""

    def __init__(self, store: Inflight, settings: Settings) -> None:
        self._settings = settings
        self._clock: Clock = store.clock
        self.topic = settings.kafka_topic
        self.admission = Admission(AdmissionLimits.of(settings))
        self.intake = Intake(
            store, self.topic, settings.broker_id, self._hand_commit, settings.kafka_auto_offset_reset
        )
        # For status and metrics: written by the thread, read by anybody.
        self.connected = False
        self.paused = False
        self.consumed = 0
        self.lags: dict[int, int] = {}
        self._tracks = Tracks(self.topic)
        # Assigned, and not read yet because Kafka or the store could not say from where.
        self._unbegun: set[int] = set()
        # Outside the log: where to go on is to be looked up.
        self._outside: set[int] = set()
        # Written by the event loop, taken by the thread.
        self._to_commit: Sequence[Position] | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._assigned_once = False
        self._chores_at = 0
        self._settle_at = 0

    # -- on the event loop

    @property
    def replayed(self) -> int:
        """Messages that were read before and were skipped by their position."""
        return self._tracks.replayed

    @property
    def assignment(self) -> Sequence[int]:
        """Partitions assigned to this broker."""
        return sorted(self.intake.readings)

    def last_commit_age_seconds(self) -> float:
        """Since the last acknowledged offset commit, or since the start."""
        return (self._clock.mono_ms() - self.intake.committed_at_ms) / 1000

    async def start(self) -> None:
        """Start consuming. Kafka may be away: it is tried until it is there.

        Raises FatalError when the topic does not exist and may not be created.
        """
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._checked: asyncio.Future[None] = self._loop.create_future()
        self._settle_at = self._clock.mono_ms() + SETTLE_MS_MAX
        self._thread = threading.Thread(target=self._main, name="kafka-consumer", daemon=True)
        self._thread.start()
        await asyncio.wait(
            (self._checked, self._finished),
            timeout=START_SECONDS_MAX,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if self._finished.done():
            self._finished.result()

    async def run(self) -> None:
        """Until stopped. Raises FatalError when consuming cannot go on."""
        await asyncio.shield(self._finished)

    async def stop(self) -> None:
        """Stop taking, commit what is durable, leave. Bounded in time, whatever Kafka does."""
        self._stopping.set()
        done, _ = await asyncio.wait((self._finished,), timeout=STOP_SECONDS_MAX)
        if not done:
            log.warning("the Kafka consumer did not end in time; its last offsets may be read again")

    def _hand_commit(self, positions: Sequence[Position]) -> None:
        self._to_commit = positions

    def _topic_partitions(self, positions: Iterable[Position]) -> list[TopicPartition]:
        return [TopicPartition(self.topic, p.partition, p.offset, p.metadata) for p in positions]

    def _finish(self, error: Exception | None) -> None:
        if self._finished.done():
            return
        if error is None:
            self._finished.set_result(None)
        else:
            self._finished.set_exception(error)

    # -- on the thread

    def _main(self) -> None:
        error: Exception | None = None
        try:
            if self._await_topics():
                self._consume()
        except StoreStopped:
            log.debug("the store has stopped, and with it the intake")
        except KafkaException as caught:
            error = FatalError(f"the Kafka client cannot go on: {caught.args[0].str()}", RESTART)
        except Exception as caught:  # noqa: BLE001 - the event loop raises it
            error = caught
        if not self._loop.is_closed():
            self._tell(self._finish, error)

    def _tell(self, callback: Callable[..., object], *args: object) -> None:
        self._loop.call_soon_threadsafe(callback, *args)

    def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        """Have the event loop answer. Raises TimeoutError when it does not, StoreStopped."""
        future = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return future.result(LOOP_SECONDS_MAX)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError("the event loop did not answer") from None

    def _await_topics(self) -> bool:
        """Wait until Kafka is there and has the topics; False when stopped before."""
        away = False
        while not self._stopping.is_set():
            try:
                ensure_topics(self._settings, START_SECONDS_MAX - 0.5)
            except KafkaException as error:
                if not away:
                    log.warning(
                        "Kafka cannot be reached; what is stored is served, and Kafka is tried on",
                        cluster=self._settings.kafka_cluster,
                        error=error.args[0].str(),
                    )
                away = True
                self._tell(self._set_checked)
                self._stopping.wait(1)
            else:
                self._tell(self._set_checked)
                return True
        return False

    def _set_checked(self) -> None:
        if not self._checked.done():
            self._checked.set_result(None)

    def _consume(self) -> None:
        consumer = Consumer(
            consumer_config(self._settings, self._on_error, self._on_commit, self._on_statistics)
        )
        consumer.subscribe(
            [self.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        try:
            while not self._stopping.is_set():
                self._turn(consumer)
            self._commit_last(consumer)
        finally:
            self._stopping.set()
            consumer.close()

    def _turn(self, consumer: Consumer) -> None:
        allowance = self.intake.gate.allowance()
        if allowance <= 0 and not self.paused:
            if self.intake.gate.wait(PAUSE_AFTER_SECONDS):
                return
            self._pause(consumer, True)
        elif allowance > 0 and self.paused:
            self._pause(consumer, False)
        # poll returns with the first message at once; consume alone would wait for a full batch.
        self._commit(consumer)
        first = consumer.poll(POLL_BUSY_SECONDS if self.intake.busy else POLL_SECONDS)
        if first is not None:
            messages: list[ReadMessage] = [first]
            if allowance > 1:
                messages += consumer.consume(min(allowance, BATCH_MESSAGES_MAX) - 1, 0)
            self._take(messages)
        if self._clock.mono_ms() >= self._chores_at:
            self._chores(consumer)
            self._chores_at = self._clock.mono_ms() + CHORES_EVERY_MS

    def _commit(self, consumer: Consumer) -> None:
        """Start the commit that the intake has asked for."""
        positions = self._to_commit
        if positions is None:
            return
        self._to_commit = None
        try:
            consumer.commit(offsets=self._topic_partitions(positions), asynchronous=True)
        except KafkaException as error:
            answers = [(p.partition, p.offset, str(error)) for p in positions]
            self._tell(self.intake.commit_done, answers)

    def _take(self, messages: Sequence[ReadMessage]) -> None:
        batch = self._tracks.take(messages, self.admission, self._clock.wall_ms())
        if batch.rows or batch.taken:
            self.consumed += len(batch.rows)
            self.intake.gate.take(len(batch.rows), batch.size)
            self._tell(self.intake.deliver, batch.rows, batch.size, batch.taken)
            self._set_connected(True)
        for message in batch.errors:
            self._on_message_error(message)

    def _pause(self, consumer: Consumer, pause: bool) -> None:
        partitions = consumer.assignment()
        (consumer.pause if pause else consumer.resume)(partitions)
        self.paused = pause
        if pause:
            log.warning("intake paused: the store has no room", topic=self.topic)
        else:
            log.info("intake resumed", topic=self.topic)

    def _chores(self, consumer: Consumer) -> None:
        """What could not be done when it came up, because Kafka was away."""
        try:
            if self._unbegun:
                self._read_anew(consumer, self._begin(consumer, sorted(self._unbegun)))
            if self._outside:
                self._begin_inside(consumer, sorted(self._outside))
            settled = self._assigned_once or self._clock.mono_ms() >= self._settle_at
            if settled and self.intake.unresolved and not self.intake.committing:
                found = self._look_up(consumer, sorted(self.intake.unresolved), with_log=False)
                self._ask(self.intake.resolve(found))
        except (KafkaException, TimeoutError) as error:
            log.debug("partitions cannot be looked up yet", error=str(error))

    # -- rebalances: called by the client within poll and consume

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._assigned_once = True
        self._set_connected(True)
        if self._stopping.is_set():
            return
        numbers = sorted(p.partition for p in partitions)
        if not numbers:
            return
        try:
            begun = self._begin(consumer, numbers)
        except (KafkaException, TimeoutError) as error:
            log.warning("an assignment cannot be started yet", partitions=numbers, error=str(error))
            self._unbegun.update(numbers)
            consumer.incremental_assign(partitions)
            consumer.pause(partitions)
            return
        self._read(consumer, begun)
        log.info("partitions assigned", topic=self.topic, partitions=numbers)

    def _begin(self, consumer: Consumer, partitions: list[int]) -> list[Begun]:
        return self._ask(self.intake.begin(self._look_up(consumer, partitions)))

    def _read(self, consumer: Consumer, begun: Sequence[Begun]) -> None:
        for partition, source, offset in begun:
            self._tracks.add(partition, source, offset)
            self._unbegun.discard(partition)
            self._outside.discard(partition)
        assigned = [TopicPartition(self.topic, b.partition, b.offset) for b in begun]
        consumer.incremental_assign(assigned)
        if self.paused:
            consumer.pause(assigned)
        self._ask(self.intake.begun([b.partition for b in begun]))

    def _read_anew(self, consumer: Consumer, begun: Sequence[Begun]) -> None:
        """These are assigned already, but not from there."""
        consumer.incremental_unassign([TopicPartition(self.topic, b.partition) for b in begun])
        self._read(consumer, begun)

    def _look_up(self, consumer: Consumer, partitions: list[int], with_log: bool = True) -> list[Found]:
        """Committed offsets and owners; for what has none, also where the log begins and ends."""
        asked = [TopicPartition(self.topic, p) for p in partitions]
        found = []
        for answer in consumer.committed(asked, timeout=LOOKUP_SECONDS_MAX):
            if answer.error is not None:
                raise KafkaException(answer.error)
            committed = answer.offset if answer.offset >= 0 else None
            low = high = -1
            if committed is None and with_log:
                low, high = self._watermarks(consumer, answer.partition)
            owners = decode(answer.metadata)
            found.append(Found(answer.partition, committed, owners, low, high))
        return found

    def _watermarks(self, consumer: Consumer, partition: int) -> tuple[int, int]:
        asked = TopicPartition(self.topic, partition)
        low, high = consumer.get_watermark_offsets(asked, timeout=LOOKUP_SECONDS_MAX)
        return low, high

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self._stopping.is_set():
            return
        numbers = [p.partition for p in partitions]
        self._forget(numbers)
        log.info("partitions revoked", topic=self.topic, partitions=numbers)
        try:
            positions = self._ask(self.intake.leave(numbers))
            self._ask(self.intake.left(positions, self._commit_now(consumer, positions)))
        except TimeoutError:
            # It stands still; when it goes on, it learns that these are gone.
            self._tell(self._lose, numbers)

    def _lose(self, partitions: list[int]) -> None:
        self._losing = asyncio.ensure_future(self.intake.lost(partitions))

    def _commit_now(self, consumer: Consumer, positions: list[Position]) -> str | None:
        """Commit and wait for the answer: the error, or None."""
        if not positions:
            return None
        try:
            answers = consumer.commit(offsets=self._topic_partitions(positions), asynchronous=False)
        except KafkaException as error:
            return str(error)
        return next((str(a.error) for a in answers or () if a.error is not None), None)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [p.partition for p in partitions]
        self._forget(numbers)
        if not self._stopping.is_set():
            log.warning("partitions lost: another broker may read them", topic=self.topic, partitions=numbers)
            self._tell(self._lose, numbers)

    def _forget(self, partitions: Iterable[int]) -> None:
        for partition in partitions:
            self._tracks.remove(partition)
            self._unbegun.discard(partition)
            self._outside.discard(partition)
            self.lags.pop(partition, None)

    # -- other events of the client

    def _on_message_error(self, message: ReadMessage) -> None:
        error, partition = message.error(), message.partition()
        assert error is not None
        if error.code() == KafkaError._AUTO_OFFSET_RESET and partition is not None:
            self._outside.add(partition)
            self._chores_at = 0
        elif error.fatal():
            self._on_error(error)
        else:
            log.warning("Kafka reports an error", topic=self.topic, partition=partition, error=error.str())

    def _begin_inside(self, consumer: Consumer, partitions: list[int]) -> None:
        """These were to be read from an offset that their log does not have (any more)."""
        found = []
        for partition in partitions:
            low, high = self._watermarks(consumer, partition)
            (known,) = self._look_up(consumer, [partition], with_log=False)
            found.append(known._replace(low=low, high=high))
        self._read_anew(consumer, self._ask(self.intake.begin_inside(found)))

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal() or error.code() == KafkaError._FATAL:
            if error.code() == KafkaError.FENCED_INSTANCE_ID or "fenced" in error.str().lower():
                raise FatalError(
                    f"another broker with the id {self._settings.broker_id!r} has joined the consumer group"
                    f" {self._settings.kafka_consumer_group!r}",
                    "each broker needs its own broker_id (TASKBROKER_BROKER_ID) and its own database",
                )
            raise FatalError(f"the Kafka client cannot go on: {error.str()}", RESTART)
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._set_connected(False)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        self._tell(
            self.intake.commit_done,
            [
                (p.partition, p.offset, str(e) if (e := error or p.error) is not None else None)
                for p in partitions
            ],
        )

    def _on_statistics(self, text: str) -> None:
        statistics = json.loads(text)
        brokers = statistics.get("brokers", {}).values()
        self._set_connected(any(b["state"] == "UP" for b in brokers if b["nodeid"] >= 0))
        partitions = statistics.get("topics", {}).get(self.topic, {}).get("partitions", {})
        lags = {}
        for partition in self._tracks:
            high = partitions.get(str(partition), {}).get("hi_offset", -1)
            if high >= 0:
                lags[partition] = max(0, high - self._tracks.next(partition))
        self.lags = lags

    def _set_connected(self, connected: bool) -> None:
        if connected == self.connected:
            return
        self.connected = connected
        if connected:
            log.info("connected to Kafka", cluster=self._settings.kafka_cluster)
        else:
            log.warning(
                "Kafka is away; what is stored is served, and Kafka is tried on",
                cluster=self._settings.kafka_cluster,
            )

    # -- the end

    def _commit_last(self, consumer: Consumer) -> None:
        """Commit what is durable and wait for the answer, within what remains of the time."""
        until = self._clock.mono_ms() + COMMIT_LAST_MS_MAX
        self._ask(self.intake.finish())
        self._await_commit(consumer, until)
        self._ask(self.intake.commit_rest())
        self._await_commit(consumer, until)

    def _await_commit(self, consumer: Consumer, until: int) -> None:
        while self.intake.committing and self._clock.mono_ms() < until:
            self._commit(consumer)
            consumer.poll(POLL_BUSY_SECONDS)
