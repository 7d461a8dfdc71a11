"""Exceptions as bounded text, fit for the wire whatever they contain."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from types import TracebackType

from penstock_worker.frames import Error

TYPE_CHARACTERS_MAX = 200
MESSAGE_CHARACTERS_MAX = 2_000
TRACEBACK_CHARACTERS_MAX = 16_000
TRACEBACK_FRAMES_MAX = 50
_OUR_DIRECTORY = str(Path(__file__).parent) + os.sep


def summarize(exception: BaseException) -> Error:
    """Type, message and traceback of an exception, each bounded and valid UTF-8."""
    kind = type(exception)
    return Error(
        bounded(f"{kind.__module__}.{kind.__qualname__}", TYPE_CHARACTERS_MAX),
        bounded(_message(exception), MESSAGE_CHARACTERS_MAX),
        bounded(_traceback(exception), TRACEBACK_CHARACTERS_MAX),
    )


def bounded(text: str, limit: int) -> str:
    """The text within the limit, its middle left out, without characters UTF-8 does not have."""
    if len(text) > limit:
        gap = f" … {len(text) - limit} characters left out … "
        half = max(0, (limit - len(gap)) // 2)
        text = text[:half] + gap + text[len(text) - half :]
    return text.encode("utf-8", "replace").decode("utf-8")


def _message(exception: BaseException) -> str:
    try:
        return str(exception)
    # __str__ is the user's code, whatever it raises, and the report must go out all the same.
    except BaseException as error:  # noqa: BLE001
        return f"<its __str__ raised {type(error).__qualname__}>"


def _traceback(exception: BaseException) -> str:
    try:
        lines = traceback.format_exception(
            type(exception), exception, _below_ours(exception.__traceback__), limit=-TRACEBACK_FRAMES_MAX
        )
    # As above: formatting calls the user's __str__, and that of every exception in the chain.
    except BaseException as error:  # noqa: BLE001
        return f"<the traceback could not be written: {type(error).__qualname__}>"
    return "".join(lines)


def _below_ours(whole: TracebackType | None) -> TracebackType | None:
    """Frames down to the task's own function are ours and say nothing."""
    first = at = whole
    while at is not None:
        if at.tb_frame.f_code.co_filename.startswith(_OUR_DIRECTORY):
            first = at.tb_next
        at = at.tb_next
    return first or whole
