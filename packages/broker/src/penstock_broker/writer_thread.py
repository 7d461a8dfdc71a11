"""The thread that uses the database: only there may the broker wait for the disk."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from penstock_broker.ingest.event_loop import EventLoop

A = TypeVar("A")
T = TypeVar("T")


class WriterThread:
    """Made on the event loop, which hands it one thing after the other: a tick, or what is done between two.

    For a tick of one task, ``run_in_executor`` costs as much as the transaction: docs/adr/0003.
    """

    def __init__(self) -> None:
        self._loop = EventLoop()
        self._waiting: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[Any], Any], object] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[A], T], of: A) -> asyncio.Future[T]:
        """What ``work(of)`` returns or raises."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.put((done, work, of))
        return done

    def stop(self) -> None:
        """Wait for what was handed over."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (handed := self._waiting.get()) is not None:
            done, work, of = handed
            try:
                result = work(of)
            except BaseException as error:  # noqa: BLE001 - whoever waits is told
                self._loop.tell(_tell, done, done.set_exception, error)
            else:
                self._loop.tell(_tell, done, done.set_result, result)


def _tell(done: asyncio.Future[Any], end: Callable[[Any], None], what: object) -> None:
    if not done.done():  # or whoever waited has given up
        end(what)
