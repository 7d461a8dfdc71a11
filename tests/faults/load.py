"""Tasks sent, run and reported all the time while faults happen; and how each of them must have ended.

``python -m tests.faults.load ADDRESS NAMESPACE`` sends a thousand a second to a broker, until killed.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import grpc

from penstock_client.task import TaskRef
from penstock_protocol.v1 import producer_pb2
from penstock_protocol.v1.activation_pb2 import TaskActivation
from tests.e2e.harness import Broker, Pool, Process, eventually
from tests.e2e.raw_worker import Acknowledgements, RawWorker

# What one worker of two slots, or one raw worker, can hold: what a fault of it can make run twice.
HELD_MAX = 64


class Sent(NamedTuple):
    """Ids: acknowledged, and so promised; given up by the client, and so perhaps there all the same."""

    promised: set[str]
    doubtful: set[str]


class Producer(threading.Thread):
    """Sends at a steady rate until stopped."""

    def __init__(self, pool: Pool, taskname: str, per_second: int, *arguments: object) -> None:
        super().__init__(name=f"producer of {taskname}", daemon=True)
        self._app = pool.app()
        self._task = self._app.tasks[taskname]
        self._arguments = arguments
        self._pause = 1 / per_second
        self._stopping = threading.Event()
        self._refs: list[TaskRef] = []

    def run(self) -> None:
        while not self._stopping.wait(self._pause):
            self._refs.append(self._task.delay(*self._arguments))

    def stop(self) -> Sent:
        self._stopping.set()
        self.join()
        assert self._app.flush() == 0, "sends that are neither acknowledged nor given up"
        failed = {ref.id for ref in self._refs if ref.future.exception() is not None}
        return Sent({ref.id for ref in self._refs} - failed, failed)


class Load:
    """Half of it is run by workers, half by raw workers that remember what was acknowledged to them."""

    def __init__(
        self,
        pool: Pool,
        brokers: Sequence[Broker],
        *,
        addresses: Sequence[str] = (),
        workers: int = 2,
        per_second: int = 400,
    ) -> None:
        """``addresses``: where the brokers are for the workers."""
        self.pool = pool
        self.brokers = list(brokers)
        self.books = Acknowledgements()
        where = addresses or [broker.address for broker in brokers]
        self.workers = [pool.worker(where, name=f"worker-{n}") for n in range(workers)]
        self.raw = [RawWorker(address, self.books) for address in where for _ in range(2)]
        self._raw_producer = Producer(pool, "raw.noop", per_second)
        self._producer = Producer(pool, "sleep", max(1, per_second // 8), 0.005)
        for thread in (*self.raw, self._raw_producer, self._producer):
            thread.start()
        eventually("under load", lambda: len(self.books.acknowledged) > 100 and pool.ended())

    def done(self) -> int:
        return len(self.books.acknowledged) + len(self.pool.ended())

    def await_more(self, count: int = 200, seconds: float = 60.0) -> None:
        """The pool works."""
        before = self.done()
        eventually(f"{count} more tasks are done", lambda: self.done() > before + count, seconds)

    def stop_sending(self) -> tuple[Sent, Sent]:
        """What was sent: to raw workers, to workers."""
        return self._raw_producer.stop(), self._producer.stop()

    def finish(self, seconds: float = 120.0) -> str:
        """No fault any more: all that was sent has ended, and nothing acknowledged ran again.

        Returns a line of figures.
        """
        raw, real = self.stop_sending()
        acknowledged = self.books.acknowledged
        eventually("all sent to raw workers is acknowledged", lambda: raw.promised <= acknowledged, seconds)
        eventually("all has run", lambda: real.promised <= self.pool.ended().keys(), seconds)
        self.pool.await_empty(*self.brokers)
        for worker in self.raw:
            worker.stop()
        ended = self.pool.ended()
        again = self.books.violations
        assert again == [], f"acknowledged, and handed out again: {again[:20]}"
        assert acknowledged <= raw.promised | raw.doubtful, "never sent"
        assert ended.keys() <= real.promised | real.doubtful, "never sent"
        twice = sum(n - 1 for n in self.books.handed_out.values()), sum(n - 1 for n in ended.values())
        self.twice = sum(twice)
        given_up = len(raw.doubtful) + len(real.doubtful)
        return (
            f"{len(raw.promised) + len(real.promised)} tasks, each ended; handed out again, never after an"
            f" acknowledgement: {twice[0]} to raw workers; run twice by workers: {twice[1]}"
            + (f"; {given_up} sends given up by the client" if given_up else "")
        )

    def processes(self) -> list[Process]:
        return [*self.brokers, *self.workers]


def fill(address: str, rows: int, *, namespace: str = "raw", payload: bytes = b"") -> None:
    """Put pending activations into a broker, as fast as it takes them."""
    with grpc.insecure_channel(address) as channel:
        send = channel.unary_unary(
            "/penstock.v1.ProducerService/SendTasks",
            request_serializer=producer_pb2.SendTasksRequest.SerializeToString,
            response_deserializer=producer_pb2.SendTasksResponse.FromString,
        )
        one = TaskActivation(application="e2e", namespace=namespace, taskname=f"{namespace}.noop")
        one.parameters_bytes = payload
        for at in range(0, rows, 1_000):
            request = producer_pb2.SendTasksRequest()
            for _ in range(min(1_000, rows - at)):
                one.id = uuid.uuid4().hex
                one.received_at.GetCurrentTime()
                request.activations.append(one)
            send(request, timeout=60)


if __name__ == "__main__":
    while True:
        fill(sys.argv[1], 50, namespace=sys.argv[2])
        time.sleep(0.05)
