"""A function that can be called later, elsewhere."""

from __future__ import annotations

import functools
import inspect
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from penstock_client.context import TaskContext
from penstock_client.durations import Duration, expiry, seconds
from penstock_client.errors import ArgumentsMismatch, SendError
from penstock_client.retry import Retry
from penstock_client.transports import Outgoing
from penstock_protocol.payload import (
    COMPRESS_FROM_BYTES,
    COMPRESSION,
    COMPRESSION_HEADER,
    PayloadError,
    compress,
    encode_parameters,
)
from penstock_protocol.v1 import activation_pb2

if TYPE_CHECKING:
    from penstock_client.app import App

P = ParamSpec("P")
R = TypeVar("R")

TRACEPARENT = "traceparent"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TaskRef:
    """A task that was sent: its id, and a future of the acknowledgement."""

    __slots__ = ("future", "id", "taskname")

    def __init__(self, id: str, taskname: str, future: Future[None]) -> None:
        self.id = id
        self.taskname = taskname
        self.future = future

    def wait(self, timeout: float | None = None) -> TaskRef:
        """Block until the task is safe in Kafka or in the broker.

        Raises SendError when it is not, or when ``timeout`` seconds have passed: then it may still
        arrive.
        """
        try:
            self.future.result(timeout)
        except FutureTimeout:
            raise SendError(
                f"task {self.taskname} ({self.id}) was not acknowledged within {timeout} s; it is still being"
                " tried, and its future will tell"
            ) from None
        except SendError as error:
            error.raised = True
            raise
        return self

    def __repr__(self) -> str:
        return f"<TaskRef {self.taskname} {self.id}>"


@dataclass(frozen=True, slots=True)
class Call:
    """A call as a value: what ``task.call(...)`` stands for, to be compared in tests."""

    taskname: str
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Options:
    """How calls are sent. A moment stays one until then: a duration begins with each call."""

    countdown: float | datetime | None = None
    expires: int | datetime | None = None
    headers: Mapping[str, str] | None = None
    task_id: str | None = None
    wait: bool = False


class Task(Generic[P, R]):
    """A registered function. Calling it runs it here; ``delay`` and ``apply_async`` send it."""

    def __init__(  # noqa: PLR0913 - what a declaration says
        self,
        app: App,
        fn: Callable[..., R],
        *,
        name: str,
        namespace: str,
        bind: bool,
        retry: Retry | None,
        deadline_seconds: int,
        expires_seconds: int | None,
        at_most_once: bool,
    ) -> None:  # fmt: skip
        self.app = app
        self.fn = fn
        self.name = name
        self.namespace = namespace
        self.bind = bind
        self.retry = retry
        self.deadline_seconds = deadline_seconds
        self.expires_seconds = expires_seconds
        self.at_most_once = at_most_once
        signature = inspect.signature(fn)
        if bind:
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        self._signature = signature
        self._template = self._encode_template()
        functools.update_wrapper(self, fn)

    def __repr__(self) -> str:
        return f"<Task {self.name} of {self.app.name}/{self.namespace}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it here and now."""
        if self.bind:
            context = TaskContext("inline", self.name, self.namespace, deadline_seconds=self.deadline_seconds)
            with context.entered():
                return self.fn(context, *args, **kwargs)
        return self.fn(*args, **kwargs)

    # -- sending

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> TaskRef:
        """Send it with these arguments."""
        return self._send(args, kwargs, _PLAIN)

    async def delay_async(self, *args: P.args, **kwargs: P.kwargs) -> TaskRef:
        """Send it, and wait without blocking the event loop until it is acknowledged. Raises SendError."""
        return await self._send_async(args, kwargs, _PLAIN)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call:
        """The call as a value; nothing is sent."""
        return Call(self.name, tuple(args), dict(kwargs))

    def options(
        self,
        *,
        countdown: Duration | None = None,
        eta: datetime | None = None,
        expires: Duration | datetime | None = None,
        headers: Mapping[str, str] | None = None,
        task_id: str | None = None,
        wait: bool = False,
        **unsupported: object,
    ) -> Bound[P]:
        """The task with options for the calls that follow: ``task.options(countdown=60).delay(7)``.

        ``countdown`` (seconds) or ``eta``: not before then. ``expires``: not after then. Seconds count
        from each call. ``task_id``: an id of your own; a second call with it is absorbed within the
        window. ``wait``: do not return before it is acknowledged.
        """
        _refuse(unsupported)
        if countdown is not None and eta is not None:
            raise TypeError("countdown= and eta= say the same in two ways: give one")
        options = Options(
            _aware("eta", eta) if countdown is None else seconds("countdown", countdown),
            _expiry(expires),
            _texts(headers),
            _id(task_id),
            wait,
        )
        return Bound(self, options)

    def apply_async(
        self,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
        **options: Any,
    ) -> TaskRef:
        """Send it with arguments in a sequence and a mapping; ``options`` are those of ``options()``."""
        if isinstance(args, str | bytes):
            raise TypeError(
                f"args= takes a list or a tuple of arguments, not {args!r:.100}: write ({args!r:.100},)"
            )
        return self._send(tuple(args), kwargs or {}, self.options(**options)._options)

    def _send(self, args: Sequence[object], kwargs: Mapping[str, object], options: Options) -> TaskRef:
        id = options.task_id or os.urandom(16).hex()
        message = activation_pb2.TaskActivation(id=id)
        received_at, now = message.received_at, time.time_ns()
        received_at.seconds, received_at.nanos = divmod(now, 1_000_000_000)
        headers = options.headers
        if headers:
            message.headers.update(headers)
        message.parameters_bytes = self._parameters(args, kwargs, message)
        if options.countdown and (delay := math.ceil(_seconds_to(options.countdown, now))):
            message.delay = delay
        if options.expires is not None:
            message.expires = math.floor(_seconds_to(options.expires, now))
        outgoing = Outgoing(
            id,
            self.name,
            self.namespace,
            self.app.topic_of(self.namespace),
            # The same as one message: of a field that is there twice, protobuf takes the last.
            self._template + message.SerializeToString(),
            options.task_id,
            headers.get(TRACEPARENT) if headers else None,
        )
        future: Future[None] = Future()
        # Under way from here on: a caller who stops waiting must not cancel what will be answered.
        future.set_running_or_notify_cancel()
        if self.app.answered is not None:
            future.add_done_callback(self.app.answered)
        self.app.transport.send(outgoing, future)
        ref = TaskRef(id, self.name, future)
        return ref.wait(self.app.settings.send_timeout_seconds) if options.wait else ref

    async def _send_async(
        self, args: Sequence[object], kwargs: Mapping[str, object], options: Options
    ) -> TaskRef:
        import asyncio  # a quarter of this package's import time; who awaits has it already

        # In a thread: connecting takes time, and so does a full buffer.
        ref = await asyncio.to_thread(self._send, args, kwargs, options)
        try:
            await asyncio.wrap_future(ref.future)
        except SendError as error:
            error.raised = True
            raise
        return ref

    def _parameters(
        self, args: Sequence[object], kwargs: Mapping[str, object], message: activation_pb2.TaskActivation
    ) -> bytes:
        try:
            parameters = encode_parameters(args, kwargs)
        except PayloadError as error:
            raise PayloadError(f"task {self.name}: {error}") from None
        size, settings = len(parameters), self.app.settings
        if size > settings.payload_bytes_max:
            raise PayloadError(
                f"task {self.name}: the arguments take {size} bytes, more than payload_bytes_max"
                f" ({settings.payload_bytes_max}); the largest is {_largest(args, kwargs)}. Store the"
                " data elsewhere and send its key"
            )
        if size >= settings.payload_warn_bytes:
            warnings.warn(
                f"task {self.name}: the arguments take {size} bytes (payload_warn_bytes is"
                f" {settings.payload_warn_bytes}); the largest is {_largest(args, kwargs)}",
                stacklevel=4,
            )
        if size >= COMPRESS_FROM_BYTES:
            message.headers[COMPRESSION_HEADER] = COMPRESSION
            return compress(parameters)
        return parameters

    def _encode_template(self) -> bytes:
        """All that is the same in every call."""
        retry = self.retry or Retry()
        exceeded = (
            activation_pb2.ON_ATTEMPTS_EXCEEDED_DISCARD
            if retry.on_exceeded == "discard"
            else activation_pb2.ON_ATTEMPTS_EXCEEDED_DEADLETTER
        )
        state = activation_pb2.RetryState(max_attempts=retry.max_attempts, on_attempts_exceeded=exceeded)
        if self.at_most_once:
            state.at_most_once = True
        wait = math.ceil(retry.delay_seconds(1))
        if wait and retry.max_attempts > 1:
            state.delay_on_retry = wait
        template = activation_pb2.TaskActivation(
            namespace=self.namespace,
            taskname=self.name,
            application=self.app.name,
            processing_deadline_duration=self.deadline_seconds,
            retry_state=state,
        )
        if self.expires_seconds is not None:
            template.expires = self.expires_seconds
        return template.SerializeToString()

    # -- receiving

    def bind_arguments(self, args: Sequence[object], kwargs: Mapping[str, object]) -> inspect.BoundArguments:
        """See that the arguments fit the function. Raises ArgumentsMismatch saying why not."""
        try:
            return self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentsMismatch(
                f"the arguments do not fit {self.name}{self._signature}: {error}"
            ) from None

    def takes_more(self) -> bool:
        """Whether newer code may send arguments that this function does not name."""
        return any(p.kind is p.VAR_KEYWORD for p in self._signature.parameters.values())


class Bound(Generic[P]):
    """A task with the options of its next calls."""

    __slots__ = ("_options", "_task")

    def __init__(self, task: Task[P, Any], options: Options) -> None:
        self._task = task
        self._options = options

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> TaskRef:
        return self._task._send(args, kwargs, self._options)

    async def delay_async(self, *args: P.args, **kwargs: P.kwargs) -> TaskRef:
        return await self._task._send_async(args, kwargs, self._options)


_PLAIN = Options()

# Words of other systems that cannot be honoured, with what to do instead.
_ALTERNATIVES = {
    "link": "call the next task at the end of this one",
    "link_error": "read the dead letters, or catch the error in the task",
    "chord": "count finished parts in your database, and start the last step from the last part",
    "chain": "call the next task at the end of this one",
    "group": "send the tasks one by one; delay() does not wait",
    "priority": "give urgent tasks a namespace of their own; namespaces take turns",
    "rate_limit": "limit inside the task, or run its namespace on a worker with little concurrency",
    "time_limit": "use deadline= (seconds)",
    "soft_time_limit": "use deadline= (seconds)",
    "serializer": "arguments are msgpack; send plain values",
    "compression": "large arguments are compressed by themselves",
    "exchange": "set a route for the namespace (taskworker.route.overrides)",
    "routing_key": "set a route for the namespace (taskworker.route.overrides)",
    "queue": "a task's queue is fixed where it is declared; declare it in another namespace",
    "ignore_result": "results are never stored",
    "shadow": "name the task with name=",
    "acks_late": "tasks are always acknowledged after they ran; at_most_once=True is the other way",
}


def _refuse(unsupported: Mapping[str, object]) -> None:
    for word in unsupported:
        alternative = _ALTERNATIVES.get(word)
        if alternative is not None:
            raise TypeError(f"{word}= is not supported: {alternative}")
        raise TypeError(f"unknown option {word}=")


def _aware(name: str, moment: datetime | None) -> datetime | None:
    if moment is not None and moment.tzinfo is None:
        raise ValueError(f"{name}={moment} has no time zone: use datetime.now(UTC) or another aware one")
    return moment


def _expiry(expires: Duration | datetime | None) -> int | datetime | None:
    if expires is None or isinstance(expires, datetime):
        return _aware("expires", expires)
    return expiry(expires)


def _seconds_to(when: float | datetime, now: int) -> float:
    """From ``now`` (epoch ns) to a moment, but not into the past; a duration is what it is."""
    if isinstance(when, datetime):
        return max(0, (when - _EPOCH) // timedelta(microseconds=1) * 1000 - now) / 1_000_000_000
    return when


def _texts(headers: Mapping[str, str] | None) -> dict[str, str] | None:
    if headers is None:
        return None
    for name, value in headers.items():
        if type(name) is not str or type(value) is not str:
            raise TypeError(f"headers are texts; {name!r} is {value!r}")
    # Of another task's headers, this one says how that one's arguments are encoded.
    return {name: value for name, value in headers.items() if name != COMPRESSION_HEADER}


def _id(task_id: str | None) -> str | None:
    if task_id is not None and (type(task_id) is not str or not 0 < len(task_id) <= 256):
        raise ValueError(f"task_id must be a text of 1 to 256 characters, not {task_id!r:.100}")
    return task_id


def _largest(args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    named = [(f"argument {n}", value) for n, value in enumerate(args)]
    named += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    if not named:
        return "none"
    name, value = max(named, key=lambda item: len(encode_parameters((item[1],), {})))
    return f"{name} ({len(encode_parameters((value,), {}))} bytes)"
