"""Workers that wait for work, and their match with rows that become ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from penstock_broker.domain.activation import Activation
from penstock_broker.store.inflight import Inflight


class Wanted(NamedTuple):
    """What a worker serves. No application: any; no namespaces: all of the application's."""

    application: str | None
    namespaces: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Waiter:
    rows_max: int
    worker: str
    future: asyncio.Future[list[Activation]]


class Waiting:
    """Long polls, grouped by what they want and answered first come, first served."""

    def __init__(self, store: Inflight, bytes_max: int) -> None:
        self._store = store
        self._bytes_max = bytes_max
        # Ordered sets: whoever gives up leaves at once.
        self._waiters: dict[Wanted, dict[_Waiter, None]] = {}
        self._closed = False
        # Told how many rows each match handed out.
        self.on_claimed: Callable[[list[Activation]], None] = lambda rows: None
        store.writer.on_committed.append(self._match)

    def __len__(self) -> int:
        return sum(len(waiters) for waiters in self._waiters.values())

    def claim(
        self, wanted: Wanted, rows_max: int, worker: str = "", tokenless: bool = False
    ) -> list[Activation]:
        """What is ready now."""
        if self._closed:
            return []
        rows = self._store.claim(
            wanted.application, wanted.namespaces, rows_max, self._bytes_max, worker, tokenless
        )
        self.on_claimed(rows)
        return rows

    async def wait(self, wanted: Wanted, rows_max: int, seconds: float, worker: str = "") -> list[Activation]:
        """What is ready now, or becomes ready within ``seconds``; empty when nothing did.

        Cancelled after its match, the claims go back.
        """
        rows = self.claim(wanted, rows_max, worker)
        if rows or self._closed or seconds <= 0:
            return rows
        waiter = _Waiter(rows_max, worker, asyncio.get_running_loop().create_future())
        self._waiters.setdefault(wanted, {})[waiter] = None
        timer = asyncio.get_running_loop().call_later(seconds, self._give_up, waiter)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled():
                self._store.release(waiter.future.result())
            raise
        finally:
            timer.cancel()
            self._leave(wanted, waiter)

    def _leave(self, wanted: Wanted, waiter: _Waiter) -> None:
        if (waiters := self._waiters.get(wanted)) is not None:
            waiters.pop(waiter, None)
            if not waiters:
                del self._waiters[wanted]

    @staticmethod
    def _give_up(waiter: _Waiter) -> None:
        if not waiter.future.done():
            waiter.future.set_result([])

    def _match(self) -> None:
        """Hand out what is ready to those who wait, shared among them."""
        if not self._store.memory.index.rows:
            return
        for wanted in list(self._waiters):
            waiters = self._waiters[wanted]
            for waiter in list(waiters):
                if waiter.future.done():
                    del waiters[waiter]
                    continue
                share = max(1, -(-self._store.memory.index.rows // len(waiters)))
                rows = self.claim(wanted, min(waiter.rows_max, share), waiter.worker)
                if rows:
                    del waiters[waiter]
                    waiter.future.set_result(rows)
                elif not self._store.memory.index.any_ready(*wanted):
                    break

    def close(self) -> None:
        """Answer every poll empty and claim nothing any more."""
        self._closed = True
        for waiters in self._waiters.values():
            for waiter in waiters:
                self._give_up(waiter)
        self._waiters.clear()
