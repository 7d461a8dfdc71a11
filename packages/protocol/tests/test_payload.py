"""Arguments as bytes: what goes in comes out, anything else is refused by name, and within bounds."""

from __future__ import annotations

import contextlib
import decimal
import enum
import json
import resource
import uuid

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from penstock_protocol.payload import (
    PAYLOAD_BYTES_MAX,
    VALUES_MAX,
    PayloadError,
    compress,
    decode_parameters,
    encode_parameters,
)
from penstock_protocol.v1.activation_pb2 import TaskActivation

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(values, max_size=4), st.dictionaries(st.text(), values, max_size=4), st.booleans())
def test_what_goes_in_comes_out(args: list[object], kwargs: dict[str, object], compressed: bool) -> None:
    packed = encode_parameters(args, kwargs)
    activation = TaskActivation(parameters_bytes=compress(packed) if compressed else packed)
    if compressed:
        activation.headers["compression-type"] = "zstd"
    assert decode_parameters(activation) == (args, kwargs)


class Colour(enum.Enum):
    RED = "red"


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (uuid.uuid4(), "uuid.UUID"),
        (decimal.Decimal(1), "decimal.Decimal"),
        (Colour.RED, "Colour"),
        ({1, 2}, "set"),
        (object(), "object"),
        (1j, "complex"),
        (bytearray(b"x"), "bytearray"),
        (Text("subclass"), "Text"),
    ],
)
def test_what_would_change_on_the_way_is_refused_by_name(value: object, kind: str) -> None:
    with pytest.raises(PayloadError, match=rf"argument 1 is of type .*{kind}"):
        encode_parameters([1, value], {})
    with pytest.raises(PayloadError, match=rf"argument 'order'\['lines'\]\[2\] is of type .*{kind}"):
        encode_parameters([], {"order": {"lines": [1, 2, value]}})


def test_integers_keys_and_depth_have_limits() -> None:
    with pytest.raises(PayloadError, match="argument 'n' is an int beyond 64 bits"):
        encode_parameters([], {"n": 2**64})
    with pytest.raises(PayloadError, match=r"argument 0 is a dict with the key 7 of type int"):
        encode_parameters([{7: 1}], {})
    lists: list[object] = []
    dicts: dict[str, object] = {}
    for _ in range(100):
        lists, dicts = [lists], {"a": dicts}
    cycle: list[object] = []
    cycle.append(cycle)
    ring: dict[str, object] = {}
    ring["a"] = ring
    for nested in (lists, dicts, cycle, ring):
        with pytest.raises(PayloadError, match="nested"):
            encode_parameters([nested], {})


def test_a_tuple_becomes_a_list() -> None:
    activation = TaskActivation(parameters_bytes=encode_parameters([(1, (2,))], {}))
    assert decode_parameters(activation) == ([[1, [2]]], {})


def test_the_older_json_is_read() -> None:
    text = json.dumps({"args": [1, "x"], "kwargs": {"a": None}})
    assert decode_parameters(TaskActivation(parameters=text)) == ([1, "x"], {"a": None})
    assert decode_parameters(TaskActivation()) == ([], {})


@pytest.mark.parametrize(
    ("activation", "why"),
    [
        (TaskActivation(parameters_bytes=b"\xc1"), "no msgpack"),
        (TaskActivation(parameters_bytes=b"\xdd\xff\xff\xff\xff"), "no msgpack"),
        (TaskActivation(parameters_bytes=b"\x91" * 100_000), "no msgpack"),
        (TaskActivation(parameters_bytes=b"\x90"), "not of the form"),
        (TaskActivation(parameters_bytes=b"\x81\xa4args\xa1x"), "not of the form"),
        (TaskActivation(parameters="{"), "no JSON"),
        (TaskActivation(parameters="[" * 100_000), "no JSON"),
        (TaskActivation(parameters="[]"), "not of the form"),
        (TaskActivation(parameters_bytes=b"x", headers={"compression-type": "zstd"}), "no zstd frame"),
        (TaskActivation(parameters_bytes=b"x", headers={"compression-type": "lzma"}), "lzma"),
    ],
)
def test_what_is_not_ours_is_refused(activation: TaskActivation, why: str) -> None:
    with pytest.raises(PayloadError, match=why):
        decode_parameters(activation)


def frame(data: bytes, size: int) -> bytes:
    """``data`` again and again, as a frame that does not say how large it becomes."""
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return b"".join(stream.compress(data) for _ in range(0, size, len(data))) + stream.flush()


def listed(value: bytes, count: int, first: bytes = b"\xc0") -> bytes:
    args = (count + 1).to_bytes(4, "big") + first + value * count
    return b"\x82\xa4args\xdd" + args + b"\xa6kwargs\x80"


def wide(data: bytes) -> bytes:
    """``data`` as a frame that asks for half a GiB to be read with."""
    parameters = zstandard.ZstdCompressionParameters(window_log=29, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush()


# What follows would be the length of a text, if the last byte were no type of an extension but a value.
EXTENSIONS = (b"\xc7\x00\xc6", b"\xc8\x00\x00\xc6", b"\xc9\x00\x00\x00\x00\xc6")


MIB = 1 << 20
BOMBS = {
    "declares 512 MiB": (lambda: zstandard.ZstdCompressor().compress(bytes(512 * MIB)), "declare"),
    "does not say, and is 512 MiB": (lambda: frame(bytes(MIB), 512 * MIB), "decompress to more than"),
    "asks for a window of 512 MiB": (lambda: wide(b"\x80"), "cannot be decompressed"),
    "4 million lists": (lambda: compress(listed(b"\x90", 4 * MIB - 100)), "values"),
    "a million dicts": (lambda: compress(listed(b"\x81\xa0\xc0", MIB)), "values"),
    "lists behind a short extension": (lambda: compress(listed(b"\x90", MIB, EXTENSIONS[0])), "values"),
    "lists behind an extension": (lambda: compress(listed(b"\x90", MIB, EXTENSIONS[1])), "values"),
    "lists behind a long extension": (lambda: compress(listed(b"\x90", MIB, EXTENSIONS[2])), "values"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory(name: str) -> None:
    make, why = BOMBS[name]
    bomb = make()
    assert len(bomb) < 64 * 1024
    activation = TaskActivation(parameters_bytes=bomb, headers={"compression-type": "zstd"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PayloadError, match=why):
        decode_parameters(activation)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


@pytest.mark.parametrize("as_json", [False, True])
def test_values_have_a_limit_that_text_does_not_count_towards(as_json: bool) -> None:
    def decode(args: list[object]) -> list[object]:
        if as_json:
            return decode_parameters(TaskActivation(parameters=json.dumps({"args": args, "kwargs": {}})))[0]
        return decode_parameters(TaskActivation(parameters_bytes=encode_parameters(args, {})))[0]

    many: list[object] = [[n % 7] for n in range(VALUES_MAX // 2 - 10)]
    assert decode(many) == many
    wordy: list[object] = ["a, [b], {c}, \\" * 100_000, '"' * 100_000]
    assert decode(wordy) == wordy
    with pytest.raises(PayloadError, match=f"more than {VALUES_MAX} values"):
        decode([[]] * (VALUES_MAX + 10))


def test_what_no_worker_would_decode_is_refused_when_it_is_sent() -> None:
    with pytest.raises(PayloadError, match=f"at most {PAYLOAD_BYTES_MAX}"):
        encode_parameters([b"x" * PAYLOAD_BYTES_MAX], {})
    args: list[object] = [b"x" * (PAYLOAD_BYTES_MAX - 100)]
    assert decode_parameters(TaskActivation(parameters_bytes=encode_parameters(args, {})))[0] == args


@given(st.binary(max_size=200), st.booleans())
@example(b"\x81\xa4args\x91\xa1\xff", False)  # a text that is not UTF-8
@example(b"\x81\xa4args\xdd\xff\xff\xff\xff", False)  # a list that says it has 4 billion items
@example(b"\x81\xa4args\x91\x81\x81\x01\x01\x01", False)  # a dict as a key
def test_any_bytes_are_arguments_or_refused(data: bytes, compressed: bool) -> None:
    activation = TaskActivation(parameters_bytes=compress(data) if compressed else data)
    if compressed:
        activation.headers["compression-type"] = "zstd"
    with contextlib.suppress(PayloadError):
        args, kwargs = decode_parameters(activation)
        assert isinstance(args, list)
        assert all(isinstance(name, str) for name in kwargs)
