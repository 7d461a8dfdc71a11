"""What a replay of a dead letter sends: a new task, that knows where it comes from."""

from __future__ import annotations

from penstock_protocol.replay import ROOT_ID, forward_id, letter_name, replay_id, replayed
from penstock_protocol.v1.activation_pb2 import RetryState, SentOn, TaskActivation

LETTER = TaskActivation(
    id="first",
    namespace="pay",
    taskname="charge",
    parameters_bytes=b"arguments",
    delay=7,
    retry_state=RetryState(attempts=3, max_attempts=3),
    sent_on=SentOn(),
)


def test_it_is_new_and_asks_for_the_same() -> None:
    name = letter_name(forward_id("first", 3, "attempts_exhausted"), 1_700_000_000_000)
    sent = replayed(LETTER.SerializeToString(), name, 1, 1_800_000_000_000)
    assert sent is not None
    assert (sent.id, sent.headers[ROOT_ID]) == (replay_id(name, 1), "first")
    assert sent.received_at.ToMilliseconds() == 1_800_000_000_000
    assert (sent.parameters_bytes, sent.delay, sent.retry_state.attempts) == (b"arguments", 7, 0)
    assert not sent.HasField("sent_on"), "what was lost of the original is not the new one's"


def test_the_same_replay_has_the_same_id_and_another_one_another() -> None:
    assert replay_id("x", 1) == replay_id("x", 1) != replay_id("x", 2)


def test_what_dies_again_in_the_same_way_is_another_dead_letter() -> None:
    assert letter_name("x", 1) == letter_name("x", 1) != letter_name("x", 2)


def test_the_root_is_the_first_of_the_line() -> None:
    again = replayed(LETTER.SerializeToString(), "x", 1, 1)
    assert again is not None
    third = replayed(again.SerializeToString(), "y", 1, 1)
    assert third is not None
    assert third.headers[ROOT_ID] == "first"


def test_what_a_broker_appended_on_its_way_is_not_the_new_ones() -> None:
    """As of one that lived two hours: what waits is told from when it was received."""
    appended = RetryState(attempts=4, max_attempts=9, delay_on_retry=60)
    for delay, state in ((None, None), (7, RetryState(max_attempts=5, delay_on_retry=1))):
        sent = TaskActivation(id="first", taskname="charge", delay=delay, expires=90, retry_state=state)
        value = sent.SerializeToString()
        hop = SentOn(forward_id="hop", size=len(value))
        value += TaskActivation(delay=7210, retry_state=appended, sent_on=hop).SerializeToString()
        again = replayed(value, "x", 1, 1)
        assert again is not None
        for name in ("id", "headers", "received_at"):
            again.ClearField(name)
            sent.ClearField(name)
        assert again == sent


def test_what_is_no_activation_is_not_sent() -> None:
    assert replayed(b"{}", "x", 1, 1) is None
    assert replayed(b"", "x", 1, 1) is None
