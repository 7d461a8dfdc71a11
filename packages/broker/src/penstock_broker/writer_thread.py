"""The thread that ticks are written on: only there may the broker wait for the disk."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

from penstock_broker.ingest.event_loop import EventLoop
from penstock_broker.store.batch import Batch, Written

_Tick = tuple["asyncio.Future[Written]", Callable[[Batch], Written], Batch]


class WriterThread:
    """Made on the event loop, which hands it one tick after the other.

    For a tick of one task, ``run_in_executor`` costs as much as the transaction: docs/adr/0003.
    """

    def __init__(self) -> None:
        self._loop = EventLoop()
        self._ticks: queue.SimpleQueue[_Tick | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def run(self, write: Callable[[Batch], Written], batch: Batch) -> asyncio.Future[Written]:
        """What ``write(batch)`` returns or raises."""
        done: asyncio.Future[Written] = asyncio.get_running_loop().create_future()
        self._ticks.put((done, write, batch))
        return done

    def stop(self) -> None:
        """Wait for the tick that is being written."""
        self._ticks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (tick := self._ticks.get()) is not None:
            done, write, batch = tick
            try:
                written = write(batch)
            except BaseException as error:  # noqa: BLE001 - whoever waits is told
                self._loop.tell(_tell, done, done.set_exception, error)
            else:
                self._loop.tell(_tell, done, done.set_result, written)


def _tell(done: asyncio.Future[Written], end: Callable[[Any], None], what: object) -> None:
    if not done.done():  # or whoever waited has given up
        end(what)
