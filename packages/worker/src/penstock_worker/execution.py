"""One execution, from bytes to outcome."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
from collections.abc import Awaitable
from concurrent.futures import Future
from time import monotonic
from typing import Any

from google.protobuf.message import DecodeError

from penstock_client import App, ArgumentsMismatch, RetryRequested, SendError, Task, TaskContext, Verdict
from penstock_protocol.payload import decode_parameters
from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1.activation_pb2 import TaskActivation
from penstock_worker.errors import bounded, summarize
from penstock_worker.frames import Assignment, Error, Finished, Outcome

_COMPLETE = Outcome(pb.TASK_OUTCOME_STATUS_COMPLETE)
_EXPIRED = Outcome(pb.TASK_OUTCOME_STATUS_EXPIRED)
RETRY_DELAY_SECONDS_MAX = 366 * 86400.0


class NotRunnable(Exception):
    """This worker cannot run the task; another one may."""

    def __init__(self, reason: pb.ReleaseReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Execution:
    """Executes one task after another for an application. `async def` tasks share one loop."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, assignment: Assignment, started_at: float) -> Finished:
        """Load, find, bind, call, deliver, classify. The parent holds the deadline: it kills."""
        activation = TaskActivation()
        try:
            activation.ParseFromString(assignment.activation)
        except DecodeError as error:
            outcome = _failure(error)
        else:
            outcome = self._execute(assignment, activation)
        return Finished(
            assignment.number,
            outcome,
            bounded(activation.namespace, 200),
            monotonic() - started_at,
        )

    def _execute(self, assignment: Assignment, activation: TaskActivation) -> Outcome:
        if assignment.expires_at is not None and monotonic() >= assignment.expires_at:
            return _EXPIRED
        try:
            task = self._find(activation)
            args, kwargs = self._bind(task, activation)
        except NotRunnable as refusal:
            detail = Error(type(refusal).__qualname__, str(refusal), "")
            return Outcome(0, release_reason=refusal.reason, error=detail)
        # A payload that cannot be decoded today cannot be tomorrow.
        except ValueError as error:
            return _failure(error)
        context = TaskContext.from_activation(activation, assignment.attempt, assignment.claim_token)
        failed: list[SendError] = []
        self._app.answered = functools.partial(_keep_failure, failed)
        try:
            self._call(task, context, args, kwargs)
            self._deliver(failed)
        # SystemExit too: it ends the task, not the process.
        except BaseException as error:
            if os.getpid() != self._pid:
                # In a process that the task has forked: that one it ends.
                raise
            return classify(task, error, assignment.attempt)
        return _COMPLETE

    def _find(self, activation: TaskActivation) -> Task[..., Any]:
        task = self._app.tasks.get(activation.taskname)
        if task is None:
            raise NotRunnable(
                pb.RELEASE_REASON_UNKNOWN_TASK,
                f"The application {self._app.name!r} of this worker has no task {activation.taskname!r}.",
            )
        return task

    def _bind(self, task: Task[..., Any], activation: TaskActivation) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = decode_parameters(activation)
        try:
            task.bind_arguments(args, kwargs)
        except ArgumentsMismatch as mismatch:
            raise NotRunnable(pb.RELEASE_REASON_ARGUMENTS_MISMATCH, str(mismatch)) from mismatch
        return args, kwargs

    def _call(
        self, task: Task[..., Any], context: TaskContext, args: list[Any], kwargs: dict[str, Any]
    ) -> None:
        with context.entered():
            result = task.fn(context, *args, **kwargs) if task.bind else task.fn(*args, **kwargs)
            if inspect.isawaitable(result):
                self._await(result)

    def _deliver(self, failed: list[SendError]) -> None:
        """What the task has sent is safe before the task counts as done: this process may die next."""
        left = self._app.flush()
        if left:
            raise SendError(f"{left} tasks that this one sent were not acknowledged in time")
        for error in failed:
            # One that was raised in the task is the task's to handle.
            if not error.raised:
                raise error

    def _await(self, awaitable: Awaitable[object]) -> None:
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)

        async def awaited() -> None:
            await awaitable

        self._loop.run_until_complete(awaited())


def _keep_failure(failed: list[SendError], future: Future[None]) -> None:
    error = future.exception()
    if isinstance(error, SendError):
        failed.append(error)


def classify(task: Task[..., Any], error: BaseException, attempt: int) -> Outcome:
    """What an exception means: the task's retry policy decides."""
    try:
        return _classify(task, error, attempt)
    # A policy may be the user's code. Its traceback has that of the task's error, too.
    except Exception as broken:  # noqa: BLE001
        return _failure(broken)


def _classify(task: Task[..., Any], error: BaseException, attempt: int) -> Outcome:
    if isinstance(error, RetryRequested):
        seconds = error.countdown
        if seconds is None and task.retry is not None:
            seconds = task.retry.delay_seconds(attempt)
        return _retry(error, seconds)
    verdict = Verdict.FAIL if task.retry is None else task.retry.classify(error)
    if verdict is Verdict.IGNORE:
        return Outcome(pb.TASK_OUTCOME_STATUS_IGNORED, error=summarize(error))
    if verdict is Verdict.RETRY and task.retry is not None:
        return _retry(error, task.retry.delay_seconds(attempt))
    return _failure(error)


def _failure(error: BaseException) -> Outcome:
    return Outcome(pb.TASK_OUTCOME_STATUS_FAILURE, error=summarize(error))


def _retry(error: BaseException, seconds: float | None) -> Outcome:
    delay_ms = None
    if seconds is not None:
        delay_ms = math.ceil(min(max(seconds, 0.0), RETRY_DELAY_SECONDS_MAX) * 1000)
    return Outcome(pb.TASK_OUTCOME_STATUS_RETRY, error=summarize(error), retry_delay_ms=delay_ms)
