from __future__ import annotations

import asyncio
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from time import monotonic

import msgspec
import pytest
import worker_tasks

from penstock_client import App, Exponential, Fixed, Retry, RetryRequested, SendError, TaskContext
from penstock_client.durations import Duration
from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1.activation_pb2 import TaskActivation
from penstock_worker.execution import Execution, classify
from penstock_worker.frames import Assignment, Finished


def run(
    taskname: str, *args: object, attempt: int = 1, expires_in: float | None = None, **kwargs: object
) -> Finished:
    activation = TaskActivation(
        id="id-1",
        namespace="tests",
        taskname=taskname,
        application="worker-tests",
        parameters_bytes=msgspec.msgpack.encode({"args": args, "kwargs": kwargs}),
    )
    return run_bytes(activation.SerializeToString(), attempt, expires_in)


def run_bytes(activation: bytes, attempt: int = 1, expires_in: float | None = None) -> Finished:
    expires_at = None if expires_in is None else monotonic() + expires_in
    assignment = Assignment(7, activation, b"token-1", attempt, expires_at)
    return Execution(worker_tasks.app).run(assignment, monotonic())


def test_a_task_completes() -> None:
    finished = run("noop")
    assert finished.outcome.status == pb.TASK_OUTCOME_STATUS_COMPLETE
    assert finished.outcome.error is None
    assert (finished.number, finished.namespace) == (7, "tests")


def test_a_bound_task_gets_its_context(tmp_path: Path) -> None:
    file = tmp_path / "context"
    assert run("bound", str(file), attempt=2).outcome.status == pb.TASK_OUTCOME_STATUS_COMPLETE
    assert file.read_text() == "id-1 bound tests 2 token-1"


def test_coroutines_share_one_loop(tmp_path: Path) -> None:
    execution = Execution(worker_tasks.app)
    loops = set()
    for number in range(2):
        file = tmp_path / str(number)
        body = msgspec.msgpack.encode({"args": [str(file)], "kwargs": {}})
        activation = TaskActivation(id="i", namespace="tests", taskname="coroutine", parameters_bytes=body)
        assignment = Assignment(number, activation.SerializeToString(), b"t", 1, None)
        assert execution.run(assignment, monotonic()).outcome.status == pb.TASK_OUTCOME_STATUS_COMPLETE
        loops.add(file.read_text())
    assert len(loops) == 1


def test_a_task_that_closes_the_loop_it_finds_ends_no_coroutine_of_others() -> None:
    app = App("worker-tests", strict_kwargs="off")
    tests = app.namespace("tests", retry=None)

    @tests.task(name="coroutine")
    async def coroutine() -> None:
        await asyncio.sleep(0)

    @tests.task(name="closing")
    def closing() -> None:
        loop = asyncio.get_event_loop()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    execution, statuses = Execution(app), []
    for name in ("coroutine", "closing", "coroutine", "closing"):
        activation = TaskActivation(id="i", taskname=name).SerializeToString()
        outcome = execution.run(Assignment(1, activation, b"t", 1, None), monotonic()).outcome
        statuses.append(outcome.status)
    assert statuses == 4 * [pb.TASK_OUTCOME_STATUS_COMPLETE]


@pytest.mark.parametrize(
    ("kind", "status", "type", "delay_ms"),
    [
        ("retry", pb.TASK_OUTCOME_STATUS_RETRY, "builtins.ConnectionError", 2500),
        ("exclude", pb.TASK_OUTCOME_STATUS_FAILURE, "builtins.ConnectionResetError", None),
        ("ignore", pb.TASK_OUTCOME_STATUS_IGNORED, "builtins.KeyError", None),
        ("fail", pb.TASK_OUTCOME_STATUS_FAILURE, "builtins.ValueError", None),
        ("exit", pb.TASK_OUTCOME_STATUS_FAILURE, "builtins.SystemExit", None),
        ("interrupt", pb.TASK_OUTCOME_STATUS_FAILURE, "builtins.KeyboardInterrupt", None),
    ],
)
def test_the_retry_policy_decides_what_an_exception_means(
    kind: str, status: int, type: str, delay_ms: int | None
) -> None:
    outcome = run("raise", kind).outcome
    assert outcome.status == status
    assert outcome.retry_delay_ms == delay_ms
    assert outcome.error is not None
    assert outcome.error.type == type
    assert "worker_tasks.py" in outcome.error.traceback
    assert "execution.py" not in outcome.error.traceback


def test_a_retry_waits_as_long_as_its_attempt_asks_for() -> None:
    policy = Retry(max_attempts=9, backoff=Exponential(base=1, factor=3, jitter=0))
    task = App("worker-tests", strict_kwargs="off").namespace("tests").task(name="t", retry=policy)(print)
    for error in (ConnectionError(), RetryRequested(None)):
        delays = [classify(task, error, attempt).retry_delay_ms for attempt in (1, 2, 3)]
        assert delays == [1000, 3000, 9000]


def test_a_retry_waits_no_fraction_of_a_millisecond_less() -> None:
    policy = Retry(max_attempts=9, backoff=Fixed(0.0501))
    task = App("worker-tests", strict_kwargs="off").namespace("tests").task(name="t", retry=policy)(print)
    assert classify(task, ConnectionError(), 1).retry_delay_ms == 51


def test_a_task_asks_for_its_own_retry() -> None:
    outcome = run("retry_later").outcome
    assert (outcome.status, outcome.retry_delay_ms) == (pb.TASK_OUTCOME_STATUS_RETRY, 7000)


def test_an_unknown_task_is_given_back() -> None:
    outcome = run("nobody_knows").outcome
    assert outcome.release_reason == pb.RELEASE_REASON_UNKNOWN_TASK
    assert outcome.error is not None
    assert "'nobody_knows'" in outcome.error.message


@pytest.mark.parametrize(
    "arguments", [{"args": [1]}, {"args": [1, 2, 3]}, {"args": [1, 2], "kwargs": {"x": 1}}]
)
def test_arguments_that_do_not_bind_are_given_back(arguments: dict[str, object]) -> None:
    body = msgspec.msgpack.encode({"args": [], "kwargs": {}} | arguments)
    activation = TaskActivation(id="i", namespace="tests", taskname="two_arguments", parameters_bytes=body)
    outcome = run_bytes(activation.SerializeToString()).outcome
    assert outcome.release_reason == pb.RELEASE_REASON_ARGUMENTS_MISMATCH


def test_an_expired_task_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "ran"
    assert run("write", str(file), "x", expires_in=-0.001).outcome.status == pb.TASK_OUTCOME_STATUS_EXPIRED
    assert not file.exists()
    assert run("write", str(file), "x", expires_in=60).outcome.status == pb.TASK_OUTCOME_STATUS_COMPLETE


def test_what_cannot_be_read_fails_for_good() -> None:
    assert run_bytes(b"\xff\xff").outcome.status == pb.TASK_OUTCOME_STATUS_FAILURE
    broken = TaskActivation(id="i", namespace="tests", taskname="noop", parameters_bytes=b"\xc1")
    outcome = run_bytes(broken.SerializeToString()).outcome
    assert outcome.status == pb.TASK_OUTCOME_STATUS_FAILURE
    assert outcome.error is not None
    assert "PayloadError" in outcome.error.type


class Undelivered:
    """A transport that never gets an acknowledgement."""

    def send(self, message: object, future: object) -> None: ...

    def flush(self, seconds: float) -> int:
        return 2

    def close(self) -> None: ...


def test_a_task_is_done_only_when_what_it_sent_is_safe() -> None:
    app = App("worker-tests", transport=Undelivered(), strict_kwargs="off")
    follow_up = app.namespace("tests").task(name="follow up", retry=None)(lambda: None)
    app.namespace("tests").task(name="first", retry=None)(lambda: follow_up.delay())
    assignment = Assignment(1, TaskActivation(id="i", taskname="first").SerializeToString(), b"t", 1, None)
    outcome = Execution(app).run(assignment, monotonic()).outcome
    assert outcome.status == pb.TASK_OUTCOME_STATUS_FAILURE
    assert outcome.error is not None
    assert "2 tasks that this one sent" in outcome.error.message


class Refusing:
    """A transport whose broker refuses all; nothing is left to wait for."""

    def send(self, message: object, future: Future[None]) -> None:
        future.set_exception(SendError("the broker refused it"))

    def flush(self, seconds: float) -> int:
        return 0

    def close(self) -> None: ...


def test_a_task_is_not_done_when_what_it_sent_has_failed_unseen() -> None:
    app = App("worker-tests", transport=Refusing(), strict_kwargs="off")
    tests = app.namespace("tests", retry=None)
    follow_up = tests.task(name="follow up")(lambda: None)

    @tests.task(name="careless")
    def careless() -> None:
        follow_up.delay()

    @tests.task(name="careful")
    def careful() -> None:
        with pytest.raises(SendError):
            follow_up.delay().wait()

    @tests.task(name="awaiting")
    async def awaiting() -> None:
        with pytest.raises(SendError):
            await follow_up.delay_async()

    execution, statuses = Execution(app), []
    for name in ("careless", "careful", "awaiting"):
        activation = TaskActivation(id="i", taskname=name).SerializeToString()
        outcome = execution.run(Assignment(1, activation, b"t", 1, None), monotonic()).outcome
        statuses.append(outcome.status)
        if outcome.error is not None:
            assert outcome.error.message == "the broker refused it"
    complete, failure = pb.TASK_OUTCOME_STATUS_COMPLETE, pb.TASK_OUTCOME_STATUS_FAILURE
    assert statuses == [failure, complete, complete]


class Broken:
    """A back-off that works when the task is declared, and not when it is needed."""

    def seconds(self, attempt: int) -> float:
        return float("nan") if attempt > 1 else 0.0


def test_a_policy_that_is_broken_fails_the_task_and_not_the_process() -> None:
    app = App("worker-tests", transport=Refusing(), strict_kwargs="off")
    tests = app.namespace("tests", retry=Retry(max_attempts=5, backoff=Broken()))

    @tests.task(name="raises")
    def raises() -> None:
        raise ConnectionError("the reason")

    @tests.task(name="asks", bind=True)
    def asks(ctx: TaskContext, /) -> None:
        raise ctx.retry([30])  # type: ignore[arg-type]

    for name, reason in (("raises", "the reason"), ("asks", "asked to be started again")):
        activation = TaskActivation(id="i", taskname=name).SerializeToString()
        outcome = Execution(app).run(Assignment(1, activation, b"t", 2, None), monotonic()).outcome
        assert outcome.status == pb.TASK_OUTCOME_STATUS_FAILURE
        assert outcome.error is not None
        assert reason in outcome.error.traceback


@pytest.mark.parametrize("countdown", ["7s", timedelta(seconds=7), 7, 7.0])
def test_a_countdown_is_a_duration_like_any_other(countdown: Duration) -> None:
    app = App("worker-tests", transport=Refusing(), strict_kwargs="off")

    @app.namespace("tests", retry=None).task(name="asks", bind=True)
    def asks(ctx: TaskContext, /) -> None:
        raise ctx.retry(countdown)

    activation = TaskActivation(id="i", taskname="asks").SerializeToString()
    outcome = Execution(app).run(Assignment(1, activation, b"t", 1, None), monotonic()).outcome
    assert (outcome.status, outcome.retry_delay_ms) == (pb.TASK_OUTCOME_STATUS_RETRY, 7000)
