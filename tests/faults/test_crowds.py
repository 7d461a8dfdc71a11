"""Very many workers, very many rows, one namespace that floods: the figures, and that all goes on."""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Iterator

import grpc
import psutil
import pytest

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1 import producer_pb2
from penstock_protocol.v1.activation_pb2 import TaskActivation
from penstock_protocol.v1.consumer_pb2_grpc import ConsumerServiceStub
from penstock_protocol.v1.producer_pb2_grpc import ProducerServiceStub
from tests.e2e.harness import Broker, Pool, Process, eventually
from tests.faults.conftest import Figure
from tests.faults.load import fill


def crowd(pool: Pool, broker: Broker, workers: int, *, namespace: str = "raw", batch: int = 1) -> None:
    """So many workers, in few processes."""
    for n in range(0, workers, 125):
        some = min(125, workers - n)
        command = ["-m", "tests.faults.crowd", broker.address, str(some), namespace, str(batch)]
        process = Process(f"crowd-{namespace}-{n}", pool.folder, command, {})
        pool.processes.append(process)
        process.start()


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


@pytest.fixture
def short(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--short"))


@pytest.mark.timeout(300)
def test_idle_workers_and_a_herd_after_an_outage(direct_pool: Pool, short: bool, figure: Figure) -> None:
    workers = 100 if short else 500
    broker = direct_pool.broker()
    crowd(direct_pool, broker, workers, batch=10)

    def waiting() -> float:
        return broker.metrics()["penstock_waiting_requests"]

    eventually("all wait", lambda: waiting() == workers)
    assert broker.process is not None
    process = psutil.Process(broker.process.pid)
    watched = 5 if short else 30
    before = sum(process.cpu_times()[:2])
    time.sleep(watched)  # the idleness
    busy = (sum(process.cpu_times()[:2]) - before) / watched
    figure(f"{workers} idle workers: {busy:.1%} of a core")
    processes = [one.process for one in direct_pool.processes if one is not broker and one.process]
    for one in processes:
        one.send_signal(signal.SIGSTOP)
    fill(broker.address, 40_000 if short else 200_000)
    for one in processes:
        one.send_signal(signal.SIGCONT)
    peak = max(_rates(broker, 2 if short else 10))
    broker.kill()
    begun = time.monotonic()
    broker.start()
    again = time.monotonic() - begun
    herd = _rates(broker, 3 if short else 30)
    back = next((n for n, rate in enumerate(herd, 1) if rate >= 0.8 * peak), "never")
    figure(
        f"herd of {workers}: {peak:.0f} tasks/s before the outage; serving again after {again:.1f} s,"
        f" 80 % of that in second {back} of it ({max(herd):.0f}/s at best)"
    )
    direct_pool.await_empty(broker, seconds=120)
    eventually("all wait again", lambda: waiting() == workers)
    fill(broker.address, 100)
    direct_pool.await_empty(broker)


def _rates(broker: Broker, seconds: int) -> list[float]:
    """Tasks handed out in each second from now on, as long as there are any."""
    rates = []
    for _ in range(seconds):
        before, at = broker.metrics()["penstock_claimed_tasks_total"], time.monotonic()
        time.sleep(1)
        rates.append((broker.metrics()["penstock_claimed_tasks_total"] - before) / (time.monotonic() - at))
    return rates


@pytest.mark.timeout(300)
def test_a_namespace_floods_and_the_others_do_not_wait(
    direct_pool: Pool, short: bool, figure: Figure
) -> None:
    broker, another = direct_pool.broker(), direct_pool.broker("another")
    rounds = 200 if short else 1_500
    backlog = 5_000 if short else 100_000
    _latencies(broker, rounds)  # warm
    alone = p99(_latencies(broker, rounds))
    # The same flood of another broker costs the machine as much, and this broker nothing.
    elsewhere = p99(_latencies_beside_a_flood(direct_pool, another, broker, backlog, rounds))
    beside = p99(_latencies_beside_a_flood(direct_pool, broker, broker, backlog, rounds))
    figure(
        f"claim p99 of a quiet namespace beside a flood of {backlog} rows and 1,000/s more:"
        f" {beside * 1000:.1f} ms; the same flood on another broker: {elsewhere * 1000:.1f} ms"
        f" ({beside / elsewhere:.1f} times); alone: {alone * 1000:.1f} ms ({beside / alone:.1f} times)"
    )


def _latencies_beside_a_flood(
    pool: Pool, flooded: Broker, quiet: Broker, backlog: int, rounds: int
) -> list[float]:
    fill(flooded.address, backlog, namespace="flood")
    before = len(pool.processes)
    crowd(pool, flooded, 4, namespace="flood", batch=50)
    flooding = Process("flood", pool.folder, ["-m", "tests.faults.load", flooded.address, "flood"], {})
    pool.processes.append(flooding)
    flooding.start()
    latencies = _latencies(quiet, rounds)
    flooding.kill()
    pool.await_empty(flooded, seconds=180)
    for process in pool.processes[before:]:
        process.kill()
    return latencies


def _latencies(broker: Broker, rounds: int) -> list[float]:
    """From a task's being accepted to its being in the hands of a worker that waits for it."""
    latencies = []
    with grpc.insecure_channel(broker.address) as producing, grpc.insecure_channel(broker.address) as working:
        producer, worker = ProducerServiceStub(producing), ConsumerServiceStub(working)
        for _ in range(rounds):
            poll = worker.GetTasks.future(_poll("quiet", 1))
            time.sleep(0.005)  # the worker waits
            task = TaskActivation(id=uuid.uuid4().hex, application="e2e", namespace="quiet", taskname="t")
            producer.SendTasks(producer_pb2.SendTasksRequest(activations=[task]))
            accepted = time.monotonic()
            (claimed,) = poll.result(timeout=30).tasks
            latencies.append(max(0.0, time.monotonic() - accepted) + 1e-4)
            worker.SetTaskStatuses(_completed(claimed))
    return latencies


def _poll(namespace: str, batch: int) -> pb.GetTasksRequest:
    return pb.GetTasksRequest(
        request_id=uuid.uuid4().hex,
        application="e2e",
        namespaces=[namespace],
        max_tasks=batch,
        wait_ms=10_000,
    )


def _completed(*claimed: pb.ClaimedTask) -> pb.SetTaskStatusesRequest:
    status = pb.TASK_OUTCOME_STATUS_COMPLETE
    outcomes = [pb.TaskOutcome(claim_token=one.claim_token, status=status) for one in claimed]
    return pb.SetTaskStatusesRequest(outcomes=outcomes)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", [1, 20])
def test_claims_beside_a_million_rows(million: Broker, figure: Figure, batch: int) -> None:
    rounds = 500
    held = million.held()
    times = []
    with grpc.insecure_channel(million.address) as channel:
        worker = ConsumerServiceStub(channel)
        for _ in range(rounds):
            asked = time.monotonic()
            claimed = worker.GetTasks(_poll("raw", batch), timeout=30).tasks
            times.append(time.monotonic() - asked)
            assert len(claimed) == batch
            worker.SetTaskStatuses(_completed(*claimed))
    assert million.held() == held - rounds * batch
    million.check_books()
    figure(f"{held} rows wait: claim of {batch}, p99 {p99(times) * 1000:.1f} ms")


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Broker]:
    rows = 20_000 if request.config.getoption("--short") else 1_000_000
    folder = tmp_path_factory.mktemp("million")
    broker = Broker("million", folder, {"INGEST": "grpc", "MAX_PENDING_COUNT": "2000000"})
    broker.start()
    try:
        fill(broker.address, rows)
        yield broker
    finally:
        broker.kill()
