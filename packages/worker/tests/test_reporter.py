"""What became of tasks, told to a broker until it has answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, cast

import grpc
import pytest
import uvloop
from grpc.aio import AioRpcError, Metadata

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker import reporter as module
from penstock_worker.claim import Claim
from penstock_worker.frames import Assignment, Error, Outcome
from penstock_worker.link import HELD_SECONDS, BrokerLink
from penstock_worker.metrics import Metrics
from penstock_worker.reporter import Reporter

MINUTE = 60.0


class Link:
    """A broker that answers so many reports of a call; None: it does not answer."""

    address = "broker"

    def __init__(self) -> None:
        self.claims: dict[int, Claim] = {}
        self.answers: int | None = 1000
        self.bytes_max = 1 << 20
        self.calls: list[list[bytes]] = []
        self.told: list[pb.TaskOutcome] = []
        # Until it is set no call is answered.
        self.ready = asyncio.Event()
        self.ready.set()

    async def call(self, path: str, request: pb.SetTaskStatusesRequest, seconds: float) -> bytes:
        self.calls.append([outcome.claim_token for outcome in request.outcomes])
        if self.answers is None:
            raise AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata())
        if request.ByteSize() > self.bytes_max:
            raise AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, Metadata(), Metadata())
        self.told += request.outcomes
        await self.ready.wait()
        answers = [pb.OUTCOME_ANSWER_APPLIED] * min(self.answers, len(request.outcomes))
        return pb.SetTaskStatusesResponse(answers=answers).SerializeToString()


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
async def reporter(link: Link) -> AsyncIterator[Reporter]:
    made = Reporter(cast("BrokerLink", link), "worker", Metrics())
    yield made
    made.close()


def settle(reporter: Reporter, count: int, errors: dict[int, Error] | None = None) -> None:
    """So many have succeeded, but for those with errors."""
    for n in range(count):
        claim = Claim(reporter.link, Assignment(n, b"", b"%d" % n, 1, None), 1.0)
        reporter.link.claims[n] = claim
        error = (errors or {}).get(n)
        status = pb.TASK_OUTCOME_STATUS_FAILURE if error else pb.TASK_OUTCOME_STATUS_COMPLETE
        reporter.settle(claim, Outcome(status, error=error))


async def test_what_an_answer_does_not_mention_is_told_again(reporter: Reporter, link: Link) -> None:
    link.answers = 2
    settle(reporter, 5)
    assert await reporter.flush(10) == 0
    assert link.calls == [[b"0", b"1", b"2", b"3", b"4"], [b"2", b"3", b"4"], [b"4"]]
    assert not link.claims


def test_what_waits_for_calls_is_told_when_all_of_them_are_answered_at_once() -> None:
    """As by one commit of a slow disk; on the loop that workers have."""

    async def report() -> None:
        link = Link()
        reporter = Reporter(cast("BrokerLink", link), "worker", Metrics())
        link.ready.clear()
        settle(reporter, module.CALLS_MAX * module.BATCH_REPORTS_MAX)
        while len(link.calls) < module.CALLS_MAX:  # noqa: ASYNC110
            await asyncio.sleep(0)
        settle(reporter, 100)
        link.ready.set()
        assert await reporter.flush(10) == 0
        reporter.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(report())


async def test_of_a_batch_that_is_too_large_less_is_told_at_a_time(reporter: Reporter, link: Link) -> None:
    link.bytes_max = 1024
    settle(reporter, 1000)
    await reporter.flush(5)
    assert len(link.told) == 1000
    assert not link.claims
    link.bytes_max, link.calls = 1 << 20, []
    for _ in range(3):
        settle(reporter, 1000)
        assert await reporter.flush(5) == 0
    # Batches grow again.
    assert max(map(len, link.calls)) > 200


async def test_an_error_that_is_too_large_is_told_without_its_traceback(
    reporter: Reporter, link: Link
) -> None:
    link.bytes_max = 1024
    settle(reporter, 9, {4: Error("builtins.ValueError", "why " * 500, "in line 1\n" * 1600)})
    await reporter.flush(5)
    assert not link.claims
    (failed,) = (told for told in link.told if told.status == pb.TASK_OUTCOME_STATUS_FAILURE)
    assert (failed.claim_token, failed.error.type) == (b"4", "builtins.ValueError")
    assert failed.error.message.startswith("why why")
    assert failed.error.traceback == "left out: too large for this broker (message_bytes_max)"


async def test_a_result_is_kept_for_a_broker_that_is_away_for_minutes(
    reporter: Reporter, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    link.answers, passed = None, [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: monotonic() + passed[0])
    settle(reporter, 1)
    await _called(link, 2)
    passed[0] = 14 * MINUTE
    await _called(link, len(link.calls) + 2)
    assert (reporter.waiting(), len(link.claims)) == (1, 1)
    link.answers = 1
    assert await reporter.flush(10) == 0
    assert not link.claims


async def test_all_results_are_kept_for_a_broker_that_is_away(reporter: Reporter, link: Link) -> None:
    link.answers, count = None, 3 * module.BATCH_REPORTS_MAX
    settle(reporter, count)
    await _called(link, 4)
    assert (reporter.waiting(), len(link.claims)) == (count, count)
    link.answers = count
    assert await reporter.flush(10) == 0
    assert {told.claim_token for told in link.told} == {b"%d" % n for n in range(count)}
    assert not link.claims


async def test_results_do_not_wait_behind_those_that_their_broker_holds(
    reporter: Reporter, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock_worker.link.BACKOFF_FIRST_SECONDS", 600.0)
    monkeypatch.setattr("penstock_worker.link.BACKOFF_MAX_SECONDS", 600.0)
    passed = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: monotonic() + passed[0])

    async def hold(path: str, request: pb.SetTaskStatusesRequest, seconds: float) -> bytes:
        passed[0] += HELD_SECONDS
        raise AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata())

    with monkeypatch.context() as broker:
        broker.setattr(link, "call", hold)
        settle(reporter, 1)
        while not passed[0]:  # noqa: ASYNC110 - the test's timeout ends it
            await asyncio.sleep(0)
    settle(reporter, 2)
    assert await reporter.flush(5) == 0
    assert len(link.told) == 3


async def _called(link: Any, times: int) -> None:
    while len(link.calls) < times:  # noqa: ASYNC110 - the test's timeout ends it
        await asyncio.sleep(0.005)
