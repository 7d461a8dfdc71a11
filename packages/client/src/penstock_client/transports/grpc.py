"""Straight to a broker: durable when acknowledged, many tasks in one call."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from google.protobuf.message import DecodeError

from penstock_client.errors import BufferFull, SendError
from penstock_client.settings import ClientSettings
from penstock_client.transports import Outgoing
from penstock_protocol import signature
from penstock_protocol.v1 import producer_pb2, raw_pb2

try:
    import grpc
except ImportError:
    raise ImportError(
        "sending straight to a broker needs gRPC: pip install 'penstock-client[grpc]'"
    ) from None

log = logging.getLogger("penstock.client")

METHOD = "/penstock.v1.ProducerService/SendTasks"
BATCH_TASKS_MAX = 512
BATCH_BYTES_MAX = 2 * 1024 * 1024
RETRY_SECONDS = 0.2
# What a broker that restarts, or whose intake is paused, answers; the task is tried again.
_TRANSIENT = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
    )
)

# A duplicate is there already, which is what was asked for.
_SAFE = frozenset((producer_pb2.SEND_RESULT_ACCEPTED, producer_pb2.SEND_RESULT_DUPLICATE))

_Waiting = tuple[Outgoing, Future[None], float]


class GrpcTransport:
    """One connection and one thread. Thread-safe."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._channel = grpc.insecure_channel(
            settings.broker,
            options=(
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.max_reconnect_backoff_ms", 1_000),
            ),
        )
        self._call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(METHOD)
        # A signal's handler may send while something is put there.
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        # As many as the broker may have room for, going by its last answers.
        self._batch_max = BATCH_TASKS_MAX
        self._unacknowledged = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="penstock-grpc", daemon=True)
        self._thread.start()

    def send(self, message: Outgoing, future: Future[None]) -> None:
        settings = self._settings
        with self._changed:
            has_room = self._changed.wait_for(self._has_room, settings.send_timeout_seconds)
            if self._closed:
                raise SendError(f"task {message.taskname} ({message.id}) was not sent: the client was closed")
            if not has_room:
                raise BufferFull(
                    f"task {message.taskname} ({message.id}) was not sent: {settings.buffer_messages_max}"
                    f" tasks wait for the broker at {settings.broker}; buffer_messages_max bounds them"
                    " (PENSTOCK_BUFFER_MESSAGES_MAX)"
                )
            self._unacknowledged += 1
        self._queue.put((message, future, time.monotonic() + settings.delivery_timeout_seconds))

    def _has_room(self) -> bool:
        return self._unacknowledged < self._settings.buffer_messages_max

    def _acknowledged(self, tasks: int) -> None:
        with self._changed:
            self._unacknowledged -= tasks
            self._changed.notify_all()

    def _run(self) -> None:
        waiting: list[_Waiting] = []
        while True:
            self._gather(waiting)
            if not waiting:
                return
            waiting = self._deliver(waiting)

    def _gather(self, waiting: list[_Waiting]) -> None:
        """Add what else is to be sent; wait only when there is nothing yet. None comes once it is closed."""
        while not self._closed and len(waiting) < BATCH_TASKS_MAX:
            try:
                more = self._queue.get(block=not waiting)
            except queue.Empty:
                return
            if more is None:
                self._closed = True
                return
            waiting.append(more)

    def _deliver(self, waiting: list[_Waiting]) -> list[_Waiting]:
        """Send the first ones; what has neither been acknowledged nor given up. Sent again under the same
        ids: the broker absorbs copies."""
        batch = waiting[: self._fitting(waiting)]
        later = waiting[len(batch) :]
        request = raw_pb2.RawSendTasksRequest(
            activations=[message.value for message, _, _ in batch]
        ).SerializeToString()
        try:
            response = producer_pb2.SendTasksResponse.FromString(
                self._call(request, timeout=5.0, metadata=self._metadata(request))
            )
        except DecodeError:
            self._fail(batch, "what answered there is no broker")
            return later
        except grpc.RpcError as error:
            return self._failed(batch, later, error)
        self._batch_max = max(self._batch_max, min(BATCH_TASKS_MAX, 2 * len(batch)))
        self._answered(batch, response.answers)
        return later

    def _fitting(self, waiting: Sequence[_Waiting]) -> int:
        """How many of them go into one call."""
        size = 0
        for count, (message, _, _) in enumerate(waiting[: self._batch_max], 1):
            size += len(message.value)
            if size >= BATCH_BYTES_MAX:
                return count
        return min(len(waiting), self._batch_max)

    def _answered(self, batch: list[_Waiting], answers: Sequence[producer_pb2.SendAnswer]) -> None:
        self._fail(batch[len(answers) :], "the broker's answer does not mention it")
        safe = 0
        for waiting, answer in zip(batch, answers, strict=False):
            if answer.result in _SAFE:
                waiting[1].set_result(None)
                safe += 1
            else:
                self._fail([waiting], f"the broker refused it: {answer.reason}")
        self._acknowledged(safe)

    def _metadata(self, request: bytes) -> tuple[tuple[str, str], ...]:
        secret = self._settings.grpc_shared_secret
        return ((signature.HEADER, signature.sign(secret, METHOD, request)),) if secret else ()

    def _failed(self, batch: list[_Waiting], later: list[_Waiting], error: grpc.RpcError) -> list[_Waiting]:
        """What is left to try after a call failed."""
        code, why = error.code(), f"{error.code().name.lower()}: {error.details()}"
        if code not in _TRANSIENT:
            self._fail(batch, why)
            return later
        # A broker takes all of a call or nothing: what fits may be a part of it.
        halved = code is grpc.StatusCode.RESOURCE_EXHAUSTED and len(batch) > 1
        if halved:
            self._batch_max = len(batch) // 2
        now = time.monotonic()
        # One that does not even fit alone must not keep the others from it.
        tried_next = batch + later if halved else later + batch
        left = [w for w in tried_next if now < w[2] and not self._closed]
        kept = {id(w) for w in left}
        self._fail([w for w in tried_next if id(w) not in kept], why)
        if left and not halved:
            time.sleep(RETRY_SECONDS)
        return left

    def _fail(self, batch: Sequence[_Waiting], why: str) -> None:
        """Each future is told; the log has one line for all."""
        failures = [
            SendError(
                f"task {message.taskname} ({message.id}) was not sent to the broker at"
                f" {self._settings.broker}: {why}"
            )
            for message, _, _ in batch
        ]
        if failures:
            more = f", and {len(failures) - 1} more with it" if len(failures) > 1 else ""
            log.error("%s%s", failures[0], more)
        for (_, future, _), failure in zip(batch, failures, strict=True):
            future.set_exception(failure)
        self._acknowledged(len(batch))

    def flush(self, seconds: float) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._unacknowledged == 0, seconds)
            return self._unacknowledged

    def close(self) -> None:
        self._closed = True
        left: list[_Waiting] = []
        while not self._queue.empty():
            waiting = self._queue.get_nowait()
            if waiting is not None:
                left.append(waiting)
        self._fail(left, "the client was closed")
        self._queue.put(None)
        self._thread.join()
        self._channel.close()
