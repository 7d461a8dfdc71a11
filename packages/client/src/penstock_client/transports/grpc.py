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
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(settings.buffer_messages_max)
        self._unacknowledged = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="penstock-grpc", daemon=True)
        self._thread.start()

    def send(self, message: Outgoing, future: Future[None]) -> None:
        if self._closed:
            raise SendError(f"task {message.taskname} ({message.id}) was not sent: the client was closed")
        with self._changed:
            self._unacknowledged += 1
        waiting = (message, future, time.monotonic() + self._settings.delivery_timeout_seconds)
        try:
            self._queue.put(waiting, timeout=self._settings.send_timeout_seconds)
        except queue.Full:
            self._acknowledged(1)
            raise BufferFull(
                f"task {message.taskname} ({message.id}) was not sent: {self._settings.buffer_messages_max}"
                f" tasks wait for the broker at {self._settings.broker}; buffer_messages_max bounds them"
                " (PENSTOCK_BUFFER_MESSAGES_MAX)"
            ) from None

    def _acknowledged(self, tasks: int) -> None:
        with self._changed:
            self._unacknowledged -= tasks
            self._changed.notify_all()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, size = [first], len(first[0].value)
            while len(batch) < BATCH_TASKS_MAX and size < BATCH_BYTES_MAX:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    self._closed = True
                    break
                batch.append(more)
                size += len(more[0].value)
            self._deliver(batch)
            if self._closed:
                return

    def _deliver(self, batch: list[_Waiting]) -> None:
        """Until acknowledged or given up. Sent again under the same ids: the broker absorbs copies."""
        while batch:
            request = raw_pb2.RawSendTasksRequest(
                activations=[message.value for message, _, _ in batch]
            ).SerializeToString()
            try:
                response = producer_pb2.SendTasksResponse.FromString(
                    self._call(request, timeout=5.0, metadata=self._metadata(request))
                )
            except DecodeError:
                self._fail(batch, "what answered there is no broker")
                return
            except grpc.RpcError as error:
                batch = self._failed(batch, error)
                if batch:
                    time.sleep(RETRY_SECONDS)
                continue
            self._answered(batch, response.answers)
            return

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

    def _failed(self, batch: list[_Waiting], error: grpc.RpcError) -> list[_Waiting]:
        """What is left to try after a call failed."""
        code, detail = error.code(), error.details()
        now = time.monotonic()
        left = [w for w in batch if code in _TRANSIENT and now < w[2] and not self._closed]
        kept = {id(w) for w in left}
        self._fail([w for w in batch if id(w) not in kept], f"{code.name.lower()}: {detail}")
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
