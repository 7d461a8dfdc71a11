"""Produces batches of messages and says which of them the log has acknowledged."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from functools import partial

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from penstock_broker.config import Settings
from penstock_broker.ingest.dead_letters import Letter
from penstock_broker.ingest.kafka import Connections, producer_config

log = structlog.get_logger("ingest")

POLL_SECONDS = 0.5

DELIVERY_MS_MAX = 30_000

Answered = Callable[[KafkaError | None], None]


class Publisher:
    """A producer and the thread that polls it. Made and called on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        # The producer cannot go on; another one can.
        self._given_up = False
        # Whoever produces does so with the one that is polled.
        self._replacing = threading.Lock()
        self._producer = self._make_producer()
        # Filled by the producer's thread, emptied by the event loop once per round of poll.
        self._answers: list[tuple[Answered, KafkaError | None]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._poll, name="kafka-producer", daemon=True)
        self._thread.start()

    def _make_producer(self) -> Producer:
        connections = Connections()

        def on_statistics(text: str) -> None:
            connections.look(json.loads(text))
            if connections.lost:
                self._given_up = True

        return Producer(producer_config(self._settings, self._on_error, on_statistics, DELIVERY_MS_MAX))

    async def publish(self, letters: Sequence[Letter]) -> list[KafkaError | None]:
        """Produce ``letters`` and wait for all answers: None for one that is safe, else the error.

        Ends within the delivery timeout of the producer.
        """
        answers: list[KafkaError | None] = [None] * len(letters)
        finished = self._loop.create_future()
        open_ = len(letters)

        def answered(index: int, error: KafkaError | None) -> None:
            nonlocal open_
            answers[index] = error
            open_ -= 1
            if not open_ and not finished.done():
                finished.set_result(None)

        for index, letter in enumerate(letters):
            self._produce(letter, partial(answered, index))
        if letters:
            await finished
        return answers

    def _produce(self, letter: Letter, answered: Answered) -> None:
        def delivered(error: KafkaError | None, message: Message[bytes, bytes]) -> None:
            self._answers.append((answered, error))

        try:
            with self._replacing:
                self._producer.produce(
                    letter.topic, letter.value, letter.key, headers=letter.headers, on_delivery=delivered
                )
        except KafkaException as error:
            self._loop.call_soon(answered, error.args[0])
        except BufferError:
            self._loop.call_soon(answered, KafkaError(KafkaError._QUEUE_FULL))

    def _poll(self) -> None:
        while not self._stopping:
            self._producer.poll(POLL_SECONDS)
            if self._given_up:
                self._replace()
            if self._answers and not self._loop.is_closed():
                answers, self._answers = self._answers, []
                self._loop.call_soon_threadsafe(_answer, answers)

    def _replace(self) -> None:
        """What the old producer has no answer to fails, and is tried again by who published it."""
        cluster = self._settings.kafka_cluster
        try:
            made = self._make_producer()
        except KafkaException as error:
            # No memory or no thread for it. The old one is asked on, and this tried again.
            log.warning("no new Kafka producer can be made", cluster=cluster, error=str(error))
            return
        log.warning("the Kafka producer cannot go on; a new one does", cluster=cluster)
        with self._replacing:
            old, self._producer = self._producer, made
        old.purge()
        while len(old):
            old.poll(POLL_SECONDS)
        self._given_up = False

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._given_up = True

    async def stop(self) -> None:
        """Give up on what has no answer yet."""
        self._stopping = True
        self._producer.purge()
        await asyncio.to_thread(self._thread.join, 2 * POLL_SECONDS)


def _answer(answers: list[tuple[Answered, KafkaError | None]]) -> None:
    for answered, error in answers:
        answered(error)
