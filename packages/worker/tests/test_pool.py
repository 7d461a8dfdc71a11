"""A pool with real children, on a machine that does what a test wants."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import psutil
import pytest
from memory_broker import MemoryBroker
from worker_runs import TESTS, appears

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker.claim import Claim
from penstock_worker.frames import Assignment, Outcome
from penstock_worker.link import BrokerLink
from penstock_worker.metrics import Metrics
from penstock_worker.pool import Pool


class Run:
    """A pool of one child, and what its claims ended in."""

    def __init__(self) -> None:
        self.link = BrokerLink("127.0.0.1:1", None)
        self.ended: asyncio.Queue[tuple[Claim, Outcome]] = asyncio.Queue()
        self.pool = Pool(
            "worker_tasks:app", 1, lambda *end: self.ended.put_nowait(end), lambda: None, Metrics()
        )
        self._numbers = count(1)

    def claim(self, taskname: str, *args: object, deadline_seconds: float = 60.0) -> Claim:
        broker = MemoryBroker()
        broker.put(taskname, *args)
        activation = broker.pending.pop().activation.SerializeToString()
        return Claim(self.link, Assignment(next(self._numbers), activation, b"", 1, None), deadline_seconds)

    async def outcomes(self, number: int) -> dict[Claim, Outcome]:
        return dict([await self.ended.get() for _ in range(number)])

    async def warm_up(self) -> None:
        """Short tasks, until others wait behind the one that runs."""
        await self.pool.children.loaded
        while not self.pool.prefetch:
            self.pool.add([self.claim("noop")])
            await self.ended.get()


@pytest.fixture
async def run(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Run]:
    monkeypatch.chdir(TESTS)
    run = Run()
    run.pool.children.start(1)
    watching = asyncio.create_task(run.pool.watch())
    yield run
    watching.cancel()
    await run.pool.children.close()
    await run.link.close()


async def test_a_child_that_leaves_behind_what_may_not_be_killed_is_replaced(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a process its task has started as another user."""

    def not_permitted(group: int, number: int) -> None:
        raise PermissionError

    with monkeypatch.context() as machine:
        machine.setattr(os, "killpg", not_permitted)
        dying, after = run.claim("die", "exit"), run.claim("noop")
        await run.warm_up()
        run.pool.add([dying, after])
        outcomes = await run.outcomes(2)
    assert outcomes[dying].status == pb.TASK_OUTCOME_STATUS_WORKER_DIED
    assert outcomes[after].status == pb.TASK_OUTCOME_STATUS_COMPLETE


async def test_the_next_task_is_not_killed_in_place_of_one_that_has_just_ended(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, next_gate = tmp_path / "gate", tmp_path / "next"
    next_started = tmp_path / "next.started"
    killpg = os.killpg

    def slow_killpg(group: int, number: int) -> None:
        if number == signal.SIGCONT:
            gate.touch()
        killpg(group, number)
        # Others have the processor, until the child is dead or at the next task.
        while number == signal.SIGCONT and psutil.pid_exists(group) and not next_started.exists():
            time.sleep(0.005)

    monkeypatch.setattr(os, "killpg", slow_killpg)
    await run.warm_up()
    late, next_one = run.claim("block", str(gate), deadline_seconds=0.05), run.claim("block", str(next_gate))
    run.pool.add([late, next_one])
    await run.ended.get()
    await appears(next_started)
    next_gate.touch()
    assert (await run.outcomes(1))[next_one].status == pb.TASK_OUTCOME_STATUS_COMPLETE


async def test_what_waits_goes_back_when_children_can_no_longer_load_the_application(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    monkeypatch.setenv("WORKER_TASKS_BROKEN", str(broken))
    await run.warm_up()
    broken.touch()
    claims = [run.claim("die", "exit"), *(run.claim("noop") for _ in range(3))]
    run.pool.add(claims)
    outcomes = await run.outcomes(4)
    assert all(outcomes[claim].release_reason == pb.RELEASE_REASON_SURPLUS for claim in claims[1:])


async def test_what_a_child_gives_back_while_stopping_goes_back_to_its_broker(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else what waits behind the long task is not with the child any more.
    monkeypatch.setattr("penstock_worker.pool.BLOCKED_SECONDS", 600.0)
    gate = tmp_path / "gate"
    await run.warm_up()
    running, waiting = run.claim("block", str(gate)), run.claim("noop")
    run.pool.add([running, waiting])
    await appears(tmp_path / "gate.started")
    run.pool.stop_starting()
    (child,) = run.pool.children
    while child.withdrawing:  # noqa: ASYNC110 - the test's timeout ends it
        await asyncio.sleep(0.005)
    gate.touch()
    outcomes = await run.outcomes(2)
    assert outcomes[waiting].release_reason == pb.RELEASE_REASON_SHUTDOWN
    assert outcomes[running].status == pb.TASK_OUTCOME_STATUS_COMPLETE
    await run.pool.wait_idle()
