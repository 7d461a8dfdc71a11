"""How tasks leave the process."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from penstock_client.settings import ClientSettings


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One encoded activation on its way. ``key``: only when the same id may be sent twice."""

    id: str
    taskname: str
    namespace: str
    topic: str
    value: bytes
    key: str | None = None
    traceparent: str | None = None


class Transport(Protocol):
    """Takes tasks and says through their future what became of them."""

    def send(self, message: Outgoing, future: Future[None]) -> None:
        """Hand over; the future resolves when it is acknowledged, or fails with SendError.

        Raises BufferFull when it cannot be handed over within the send timeout.
        """

    def flush(self, seconds: float) -> int:
        """Wait until everything is acknowledged or ``seconds`` have passed. How many tasks are not."""

    def close(self) -> None:
        """Let go; what is not flushed is lost, and its futures fail."""


def connect(settings: ClientSettings) -> Transport:
    """The transport that ``settings`` name."""
    if settings.broker:
        from penstock_client.transports.grpc import GrpcTransport

        return GrpcTransport(settings)
    # Imported when the first task is sent: a process that only declares tasks does not pay for it.
    from penstock_client.transports.kafka import KafkaTransport

    return KafkaTransport(settings)
