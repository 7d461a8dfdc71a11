"""A broker of the same libraries that promises nothing: what P1 would cost without Penstock's promises.

``python -m benchmarks.bare PORT KAFKA TOPIC`` reads activations, parses them, writes them to SQLite (WAL,
``synchronous=FULL``, one transaction for all that waits), hands them out in the order of their arrival and
deletes them once they are reported complete. It knows no claims, leases, retries, delays, priorities of
namespaces, duplicates, checksums, books, metrics, limits, other brokers or ledger, and forgets everything
when it stops. What a task costs here is the libraries', not the broker's.
"""

from __future__ import annotations

import argparse
import asyncio
import struct
import sys
import tempfile
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, islice
from pathlib import Path

import apsw
import apsw.ext
import grpc
import uvloop
from confluent_kafka import Consumer

from benchmarks.load import SERVICE
from penstock_broker.server import SWITCH_INTERVAL_SECONDS, rarely_collect
from penstock_protocol.v1 import consumer_pb2, raw_pb2
from penstock_protocol.v1.activation_pb2 import TaskActivation

MESSAGES = 1024
ROWS = 256
TOKEN = struct.Struct(">q")
APPLIED = consumer_pb2.OUTCOME_ANSWER_APPLIED

Row = tuple[int, str, str, str, int, int, bytes]


class Bare:
    """One event loop, a thread that reads Kafka, a thread that writes SQLite; between them go batches."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1)
        self._database = apsw.Connection(str(folder / "bare.sqlite"), vfs="unix-excl")
        for name, value in (("locking_mode", "exclusive"), ("journal_mode", "wal"), ("synchronous", "FULL")):
            self._database.pragma(name, value)
        self._database.execute(
            "CREATE TABLE task (seq INTEGER PRIMARY KEY, application, namespace, id, partition, offset, body)"
        )
        self._arrived: list[Row] = []
        self._gone: list[int] = []
        self._ready: deque[Row] = deque()
        self._work, self._more = asyncio.Event(), asyncio.Event()
        self._written: asyncio.Future[None] = self._loop.create_future()
        self.committed = threading.Event()

    # -- on the consumer's thread

    def read(self, kafka: str, topic: str) -> None:
        consumer = Consumer(
            {"bootstrap.servers": kafka, "group.id": topic, "auto.offset.reset": "earliest",
             "enable.auto.commit": False}
        )  # fmt: skip
        consumer.subscribe([topic])
        numbers = count(1)
        while True:
            if self.committed.is_set():
                self.committed.clear()
                consumer.commit(asynchronous=True)
            first = consumer.poll(0.2)
            if first is None or first.error():
                continue
            rows: list[Row] = []
            for message in (first, *consumer.consume(MESSAGES - 1, 0)):
                body = message.value() or b""
                task = TaskActivation.FromString(body)
                rows.append(
                    (next(numbers), task.application, task.namespace, task.id,
                     message.partition() or 0, message.offset() or 0, body)
                )  # fmt: skip
            self._loop.call_soon_threadsafe(self._deliver, rows)

    # -- on the event loop

    def _deliver(self, rows: list[Row]) -> None:
        self._arrived += rows
        self._work.set()

    async def write(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            rows, self._arrived = self._arrived, []
            gone, self._gone = self._gone, []
            written, self._written = self._written, self._loop.create_future()
            await self._loop.run_in_executor(self._thread, self._transaction, rows, gone)
            written.set_result(None)
            self._ready += rows
            self._more.set()
            self.committed.set()

    def _transaction(self, rows: list[Row], gone: list[int]) -> None:
        with self._database:
            for at in range(0, len(rows), ROWS):
                part = rows[at : at + ROWS]
                values = ",".join(["(?,?,?,?,?,?,?)"] * len(part))
                self._database.execute(f"INSERT INTO task VALUES {values}", tuple(chain(*part)))
            for at in range(0, len(gone), ROWS):
                part_of = gone[at : at + ROWS]
                marks = ",".join("?" * len(part_of))
                self._database.execute(f"DELETE FROM task WHERE seq IN ({marks})", part_of)

    async def get_tasks(self, request: bytes, context: object) -> bytes:
        asked = consumer_pb2.GetTasksRequest.FromString(request)
        if not self._ready:
            self._more.clear()
            try:
                await asyncio.wait_for(self._more.wait(), asked.wait_ms / 1000)
            except TimeoutError:
                return b""
        response = raw_pb2.RawGetTasksResponse()
        for _ in islice(range(len(self._ready)), asked.max_tasks):
            row = self._ready.popleft()
            response.tasks.add(activation=row[-1], claim_token=TOKEN.pack(row[0]))
        return response.SerializeToString()

    async def set_task_statuses(self, request: bytes, context: object) -> bytes:
        outcomes = consumer_pb2.SetTaskStatusesRequest.FromString(request).outcomes
        self._gone += [TOKEN.unpack(outcome.claim_token)[0] for outcome in outcomes]
        self._work.set()
        await asyncio.shield(self._written)
        return consumer_pb2.SetTaskStatusesResponse(answers=[APPLIED] * len(outcomes)).SerializeToString()


async def serve(port: int, kafka: str, topic: str, folder: Path) -> None:
    bare = Bare(folder)
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "GetTasks": grpc.unary_unary_rpc_method_handler(bare.get_tasks),
        "SetTaskStatuses": grpc.unary_unary_rpc_method_handler(bare.set_task_statuses),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.strip("/"), handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    threading.Thread(target=bare.read, args=(kafka, topic), daemon=True).start()
    rarely_collect()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await bare.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("kafka")
    parser.add_argument("topic")
    options = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    with (
        tempfile.TemporaryDirectory(prefix="penstock-bare-") as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(serve(options.port, options.kafka, options.topic, Path(folder)))


if __name__ == "__main__":
    main()
