"""A worker that speaks the wire itself, and writes down every hand-out and every answer."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import grpc

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1.consumer_pb2_grpc import ConsumerServiceStub

ACCEPTED = (pb.OUTCOME_ANSWER_APPLIED, pb.OUTCOME_ANSWER_DUPLICATE)


class HandOut(NamedTuple):
    id: str
    broker: str
    at: float


class WireWorker:
    """Claims batches of an application from brokers, and reports them complete until it is answered.

    Each stream has one call at a time, so that what it was handed out and what it was answered is in
    the order it happened.
    """

    def __init__(self, application: str, brokers: Sequence[str], batch: int = 50, streams: int = 2) -> None:
        self.application = application
        self.batch = batch
        self.handed_out: list[HandOut] = []
        # id -> when each acceptance of its outcome was received.
        self.accepted: dict[str, list[float]] = {}
        self.answers: dict[int, int] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._stream, args=(broker,), name=f"wire-{broker}", daemon=True)
            for broker in brokers
            for _ in range(streams)
        ]

    def __enter__(self) -> WireWorker:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)

    def add(self, broker: str) -> None:
        """Serve one more broker from now on."""
        thread = threading.Thread(target=self._stream, args=(broker,), name=f"wire-{broker}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _stream(self, broker: str) -> None:
        with grpc.insecure_channel(broker, options=[("grpc.max_reconnect_backoff_ms", 500)]) as channel:
            stub = ConsumerServiceStub(channel)
            while not self._stopping.is_set():
                try:
                    self._turn(stub, broker)
                except grpc.RpcError:
                    # It is away: the channel comes back by itself.
                    self._stopping.wait(0.05)

    def _turn(self, stub: ConsumerServiceStub, broker: str) -> None:
        asked = pb.GetTasksRequest(
            request_id=uuid.uuid4().hex, application=self.application, max_tasks=self.batch, wait_ms=500
        )
        tasks = stub.GetTasks(asked, timeout=10).tasks
        now = time.monotonic()
        self.handed_out += [HandOut(task.activation.id, broker, now) for task in tasks]
        if tasks:
            self._report(stub, tasks)

    def _report(self, stub: ConsumerServiceStub, tasks: Sequence[pb.ClaimedTask]) -> None:
        report = pb.SetTaskStatusesRequest(
            outcomes=[
                pb.TaskOutcome(claim_token=task.claim_token, status=pb.TASK_OUTCOME_STATUS_COMPLETE)
                for task in tasks
            ]
        )
        answers: Sequence[int] = ()
        while not answers and not self._stopping.is_set():
            with contextlib.suppress(grpc.RpcError):
                answers = stub.SetTaskStatuses(report, timeout=15).answers
            if not answers:
                self._stopping.wait(0.05)
        now = time.monotonic()
        with self._lock:
            for task, answer in zip(tasks, answers, strict=bool(answers)):
                self.answers[answer] = self.answers.get(answer, 0) + 1
                if answer in ACCEPTED:
                    self.accepted.setdefault(task.activation.id, []).append(now)

    def assert_nothing_accepted_ran_again(self) -> None:
        """One accepted outcome each, and no hand-out after it, on any broker."""
        twice = [id for id, times in self.accepted.items() if len(times) > 1]
        assert not twice, f"{len(twice)} ids were accepted more than once, e.g. {twice[:3]}"
        again = [
            out for out in self.handed_out if out.id in self.accepted and out.at > self.accepted[out.id][0]
        ]
        assert not again, f"{len(again)} ids were handed out after their outcome was accepted: {again[:3]}"
