"""Power cuts that lose what was not synced, full disks, slow disks: under real SQLite files."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.harness import Broker, Pool, eventually
from tests.faults.conftest import Figure
from tests.faults.disks import LoopDisk, loop_disk, shim, small_disk
from tests.faults.load import HELD_MAX, Load


def cut_power(broker: Broker, disk: LoopDisk) -> None:
    """The broker and everything not on the device are gone, as of one instant."""
    assert broker.process is not None
    marker = disk.path / "unsynced"
    marker.write_bytes(b"never synced" * 1_000)
    broker.process.send_signal(signal.SIGSTOP)
    disk.copy()
    broker.kill()
    disk.cut()
    assert not marker.exists() or not marker.read_bytes().strip(b"\0"), "what was never synced survived"
    marker.unlink(missing_ok=True)


@pytest.mark.timeout(600)
def test_power_cuts_lose_nothing(
    kafka_pool: Pool, tmp_path: Path, seconds: float, dice: random.Random, figure: Figure
) -> None:
    kafka_pool.create_topic(4)
    with loop_disk(tmp_path) as disk:
        broker = kafka_pool.broker(DB_PATH=str(disk.path / "broker.sqlite"), LEASE_SECONDS="3")
        load = Load(kafka_pool, [broker])
        cuts = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end or cuts < 2:
            time.sleep(dice.uniform(0.1, 2.0))  # the instant
            cut_power(broker, disk)
            broker.start()
            cuts += 1
            load.await_more()
        figure(f"{cuts} power cuts (loop-mounted ext4); {load.finish()}")
        broker.kill()
    assert load.twice <= cuts * 4 * HELD_MAX


@pytest.mark.timeout(300)
def test_a_disk_that_lies_about_its_syncs_is_caught(kafka_pool: Pool, tmp_path: Path) -> None:
    """The power cut is one: without syncs the database is older than what was acknowledged. The broker
    knows that from its ledger."""
    kafka_pool.create_topic(4)
    with loop_disk(tmp_path) as disk:
        broker = kafka_pool.broker(start=False, DB_PATH=str(disk.path / "broker.sqlite"))
        broker.environment |= shim(tmp_path, DISK_LIES="1")
        broker.start()
        os.sync()  # an empty database to come back to
        load = Load(kafka_pool, [broker])
        load.await_more()
        cut_power(broker, disk)
        broker.start(serving=False)
        assert broker.wait(60) == 1
        assert "is an old copy: it has written" in broker.text()
        load.stop_sending()
        for thread in load.raw:
            thread.stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("milliseconds", [50, 500])
def test_a_slow_disk_costs_no_lease(
    kafka_pool: Pool, tmp_path: Path, figure: Figure, request: pytest.FixtureRequest, milliseconds: int
) -> None:
    short = request.config.getoption("--short")
    kafka_pool.create_topic(4)
    broker = kafka_pool.broker(start=False, LEASE_SECONDS="5")
    broker.environment |= shim(tmp_path, DISK_SYNC_MS=str(milliseconds))
    app = kafka_pool.app()
    count = 2_000 if short else 20_000
    ids = [app.tasks["noop"].delay().id for _ in range(count)]
    assert app.flush() == 0
    broker.start()
    kafka_pool.worker([broker], slots=2)
    begun = time.monotonic()
    assert set(kafka_pool.await_all(ids, 200).values()) == {1}
    took = time.monotonic() - begun
    kafka_pool.await_empty(broker)
    metrics = broker.metrics()
    ticks, per_tick = metrics["penstock_commit_seconds_count"], 0.0
    per_tick = metrics["penstock_tick_rows_sum"] / ticks
    figure(
        f"{count} tasks in {took:.1f} s with {milliseconds} ms more for each sync:"
        f" {ticks:.0f} transactions of {per_tick:.0f} rows, {count / took:.0f} tasks/s"
    )
    assert metrics["penstock_deliveries_lost_total"] == 0


@pytest.mark.timeout(300)
def test_a_full_disk(kafka_pool: Pool, tmp_path: Path, figure: Figure) -> None:
    """The intake pauses before; what is stored is run and reported; with room it goes on by itself."""
    kafka_pool.create_topic(2)
    with small_disk(tmp_path, "512m") as path:
        broker = kafka_pool.broker(DB_PATH=str(path / "broker.sqlite"))
        load = Load(kafka_pool, [broker], per_second=200)
        ballast = path / "ballast"

        def state() -> list[str]:
            """The intake's state and why, of the metrics."""
            return [
                name
                for name, value in broker.metrics().items()
                if name.startswith("penstock_intake_state{") and value
            ]

        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:  # to the last byte
                file.write(bytes(1 << 20))
        eventually("the intake pauses", lambda: any("state=paused" in name for name in state()))
        paused = state()
        eventually("what is stored is done", lambda: broker.held() == 0)
        done = load.done()
        assert broker.is_serving()
        ballast.unlink()
        load.await_more(1_000)
        assert not any("state=paused" in name for name in state())
        figure(f"{paused} at {done} tasks done; {load.finish()}")
        broker.kill()
    assert load.twice <= 2 * HELD_MAX
