"""One broker: the connection to it, whether it answers, and what is held from it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from time import monotonic

import grpc.aio
import structlog
from google.protobuf.message import Message
from grpc.aio import AioRpcError

from penstock_protocol import signature
from penstock_worker.claim import Claim

LEASE_SECONDS_DEFAULT = 15.0
# Whatever a broker's message_bytes_max allows fits.
RESPONSE_BYTES_MAX = 64 * 1024 * 1024
BACKOFF_FIRST_SECONDS = 0.1
# A report that fails only after this long was held by a living broker, for a reason: an outcome, for
# example, is not answered while Kafka has not acknowledged the offset it depends on.
HELD_SECONDS = 4.0
# Well within a lease, so that results reach a broker that has come back in time.
BACKOFF_MAX_SECONDS = 3.0

_SERVICE = "/penstock.v1.ConsumerService/"
GET_TASKS = _SERVICE + "GetTasks"
SET_TASK_STATUSES = _SERVICE + "SetTaskStatuses"
EXTEND_CLAIMS = _SERVICE + "ExtendClaims"
RELEASE_TASKS = _SERVICE + "ReleaseTasks"
_REPORTS = (SET_TASK_STATUSES, RELEASE_TASKS)

_OPTIONS = [
    # A half-open connection is noticed within 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A broker that is back is found quickly.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", RESPONSE_BYTES_MAX),
    ("grpc.max_send_message_length", RESPONSE_BYTES_MAX),
    ("grpc.enable_retries", 0),
    # Brokers are neighbours; a proxy for the outside world has no business in between.
    ("grpc.enable_http_proxy", 0),
]
_REFUSALS = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}

log = structlog.get_logger("penstock_worker")


def was_held(error: AioRpcError, seconds: float) -> bool:
    """Whether a report failed because a living broker waited for something, as far as can be told."""
    codes = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return error.code() in codes and seconds >= HELD_SECONDS


@dataclass(slots=True)
class BackOff:
    """When to try again: doubling up to a few seconds, spread so that workers do not march in step."""

    failures: int = 0
    not_before: float = 0.0

    def failed(self) -> float:
        """Count a failure; the seconds to wait."""
        delay = min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2.0 ** min(self.failures, 10))
        delay *= random.uniform(0.5, 1.0)
        self.failures += 1
        self.not_before = monotonic() + delay
        return delay

    def succeeded(self) -> None:
        self.failures = 0
        self.not_before = 0.0


class BrokerLink:
    """Calls to one broker, signed, as bytes; and the claims held from it."""

    def __init__(self, address: str, secret: str | None) -> None:
        self.address = address
        self.lease_seconds = LEASE_SECONDS_DEFAULT
        self.lease_changed = asyncio.Event()
        # Everything a heartbeat must name: waiting, running, or with an outcome not yet answered.
        self.claims: dict[int, Claim] = {}
        self._secret = secret
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._methods: dict[str, grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = {
            # No serializers: requests are signed as the bytes that are sent.
            path: self._channel.unary_unary(path)
            for path in (GET_TASKS, SET_TASK_STATUSES, EXTEND_CLAIMS, RELEASE_TASKS)
        }
        self._reachable: bool | None = None

    def learn_lease(self, lease_seconds: float) -> None:
        if lease_seconds > 0 and lease_seconds != self.lease_seconds:
            self.lease_seconds = lease_seconds
            self.lease_changed.set()

    async def call(self, path: str, request: Message, timeout_seconds: float) -> bytes:
        """One unary call; the answer's bytes.

        Raises: AioRpcError when there is no answer or a refusal.
        """
        body = request.SerializeToString()
        metadata: tuple[tuple[str, str], ...] = ()
        if self._secret is not None:
            metadata = ((signature.HEADER, signature.sign(self._secret, path, body)),)
        called_at = monotonic()
        try:
            answer = await self._methods[path](body, timeout=timeout_seconds, metadata=metadata)
        except AioRpcError as error:
            # A living broker refused it as too large, and is told less at a time.
            too_large = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            if path not in _REPORTS or not (too_large or was_held(error, monotonic() - called_at)):
                self._unanswered(path, error)
            raise
        if self._reachable is not True:
            self._reachable = True
            log.info("broker answers", broker=self.address)
        return answer

    def _unanswered(self, path: str, error: AioRpcError) -> None:
        if self._reachable is False:
            return
        self._reachable = False
        hint = "is it running, and is the address right? Trying again until it answers"
        if error.code() in _REFUSALS:
            hint = "set TASKBROKER_GRPC_SHARED_SECRET to the broker's secret"
        log.warning(
            "broker does not answer" if error.code() not in _REFUSALS else "broker refuses this worker",
            broker=self.address,
            call=path.rpartition("/")[2],
            code=error.code().name,
            details=error.details(),
            hint=hint,
        )

    async def close(self) -> None:
        await self._channel.close(grace=None)
