"""Keeps what was sent: for tests and notebooks."""

from __future__ import annotations

from concurrent.futures import Future

from penstock_client.transports import Outgoing
from penstock_protocol.v1.activation_pb2 import TaskActivation


class MemoryTransport:
    """``messages`` holds what was sent, in order, encoded as it would have been."""

    def __init__(self) -> None:
        self.messages: list[Outgoing] = []

    def send(self, message: Outgoing, future: Future[None]) -> None:
        self.messages.append(message)
        future.set_result(None)

    def activations(self) -> list[TaskActivation]:
        """What a broker would read."""
        return [TaskActivation.FromString(message.value) for message in self.messages]

    def flush(self, seconds: float) -> int:
        return 0

    def close(self) -> None:
        self.messages.clear()
