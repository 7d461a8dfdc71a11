"""What became of tasks, told to a broker until it has answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, cast

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_worker import reporter as module
from penstock_worker.claim import Claim
from penstock_worker.frames import Assignment, Outcome
from penstock_worker.link import BrokerLink
from penstock_worker.metrics import Metrics
from penstock_worker.reporter import Reporter

MINUTE = 60.0


class Link:
    """A broker that answers so many reports of a call; None: it does not answer."""

    address = "broker"

    def __init__(self) -> None:
        self.claims: dict[int, Claim] = {}
        self.answers: int | None = 1000
        self.calls: list[list[bytes]] = []

    async def call(self, path: str, request: pb.SetTaskStatusesRequest, seconds: float) -> bytes:
        self.calls.append([outcome.claim_token for outcome in request.outcomes])
        if self.answers is None:
            raise AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata())
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


def settle(reporter: Reporter, count: int) -> None:
    for n in range(count):
        claim = Claim(reporter.link, Assignment(n, b"", b"%d" % n, 1, None), 1.0)
        reporter.link.claims[n] = claim
        reporter.settle(claim, Outcome(pb.TASK_OUTCOME_STATUS_COMPLETE))


async def test_what_an_answer_does_not_mention_is_told_again(reporter: Reporter, link: Link) -> None:
    link.answers = 2
    settle(reporter, 5)
    assert await reporter.flush(10) == 0
    assert link.calls == [[b"0", b"1", b"2", b"3", b"4"], [b"2", b"3", b"4"], [b"4"]]
    assert not link.claims


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


async def _called(link: Any, times: int) -> None:
    while len(link.calls) < times:  # noqa: ASYNC110 - the test's timeout ends it
        await asyncio.sleep(0.005)
