"""The thread that ticks are written on."""

from __future__ import annotations

import asyncio
import threading

import pytest

from penstock_broker.store.batch import Batch, Written
from penstock_broker.writer_thread import WriterThread


async def test_ticks_are_written_one_after_the_other_on_a_thread_of_their_own() -> None:
    thread, wrote = WriterThread(), []

    def write(batch: Batch) -> Written:
        wrote.append((batch, threading.current_thread().name))
        return Written()

    batches = [Batch() for _ in range(3)]
    written = await asyncio.gather(*(thread.run(write, batch) for batch in batches))
    thread.stop()
    assert [id(batch) for batch, _ in wrote] == [id(batch) for batch in batches]
    assert {name for _, name in wrote} == {"writer"}
    assert all(isinstance(one, Written) for one in written)


async def test_what_a_tick_raises_is_raised_and_the_next_is_written() -> None:
    thread = WriterThread()

    def fail(batch: Batch) -> Written:
        raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk"):
        await thread.run(fail, Batch())
    assert isinstance(await thread.run(lambda batch: Written(), Batch()), Written)
    thread.stop()


async def test_whoever_gives_up_and_whoever_stops_ends_no_tick() -> None:
    thread, begun, goes_on, ended = WriterThread(), threading.Event(), threading.Event(), threading.Event()

    def write(batch: Batch) -> Written:
        begun.set()
        goes_on.wait()
        ended.set()
        return Written()

    waiting = thread.run(write, Batch())
    await asyncio.to_thread(begun.wait)
    waiting.cancel()
    stopping = asyncio.create_task(asyncio.to_thread(thread.stop))
    await asyncio.sleep(0.05)
    assert not stopping.done()
    goes_on.set()
    await stopping
    assert ended.is_set()
