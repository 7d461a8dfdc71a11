"""Brokers and workers come, go and are killed, under load: nothing is lost, nothing accepted runs again."""

from __future__ import annotations

import itertools
import signal
import threading

import psutil
import pytest

from tests.e2e.pool import Pool, Pools
from tests.e2e.processes import Broker
from tests.e2e.wire import WireWorker

WIRE = "wire"


def test_three_brokers_twelve_workers(pools: Pools) -> None:
    """Twelve partitions, 20,000 tasks: each runs once."""
    pool = pools.pool(partitions=12)
    brokers = pool.start_brokers(3)
    pool.await_partitions(brokers, 12)
    pool.start_workers(12, slots=2)
    ids = pool.send(pool.tasks.work.delay, 20_000)

    pool.await_ended(ids, seconds=150)
    pool.await_drained()
    assert len(set(ids)) == 20_000
    assert pool.ledger.runs.keys() == set(ids)
    assert pool.ledger.repeated() == {}
    assert pool.total("penstock_tasks_finished_total", outcome="done") == 20_000
    # All had a part in it.
    for broker in brokers:
        assert broker.metrics().total("penstock_tasks_finished_total", outcome="done") > 0
    parents = {psutil.Process(run.pid).ppid() for runs in pool.ledger.runs.values() for run in runs}
    assert parents == {worker.pid for worker in pool.workers}


def test_killed_broker_comes_back(pools: Pools) -> None:
    """SIGKILL three times under load, with real workers and one that writes down every answer."""
    pool = pools.pool(partitions=4)
    victim, other = pool.start_brokers(2)
    pool.await_partitions([victim, other], 4)
    loads = pool.client(WIRE)
    pool.start_workers(2, slots=2)
    ids = pool.send(lambda n: pool.tasks.work.delay(n, seconds=0.01), 1500)
    with WireWorker(WIRE, [victim.address, other.address]) as wire:
        load_ids: list[str] = []
        for kill in range(3):
            before = len(wire.accepted)
            load_ids += pool.send(loads.work.delay, 4000)
            pool.until(lambda before=before: len(wire.accepted) > before + 1000, f"load {kill} is under way")  # type: ignore[misc]
            victim.kill()
            victim.restart()
        pool.until(lambda: wire.accepted.keys() >= set(load_ids), lambda: f"{len(wire.accepted)} of 12000")
        pool.await_ended(ids)
        pool.await_drained()
    wire.assert_nothing_accepted_ran_again()
    assert_repeats_were_refused(pool)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_brokers_join_and_leave_while_producing(pools: Pools, number: signal.Signals) -> None:
    """Partitions move; what was accepted on one broker does not run again on another."""
    pool = pools.pool(partitions=12)
    leaver, stayer = pool.start_brokers(2)
    pool.await_partitions([leaver, stayer], 12)
    joiner = pool.add_broker()
    # The workers know it before it is there.
    pool.start_workers(2, slots=2)
    with Producing(pool) as producing, WireWorker(WIRE, [b.address for b in pool.brokers]) as wire:
        pool.until(lambda: len(wire.accepted) > 1000, "work is under way")
        joiner.restart()
        pool.await_partitions(pool.brokers, 12)
        await_more(pool, wire)

        leaver.send(number)
        assert leaver.wait(10) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        pool.await_partitions([stayer, joiner], 12)
        await_more(pool, wire)
        # It comes back for what is its own.
        leaver.restart()
        pool.await_partitions(pool.brokers, 12)
        await_more(pool, wire)

        producing.stop()
        pool.until(
            lambda: wire.accepted.keys() >= producing.wire_ids,
            lambda: f"{len(wire.accepted)} of {len(producing.wire_ids)}; {pool.state()}",
        )
        pool.await_ended(list(producing.worker_ids))
        pool.await_drained()
    wire.assert_nothing_accepted_ran_again()
    assert_repeats_were_refused(pool)


def test_killed_workers(pools: Pools) -> None:
    """What they were running runs elsewhere; their children do not outlive them."""
    pool = pools.pool()
    pool.start_brokers(1, LEASE_SECONDS="3")
    workers = pool.start_workers(3, slots=2)
    ids = pool.send(lambda n: pool.tasks.work.delay(n, seconds=0.02), 2000)

    killed: set[int] = set()
    for victim in workers[:2]:
        before = len(pool.ledger.ended)
        pool.until(lambda before=before: len(pool.ledger.ended) > before + 200, "work is under way")  # type: ignore[misc]
        children = victim.children()
        killed |= {child.pid for child in children}
        victim.kill()
        pool.until(lambda children=children: not any(map(alive, children)), "its children end too")  # type: ignore[misc]
    # A single child: its worker goes on without it.
    child = next(child for child in workers[2].children() if "spawn_main" in " ".join(child.cmdline()))
    killed.add(child.pid)
    child.kill()

    pool.await_ended(ids)
    pool.await_drained()
    for id, runs in pool.ledger.repeated().items():
        assert {run.pid for run in runs} & killed, f"{id} ran twice, and no worker of it was killed: {runs}"


def test_sigterm_under_load(pools: Pools) -> None:
    """A worker and a broker end with 0, in time; nothing runs again."""
    pool = pools.pool()
    stopped, other = pool.start_brokers(2)
    pool.await_partitions([stopped, other], 4)
    leaving, _ = pool.start_workers(2, slots=2)
    loads = pool.client(WIRE)
    load_ids = pool.send(loads.work.delay, 6000)
    ids = pool.send(lambda n: pool.tasks.work.delay(n, seconds=0.02), 1500)
    with WireWorker(WIRE, [stopped.address, other.address]) as wire:
        pool.until(lambda: len(pool.ledger.ended) > 100 and len(wire.accepted) > 100, "work is under way")
        assert leaving.terminate(40) == 0
        done = len(pool.ledger.ended)
        pool.until(lambda: len(pool.ledger.ended) > done + 100, "the other worker goes on")
        assert stopped.terminate(10) == 0
        stopped.restart()
        pool.until(lambda: wire.accepted.keys() >= set(load_ids), lambda: f"{len(wire.accepted)} of 6000")
        pool.await_ended(ids)
        pool.await_drained()
    wire.assert_nothing_accepted_ran_again()
    assert pool.ledger.repeated() == {}
    assert all(run.ended for runs in pool.ledger.runs.values() for run in runs), "a task was cut off"


class Producing:
    """Sends tasks for the workers and for the wire until stopped."""

    def __init__(self, pool: Pool) -> None:
        self.worker_ids: set[str] = set()
        self.wire_ids: set[str] = set()
        self._worker_tasks = pool.tasks
        self._wire_tasks = pool.client(WIRE)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None

    def __enter__(self) -> Producing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def stop(self) -> None:
        """All that was sent is safe in Kafka when this returns."""
        self.__exit__()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for round in itertools.count():
                if self._stopping.is_set():
                    return
                wire = [self._wire_tasks.work.delay(round) for _ in range(100)]
                workers = [self._worker_tasks.work.delay(round) for _ in range(10)]
                self.wire_ids |= {ref.wait(120).id for ref in wire}
                self.worker_ids |= {ref.wait(120).id for ref in workers}
                # Steady, not as fast as can be.
                self._stopping.wait(0.1)
        except Exception as error:  # noqa: BLE001 - raised by stop()
            self._error = error


def await_more(pool: Pool, wire: WireWorker) -> None:
    done, accepted = len(pool.ledger.ended), len(wire.accepted)
    pool.until(
        lambda: len(pool.ledger.ended) > done + 50 and len(wire.accepted) > accepted + 500,
        lambda: f"work goes on; {pool.state()}",
    )


def assert_repeats_were_refused(pool: Pool) -> None:
    """Of several executions of an attempt one was accepted; the others' workers were told so."""
    repeats = sum(
        len([run for run in runs if run.ended]) - len({run.attempt for run in runs})
        for runs in pool.ledger.repeated().values()
    )
    refused = sum(worker.log().count("outcome not accepted") for worker in pool.workers)
    assert repeats <= refused, f"{repeats} executions too many, {refused} reports refused"


def alive(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
