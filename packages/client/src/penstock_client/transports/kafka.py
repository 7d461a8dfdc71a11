"""Through Kafka: librdkafka's producer, idempotent, with a thread that collects acknowledgements."""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from penstock_client.errors import BufferFull, ConfigError, SendError
from penstock_client.settings import ClientSettings
from penstock_client.transports import Outgoing

log = logging.getLogger("penstock.client")

POLL_SECONDS = 0.1
# What is sent while nothing is on its way leaves at once, and what follows it for so long.
HURRY_SECONDS = 0.001
# Where more wait than there may be threads that each wait for one, acknowledgements gather for so long before
# they are collected. Who sends gives way to that, for so long at most: a future's callback may take its time,
# or wait for who sends.
MANY = 500
GATHER_SECONDS = 0.002
GIVE_WAY_SECONDS_MAX = 0.02
PAUSE_SECONDS = 0.0002
STATISTICS_MS = 2000
# So many statistics in a row without a server: for a moment it can look so while one is tried.
LOST_AFTER = 3
ANY_PARTITION = -1
_PURGED = (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT)


class KafkaTransport:
    """One producer a process. Thread-safe."""

    def __init__(self, settings: ClientSettings) -> None:
        if not settings.kafka:
            raise ConfigError(
                'nothing says where tasks go: App(..., kafka="host:9092") or PENSTOCK_KAFKA for Kafka,'
                ' App(..., broker="host:50051") or PENSTOCK_BROKER for a broker without Kafka'
            )
        self._settings = settings
        self._unreachable = ""
        # Producers are counted. Of those that cannot go on, where another one can, the last.
        self._count = 0
        self._given_up = 0
        # The one that is being replaced, and what such producers had and no other has yet.
        self._old: Producer | None = None
        self._again: deque[tuple[Outgoing, Future[None], int]] = deque()
        # Whoever sends does so with the one that is polled; a signal's handler may do so within.
        self._replacing = threading.RLock()
        # Whether nothing is on its way, and who sends tells the poller; of queues, this kind may be used by a
        # signal's handler in the middle of a use of it.
        self._idle = False
        self._sent: queue.SimpleQueue[None] = queue.SimpleQueue()
        # Whether something was sent since the poller has looked, and whether it collects what has gathered.
        self._sending = False
        self._collecting = False
        try:
            self._producer = self._connect(settings)
        except KafkaException as error:
            raise ConfigError(
                f"Kafka's producer refuses these settings: {error.args[0].str().strip()}"
            ) from None
        self._count = 1
        self._closing = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="penstock-kafka", daemon=True)
        self._poller.start()

    def _connect(self, settings: ClientSettings) -> Producer:
        number, without = self._count + 1, 0

        def give_up() -> None:
            self._given_up = max(self._given_up, number)

        def on_error(error: KafkaError) -> None:
            if error.fatal():
                give_up()
            if error.code() == KafkaError._ALL_BROKERS_DOWN:
                self._unreachable = error.str()

        def look(text: str) -> None:
            """librdkafka can forget all servers for good, by what one answers last that stands still or goes
            away (2.13 and later, its issue 5301)."""
            nonlocal without
            brokers = json.loads(text)["brokers"].values()
            servers = [b for b in brokers if b["source"] in ("configured", "learned")]
            knows_none = all(b["source"] == "learned" and b["state"] == "INIT" for b in servers)
            without = without + 1 if knows_none else 0
            if without >= LOST_AFTER:
                give_up()

        return Producer(
            {
                "bootstrap.servers": settings.kafka,
                "client.id": "penstock-client",
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": settings.linger_ms,
                # 0 would be without bound.
                "delivery.timeout.ms": math.ceil(settings.delivery_timeout_seconds * 1000),
                "queue.buffering.max.messages": settings.buffer_messages_max,
                "message.max.bytes": settings.payload_bytes_max + 64 * 1024,
                "reconnect.backoff.max.ms": 1000,
                "error_cb": on_error,
                "statistics.interval.ms": STATISTICS_MS,
                "stats_cb": look,
                # It repeats itself on stderr while a cluster is away; what fails is told per task.
                "log_level": 2,
            }
        )

    def _poll(self) -> None:
        while not self._closing.is_set():
            waiting = len(self._producer)
            if waiting >= MANY and self._sending:
                self._collect()
            elif waiting:
                self._producer.poll(POLL_SECONDS)
            else:
                self._rest()
            if self._given_up == self._count:
                self._replace()
            self._send_again()

    def _collect(self) -> None:
        """Many acknowledgements at once, while who sends gives way: the binding takes the GIL anew for each,
        and beside a thread that sends all the time may wait for it each time (docs/adr/0003)."""
        self._sending = False
        time.sleep(GATHER_SECONDS)
        self._collecting = True
        self._producer.poll(0)
        self._collecting = False

    def _give_way(self) -> None:
        until = time.monotonic() + GIVE_WAY_SECONDS_MAX
        while self._collecting and time.monotonic() < until:
            time.sleep(PAUSE_SECONDS)
        self._collecting = False

    def _rest(self) -> None:
        """Until something is sent. It does not wait for others to share a request with: librdkafka would have
        it linger though it is alone (docs/adr/0003)."""
        self._idle = True
        if not len(self._producer):
            try:
                self._sent.get(timeout=POLL_SECONDS)
            except queue.Empty:
                return
        self._idle = False
        self._producer.flush(HURRY_SECONDS)

    def _replace(self) -> None:
        """With a new producer, which sends again what the old one has no answer to: brokers know its ids."""
        try:
            made = self._connect(self._settings)
        except KafkaException as error:
            # No memory or no thread for it. The old one is asked on, and this tried again.
            log.warning("no new Kafka producer can be made: %s", error.args[0].str())
            self._closing.wait(1)
            return
        log.warning(
            "the Kafka producer cannot go on; a new one sends what waits for %s", self._settings.kafka
        )
        with self._replacing:
            self._old = old = self._producer
            self._producer = made
            self._count += 1
        old.purge()
        while len(old):
            old.poll(POLL_SECONDS)
        self._old = None

    def _send_again(self) -> None:
        while self._again:
            message, future, partition = self._again[0]
            try:
                self._produce(message, future, partition)
            except BufferError:
                return
            except KafkaException as error:
                self._fail(future, self._refused(message, error))
            self._again.popleft()

    def send(self, message: Outgoing, future: Future[None]) -> None:
        if self._closing.is_set():
            raise self._closed(message)
        if self._collecting:
            self._give_way()
        self._sending = True
        deadline = 0.0
        while True:
            try:
                self._produce(message, future)
                return
            except BufferError:
                now = time.monotonic()
                deadline = deadline or now + self._settings.send_timeout_seconds
                if now >= deadline:
                    raise self._full(message) from None
                time.sleep(PAUSE_SECONDS)
            except KafkaException as error:
                raise self._refused(message, error) from None

    def _produce(self, message: Outgoing, future: Future[None], partition: int = ANY_PARTITION) -> None:
        """Raises BufferError, KafkaException."""

        def delivered(error: KafkaError | None, sent: Any) -> None:
            if error is None:
                self._unreachable = ""
                future.set_result(None)
            elif error.code() in _PURGED and not self._closing.is_set():
                # It may be there already: brokers know an id again within its partition.
                where = sent.partition()
                self._again.append((message, future, ANY_PARTITION if where is None else where))
            else:
                self._fail(
                    future,
                    SendError(
                        f"task {message.taskname} ({message.id}) was not sent to topic {message.topic!r} of"
                        f" {self._settings.kafka}: {self._why(error)}"
                    ),
                )

        headers: Any = [("traceparent", message.traceparent)] if message.traceparent else None
        with self._replacing:
            self._producer.produce(
                message.topic,
                message.value,
                message.key,
                partition,
                on_delivery=delivered,
                headers=headers,
            )
        if self._idle:
            self._idle = False
            self._sent.put(None)

    def _fail(self, future: Future[None], failure: SendError) -> None:
        """Whoever holds the future is told; if nobody does, the log has it."""
        log.error("%s", failure)
        future.set_exception(failure)

    def _closed(self, message: Outgoing) -> SendError:
        return SendError(f"task {message.taskname} ({message.id}) was not sent: the client was closed")

    def _refused(self, message: Outgoing, error: KafkaException) -> SendError:
        return SendError(f"task {message.taskname} ({message.id}) was refused: {error.args[0].str()}")

    def _why(self, error: KafkaError) -> str:
        if error.code() != KafkaError._MSG_TIMED_OUT:
            return error.str()
        reached = "could not be reached" if self._unreachable else "did not acknowledge it"
        seconds = self._settings.delivery_timeout_seconds
        return f"Kafka {reached} within {seconds:g} s (delivery_timeout_seconds)"

    def _full(self, message: Outgoing) -> BufferFull:
        why = f" ({self._unreachable})" if self._unreachable else ""
        return BufferFull(
            f"task {message.taskname} ({message.id}) was not sent: {len(self._producer)} tasks wait for"
            f" Kafka at {self._settings.kafka}{why}; buffer_messages_max bounds them"
            f" ({self._settings.buffer_messages_max}, PENSTOCK_BUFFER_MESSAGES_MAX)"
        )

    def flush(self, seconds: float) -> int:
        until = time.monotonic() + seconds
        while True:
            self._producer.flush(max(0.0, until - time.monotonic()))
            # It may have been replaced meanwhile.
            waiting = self._waiting()
            left = until - time.monotonic()
            if not waiting or left <= 0:
                return waiting
            time.sleep(min(left, POLL_SECONDS))

    def _waiting(self) -> int:
        """At least what is not acknowledged."""
        # What moves is for a moment in both: from the old producer to those that are sent again, therefore
        # counted in this order, and from there, by who has the lock, to the new one.
        with self._replacing:
            old = self._old
            return (len(old) if old is not None else 0) + len(self._again) + len(self._producer)

    def close(self) -> None:
        self._closing.set()
        self._poller.join()
        self._producer.purge()
        self._producer.flush(1)
        for message, future, _ in self._again:
            self._fail(future, self._closed(message))
