"""The application: its namespaces, its tasks, and how they leave."""

from __future__ import annotations

import atexit
import importlib
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from penstock_client import forks
from penstock_client.context import TaskContext
from penstock_client.durations import Duration, expiry, seconds
from penstock_client.errors import AppError, SendError, nearest
from penstock_client.retry import Backoff, Exponential, Fixed, Retry, exception_types
from penstock_client.settings import ClientSettings, load_settings, setting_origins
from penstock_client.task import Task, TaskRef, _refuse
from penstock_client.transports import Transport, connect

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("penstock.client")

DEADLINE_SECONDS = 30


class _Unset:
    """A policy nobody has chosen, as opposed to None, which is a choice."""


UNSET = _Unset()
RetryOption = Retry | None | _Unset


class App:
    """Wires namespaces, routes and the transport. One for each application.

    ``imports``: modules with tasks, which a worker imports. ``queues``: namespaces that may be named
    by ``queue=`` besides the declared ones. ``topics``: if given, the closed list of topics that
    routes may name. Settings that are not given here come from PENSTOCK_CONFIG and the environment.
    Raises ConfigError.
    """

    def __init__(  # noqa: PLR0913 - the words of a declaration
        self,
        name: str,
        *,
        kafka: str | None = None,
        broker: str | None = None,
        transport: Transport | None = None,
        imports: Sequence[str] = (),
        queues: Iterable[str] = (),
        topics: Iterable[str] = (),
        strict_kwargs: Literal["off", "warn", "error"] | None = None,
        config: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        if not name or len(name) > 256:
            raise AppError(f"an application needs a name of 1 to 256 characters, not {name!r:.100}")
        unknown = settings.keys() - ClientSettings.__dataclass_fields__.keys()
        if unknown:
            raise AppError(
                f"App has no setting {_named(sorted(unknown)[0], ClientSettings.__dataclass_fields__)}"
            )
        self.name = name
        self.imports = tuple(imports)
        self.topics = frozenset(topics)
        given = {"kafka": kafka, "broker": broker, "strict_kwargs": strict_kwargs, **settings}
        self.settings = load_settings(given, config)
        self._given = (given, config)
        self._namespaces: dict[str, Namespace] = {}
        self._queues = frozenset(queues)
        self._tasks: dict[str, Task[..., Any]] = {}
        self._routes: dict[str, str] = {}
        self._transport = transport
        self._connecting = False
        # Called with the future of each task that is sent, once it is answered. For a worker, whose tasks
        # are not done before what they have sent is safe.
        self.answered: Callable[[Future[None]], None] | None = None
        for namespace, topic in self.settings.route_overrides.items():
            self._check_topic(topic, f"the route of namespace {namespace!r}")

    def __repr__(self) -> str:
        return f"<App {self.name}: {len(self._tasks)} tasks in {len(self._namespaces)} namespaces>"

    # -- declaring

    @property
    def tasks(self) -> Mapping[str, Task[..., Any]]:
        """Registered tasks by name."""
        return self._tasks

    @property
    def namespaces(self) -> Mapping[str, Namespace]:
        """Declared namespaces by name."""
        return self._namespaces

    def namespace(
        self,
        name: str,
        *,
        retry: RetryOption = UNSET,
        deadline: Duration = DEADLINE_SECONDS,
        expires: Duration | None = None,
        at_most_once: bool = False,
    ) -> Namespace:
        """Declare a namespace with defaults for its tasks; a second time it must say the same."""
        namespace = Namespace(self, name, retry, deadline, expires, at_most_once)
        self.topic_of(name)
        known = self._namespaces.setdefault(name, namespace)
        if known is not namespace and known.defaults != namespace.defaults:
            raise AppError(f"namespace {name!r} is declared twice with different defaults")
        return known

    def queue(self, name: str) -> Namespace:
        """A declared namespace, or one of ``queues``. Raises AppError naming the nearest."""
        if name in self._namespaces:
            return self._namespaces[name]
        if name in self._queues:
            return self.namespace(name)
        known = sorted({*self._namespaces, *self._queues})
        raise AppError(
            f"queue {_named(name, known)}; declare it with app.namespace({name!r}) or App(queues=[...])"
        )

    def register(self, task: Task[..., Any]) -> None:
        """Add a task. Raises AppError when its name is taken."""
        other = self._tasks.get(task.name)
        if other is not None and _place(other.fn) != _place(task.fn):
            raise AppError(
                f"two tasks are named {task.name!r}: {_place(other.fn)} and {_place(task.fn)}; names must be"
                " unique, for messages carry nothing else"
            )
        self._tasks[task.name] = task

    def load(self) -> None:
        """Import all modules with tasks. Raises AppError naming module and cause."""
        for module in self.imports:
            try:
                importlib.import_module(module)
            except AppError:
                raise
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise AppError(
                    f"the module {module!r} of App(imports=...) cannot be imported:"
                    f" {type(error).__name__}: {error}"
                ) from error

    # -- sending

    def topic_of(self, namespace: str) -> str:
        """The topic that a namespace's tasks go to."""
        topic = self._routes.get(namespace)
        if topic is None:
            topic, origin = self.settings.topic_of(namespace)
            self._check_topic(topic, origin)
            self._routes[namespace] = topic
        return topic

    def route_of(self, namespace: str) -> tuple[str, str]:
        """The topic of a namespace, and where that route came from: for people."""
        topic = self.topic_of(namespace)
        setting = "route_overrides" if namespace in self.settings.route_overrides else "topic"
        return topic, setting_origins(*self._given).get(setting, "default")

    def _check_topic(self, topic: str, what: str) -> None:
        if self.topics and topic not in self.topics:
            raise AppError(
                f"{what}: topic {_named(topic, self.topics)}; App(topics=[...]) is the closed list"
            )

    @property
    def transport(self) -> Transport:
        """How tasks leave; connected when the first one is sent, or by reading this: as a program does at its
        start whose handlers of signals send. Raises ConfigError, SendError."""
        if self._transport is None:
            with forks.connecting:
                if self._transport is None:
                    self._transport = self._connect()
                    atexit.register(self._flush_at_exit)
                    forks.watch(self)
        return self._transport

    def _connect(self) -> Transport:
        if self._connecting:
            # What it interrupts, modules that are being imported, goes on after it only.
            raise SendError(
                "a handler of a signal cannot send while the first task of its process is being sent: connect"
                " at the start, by app.transport"
            )
        self._connecting = True
        try:
            return connect(self.settings)
        finally:
            self._connecting = False

    def forget_transport(self) -> Transport | None:
        """Connect anew for the next task. For a forked child: what waits is its parent's to send."""
        transport, self._transport = self._transport, None
        atexit.unregister(self._flush_at_exit)
        return transport

    def send_task(
        self,
        name: str,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
        *,
        queue: str | None = None,
        retry: RetryOption = UNSET,
        deadline: Duration | None = None,
        **options: Any,
    ) -> TaskRef:
        """Send a task by name, without importing its code.

        A registered one is sent as it was declared. Otherwise ``queue`` names the namespace; without
        it, the only declared one. ``retry`` and ``deadline`` are those of the namespace unless given.
        ``options`` are those of ``Task.options``.
        """
        task = self._tasks.get(name)
        if task is None:
            task = self._queue_for(name, queue).unregistered(name, retry, deadline)
        elif deadline is not None or not isinstance(retry, _Unset) or queue not in (None, task.namespace):
            raise TypeError(
                f"send_task({name!r}): the task is registered here, so its declaration fixes queue="
                f" ({task.namespace!r}), retry= and deadline=; leave them out"
            )
        return task.apply_async(args, kwargs, **options)

    def _queue_for(self, name: str, queue: str | None) -> Namespace:
        if queue is not None:
            return self.queue(queue)
        if len(self._namespaces) == 1:
            return next(iter(self._namespaces.values()))
        raise AppError(
            f"send_task({name!r}): the task is not registered here, and {len(self._namespaces)} namespaces"
            " are declared: say which with queue="
        )

    def flush(self, timeout: float | None = None) -> int:
        """Wait until what was sent is acknowledged; how many tasks are not after ``timeout`` seconds."""
        if self._transport is None:
            return 0
        return self._transport.flush(self.settings.delivery_timeout_seconds if timeout is None else timeout)

    def close(self) -> None:
        """Flush, then let go of the transport."""
        if self._transport is not None:
            self._flush_at_exit()
            self._transport.close()
            atexit.unregister(self._flush_at_exit)

    def _flush_at_exit(self) -> None:
        left = self.flush(1)
        if left:
            seconds = self.settings.delivery_timeout_seconds
            log.warning("waiting up to %g s for %d tasks of %s to be acknowledged", seconds, left, self.name)
            left = self.flush()
        if left:
            log.error("%d tasks of %s were not acknowledged before the exit and may be lost", left, self.name)


class Binding(Protocol):
    """Decorates a function that takes a TaskContext first.

    With ``**kwargs`` its first parameter must be positional-only (``ctx, /``) for its calls to be
    type-checked: else ``kwargs`` could hold a ``ctx``, too.
    """

    @overload
    def __call__(self, fn: Callable[Concatenate[TaskContext, P], R]) -> Task[P, R]: ...
    @overload
    def __call__(self, fn: Callable[..., R]) -> Task[..., R]: ...


class Namespace:
    """A group of tasks with common defaults; brokers take turns between namespaces."""

    def __init__(
        self,
        app: App,
        name: str,
        retry: RetryOption,
        deadline: Duration,
        expires: Duration | None,
        at_most_once: bool,
    ) -> None:
        if not name or len(name) > 256:
            raise AppError(f"a namespace needs a name of 1 to 256 characters, not {name!r:.100}")
        _check_policy(retry)
        self.app = app
        self.name = name
        self.retry = retry
        self.deadline = deadline
        self.expires = expires
        self.at_most_once = at_most_once

    @property
    def defaults(self) -> tuple[object, ...]:
        return self.retry, self.deadline, self.expires, self.at_most_once

    def __repr__(self) -> str:
        return f"<Namespace {self.app.name}/{self.name}>"

    @overload
    def task(self, *, name: str, bind: Literal[True], **options: Any) -> Binding: ...
    @overload
    def task(
        self, *, name: str, bind: Literal[False] = False, **options: Any
    ) -> Callable[[Callable[P, R]], Task[P, R]]: ...

    def task(self, *functions: Any, **options: Any) -> Any:
        """Register a function: ``@namespace.task(name="payments.charge", deadline=30)``.

        Options: ``name`` (required: it is what messages carry, whatever the function is called later),
        ``bind`` (the function takes a TaskContext first), ``retry``, ``deadline`` (seconds it may run),
        ``expires``, ``at_most_once``; and Celery's ``max_retries``, ``default_retry_delay``,
        ``autoretry_for``, ``retry_backoff``, ``queue``.
        """
        for fn in functions:  # @namespace.task, without a name
            raise TypeError(_name_missing(fn))

        def declare(fn: Callable[..., Any]) -> Task[..., Any]:
            return self._declare(fn, **options)

        return declare

    def _declare(  # noqa: PLR0913 - the words of a declaration
        self,
        fn: Callable[..., Any],
        *,
        name: str = "",
        bind: bool = False,
        retry: RetryOption = UNSET,
        deadline: Duration | None = None,
        expires: Duration | None = None,
        at_most_once: bool | None = None,
        queue: str | None = None,
        max_retries: int | None = None,
        default_retry_delay: Duration | None = None,
        autoretry_for: Iterable[type[BaseException]] | None = None,
        retry_backoff: bool | int | float | Backoff | None = None,
        **unsupported: object,
    ) -> Task[..., Any]:  # fmt: skip
        if isinstance(fn, Task):
            raise TypeError(f"{fn!r} is a task already")
        if not name:
            raise TypeError(_name_missing(fn))
        _refuse(unsupported)
        _check_function(fn, name, bind)
        namespace = self if queue is None else self.app.queue(queue)
        policy = _celery_retry(retry, max_retries, default_retry_delay, autoretry_for, retry_backoff)
        if isinstance(policy, _Unset):
            policy = namespace.retry
        once = namespace.at_most_once if at_most_once is None else at_most_once
        policy = _with_words(policy, fn)
        if isinstance(policy, _Unset):
            policy = None
            if not once:
                log.info(
                    "task %s has no retry policy: it runs once, and a failure is a dead letter"
                    " (retry=Retry(...) retries, retry=None says that this is meant)",
                    name,
                )
        expires = namespace.expires if expires is None else expires
        task: Task[..., Any] = Task(
            self.app,
            fn,
            name=name,
            namespace=namespace.name,
            bind=bind,
            retry=policy,
            deadline_seconds=_deadline(namespace.deadline if deadline is None else deadline),
            expires_seconds=None if expires is None else expiry(expires),
            at_most_once=once,
        )
        if once and policy is not None and policy.max_attempts > 1:
            raise AppError(f"task {name!r} is at_most_once and cannot be retried: give retry=None")
        self._check_kwargs(task)
        self.app.register(task)
        return task

    def unregistered(self, name: str, retry: RetryOption, deadline: Duration | None) -> Task[..., Any]:
        """A task whose code is elsewhere: it can be sent only."""
        policy = self.retry if isinstance(retry, _Unset) else retry
        return Task(
            self.app,
            _elsewhere,
            name=name,
            namespace=self.name,
            bind=False,
            retry=None if isinstance(policy, _Unset) else policy,
            deadline_seconds=_deadline(self.deadline if deadline is None else deadline),
            expires_seconds=None if self.expires is None else expiry(self.expires),
            at_most_once=self.at_most_once,
        )

    def _check_kwargs(self, task: Task[..., Any]) -> None:
        strict = self.app.settings.strict_kwargs
        if strict == "off" or task.takes_more():
            return
        problem = (
            f"task {task.name!r} ({_place(task.fn)}) has no **kwargs: while a deploy is under way, older"
            " workers cannot take an argument that newer code sends, and give such tasks back"
        )
        if strict == "error":
            raise TypeError(f"{problem}. Add **kwargs, or set strict_kwargs")
        warnings.warn(
            f"{problem}. Add **kwargs to it, or silence this with App(..., strict_kwargs='off')", stacklevel=4
        )


RETRY_WORDS = "__penstock_retry__"


def _with_words(policy: RetryOption, fn: Callable[..., Any]) -> RetryOption:
    """``policy`` with what the @retry decorator on the function said."""
    words: dict[str, Any] | None = getattr(fn, RETRY_WORDS, None)
    if words is None:
        return policy
    if not isinstance(policy, Retry):
        # A bare @retry means that it is retried; Sentry's default is three more times.
        policy = Retry(max_attempts=4)
    given = {
        f: getattr(policy, f) for f in ("max_attempts", "backoff", "on", "exclude", "ignore", "on_exceeded")
    }
    return Retry(**{**given, **words})


def _celery_retry(
    retry: RetryOption,
    max_retries: int | None,
    delay: Duration | None,
    autoretry_for: Iterable[type[BaseException]] | None,
    backoff: bool | int | float | Backoff | None,
) -> RetryOption:
    _check_policy(retry)
    words = (max_retries, delay, autoretry_for, backoff)
    if all(word is None for word in words):
        return retry
    if not isinstance(retry, _Unset):
        raise TypeError(
            "retry= and max_retries/default_retry_delay/autoretry_for/retry_backoff say the same: give one"
        )
    if backoff is not None and delay is not None:
        raise TypeError("retry_backoff= and default_retry_delay= say the same in two ways: give one")
    if backoff is None or backoff is False:
        wait: Backoff = Fixed(0.0 if delay is None else seconds("default_retry_delay", delay))
    elif isinstance(backoff, bool | int | float):
        wait = Exponential(1.0 if backoff is True else float(backoff), cap=600)
    else:
        wait = backoff
    on = (Exception,) if autoretry_for is None else exception_types("autoretry_for", tuple(autoretry_for))
    return Retry(max_attempts=(3 if max_retries is None else max_retries) + 1, backoff=wait, on=on)


def _check_policy(retry: object) -> None:
    if retry is not None and not isinstance(retry, Retry | _Unset):
        raise TypeError(f"retry= takes Retry(...) or None, not {retry!r:.100}")


def _check_function(fn: Callable[..., Any], name: str, bind: bool) -> None:
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise TypeError(
            f"task {name!r} ({_place(fn)}) is a generator: called, it would do nothing. Loop inside the task"
        )
    first = next(iter(inspect.signature(fn).parameters.values()), None)
    if bind and (first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD)):
        raise TypeError(
            f"task {name!r} ({_place(fn)}) has bind=True, but no place for the context: def f(ctx, ...)"
        )


def _deadline(deadline: Duration) -> int:
    return max(1, math.ceil(seconds("deadline", deadline)))


def _name_missing(fn: Callable[..., Any]) -> str:
    module = getattr(fn, "__module__", "") or ""
    suggested = f"{module.rpartition('.')[2]}.{getattr(fn, '__name__', 'task')}"
    return (
        f"a task needs a stable name, e.g. name={suggested!r}: messages carry it, and must find the function"
        " again after it was renamed or moved"
    )


def _named(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = nearest(name, known)
    hint = f"did you mean {near!r}?" if near else f"known are {', '.join(map(repr, sorted(known))) or 'none'}"
    return f"{name!r} is unknown; {hint}"


def _place(fn: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(fn)


def _elsewhere(*args: object, **kwargs: object) -> None:
    raise AppError("this task's code is not imported here: it runs in a worker that registers it")
