"""Logs: one line for an event, nothing that a terminal obeys, no secrets and no payloads."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from typing import Any, Literal

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from penstock_broker import logs


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_is_one_object_a_line(stream: io.StringIO) -> None:
    logs.configure("info", "json", stream=stream)
    log = structlog.get_logger("server")
    log.info("serving", rows=3, ratio=0.5, path=None, items=[1, "x"])
    log.debug("not shown")
    [event] = events(stream)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "serving",
        "level": "info",
        "rows": 3,
        "ratio": 0.5,
        "path": None,
        "items": [1, "x"],
    }


def test_libraries_log_the_same_way(stream: io.StringIO) -> None:
    logs.configure("info", "json", secrets=["hunter2"], stream=stream)
    logging.getLogger("some.library").warning("password %s\nnext", "hunter2")
    logging.getLogger("some.library").debug("not shown")
    [event] = events(stream)
    assert event["event"] == "password [hidden]\\nnext"
    assert event["level"] == "warning"
    assert event["logger"] == "some.library"


def test_a_caller_that_is_gone_before_its_answer_is_no_news(stream: io.StringIO) -> None:
    logs.configure("info", "json", stream=stream)
    library = logging.getLogger("grpc._cython.cygrpc")
    for kind in ("ExecuteBatchError", "InternalError"):
        library.error("%s raised", kind, exc_info=type(kind, (Exception,), {})())
    [event] = events(stream)
    assert event["event"] == "InternalError raised"


@pytest.mark.parametrize("format", ["console", "json"])
def test_what_a_terminal_would_obey_is_escaped(
    format: Literal["console", "json"], stream: io.StringIO
) -> None:
    logs.configure("info", format, stream=stream)
    hostile = "a\nlevel=error b\r\x1b[2J\x07\u202e\x9b\u2028c"
    structlog.get_logger().info(hostile, taskname=hostile, nested={"k\n": [hostile]}, **{"key\x1b": 1})
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text[:-1].isprintable()


@pytest.mark.parametrize("format", ["console", "json"])
def test_secrets_and_payloads_are_never_shown(
    format: Literal["console", "json"], stream: io.StringIO
) -> None:
    logs.configure("info", format, secrets=["hunter2", "canary"], stream=stream)
    log = structlog.get_logger()
    log.info(
        "call with hunter2",
        url="x?key=canary",
        nested=[{"deep": ("hunter2",), "payload": "innocent"}],
        parameters_bytes=b"innocent",
        claim_token="innocent",
        raw=b"innocent",
        **{"key-hunter2": 1},
    )
    payload = "innocent"
    try:
        raise ValueError("canary")
    except ValueError:
        log.exception("failed", body=payload)
    text = stream.getvalue()
    assert "hunter2" not in text
    assert "canary" not in text.replace('raise ValueError("canary")', "")
    # Neither as a value nor as a local variable of the traceback.
    assert "innocent" not in text.replace('payload = "innocent"', "")
    assert "[8 bytes]" in text


def test_tracebacks_are_kept(stream: io.StringIO) -> None:
    logs.configure("info", "json", stream=stream)
    try:
        raise ValueError("x\x1b[2J")
    except ValueError:
        structlog.get_logger().exception("failed")
    [event] = events(stream)
    assert event["exception"].splitlines()[0] == "Traceback (most recent call last):"
    assert event["exception"].splitlines()[-1] == "ValueError: x\\x1b[2J"


def test_values_are_bounded(stream: io.StringIO) -> None:
    logs.configure("info", "json", stream=stream)
    endless: list[object] = []
    endless.append(endless)
    structlog.get_logger().info("e" * 10**6, long="x" * 10**6, many=list(range(10**5)), endless=endless)
    [event] = events(stream)
    assert event["long"].endswith("... [1000000 characters]")
    assert len(event["many"]) == logs.ITEMS_MAX
    assert len(stream.getvalue()) < 10_000


def test_the_level_can_be_raised(stream: io.StringIO) -> None:
    logs.configure("error", "json", stream=stream)
    structlog.get_logger().warning("not shown")
    logging.getLogger("x").warning("not shown")
    assert stream.getvalue() == ""


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    def raised() -> Exception | None:
        try:
            structlog.get_logger().info("lost")
            logging.getLogger("some.library").warning("lost")
        except (OSError, ValueError) as error:
            return error
        return None

    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as stream:
        logs.configure("info", "json", stream=stream)
        assert raised() is None
    # Its stream is closed.
    assert raised() is None


@given(st.text())
def test_escaped_text_is_printable_and_printable_text_is_kept(text: str) -> None:
    assert logs.escaped(text).isprintable()
    assert logs.escaped(text, newlines=True).replace("\n", "").isprintable()
    if text.isprintable():
        assert logs.escaped(text) == text
