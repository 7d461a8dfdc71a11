"""A worker with real child processes against a small real gRPC server."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections import Counter
from pathlib import Path
from time import monotonic

import psutil
import pytest
from memory_broker import MemoryBroker
from worker_runs import TESTS, appears, worker

from penstock_protocol import signature
from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker.children import Children
from penstock_worker.metrics import Metrics

COMPLETE = pb.TASK_OUTCOME_STATUS_COMPLETE


def _children(pid: int) -> list[psutil.Process]:
    while not (children := psutil.Process(pid).children()):
        time.sleep(0.005)
    return list(children)


async def test_tasks_are_executed_and_reported_in_batches(broker: MemoryBroker, tmp_path: Path) -> None:
    ids = {broker.put("noop") for _ in range(1000)}
    async with worker(broker, slots=2):
        outcomes = await broker.settled(1000)
    assert set(outcomes) == ids
    assert all(outcome.status == COMPLETE for outcome in outcomes.values())
    assert len(broker.outcomes) == 1000
    assert len(broker.reports) < 500
    assert max(request.max_tasks for request in broker.fetches) > 50
    assert not broker.claims


async def test_long_tasks_are_not_hoarded(broker: MemoryBroker, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    for _ in range(6):
        broker.put("block", str(gate))
    async with worker(broker, slots=2):
        await appears(tmp_path / "gate.started")
        await broker.until(lambda: len(broker.claims) == 2)
        assert len(broker.pending) == 4
        gate.touch()
        await broker.settled(6)


async def test_work_stuck_behind_a_long_task_goes_to_others(broker: MemoryBroker, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with worker(broker, slots=2):
        for _ in range(500):
            broker.put("noop")
        await broker.settled(500)
        blocked = broker.put("block", str(gate))
        ids = {broker.put("noop") for _ in range(300)}
        await broker.until(lambda: len(broker.outcomes) == 800)
        assert blocked not in dict(broker.outcomes)
        assert ids <= set(dict(broker.outcomes))
        gate.touch()
        await broker.settled(801)


async def test_requests_are_signed(broker: MemoryBroker) -> None:
    broker.put("noop")
    async with worker(broker, TASKBROKER_GRPC_SHARED_SECRET="s3cret"):
        await broker.settled(1)
    path = "/penstock.v1.ConsumerService/GetTasks"
    for request, metadata in zip(broker.fetches, broker.metadata, strict=True):
        header = str(dict(metadata)[signature.HEADER])
        assert signature.verify(["s3cret"], path, request.SerializeToString(deterministic=True), header)


async def test_the_request_names_application_namespaces_and_worker(broker: MemoryBroker) -> None:
    async with worker(broker, slots=2, options=("--namespace", "tests", "--namespace", "others")) as process:
        await broker.until(lambda: bool(broker.fetches))
    request = broker.fetches[0]
    assert request.application == "worker-tests"
    assert list(request.namespaces) == ["tests", "others"]
    assert (request.worker.slots, request.worker.pid) == (2, process.pid)
    assert request.worker.worker_id


async def test_failures_are_reported_with_their_story(broker: MemoryBroker) -> None:
    kinds = {broker.put("raise", kind): kind for kind in ("retry", "ignore", "fail", "exit")}
    async with worker(broker):
        outcomes = await broker.settled(4)
    by_kind = {kinds[id]: outcome for id, outcome in outcomes.items()}
    assert by_kind["retry"].status == pb.TASK_OUTCOME_STATUS_RETRY
    assert by_kind["retry"].retry_delay_ms == 2500
    assert by_kind["ignore"].status == pb.TASK_OUTCOME_STATUS_IGNORED
    assert by_kind["fail"].status == pb.TASK_OUTCOME_STATUS_FAILURE
    assert by_kind["fail"].error.type == "builtins.ValueError"
    assert by_kind["fail"].error.message == "broken ?"
    assert "raise kinds[kind]" in by_kind["fail"].error.traceback
    assert by_kind["exit"].status == pb.TASK_OUTCOME_STATUS_FAILURE


async def test_what_cannot_run_here_is_given_back(broker: MemoryBroker) -> None:
    unknown = broker.put("nobody_knows")
    misfit = broker.put("two_arguments", 1)
    async with worker(broker):
        await broker.until(lambda: len(broker.released) == 2)
    released = dict(broker.released)
    assert released[unknown].reason == pb.RELEASE_REASON_UNKNOWN_TASK
    assert "nobody_knows" in released[unknown].detail
    assert released[misfit].reason == pb.RELEASE_REASON_ARGUMENTS_MISMATCH
    assert released[misfit].detail
    assert not broker.outcomes


async def test_an_expired_task_is_not_started(broker: MemoryBroker, tmp_path: Path) -> None:
    expired = broker.put("write", str(tmp_path / "ran"), "x", expires_in_ms=0)
    async with worker(broker):
        outcomes = await broker.settled(1)
    assert outcomes[expired].status == pb.TASK_OUTCOME_STATUS_EXPIRED
    assert not (tmp_path / "ran").exists()


async def test_a_task_stuck_in_c_is_killed_at_its_deadline_and_others_go_on(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    stuck = broker.put("stuck_in_c", str(tmp_path / "pid"), deadline_ms=300)
    async with worker(broker, slots=2):
        pid = int(await appears(tmp_path / "pid"))
        started = monotonic()
        others = {broker.put("noop") for _ in range(20)}
        outcomes = await broker.settled(21)
        assert monotonic() - started < 30
    assert outcomes[stuck].status == pb.TASK_OUTCOME_STATUS_DEADLINE_EXCEEDED
    assert "0.3 s" in outcomes[stuck].error.message
    assert "in stuck_in_c" in outcomes[stuck].error.traceback
    assert all(outcomes[id].status == COMPLETE for id in others)
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("how", "evidence"),
    [("exit", "exited with code 17"), ("SIGSEGV", "signal 11 (SIGSEGV)"), ("SIGKILL", "signal 9 (SIGKILL)")],
)
async def test_a_child_that_dies_is_replaced_and_its_task_reported(
    broker: MemoryBroker, tmp_path: Path, how: str, evidence: str
) -> None:
    async with worker(broker):
        # Short tasks first: what waits behind the dying one lies in the child's own queue.
        for _ in range(300):
            broker.put("noop")
        await broker.settled(300)
        dying = broker.put("die", how)
        after = [broker.put("write", str(tmp_path / "ran"), str(number)) for number in range(20)]
        outcomes = await broker.settled(321)
    assert outcomes[dying].status == pb.TASK_OUTCOME_STATUS_WORKER_DIED
    assert evidence in outcomes[dying].error.message
    assert "peak RSS" in outcomes[dying].error.message
    assert ("in die" in outcomes[dying].error.traceback) == (how == "SIGSEGV")
    assert all(outcomes[id].status == COMPLETE for id in after)
    ran = [line.split()[0] for line in (tmp_path / "ran").read_text().splitlines()]
    assert sorted(ran, key=int) == [str(number) for number in range(20)]


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_what_a_task_has_started_does_not_outlive_its_child(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    """Which died by itself: the task may run again elsewhere."""
    dying = broker.put("leave_behind", str(tmp_path / "pid"))
    async with worker(broker):
        outcomes = await broker.settled(1)
        assert outcomes[dying].status == pb.TASK_OUTCOME_STATUS_WORKER_DIED
        left_behind = int((tmp_path / "pid").read_text())
        until = monotonic() + 6
        while _lives(left_behind) and monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        lives = _lives(left_behind)
        if lives:
            os.kill(left_behind, signal.SIGKILL)
    assert not lives


async def test_a_finished_task_is_reported_though_its_child_dies_in_the_next(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    async with worker(broker):
        for _ in range(300):
            broker.put("noop")
        await broker.settled(300)
        before = [broker.put("write", str(tmp_path / "ran"), str(number)) for number in range(50)]
        broker.put("die", "SIGKILL")
        outcomes = await broker.settled(351)
    assert all(outcomes[id].status == COMPLETE for id in before)
    assert len((tmp_path / "ran").read_text().splitlines()) == 50


async def test_an_idle_child_that_is_killed_is_replaced(broker: MemoryBroker) -> None:
    broker.put("noop")
    async with worker(broker) as process:
        await broker.settled(1)
        (child,) = psutil.Process(process.pid).children()
        child.kill()
        await asyncio.to_thread(child.wait)
        id = broker.put("noop")
        outcomes = await broker.settled(2)
    assert outcomes[id].status == COMPLETE


async def test_an_application_that_cannot_be_loaded_again_is_tried_again(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broker.put("noop")
    async with worker(broker, WORKER_TASKS_BROKEN=str(broken)) as process:
        await broker.settled(1)
        broken.touch()
        broker.put("die", "exit")
        await broker.settled(2)
        # The next child finds the application broken, and dies of it.
        (child,) = await asyncio.to_thread(_children, process.pid)
        await asyncio.to_thread(psutil.wait_procs, [child])
        broken.unlink()
        id = broker.put("noop")
        outcomes = await broker.settled(3)
    assert outcomes[id].status == COMPLETE


@pytest.mark.parametrize("call", ["tempfile.TemporaryFile", "os.pipe"])
async def test_a_child_that_cannot_be_started_is_tried_again(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.chdir(TESTS)
    children = Children("worker_tasks:app", lambda *_: None, lambda: None, lambda *_: None, Metrics())
    with monkeypatch.context() as machine:
        machine.setattr(f"penstock_worker.process.{call}", full)
        children.start(1)
        await asyncio.sleep(0.01)
        assert not list(children)
    assert (await children.loaded).application == "worker-tests"
    await children.close()


async def test_heartbeats_say_what_has_started(tmp_path: Path) -> None:
    broker = MemoryBroker(lease_ms=150)
    await broker.start()
    gate = tmp_path / "gate"
    broker.put("block", str(gate))
    async with worker(broker):
        await broker.until(lambda: broker.started_heartbeats[b"token-1"] >= 3)
        gate.touch()
        await broker.settled(1)
    await broker.stop()


async def test_a_claim_is_held_until_its_outcome_is_answered() -> None:
    """Else its lease ends while the broker does not answer, and another worker runs it again."""
    broker = MemoryBroker(lease_ms=150)
    await broker.start()
    refusals = [True]

    def refuse() -> None:
        if refusals:
            raise RuntimeError("not now")

    broker.before_report = refuse
    broker.put("noop")
    async with worker(broker):
        # It ends at once, so these heartbeats are of what has ended and is not settled.
        await broker.until(lambda: broker.started_heartbeats[b"token-1"] >= 3)
        refusals.clear()
        await broker.settled(1)
    await broker.stop()


async def test_outcomes_go_to_the_broker_the_task_came_from(tmp_path: Path) -> None:
    brokers = [MemoryBroker() for _ in range(3)]
    for number, broker in enumerate(brokers):
        await broker.start()
        for n in range(20):
            broker.put("noop", id=f"{number}-{n}")
    async with worker(*brokers, slots=2):
        for number, broker in enumerate(brokers):
            assert set(await broker.settled(20)) == {f"{number}-{n}" for n in range(20)}
    for broker in brokers:
        # Not one too many either.
        assert sum(broker.reports) == 20
        await broker.stop()


@pytest.mark.parametrize("answer", [pb.CLAIM_ANSWER_CANCELLED, pb.CLAIM_ANSWER_STALE])
async def test_a_claim_that_is_lost_is_killed_and_not_reported(
    tmp_path: Path, answer: pb.ClaimAnswer
) -> None:
    broker = MemoryBroker(lease_ms=150)
    await broker.start()
    gate = tmp_path / "gate"
    lost = broker.put("block", str(gate))
    async with worker(broker):
        pid = int(await appears(tmp_path / "gate.started"))
        broker.revoked[lost] = answer
        next_one = broker.put("noop")
        outcomes = await broker.settled(1)
        assert not psutil.pid_exists(pid)
    assert list(outcomes) == [next_one]
    await broker.stop()


async def test_what_its_broker_knows_nothing_of_ends_as_it_may_and_is_reported(tmp_path: Path) -> None:
    """It may have lost its disk: then nobody else runs it."""
    broker = MemoryBroker(lease_ms=150)
    await broker.start()
    gate = tmp_path / "gate"
    id = broker.put("block", str(gate))
    async with worker(broker):
        pid = int(await appears(tmp_path / "gate.started"))
        broker.revoked[id] = pb.CLAIM_ANSWER_UNKNOWN
        heartbeats = broker.heartbeats[b"token-1"]
        await broker.until(lambda: broker.heartbeats[b"token-1"] > heartbeats)
        await asyncio.sleep(0.5)
        assert psutil.pid_exists(pid)
        gate.touch()
        outcomes = await broker.settled(1)
    assert outcomes[id].status == COMPLETE
    await broker.stop()


async def test_surplus_of_parallel_polls_is_given_back(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    brokers = [MemoryBroker() for _ in range(3)]
    for broker in brokers:
        await broker.start()
    async with worker(*brokers):
        # All three are empty, and are polled at the same time for the one free slot.
        await asyncio.gather(*(broker.until(broker.is_polled) for broker in brokers))
        for broker in brokers:
            broker.put("block", str(gate))
        await appears(tmp_path / "gate.started")
        while sum(len(broker.claims) for broker in brokers) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        gate.touch()
        await asyncio.gather(*(broker.settled(1) for broker in brokers))
    reasons = {released.reason for broker in brokers for _, released in broker.released}
    assert reasons <= {pb.RELEASE_REASON_SURPLUS}
    for broker in brokers:
        await broker.stop()


async def test_an_empty_broker_is_left_for_one_that_has_work(broker: MemoryBroker) -> None:
    empty = MemoryBroker()
    await empty.start()
    for _ in range(500):
        broker.put("noop")
    async with worker(empty, broker):
        await broker.settled(500)
        # And yet it is visited: a task there does not wait.
        empty.put("noop")
        await empty.settled(1)
    await empty.stop()


async def test_a_broker_that_never_answers_does_not_keep_the_others_waiting(broker: MemoryBroker) -> None:
    accepted = asyncio.Event()

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(swallow, "127.0.0.1", 0)
    deaf = MemoryBroker(address=f"127.0.0.1:{silent.sockets[0].getsockname()[1]}")
    for _ in range(50):
        broker.put("noop")
    async with worker(deaf, broker, options=("--grace-seconds", "1")):
        await accepted.wait()
        await broker.settled(50)
    silent.close()


async def test_a_broker_that_does_not_hold_polls_is_asked_less_and_less(broker: MemoryBroker) -> None:
    broker.waits = False
    async with worker(broker):
        await broker.until(lambda: len(broker.fetches) >= 1)
        begun = time.monotonic()
        await broker.until(lambda: len(broker.fetches) >= 6)
        # A slow machine can only make this longer.
        assert time.monotonic() - begun > 0.05 + 0.1 + 0.2


async def test_a_broker_that_is_gone_and_comes_back_gets_its_results(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    held = broker.put("block", str(gate))
    async with worker(broker):
        await appears(tmp_path / "gate.started")
        await broker.stop()
        gate.touch()
        # The task ends while its broker is away, and with it comes room for another fetch.
        await broker.start()
        after = broker.put("noop")
        outcomes = await broker.settled(2)
    assert outcomes[held].status == COMPLETE
    assert outcomes[held].claim_token == b"token-1"
    assert outcomes[after].status == COMPLETE


async def test_a_lost_answer_is_asked_for_again_with_the_same_request(broker: MemoryBroker) -> None:
    broker.losses = 1
    id = broker.put("noop")
    async with worker(broker):
        outcomes = await broker.settled(1)
    assert outcomes[id].status == COMPLETE
    assert outcomes[id].claim_token == b"token-1"
    requests = Counter(request.request_id for request in broker.fetches)
    assert max(requests.values()) == 2


async def test_the_lost_answer_of_a_poll_is_asked_for_again_though_it_waited_longer_than_a_lease() -> None:
    broker = MemoryBroker(lease_ms=100)
    await broker.start()
    async with worker(broker):
        await broker.until(broker.is_polled)
        polls = len(broker.fetches)
        await asyncio.sleep(0.2)
        # Claimed only now: its lease has just begun.
        broker.losses = 1
        broker.put("noop")
        await broker.until(lambda: len(broker.fetches) > polls)
        assert broker.fetches[polls].request_id == broker.fetches[polls - 1].request_id
        await broker.settled(1)
    await broker.stop()


async def test_a_report_that_was_not_answered_is_sent_again(broker: MemoryBroker) -> None:
    refusals = [1, 2, 3]

    def refuse() -> None:
        if refusals:
            refusals.pop()
            raise RuntimeError("not now")

    broker.before_report = refuse
    id = broker.put("noop")
    async with worker(broker):
        outcomes = await broker.settled(1)
    assert outcomes[id].status == COMPLETE
    assert not refusals


async def test_stopping_gives_back_what_waits_and_finishes_what_runs(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    async with worker(broker) as process:
        for _ in range(300):
            broker.put("noop")
        await broker.settled(300)
        running = broker.put("block", str(gate))
        waiting = [broker.put("noop") for _ in range(10)]
        await appears(tmp_path / "gate.started")
        process.send_signal(signal.SIGTERM)
        await broker.until(lambda: len(broker.claims) == 1)
        gate.touch()
        await broker.settled(301)
    outcomes = dict(broker.outcomes)
    assert outcomes[running].status == COMPLETE
    assert not broker.claims
    assert {entry.activation.id for entry in broker.pending} == set(waiting) - set(outcomes)


async def test_stopping_cuts_an_open_poll_short_without_losing_a_claim(broker: MemoryBroker) -> None:
    async with worker(broker) as process:
        await broker.until(broker.is_polled)
        poll = broker.fetches[-1]
        process.send_signal(signal.SIGTERM)
        await broker.until(lambda: broker.fetches[-1].wait_ms == 0)
    assert broker.fetches[-1].request_id == poll.request_id


async def test_what_runs_while_its_worker_stops_is_held(broker: MemoryBroker, tmp_path: Path) -> None:
    broker.lease_ms = 150
    gate = tmp_path / "gate"
    id = broker.put("block", str(gate))
    async with worker(broker, slots=2, options=("--grace-seconds", "6")) as process:
        await appears(tmp_path / "gate.started")
        # The other slot's poll: when it is cut short the worker is stopping.
        await broker.until(lambda: broker.fetches[-1].wait_ms > 0)
        process.send_signal(signal.SIGTERM)
        await broker.until(lambda: broker.fetches[-1].wait_ms == 0)
        enough = broker.started_heartbeats[b"token-1"] + 3
        await broker.until(lambda: broker.started_heartbeats[b"token-1"] >= enough or bool(broker.outcomes))
        assert not broker.outcomes, "not held until its grace time was over"
        gate.touch()
        outcomes = await broker.settled(1)
    assert outcomes[id].status == COMPLETE


async def test_what_runs_while_its_worker_stops_is_killed_at_its_deadline(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    late = broker.put("block", str(tmp_path / "gate"), deadline_ms=1000)
    async with worker(broker, options=("--grace-seconds", "6")):
        await appears(tmp_path / "gate.started")
    assert dict(broker.outcomes)[late].status == pb.TASK_OUTCOME_STATUS_DEADLINE_EXCEEDED


async def test_the_grace_time_ends_what_does_not(broker: MemoryBroker, tmp_path: Path) -> None:
    endless = broker.put("block", str(tmp_path / "gate"))
    async with worker(broker, options=("--grace-seconds", "0.1")):
        pid = int(await appears(tmp_path / "gate.started"))
    outcomes = dict(broker.outcomes)
    assert outcomes[endless].status == pb.TASK_OUTCOME_STATUS_WORKER_DIED
    assert "worker was stopped" in outcomes[endless].error.message
    assert not psutil.pid_exists(pid)


async def test_a_second_stop_kills(broker: MemoryBroker, tmp_path: Path) -> None:
    endless = broker.put("block", str(tmp_path / "gate"))
    async with worker(broker, options=("--grace-seconds", "600")) as process:
        await appears(tmp_path / "gate.started")
        process.send_signal(signal.SIGTERM)
        # It has heard the first: it asks no more. Two at once could arrive as one.
        await broker.until(lambda: broker.fetches[-1].wait_ms == 0)
        process.send_signal(signal.SIGINT)
    assert dict(broker.outcomes)[endless].status == pb.TASK_OUTCOME_STATUS_WORKER_DIED


async def test_signals_to_children_do_not_cut_tasks_short(broker: MemoryBroker, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    id = broker.put("block", str(gate))
    async with worker(broker):
        pid = int(await appears(tmp_path / "gate.started"))
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        gate.touch()
        outcomes = await broker.settled(1)
    assert outcomes[id].status == COMPLETE


async def test_a_process_that_a_task_forks_is_its_own(broker: MemoryBroker, tmp_path: Path) -> None:
    codes = {"exit": "3", "raise": "1", "return": "0"}
    ids = {how: broker.put("fork", how, str(tmp_path / how)) for how in codes}
    async with worker(broker) as process:
        outcomes = await broker.settled(3)
        later = broker.put("noop")
        await broker.settled(4)
        assert process.returncode is None
        assert len(_children(process.pid)) == 1
    assert {how: (tmp_path / how).read_text() for how in codes} == codes
    assert all(outcomes[id].status == COMPLETE for id in ids.values())
    assert dict(broker.outcomes)[later].status == COMPLETE
    assert len(broker.outcomes) == 4
