"""Declarations as Sentry's developers write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

from penstock_client.app import RETRY_WORDS, UNSET, App, _Unset
from penstock_client.durations import Duration
from penstock_client.retry import exception_types
from penstock_client.task import Task

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def instrumented_task(
    name: str,
    namespace: Any = None,
    *,
    app: App | None = None,
    queue: str | None = None,
    max_retries: int | None = None,
    default_retry_delay: Duration | None = None,
    processing_deadline_duration: Duration | None = None,
    retry: Any = UNSET,
    **options: Any,
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Register a function under ``name`` in ``namespace``, or in the namespace ``queue`` of ``app``.

    ``max_retries=n`` starts it up to n + 1 times, ``default_retry_delay`` seconds apart. Put a
    ``@retry`` below it to say which exceptions are meant.
    """
    if namespace is None:
        if app is None or queue is None:
            raise TypeError(f"instrumented_task({name!r}) needs namespace=, or app= and queue=")
        namespace = app.queue(queue)
    elif queue is not None:
        options["queue"] = queue
    if processing_deadline_duration is not None:
        options["deadline"] = processing_deadline_duration
    if max_retries is not None:
        options["max_retries"] = max_retries
    if default_retry_delay is not None:
        options["default_retry_delay"] = default_retry_delay
    if not isinstance(retry, _Unset):
        options["retry"] = retry
    decorate: Callable[[Callable[P, R]], Task[P, R]] = namespace.task(name=name, **options)
    return decorate


@overload
def retry(fn: F, /) -> F: ...
@overload
def retry(*, on: Any = ..., exclude: Any = ..., ignore: Any = ...) -> Callable[[F], F]: ...


def retry(fn: Any = None, /, *, on: Any = None, exclude: Any = None, ignore: Any = None) -> Any:
    """Say which exceptions of a task are retried (``on``; bare: Exception), which fail at once
    (``exclude``), and which count as done (``ignore``). Stands below the task's decorator.

    How often and how far apart is the task's own policy; without one, three more times.
    """
    given = {"on": (Exception,) if on is None else on, "exclude": exclude or (), "ignore": ignore or ()}
    words = {word: exception_types(word, types) for word, types in given.items()}

    def decorate(fn: F) -> F:
        if isinstance(fn, Task):
            raise TypeError(f"@retry stands below the decorator that makes {fn.name!r} a task")
        setattr(fn, RETRY_WORDS, words)
        return fn

    return decorate if fn is None else decorate(fn)
