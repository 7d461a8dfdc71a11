"""Somebody sets the clock of a machine while tasks run, wait for their time, and expire."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.e2e.harness import Pool, eventually
from tests.faults.conftest import Figure

DAY, HOUR = 86_400, 3_600


class WallClock:
    """What the wall clock of a process is off by, in seconds."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / f"{name}.clock"
        self.jump(0)
        path = f"{Path(__file__).parent / 'clock'}:{Path(__file__).parents[2]}"
        self.environment = {"PYTHONPATH": path, "PENSTOCK_TEST_CLOCK": str(self._file)}

    def jump(self, seconds: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self._file)


@pytest.mark.timeout(180)
def test_the_clock_of_a_worker_jumps(direct_pool: Pool, dice: random.Random, figure: Figure) -> None:
    clock = WallClock(direct_pool.folder, "worker")
    broker = direct_pool.broker(LEASE_SECONDS="4")
    direct_pool.worker([broker], slots=4, **clock.environment)
    noop, sleep = (direct_pool.app(broker=broker.address).tasks[name] for name in ("noop", "sleep"))
    due: dict[str, float] = {}
    others: list[str] = []
    for jump in (DAY, -DAY, 0, -DAY, DAY):
        before = len(direct_pool.ended())
        for _ in range(20):
            countdown = dice.randrange(1, 5)
            now = time.time()
            due[noop.options(countdown=countdown, expires=300).delay().id] = now + countdown
            others.append(noop.options(expires=300).delay().id)
            others.append(sleep.delay(0.2).id)
        eventually("under way", lambda before=before: len(direct_pool.ended()) > before + 5)  # type: ignore[misc]
        clock.jump(jump)
    assert set(direct_pool.await_all([*due, *others]).values()) == {1}
    direct_pool.await_empty(broker)
    early = max(due[e.id] - e.at for e in direct_pool.executions() if e.what == "start" and e.id in due)
    lost = broker.metrics()["penstock_deliveries_lost_total"]
    figure(f"5 jumps of a day: none of {len(due)} started early (the closest {-early:.3f} s after its time)")
    assert early <= 0
    assert lost == 0, "leases do not go by the wall clock"


@pytest.mark.timeout(180)
def test_the_clock_of_a_broker_jumps(direct_pool: Pool, figure: Figure) -> None:
    """Leases and deadlines do not go by it; what waits for its time waits for what that clock shows."""
    clock = WallClock(direct_pool.folder, "broker")
    broker = direct_pool.broker(start=False, LEASE_SECONDS="4")
    broker.environment |= clock.environment
    broker.start()
    direct_pool.worker([broker], slots=4)
    app = direct_pool.app(broker=broker.address)
    noop, gate = app.tasks["noop"], direct_pool.folder / "gate"
    running = [app.tasks["wait_for"].delay(str(gate)).wait(10).id for _ in range(2)]
    eventually("they run", lambda: direct_pool.started().keys() == set(running))
    ids, started_early = [], []
    for jump in (HOUR, 0, -HOUR, 0):
        delayed = noop.options(countdown=20).delay().wait(10)
        sent = time.monotonic()
        clock.jump(jump)
        now = [noop.delay(n).wait(10).id for n in range(100)]
        eventually("what need not wait is run", lambda now=now: set(now) <= direct_pool.ended().keys())  # type: ignore[misc]
        time.sleep(max(0, sent + 5 - time.monotonic()))  # longer than the lease
        if direct_pool.started()[delayed.id]:
            started_early.append(jump)
        ids += [*now, delayed.id]
    lost = broker.metrics()["penstock_deliveries_lost_total"]
    gate.touch()
    assert set(direct_pool.await_all([*running, *ids]).values()) == {1}
    direct_pool.await_empty(broker)
    figure(f"4 jumps of an hour: {lost:.0f} deliveries lost; delayed tasks early after {started_early}")
    assert lost == 0
    assert not started_early
