"""A worker that runs nothing and remembers everything: what it was handed, and what was acknowledged."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc

from penstock_protocol.v1 import consumer_pb2 as pb

SERVICE = "/penstock.v1.ConsumerService/"
ACKNOWLEDGED = (pb.OUTCOME_ANSWER_APPLIED, pb.OUTCOME_ANSWER_DUPLICATE)


class Acknowledgements:
    """Shared by the raw workers of a test: an acknowledged id must never be handed out again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.acknowledged: set[str] = set()
        self.handed_out: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self.violations: list[str] = []

    def handed(self, ids: Sequence[str], where: str) -> None:
        with self._lock:
            self.handed_out.update(ids)
            self.violations += [f"{id} at {where}" for id in ids if id in self.acknowledged]

    def answered(self, id: str, answer: int) -> None:
        with self._lock:
            self.answers[answer] += 1
            if answer in ACKNOWLEDGED:
                self.acknowledged.add(id)


class RawWorker(threading.Thread):
    """Claims batches from one broker and completes them, whatever happens to the broker."""

    def __init__(
        self, address: str, books: Acknowledgements, *, namespace: str = "raw", batch: int = 20
    ) -> None:
        super().__init__(name=f"raw worker of {address}", daemon=True)
        self.address = address
        self.books = books
        self._namespace = namespace
        self._batch = batch
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        self.join(30)
        assert not self.is_alive()

    def run(self) -> None:
        with grpc.insecure_channel(
            self.address, options=(("grpc.max_reconnect_backoff_ms", 500),)
        ) as channel:
            get = channel.unary_unary(
                SERVICE + "GetTasks",
                request_serializer=pb.GetTasksRequest.SerializeToString,
                response_deserializer=pb.GetTasksResponse.FromString,
            )
            report = channel.unary_unary(
                SERVICE + "SetTaskStatuses",
                request_serializer=pb.SetTaskStatusesRequest.SerializeToString,
                response_deserializer=pb.SetTaskStatusesResponse.FromString,
            )
            while not self._stopping.is_set():
                request = pb.GetTasksRequest(
                    request_id=uuid.uuid4().hex, application="e2e", namespaces=[self._namespace],
                    max_tasks=self._batch, wait_ms=200,
                )  # fmt: skip
                try:
                    claimed = get(request, timeout=5).tasks
                except grpc.RpcError:
                    time.sleep(0.05)
                    continue
                if claimed:
                    self._complete(report, claimed)

    def _complete(
        self,
        report: Any,
        claimed: Sequence[pb.ClaimedTask],
    ) -> None:
        """Report until there is an answer: the token stays good over a restart."""
        ids = [task.activation.id for task in claimed]
        self.books.handed(ids, self.address)
        outcomes = [
            pb.TaskOutcome(claim_token=task.claim_token, status=pb.TASK_OUTCOME_STATUS_COMPLETE)
            for task in claimed
        ]
        while True:
            try:
                answers = report(pb.SetTaskStatusesRequest(outcomes=outcomes), timeout=15).answers
            except grpc.RpcError:
                if self._stopping.is_set():
                    return
                time.sleep(0.05)
                continue
            for id, answer in zip(ids, answers, strict=True):
                self.books.answered(id, answer)
            return
