"""AdminService as an operator's command meets it: requests and answers as bytes, on a real store."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from google.protobuf.message import Message
from store_helpers import ManualClock, activation, check_store, open_store, token_of

from penstock_broker.dispatch import rpc
from penstock_broker.dispatch.admin import AHEAD_MAX, Admin
from penstock_broker.dispatch.roster import WORKERS_MAX, Roster
from penstock_broker.dispatch.service import Consumers, Refused
from penstock_broker.dispatch.waiting import Waiting, Wanted
from penstock_broker.domain.activation import Activation, Route, hash_id
from penstock_broker.domain.lifecycle import Event, Limits
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_broker.store.batch import Answer, Report
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.limits import StoreLimits
from penstock_broker.store.writer import StoreStopped
from penstock_protocol.replay import ROOT_ID
from penstock_protocol.v1 import admin_pb2 as pb
from penstock_protocol.v1 import consumer_pb2
from penstock_protocol.v1.activation_pb2 import (
    ON_ATTEMPTS_EXCEEDED_DEADLETTER,
    RetryState,
    TaskActivation,
)

BYTES = 1 << 22
M = TypeVar("M", bound=Message)


class Desk:
    """A store whose writer runs, the admin service on it, and time in the test's hands."""

    def __init__(self, store: Inflight, clock: ManualClock) -> None:
        self.store, self.clock = store, clock
        self.waiting = Waiting(store, BYTES)
        self.consumers = Consumers(store, self.waiting)
        self.admission = Admission(AdmissionLimits())
        self.lag: int | None = None
        admin = Admin(
            store,
            self.waiting,
            self.consumers.roster,
            describe=lambda status: None,
            admit=self.admission.admit,
            lag=lambda: self.lag,
        )
        self.methods = rpc.admin_methods(admin)

    async def call(self, method: str, request: Message, answer: type[M]) -> M:
        return answer.FromString(await self.methods[method](request.SerializeToString()))

    async def insert(self, *rows: Activation, taken: dict[int, int] | None = None) -> None:
        await self.store.insert(rows, taken)

    async def claim(self, n: int = 1, worker: str = "") -> list[Activation]:
        rows = self.store.claim(None, (), n, BYTES, worker)
        await self.store.committed()
        return rows

    async def settle(self, row: Activation, event: Event, delay: int | None = None) -> None:
        told = self.store.settle(token_of(self.store, row), event, self.clock.wall, delay, ERROR)
        assert told is Answer.APPLIED
        await self.store.committed()

    async def rest(self, *rows: Activation) -> None:
        """They fail, and rest in the store's dead letters."""
        await self.insert(*rows)
        for row in await self.claim(len(rows)):
            await self.settle(row, Event.FAIL)
        await self.store.outbox.rest(await self.store.outbox.take(Route.DEAD_LETTER, len(rows), BYTES))

    async def explain(self, id: str) -> pb.ExplainTaskResponse:
        return await self.call("ExplainTask", pb.ExplainTaskRequest(id=id), pb.ExplainTaskResponse)

    async def codes(self, id: str) -> list[str]:
        return [finding.code for finding in (await self.explain(id)).findings]

    async def cancel(self, *ids: str) -> list[int]:
        request = pb.CancelTasksRequest(ids=ids, by="test")
        return list((await self.call("CancelTasks", request, pb.CancelTasksResponse)).results)

    async def retry(self, *ids: str) -> list[int]:
        request = pb.RetryTasksRequest(ids=ids, by="test")
        return list((await self.call("RetryTasks", request, pb.RetryTasksResponse)).results)

    async def letters(self, **wanted: object) -> list[pb.DeadLetter]:
        request = pb.ListDeadLettersRequest(filter=pb.DeadLetterFilter(**wanted))  # type: ignore[arg-type]
        return list((await self.call("ListDeadLetters", request, pb.ListDeadLettersResponse)).letters)

    async def replay(self, seqs: Sequence[int]) -> list[pb.Replayed]:
        request = pb.ReplayDeadLettersRequest(seqs=seqs, by="test")
        return list((await self.call("ReplayDeadLetters", request, pb.ReplayDeadLettersResponse)).replayed)


ERROR = '{"type": "builtins.ValueError", "message": "it never works", "traceback": "..."}'


@contextlib.asynccontextmanager
async def opened(path: Path, limits: StoreLimits | None = None):
    clock = ManualClock()
    store = open_store(path, clock, limits)
    writing = asyncio.create_task(store.writer.run())
    yield Desk(store, clock)
    store.writer.stop()
    await writing
    check_store(store)
    store.database.close()


@pytest.fixture
async def desk(tmp_path: Path):
    async with opened(tmp_path / "store.sqlite") as desk:
        yield desk


def message(id: str, clock: ManualClock) -> bytes:
    sent = TaskActivation(
        id=id,
        application="shop",
        namespace="pay",
        taskname="charge",
        headers={"who": "me"},
        parameters_bytes=b"\x80",
        processing_deadline_duration=9,
        retry_state=RetryState(
            max_attempts=1, on_attempts_exceeded=ON_ATTEMPTS_EXCEEDED_DEADLETTER, delay_on_retry=4
        ),
    )
    sent.received_at.FromMilliseconds(clock.wall)
    return sent.SerializeToString()


# -- tasks


async def test_tasks_are_listed_by_filter_page_by_page(desk: Desk) -> None:
    await desk.insert(*(activation(f"pay{n}", desk.clock) for n in range(5)))
    await desk.insert(*(activation(f"mail{n}", desk.clock, namespace="mail", delay_ms=900) for n in range(5)))
    for wanted, found in (
        (pb.TaskFilter(), 10),
        (pb.TaskFilter(namespace="mail"), 5),
        (pb.TaskFilter(application="crm"), 0),
        (pb.TaskFilter(state=pb.TASK_STATE_DELAYED), 5),
        (pb.TaskFilter(state=pb.TASK_STATE_DELAYED, namespace="pay"), 0),
        (pb.TaskFilter(taskname="charge"), 10),
        (pb.TaskFilter(taskname="refund"), 0),
    ):
        ids, after, pages = [], 0, 0
        while True:
            request = pb.ListTasksRequest(filter=wanted, limit=3, after_seq=after)
            page = await desk.call("ListTasks", request, pb.ListTasksResponse)
            ids += [task.id for task in page.tasks]
            pages += 1
            if not page.HasField("next_after_seq"):
                break
            after = page.next_after_seq
        assert len(ids) == len(set(ids)) == found
        assert pages == found // 3 + 1


async def test_a_page_looks_at_a_bounded_number_of_rows(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_broker.dispatch.admin.SCAN_ROWS_MAX", 4)
    await desk.insert(*(activation(f"pay{n}", desk.clock) for n in range(9)))
    await desk.insert(activation("mail", desk.clock, namespace="mail"))
    pages, after = [], 0
    while True:
        request = pb.ListTasksRequest(filter=pb.TaskFilter(namespace="mail"), after_seq=after)
        page = await desk.call("ListTasks", request, pb.ListTasksResponse)
        pages.append([task.id for task in page.tasks])
        if not page.HasField("next_after_seq"):
            break
        after = page.next_after_seq
    assert pages == [[], [], ["mail"]]


async def test_a_task_is_shown_with_who_runs_it_and_its_bytes(desk: Desk) -> None:
    await desk.insert(activation("a", desk.clock, max_attempts=3))
    (row,) = await desk.claim(worker="worker-1")
    await desk.settle(row, Event.RETRY, 0)
    (row,) = await desk.claim(worker="worker-1")
    desk.clock.advance(700)
    desk.store.extend(token_of(desk.store, row), True, "worker-1")
    desk.clock.advance(300)
    answer = await desk.call("GetTask", pb.AdminServiceGetTaskRequest(id="a"), pb.AdminServiceGetTaskResponse)
    task = answer.task
    assert (task.state, task.worker_id, task.attempts) == (pb.TASK_STATE_PROCESSING, "worker-1", 1)
    assert task.started_at == desk.clock.wall - 300
    assert "traceback" in task.error
    assert answer.activation == b"body of a"
    (listed,) = (await desk.call("ListTasks", pb.ListTasksRequest(), pb.ListTasksResponse)).tasks
    assert "traceback" not in listed.error
    absent = await desk.call("GetTask", pb.AdminServiceGetTaskRequest(id="b"), pb.AdminServiceGetTaskResponse)
    assert not absent.HasField("task")


# -- explain


async def test_why_a_pending_task_waits(tmp_path: Path) -> None:
    async with opened(tmp_path / "store.sqlite", StoreLimits(window_rows_max=6)) as desk:
        await desk.insert(*(activation(f"t{n}", desk.clock) for n in range(12)))
        assert (await desk.codes("t0"))[0] == "next"
        for n in (1, 2, 11):
            answer = await desk.explain(f"t{n}")
            assert (answer.state, answer.ahead, answer.ahead_max) == ("pending", n, AHEAD_MAX)
            assert [finding.code for finding in answer.findings] == ["ahead"]
        await desk.claim(2)
        assert (await desk.explain("t11")).ahead == 9
        desk.clock.advance(200_000)
        assert "unasked" in await desk.codes("t11")
        desk.store.memory.index.ask("shop", ("pay",), desk.clock.mono)
        assert "unasked" not in await desk.codes("t11")
        pause = pb.PauseNamespaceRequest(application="shop", namespace="pay")
        await desk.call("PauseNamespace", pause, pb.PauseNamespaceResponse)
        assert (await desk.codes("t11"))[0] == "paused"


async def test_why_a_delayed_task_waits_and_until_when(desk: Desk) -> None:
    await desk.insert(
        activation("late", desk.clock, delay_ms=60_000, expires_ms=90_000),
        activation("failed", desk.clock, max_attempts=3),
    )
    (row,) = await desk.claim()
    await desk.settle(row, Event.RETRY, 30_000)
    late, failed = await desk.explain("late"), await desk.explain("failed")
    assert [finding.code for finding in late.findings] == ["delayed", "run_now", "expires"]
    assert late.runs_at == desk.clock.wall + 60_000
    assert [finding.code for finding in failed.findings] == ["back_off", "run_now"]
    assert "it never works" in failed.findings[0].text
    assert "start 2 of at most 3" in failed.findings[0].text
    assert failed.runs_at == desk.clock.wall + 1 + 30_000
    await desk.insert(activation("unknown", desk.clock))
    (row,) = await desk.claim()
    await desk.settle(row, Event.UNKNOWN_TASK)
    assert "given_back" in await desk.codes("unknown")
    await desk.retry("unknown")
    answer = await desk.explain("unknown")
    assert (answer.state, [finding.code for finding in answer.findings]) == ("pending", ["given_back"])
    assert "to that one after 60 s" in answer.findings[0].text


async def test_who_runs_a_task_and_since_when(desk: Desk) -> None:
    await desk.insert(activation("a", desk.clock))
    (row,) = await desk.claim(worker="worker-1")
    assert (await desk.codes("a"))[0] == "claimed"
    desk.store.extend(token_of(desk.store, row), True, "worker-1")
    desk.clock.advance(4_000)
    answer = await desk.explain("a")
    assert answer.findings[0].code == "running"
    assert "worker worker-1" in answer.findings[0].text
    assert "(4.0 s)" in answer.findings[0].text


async def test_a_client_without_tokens_is_not_said_to_have_heartbeats(desk: Desk) -> None:
    await desk.insert(activation("a", desk.clock))
    desk.store.claim(None, (), 1, BYTES, tokenless=True)
    await desk.store.committed()
    (lease,) = [finding.text for finding in (await desk.explain("a")).findings if finding.code == "lease"]
    assert "report its outcome within" in lease


async def test_why_a_task_from_kafka_may_not_start_yet(desk: Desk) -> None:
    source = desk.store.source("tasks", 0)
    once = activation("once", desk.clock, at_most_once=True, source=source.id, offset=0)
    other = activation("other", desk.clock, source=source.id, offset=1)
    await desk.insert(once, other, taken={source.id: 2})
    assert (await desk.codes("once"))[0] == "cover"
    desk.store.dispute(source)
    assert (await desk.codes("other"))[0] == "disputed"
    desk.store.cover(source, 2)
    desk.store.settle_dispute(source)
    assert "cover" not in await desk.codes("once")
    assert "disputed" not in await desk.codes("other")


async def test_explain_says_what_an_at_most_once_task_waits_for(desk: Desk) -> None:
    source = desk.store.source("tasks", 0)
    desk.store.cover(source, 1)
    desk.store.hold_at_most_once(True)
    await desk.insert(activation("once", desk.clock, at_most_once=True, source=source.id, offset=0))
    assert await desk.codes("once") == ["unrecorded"]
    desk.store.hold_at_most_once(False)
    assert await desk.codes("once") == ["next"]
    recorded = asyncio.Event()
    desk.store.recorded = recorded.wait  # type: ignore[assignment]
    poll = asyncio.create_task(desk.waiting.wait(Wanted(None, ()), 1, 30, "w"))
    await asyncio.sleep(0)
    assert await desk.codes("once") == ["recorded"]
    poll.cancel()
    recorded.set()
    await asyncio.sleep(0.001)
    assert await desk.codes("once") == ["recorded"]
    await desk.waiting.wait(Wanted(None, ()), 1, 0, "w")
    assert await desk.codes("once") == ["claimed", "lease"]
    desk.waiting.close()


async def test_explain_says_where_a_task_leaves_to_and_what_it_waits_for(tmp_path: Path) -> None:
    limits = StoreLimits(lifecycle=Limits(retry_topic=True))
    async with opened(tmp_path / "store.sqlite", limits) as desk:
        source = desk.store.source("tasks", 0)
        names = ("retried", "failed", "handed over")
        rows = (
            activation(id, desk.clock, max_attempts=3, source=source.id, offset=offset)
            for offset, id in enumerate(names)
        )
        await desk.insert(*rows, taken={source.id: 3})
        retried, failed = await desk.claim(2)
        await desk.settle(retried, Event.RETRY, 60_000)
        await desk.settle(failed, Event.FAIL)
        assert await desk.store.hand_over(9, running=False) == 1
        for id, where in zip(names, ("the retry topic", "the dead letters", "another broker"), strict=True):
            answer = await desk.explain(id)
            assert [finding.code for finding in answer.findings] == ["forwarding", "cover"]
            text = answer.findings[0].text
            assert f"on its way to {where}" in text
            assert ("it never works" in text) == (id != "handed over")
        desk.store.cover(source, 3)
        assert [await desk.codes(id) for id in names] == 3 * [["forwarding"]]


async def test_what_became_of_a_task_that_left(desk: Desk) -> None:
    await desk.insert(*(activation(id, desk.clock, max_attempts=2) for id in ("done", "killed", "dead")))
    done, _, dead = await desk.claim(3)
    await desk.settle(done, Event.COMPLETE)
    await desk.cancel("killed")
    await desk.settle(dead, Event.FAIL)
    (told,) = (await desk.explain("done")).findings
    assert "complete" in told.text
    assert "dlq" not in told.text
    assert "cancelled by an operator" in (await desk.explain("killed")).findings[0].text
    answer = await desk.explain("dead")
    assert (answer.state, answer.findings[0].code) == ("forwarding", "forwarding")
    await desk.store.outbox.rest(await desk.store.outbox.take(Route.DEAD_LETTER, 1, BYTES))
    answer = await desk.explain("dead")
    assert (answer.state, answer.known) == ("dead letter", True)
    assert "failed" in answer.findings[0].text


async def test_a_task_that_left_after_a_failed_start_may_be_a_dead_letter_on_kafka(desk: Desk) -> None:
    await desk.insert(activation("again", desk.clock, max_attempts=2), activation("dead", desk.clock))
    again, dead = await desk.claim(2)
    await desk.settle(again, Event.RETRY, 60_000)
    await desk.cancel("again")
    await desk.settle(dead, Event.FAIL)
    await desk.store.outbox.forwarded(await desk.store.outbox.take(Route.DEAD_LETTER, 1, BYTES))
    for id, event in (("again", "retry"), ("dead", "fail")):
        answer = await desk.explain(id)
        assert answer.state == "finished"
        assert f"ended: {event}; if it is a dead letter: penstock dlq show {id}" in answer.findings[0].text
        assert "cancelled" in answer.findings[0].text


async def test_an_unknown_id_may_have_many_reasons(desk: Desk) -> None:
    desk.lag = 12
    answer = await desk.explain("nobody")
    assert (answer.known, answer.state) == (False, "unknown")
    assert [finding.code for finding in answer.findings] == ["unknown", "lag", "elsewhere"]


# -- retry and cancel


async def test_what_retry_says(desk: Desk) -> None:
    await desk.rest(activation("dead", desk.clock))
    await desk.insert(activation("leaving", desk.clock), activation("done", desk.clock))
    leaving, done = await desk.claim(2)
    await desk.settle(leaving, Event.FAIL)
    await desk.settle(done, Event.COMPLETE)
    await desk.insert(activation("late", desk.clock, delay_ms=60_000), activation("pending", desk.clock))
    assert await desk.retry("late", "pending", "leaving", "dead", "done", "nobody") == [
        pb.RETRY_RESULT_PENDING_NOW,
        pb.RETRY_RESULT_NOT_DELAYED,
        pb.RETRY_RESULT_FORWARDING,
        pb.RETRY_RESULT_DEAD_LETTER,
        pb.RETRY_RESULT_FINISHED,
        pb.RETRY_RESULT_UNKNOWN,
    ]
    assert sorted(row.id for row in await desk.claim(9)) == ["late", "pending"]


async def test_retry_of_many_that_are_elsewhere_takes_no_longer(desk: Desk) -> None:
    """Each broker is asked about all of them."""
    ticks: list[None] = []
    desk.store.writer.on_committed.append(lambda: ticks.append(None))
    assert set(await desk.retry(*(f"elsewhere{n}" for n in range(500)))) == {pb.RETRY_RESULT_UNKNOWN}
    assert len(ticks) < 5


async def test_what_cancel_says_and_who_is_told(desk: Desk) -> None:
    await desk.insert(activation("running", desk.clock), activation("leaving", desk.clock))
    running, leaving = await desk.claim(2, worker="worker-1")
    await desk.settle(leaving, Event.FAIL)
    await desk.insert(activation("late", desk.clock, delay_ms=60_000), activation("pending", desk.clock))
    assert await desk.cancel("running", "late", "pending", "leaving", "nobody", "running") == [
        pb.CANCEL_RESULT_KILLED,
        pb.CANCEL_RESULT_CANCELLED,
        pb.CANCEL_RESULT_CANCELLED,
        pb.CANCEL_RESULT_FORWARDING,
        pb.CANCEL_RESULT_UNKNOWN,
        pb.CANCEL_RESULT_KILLED,
    ]
    assert await desk.cancel("pending") == [pb.CANCEL_RESULT_FINISHED]
    held = consumer_pb2.HeldClaim(claim_token=token_of(desk.store, running).encode(), started=True)
    heartbeat = consumer_pb2.ExtendClaimsRequest(claims=[held], worker_id="worker-1")
    answer = await desk.consumers.extend_claims(heartbeat.SerializeToString())
    assert list(consumer_pb2.ExtendClaimsResponse.FromString(answer).answers) == [
        consumer_pb2.CLAIM_ANSWER_CANCELLED
    ]


async def test_what_is_recorded_and_no_worker_has_is_cancelled_and_kills_nothing(desk: Desk) -> None:
    recorded = asyncio.Event()
    desk.store.recorded = recorded.wait  # type: ignore[assignment]
    source = desk.store.source("tasks", 0)
    desk.store.cover(source, 3)
    rows = [
        activation(id, desk.clock, at_most_once=True, source=source.id, offset=offset)
        for offset, id in enumerate(("recorded", "kept", "had"))
    ]
    await desk.insert(*rows, taken={source.id: 3})
    gone = asyncio.create_task(desk.waiting.wait(Wanted(None, ()), 3, 30, "w"))
    await asyncio.sleep(0)
    assert await desk.cancel("recorded") == [pb.CANCEL_RESULT_CANCELLED]
    gone.cancel()
    recorded.set()
    await asyncio.sleep(0.001)
    assert await desk.cancel("kept") == [pb.CANCEL_RESULT_CANCELLED]
    assert [row.id for row in await desk.waiting.wait(Wanted(None, ()), 3, 0, "w")] == ["had"]
    assert await desk.cancel("had") == [pb.CANCEL_RESULT_KILLED]
    desk.waiting.close()


async def test_a_cancel_that_meets_a_claim_of_this_moment_is_tried_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await desk.insert(activation("a", desk.clock))
    cancel = desk.store.control.cancel

    def claimed_meanwhile(id_hash: int) -> Answer | Report:
        return Answer.STALE if desk.store.claim(None, (), 1, BYTES) else cancel(id_hash)

    monkeypatch.setattr(desk.store.control, "cancel", claimed_meanwhile)
    assert await desk.cancel("a") == [pb.CANCEL_RESULT_KILLED]
    assert desk.store.memory.rows == 0


async def test_a_cancelled_task_that_another_broker_runs_is_said_to_be(desk: Desk) -> None:
    source = desk.store.source("tasks", 0)
    await desk.insert(activation("a", desk.clock, source=source.id, offset=0), taken={source.id: 1})
    cancelling = asyncio.create_task(desk.cancel("a"))
    while desk.store.memory.rows:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await desk.store.committed()
    assert not cancelling.done(), "until it is covered, another broker may run it"
    await desk.store.drop_uncovered(source, 0)
    assert await cancelling == [pb.CANCEL_RESULT_ANOTHER_BROKERS]


async def test_a_task_cancelled_before_it_is_handed_out_is_not_handed_out(desk: Desk) -> None:
    request = consumer_pb2.GetTasksRequest(max_tasks=1, wait_ms=2_000).SerializeToString()
    polling = asyncio.create_task(desk.consumers.get_tasks(request))
    while not len(desk.waiting):  # noqa: ASYNC110
        await asyncio.sleep(0)
    cancelled: list[Answer] = []

    def cancel() -> None:
        if row := next(desk.store.memory.leases.held(), None):
            cancelled.append(desk.store.control.cancel(row.id_hash))  # type: ignore[arg-type]

    # Called after the match, and before whoever was matched goes on.
    desk.store.writer.on_committed.append(cancel)
    await desk.insert(activation("a", desk.clock))
    answer = consumer_pb2.GetTasksResponse.FromString(await polling)
    assert cancelled == [Answer.APPLIED]
    assert not answer.tasks


# -- namespaces


async def test_namespaces_show_what_waits_and_their_books(desk: Desk) -> None:
    await desk.insert(*(activation(f"pay{n}", desk.clock) for n in range(3)))
    await desk.insert(activation("mail", desk.clock, namespace="mail", delay_ms=900))
    (row,) = await desk.claim()
    await desk.settle(row, Event.COMPLETE)
    desk.clock.advance(5_000)
    await desk.store.committed()
    answer = await desk.call("ListNamespaces", pb.ListNamespacesRequest(), pb.ListNamespacesResponse)
    pay, mail = answer.namespaces
    assert (pay.application, pay.namespace, pay.pending, mail.namespace) == ("shop", "pay", 2, "mail")
    assert {term.term: term.tasks for term in pay.books} == {"accepted": 3, "done": 1}
    assert pay.books_difference == mail.books_difference == 0
    assert pay.oldest_pending_seconds == 5
    assert not answer.HasField("next_after")
    # What a bug could do: a task counts as another namespace's.
    desk.store.memory.add_to_books({(1, "done"): 1, (2, "accepted"): 1})
    answer = await desk.call("ListNamespaces", pb.ListNamespacesRequest(), pb.ListNamespacesResponse)
    assert [namespace.books_difference for namespace in answer.namespaces] == [-1, 1]
    status = await desk.call("GetStatus", pb.GetStatusRequest(), pb.GetStatusResponse)
    assert status.books_difference == 2
    desk.store.memory.add_to_books({(1, "done"): -1, (2, "accepted"): -1})


async def test_namespaces_come_in_pages(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_broker.dispatch.admin.PAGE_NAMESPACES", 2)
    await desk.insert(*(activation(f"t{n}", desk.clock, namespace=f"n{n}") for n in range(5)))
    names, after = [], 0
    while True:
        request = pb.ListNamespacesRequest(after=after)
        page = await desk.call("ListNamespaces", request, pb.ListNamespacesResponse)
        names += [(n.namespace, n.pending, len(n.books)) for n in page.namespaces]
        if not page.HasField("next_after"):
            break
        after = page.next_after
    assert names == [(f"n{n}", 1, 1) for n in range(5)]


async def test_pause_and_resume_say_whether_anything_changed(desk: Desk) -> None:
    await desk.insert(activation("a", desk.clock))
    pause = pb.PauseNamespaceRequest(application="shop", namespace="pay", by="test")
    resume = pb.ResumeNamespaceRequest(application="shop", namespace="pay", by="test")
    for changed in (True, False):
        answer = await desk.call("PauseNamespace", pause, pb.PauseNamespaceResponse)
        assert (answer.changed, answer.pending) == (changed, 1)
    assert desk.store.database.pairs()[0][3] == desk.clock.wall, "durable when answered"
    status = await desk.call("GetStatus", pb.GetStatusRequest(), pb.GetStatusResponse)
    assert status.paused_namespaces == 1
    desk.clock.advance(300_000)
    assert desk.store.unclaimable.pending() == [], "a paused namespace is not one that lacks workers"
    for changed in (True, False):
        told = await desk.call("ResumeNamespace", resume, pb.ResumeNamespaceResponse)
        assert (told.changed, told.pending) == (changed, 1)
    assert desk.store.unclaimable.pending() == []
    unknown = pb.ResumeNamespaceRequest(application="shop", namespace="nowhere")
    with pytest.raises(Refused, match="never had a task of shop/nowhere"):
        await desk.call("ResumeNamespace", unknown, pb.ResumeNamespaceResponse)


async def test_a_namespace_is_paused_before_its_first_task(desk: Desk) -> None:
    pause = pb.PauseNamespaceRequest(application="shop", namespace="pay", by="test")
    assert (await desk.call("PauseNamespace", pause, pb.PauseNamespaceResponse)).changed
    await desk.insert(activation("a", desk.clock))
    assert await desk.claim() == []
    too_long = pb.PauseNamespaceRequest(application="shop", namespace="p" * 257)
    with pytest.raises(Refused, match="256 characters"):
        await desk.call("PauseNamespace", too_long, pb.PauseNamespaceResponse)


# -- workers


async def test_workers_are_those_seen_lately_with_what_they_hold(desk: Desk) -> None:
    worker = consumer_pb2.WorkerIdentity(worker_id="w1", hostname="h", pid=7, version="1", slots=4)
    await desk.insert(
        *(desk.admission.admit(message(f"t{n}", desk.clock), desk.clock.wall) for n in range(3))
    )
    request = consumer_pb2.GetTasksRequest(application="shop", namespaces=["pay"], max_tasks=2, worker=worker)
    answer = consumer_pb2.GetTasksResponse.FromString(
        await desk.consumers.get_tasks(request.SerializeToString())
    )
    held = [consumer_pb2.HeldClaim(claim_token=answer.tasks[0].claim_token, started=True)]
    desk.clock.advance(5_000)
    heartbeat = consumer_pb2.ExtendClaimsRequest(claims=held, worker_id="w1")
    await desk.consumers.extend_claims(heartbeat.SerializeToString())
    desk.clock.advance(2_000)
    (seen,) = (await desk.call("ListWorkers", pb.ListWorkersRequest(), pb.ListWorkersResponse)).workers
    assert (seen.hostname, seen.pid, seen.slots, seen.application) == ("h", 7, 4, "shop")
    assert (list(seen.namespaces), seen.holds, seen.started, seen.seen_seconds_ago) == (["pay"], 2, 1, 2.0)
    desk.clock.advance(700_000)
    assert not (await desk.call("ListWorkers", pb.ListWorkersRequest(), pb.ListWorkersResponse)).workers


def test_the_roster_is_bounded() -> None:
    roster = Roster()
    for n in range(WORKERS_MAX + 10):
        worker = consumer_pb2.WorkerIdentity(worker_id=f"w{n}")
        roster.asked(consumer_pb2.GetTasksRequest(worker=worker), n)
        roster.asked(consumer_pb2.GetTasksRequest(worker=consumer_pb2.WorkerIdentity(worker_id="w0")), n)
    seen = [worker.identity.worker_id for worker in roster.lately(0)]
    assert len(seen) == WORKERS_MAX
    assert "w0" in seen
    assert "w1" not in seen


# -- dead letters that rest in the store


async def test_dead_letters_are_listed_by_filter(desk: Desk) -> None:
    await desk.rest(activation("a", desk.clock))
    desk.clock.advance(10_000)
    await desk.rest(activation("b", desk.clock, namespace="mail"))
    assert [letter.id for letter in await desk.letters()] == ["a", "b"]
    for wanted, found in (
        ({"namespace": "mail"}, ["b"]),
        ({"application": "crm"}, []),
        ({"reason": "failed"}, ["a", "b"]),
        ({"reason": "expired"}, []),
        ({"taskname": "refund"}, []),
        ({"from_at": desk.clock.wall}, ["b"]),
        ({"until_at": desk.clock.wall}, ["a"]),
    ):
        assert [letter.id for letter in await desk.letters(**wanted)] == found
    answer = await desk.call("GetDeadLetter", pb.GetDeadLetterRequest(id="a"), pb.GetDeadLetterResponse)
    assert (answer.letter.reason, answer.activation) == ("failed", b"body of a")
    assert "it never works" in answer.letter.story
    absent = await desk.call("GetDeadLetter", pb.GetDeadLetterRequest(id="c"), pb.GetDeadLetterResponse)
    assert not absent.HasField("letter")


async def test_dead_letters_with_long_stories_come_in_pages_that_are_bounded(desk: Desk) -> None:
    rows = [activation(f"t{n}", desk.clock) for n in range(60)]
    await desk.insert(*rows)
    long = json.dumps({"type": "E", "message": "错" * 16_384, "traceback": "错" * 16_384})
    for row in await desk.claim(len(rows)):
        assert desk.store.settle(token_of(desk.store, row), Event.FAIL, desk.clock.wall, None, long)
    await desk.store.committed()
    await desk.store.outbox.rest(await desk.store.outbox.take(Route.DEAD_LETTER, len(rows), BYTES))
    await desk.rest(*(activation(f"s{n}", desk.clock) for n in range(60)))
    ids: list[str] = []
    after, pages, more = 0, 0, True
    while more:
        request = pb.ListDeadLettersRequest(after_seq=after)
        page = await desk.call("ListDeadLetters", request, pb.ListDeadLettersResponse)
        assert page.ByteSize() < 4 * 1024 * 1024, "what any client of gRPC takes"
        ids += [letter.id for letter in page.letters]
        after, pages, more = page.next_after_seq, pages + 1, page.HasField("next_after_seq")
    assert ids == [f"t{n}" for n in range(60)] + [f"s{n}" for n in range(60)]
    assert pages < 20
    request = pb.ListDeadLettersRequest(after_seq=0, limit=7)
    page = await desk.call("ListDeadLetters", request, pb.ListDeadLettersResponse)
    assert len(page.letters) == 7
    assert page.next_after_seq == page.letters[-1].seq


async def test_a_replay_is_a_new_task_that_knows_its_root(desk: Desk) -> None:
    row = desk.admission.admit(message("root", desk.clock), desk.clock.wall)
    await desk.rest(row)
    desk.clock.advance(60_000)
    (letter,) = await desk.letters()
    (first,) = await desk.replay([letter.seq])
    assert first.result == pb.REPLAY_RESULT_SENT
    assert desk.store.outbox.resting == 0
    # Handled: it is gone, so a second replay finds nothing, and nothing runs twice.
    (again,) = await desk.replay([letter.seq])
    assert again.result == pb.REPLAY_RESULT_UNKNOWN
    (claimed,) = await desk.claim(9)
    sent = TaskActivation.FromString(claimed.body or b"")
    assert (claimed.id, sent.id, claimed.attempts) == (first.id, first.id, 0)
    assert claimed.received_at == desk.clock.wall
    original = TaskActivation.FromString(message("root", desk.clock))
    assert dict(sent.headers) == {"who": "me", ROOT_ID: "root"}
    for name in ("application", "namespace", "taskname", "parameters_bytes", "processing_deadline_duration"):
        assert getattr(sent, name) == getattr(original, name)
    assert sent.retry_state == original.retry_state
    # It dies again, and is replayed again: another id, the same root.
    await desk.settle(claimed, Event.FAIL)
    await desk.store.outbox.rest(await desk.store.outbox.take(Route.DEAD_LETTER, 1, BYTES))
    (letter,) = await desk.letters()
    (second,) = await desk.replay([letter.seq])
    assert second.id != first.id
    (claimed,) = await desk.claim(9)
    assert TaskActivation.FromString(claimed.body or b"").headers[ROOT_ID] == "root"


async def test_a_replay_that_was_interrupted_runs_once(desk: Desk) -> None:
    await desk.rest(desk.admission.admit(message("root", desk.clock), desk.clock.wall))
    (letter,) = await desk.letters()
    resting = await desk.store.read(lambda database: database.load_dead_letters([letter.seq]))
    await desk.replay([letter.seq])
    # As if the broker had died between the two: the task is there, its dead letter too.
    stored = [(r.seq, r.at, r.pair, r.id, r.taskname, r.reason, r.story, r.body) for r in resting]
    await desk.store.read(lambda database: database.rest_dead_letters(stored))
    desk.store.outbox.resting += 1
    (again,) = await desk.replay([letter.seq])
    assert again.result == pb.REPLAY_RESULT_SENT
    assert desk.store.outbox.resting == 0
    assert len(await desk.claim(9)) == 1


async def test_what_dies_again_in_the_same_way_is_replayed_again(desk: Desk) -> None:
    """Also while its first replay is within the window."""
    replays = []
    for late_ms in (desk.store.limits.dedup_window_ms // 2, 0):
        await desk.rest(desk.admission.admit(message("monthly", desk.clock), desk.clock.wall))
        desk.clock.advance(late_ms)
        (letter,) = await desk.letters()
        (sent,) = await desk.replay([letter.seq])
        replays.append(sent.id)
        claimed = await desk.claim(9)
        assert [row.id for row in claimed] == [sent.id]
        await desk.settle(claimed[0], Event.COMPLETE)
        while desk.store.content_of("monthly") is not None:
            desk.clock.advance(60_000)
            desk.store.forget_finished()
        assert late_ms == 0 or desk.store.content_of(sent.id) is not None
    assert len(set(replays)) == 2


async def test_a_replay_that_was_not_stored_keeps_its_dead_letter(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await desk.rest(desk.admission.admit(message("root", desk.clock), desk.clock.wall))
    (letter,) = await desk.letters()

    def stopped(rows: list[Activation]) -> None:
        raise StoreStopped

    monkeypatch.setattr(desk.store, "insert", stopped)
    with pytest.raises(StoreStopped):
        await desk.replay([letter.seq])
    assert await desk.letters() == [letter]
    monkeypatch.setattr(desk.store, "room", lambda: 0)
    with pytest.raises(Refused, match="no room"):
        await desk.replay([letter.seq])


async def test_what_is_no_activation_stays_where_it_is(desk: Desk) -> None:
    await desk.rest(activation("poison", desk.clock, body=b"\xff"))
    (letter,) = await desk.letters()
    (told,) = await desk.replay([letter.seq])
    assert told.result == pb.REPLAY_RESULT_NOT_AN_ACTIVATION
    assert len(await desk.letters()) == 1
    request = pb.DiscardDeadLettersRequest(seqs=[letter.seq, 99], by="test")
    answer = await desk.call("DiscardDeadLetters", request, pb.DiscardDeadLettersResponse)
    assert answer.discarded == 1
    assert (await desk.letters(), desk.store.outbox.resting) == ([], 0)


async def test_what_is_discarded_makes_room_although_nobody_waits_for_it(desk: Desk) -> None:
    await desk.rest(activation("dead", desk.clock))
    (letter,) = await desk.letters()
    discarding = asyncio.create_task(desk.store.outbox.drop_resting([letter.seq]))
    await asyncio.sleep(0)
    discarding.cancel()
    assert await desk.letters() == []
    assert desk.store.outbox.resting == 0


async def test_calls_are_bounded(desk: Desk) -> None:
    with pytest.raises(Refused, match="at most"):
        await desk.replay(range(101))
    with pytest.raises(Refused, match="at most"):
        await desk.cancel(*map(str, range(1001)))
    with pytest.raises(Refused, match="number of nothing"):
        await desk.replay([2**63])
    for method, request in (
        ("ListTasks", pb.ListTasksRequest(after_seq=2**64 - 1)),
        ("ListDeadLetters", pb.ListDeadLettersRequest(after_seq=2**63)),
        ("DiscardDeadLetters", pb.DiscardDeadLettersRequest(seqs=[2**63])),
    ):
        with pytest.raises(Refused, match="number of nothing"):
            await desk.methods[method](request.SerializeToString())
    assert await desk.letters() == []
    with pytest.raises(Refused, match="no GetStatusRequest"):
        await desk.methods["GetStatus"](b"\xff\xff")
    assert hash_id("a") not in desk.store.memory.live
