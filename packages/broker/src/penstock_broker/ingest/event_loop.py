"""How a thread of ours speaks to the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

ANSWER_SECONDS_MAX = 30.0


class EventLoop:
    """Made on the event loop, used on another thread. What is told and asked arrives in that order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def tell(self, callback: Callable[..., object], *arguments: object) -> None:
        """Have it called there, and do not wait."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)

    def start(self, question: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Have it run there; the future has what it returns or raises."""
        return asyncio.run_coroutine_threadsafe(question, self._loop)

    def ask(self, question: Coroutine[Any, Any, T], seconds: float = ANSWER_SECONDS_MAX) -> T:
        """Have it run there, and wait for what it returns or raises.

        Raises TimeoutError when it has no answer within ``seconds``; then it is cancelled.
        """
        future = self.start(question)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError("the event loop did not answer") from None
