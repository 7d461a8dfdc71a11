"""What can go wrong, for callers and for workers."""

from __future__ import annotations

from collections.abc import Iterable


class AppError(Exception):
    """The application is declared wrongly, or one of its modules cannot be imported."""


class ConfigError(AppError):
    """A setting is unknown or has a wrong value; the text names it and where it came from."""


class SendError(Exception):
    """A task was not sent, or it is not known whether it was; the text says which and what to do."""

    # Whoever sent the task has had it raised by wait() or delay_async().
    raised = False


class BufferFull(SendError):
    """Nothing more can be buffered: Kafka or the broker takes tasks more slowly than they are sent."""


class ArgumentsMismatch(TypeError):
    """The arguments of a call do not fit the function: the caller and this code are of different age."""


class RetryRequested(Exception):
    """Raised by a task to be started again: ``raise ctx.retry(countdown=30)``.

    ``countdown``: seconds until then; None leaves it to the task's policy.
    """

    def __init__(self, countdown: float | None = None) -> None:
        super().__init__("the task asked to be started again")
        self.countdown = countdown

    def __reduce__(self) -> tuple[type[RetryRequested], tuple[float | None]]:
        return type(self), (self.countdown,)


def nearest(name: str, known: Iterable[str], similarity: float = 0.5) -> str | None:
    """The one of ``known`` that ``name`` was probably meant to be."""
    import difflib  # for mistakes only

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=similarity)
    return near[0] if near else None
