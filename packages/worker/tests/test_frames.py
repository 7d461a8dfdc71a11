from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_worker.frames import (
    Assign,
    Assignment,
    Finished,
    FrameError,
    FrameReader,
    FromChild,
    Outcome,
    Progress,
    Stop,
    ToChild,
    Withdraw,
    Withdrawn,
    encode,
    from_child_decoder,
    to_child_decoder,
)

assignments = st.builds(
    Assignment,
    st.integers(0, 2**63),
    st.binary(max_size=100),
    st.binary(max_size=20),
    st.integers(0, 2**32),
    st.none() | st.floats(0, 1e12),
)
to_child = st.one_of(
    st.builds(Assign, st.lists(assignments, max_size=5)),
    st.builds(Withdraw, st.none() | st.lists(st.integers(0, 100))),
    st.just(Stop()),
)


@given(st.lists(to_child, max_size=6), st.integers(1, 50))
def test_messages_survive_however_the_pipe_cuts_them(messages: list[ToChild], size: int) -> None:
    stream = b"".join(bytes(encode(message)) for message in messages)
    reader = FrameReader(to_child_decoder)
    seen: list[ToChild] = []
    for at in range(0, len(stream), size):
        seen.extend(reader.feed(stream[at : at + size]))
    assert seen == messages


def test_one_frame_says_what_ended_and_what_begins() -> None:
    finished = Finished(1, Outcome(1), "namespace", 0.5)
    messages: list[FromChild] = [Progress(finished, 2, 3.5), Withdrawn([4, 5])]
    stream = b"".join(bytes(encode(message)) for message in messages)
    assert list(FrameReader(from_child_decoder).feed(stream)) == messages


@pytest.mark.parametrize("data", [b"\x03\x00\x00\x00abc", b"\xff\xff\xff\xff"])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        list(FrameReader(from_child_decoder).feed(data))
