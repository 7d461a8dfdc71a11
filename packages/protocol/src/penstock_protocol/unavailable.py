"""UNAVAILABLE is what a broker answers that cannot do it now, and what gRPC says when nobody answers."""

from __future__ import annotations

# In what a broker says, its disk failing for one; else it is gRPC that says why nobody answers.
_SAID_BY_BROKERS = ("the broker", "Kafka")


def said_by_broker(details: str | None) -> bool:
    """Whether these details of an error are a broker's own, which lives."""
    return any(words in (details or "") for words in _SAID_BY_BROKERS)
