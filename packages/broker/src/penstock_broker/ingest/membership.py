"""Whether this broker may still take itself for a member of the consumer group.

The group drops a member that it has not heard of for the session timeout, and gives its partitions
away. The client learns that later than those who read them then: when the process goes on after it
stood still, or when Kafka answers again. What is uncovered here may have run elsewhere by then.
"""

from __future__ import annotations

from penstock_broker.clock import Clock

# A consumer's thread that has not turned for this long may have been stopped: far less than any session
# timeout, far more than a turn.
STALL_MS = 1_000


class Membership:
    """In doubt after a stall, or when no commit succeeds for half the session timeout, until one that was
    sent since is acknowledged. Written by the consumer's thread and the event loop.

    ``session_ms``: the session timeout.
    """

    def __init__(self, clock: Clock, session_ms: int) -> None:
        self._clock = clock
        self._commit_ms_max = session_ms // 2
        self._turned_at = clock.mono_ms()
        # When it was last doubted; None: it is not.
        self._doubted_at: int | None = None
        self._sent_at = 0
        # When the first commit was sent of those that nobody acknowledged.
        self._waiting_since: int | None = None

    def turned(self) -> None:
        """On the consumer's thread, before it takes anything."""
        now = self._clock.mono_ms()
        # Before the time is set: the loop looks at it first.
        if now - self._turned_at > STALL_MS:
            self._doubted_at = now
        self._turned_at = now

    def sending(self) -> None:
        """On the consumer's thread, just before a commit is sent."""
        self._sent_at = self._clock.mono_ms()
        if self._waiting_since is None:
            self._waiting_since = self._sent_at

    def acknowledged(self) -> bool:
        """The group took the last commit that was sent. Whether that ends a doubt."""
        self._waiting_since = None
        if self._doubted_at is None or self._sent_at < self._doubted_at:
            return False
        self._doubted_at = None
        return True

    def in_doubt(self, now: int) -> bool:
        """At ``now`` (monotonic ms). Until ``acknowledged`` says that it has ended."""
        stalled = now - self._turned_at > STALL_MS
        waiting = self._waiting_since
        if stalled or (waiting is not None and now - waiting > self._commit_ms_max):
            self._doubted_at = now
        return self._doubted_at is not None
