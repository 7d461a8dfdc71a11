"""Structured logs: one event a line, bounded, escaped, and without secrets or payloads.

Code that logs calls ``structlog.get_logger()``; what the libraries log through ``logging`` goes the
same way.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from typing import Any, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

VALUE_CHARACTERS_MAX = 1000
TRACEBACK_CHARACTERS_MAX = 20_000
ITEMS_MAX = 50
DEPTH_MAX = 4
HIDDEN = "[hidden]"

# Never shown, whatever is in them.
_HIDDEN_KEYS = frozenset(
    {
        "args",
        "body",
        "claim_token",
        "grpc_shared_secret",
        "kwargs",
        "parameters",
        "parameters_bytes",
        "password",
        "payload",
        "secret",
        "secrets",
        "signature",
        "token",
    }
)


class Clean:
    """A structlog processor that makes every value safe to print.

    ``secrets`` are replaced wherever they occur, also inside other texts and in tracebacks.
    """

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        self._secrets = tuple(sorted(filter(None, secrets), key=len, reverse=True))

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        cleaned: EventDict = {}
        for key, value in event.items():
            if key.startswith("_"):  # structlog's own
                cleaned[key] = value
            elif key == "exception":
                cleaned[key] = self._text(str(value), TRACEBACK_CHARACTERS_MAX, newlines=True)
            else:
                cleaned[self._text(key)] = HIDDEN if key in _HIDDEN_KEYS else self._value(value)
        return cleaned

    def _value(self, value: object, depth: int = 0) -> object:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, bytes | bytearray | memoryview):
            return f"[{len(value)} bytes]"
        if depth < DEPTH_MAX and isinstance(value, dict):
            return {
                self._text(str(key)): HIDDEN if key in _HIDDEN_KEYS else self._value(item, depth + 1)
                for key, item in list(value.items())[:ITEMS_MAX]
            }
        if depth < DEPTH_MAX and isinstance(value, list | tuple | set | frozenset):
            return [self._value(item, depth + 1) for item in list(value)[:ITEMS_MAX]]
        return self._text(str(value))

    def _text(self, text: str, characters_max: int = VALUE_CHARACTERS_MAX, newlines: bool = False) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        if len(text) > characters_max:
            text = f"{text[:characters_max]}... [{len(text)} characters]"
        return escaped(text, newlines)


def escaped(text: str, newlines: bool = False) -> str:
    """``text`` with control and other unprintable characters escaped; line feeds stay if ``newlines``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (newlines and c == "\n") else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def configure(
    level: Literal["debug", "info", "warning", "error"] = "info",
    format: Literal["console", "json"] = "console",
    *,
    secrets: Sequence[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Sets up structlog and ``logging`` for the process, to ``stream`` (standard error by default)."""
    stream = sys.stderr if stream is None else stream
    out = cast("TextIO", _Stream(stream))
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        Clean(secrets),
    ]
    renderer: Processor
    if format == "json":
        renderer = structlog.processors.JSONRenderer(default=str)
    else:
        # The plain formatter: the rich one prints local variables, payloads among them.
        renderer = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(_library_formatter(shared, renderer))
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_of_use)
    logging.basicConfig(handlers=[handler], level=max(number, logging.INFO), force=True)


class _Stream:
    """A text stream whose failures are nobody's trouble: its reader may be gone, its disk full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _is_of_use(record: logging.LogRecord) -> bool:
    """Not the traceback of gRPC for each caller that is gone before its answer."""
    return record.exc_info is None or getattr(record.exc_info[0], "__name__", "") != "ExecuteBatchError"


def _library_formatter(shared: list[Processor], renderer: Processor) -> logging.Formatter:
    chain: list[Any] = [
        structlog.stdlib.add_logger_name,
        *shared,
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        renderer,
    ]
    return structlog.stdlib.ProcessorFormatter(processors=chain)
