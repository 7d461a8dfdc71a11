from __future__ import annotations

import pytest

from penstock_worker.errors import (
    MESSAGE_CHARACTERS_MAX,
    TRACEBACK_CHARACTERS_MAX,
    TYPE_CHARACTERS_MAX,
    bounded,
    summarize,
)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001
        return caught


def test_type_message_and_traceback() -> None:
    summary = summarize(raised(ValueError("broken")))
    assert (summary.type, summary.message) == ("builtins.ValueError", "broken")
    assert summary.traceback.startswith("Traceback")
    assert summary.traceback.endswith("ValueError: broken\n")


def test_each_part_is_bounded_and_keeps_both_ends() -> None:
    long = type("T" * 500, (Exception,), {})("a" + "x" * 50_000 + "z")
    summary = summarize(raised(long))
    assert len(summary.type) <= TYPE_CHARACTERS_MAX
    assert len(summary.message) <= MESSAGE_CHARACTERS_MAX
    assert len(summary.traceback) <= TRACEBACK_CHARACTERS_MAX
    assert (summary.message[0], summary.message[-1]) == ("a", "z")


def test_a_deep_recursion_gives_a_short_traceback() -> None:
    def deeper(n: int) -> int:
        return deeper(n + 1) + 1

    with pytest.raises(RecursionError) as caught:
        deeper(0)
    assert len(summarize(caught.value).traceback) <= TRACEBACK_CHARACTERS_MAX


def test_an_exception_that_cannot_be_printed_is_still_reported() -> None:
    for kind in (RuntimeError, SystemExit):

        class Hostile(Exception):
            def __str__(self) -> str:
                raise kind("no")  # noqa: B023 - it is printed in the same turn

        summary = summarize(raised(Hostile()))
        assert "Hostile" in summary.type
        assert summary.message == f"<its __str__ raised {kind.__name__}>"


def test_characters_the_wire_does_not_have_are_replaced() -> None:
    assert bounded("a\ud800b", 10) == "a?b"
