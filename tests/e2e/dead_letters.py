"""What is in the dead letter topic."""

from __future__ import annotations

import uuid
from typing import NamedTuple

from confluent_kafka import Consumer

PREFIX = "penstock-"


class DeadLetter(NamedTuple):
    key: str
    value: bytes
    # Without the prefix.
    headers: dict[str, str]

    @property
    def reason(self) -> str:
        return self.headers["reason"]


class DeadLetters:
    """Reads a topic from its beginning, on and on."""

    def __init__(self, kafka: str, topic: str) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": kafka,
                "group.id": f"dead-letters-{uuid.uuid4().hex}",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "log_level": 2,
            }
        )
        self._topic = topic
        self._subscribed = False
        self._letters: list[DeadLetter] = []

    def read(self) -> list[DeadLetter]:
        """Those that have arrived so far."""
        if not self._subscribed:
            self._consumer.subscribe([self._topic])
            self._subscribed = True
        for message in self._consumer.consume(1000, 0.1):
            if message.error() is None:
                self._letters.append(_letter(message.key(), message.value(), message.headers()))
        return self._letters

    def close(self) -> None:
        self._consumer.close()


def _letter(key: object, value: object, headers: object) -> DeadLetter:
    assert isinstance(key, bytes)
    assert isinstance(headers, list)
    texts = {name.removeprefix(PREFIX): text.decode() for name, text in headers}
    return DeadLetter(key.decode(), value if isinstance(value, bytes) else b"", texts)
