"""The arguments of a call, as bytes: msgpack of ``{"args": [...], "kwargs": {...}}``, within bounds.

Arguments are None, bool, 64-bit int, float, str, bytes, list, and dict with str keys; a tuple becomes
a list. Anything else is refused by name: msgpack alone would silently turn a UUID, a Decimal, an enum
or a dataclass into something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import msgspec

from penstock_protocol.v1.activation_pb2 import TaskActivation

# Together they bound what arguments may take in memory to 32 MiB, however small the message is: the bytes,
# what they hold (a text may take four times its bytes), and an object of up to 80 bytes for each value.
PAYLOAD_BYTES_MAX = 4 * 1024 * 1024
VALUES_MAX = 150_000
DEPTH_MAX = 64
COMPRESSION_HEADER = "compression-type"
COMPRESSION = "zstd"
# Smaller payloads gain nothing from compression.
COMPRESS_FROM_BYTES = 16 * 1024

_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_SCALARS = frozenset((str, float, bool, type(None), bytes))

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode


class PayloadError(ValueError):
    """Arguments that cannot be encoded, or bytes that cannot be decoded; the text says which and why."""


def encode_parameters(args: Sequence[object], kwargs: Mapping[str, object]) -> bytes:
    """The msgpack of a call's arguments. Raises PayloadError naming the argument and its type."""
    for position, value in enumerate(args):
        if type(value) not in _SCALARS:
            _check(value, lambda position=position: f"argument {position}", 1)
    for name, value in kwargs.items():
        if type(name) is not str:
            raise PayloadError(f"an argument has the name {name!r:.100}; names must be str")
        if type(value) not in _SCALARS:
            _check(value, lambda name=name: f"argument {name!r}", 1)
    try:
        packed = _pack({"args": args, "kwargs": kwargs})
    except UnicodeEncodeError as error:
        raise PayloadError(f"a text among the arguments is not valid Unicode: {error.reason}") from None
    _check_bounds(packed)
    return packed


def _check(value: object, where: object, depth: int) -> None:
    kind = type(value)
    if kind in _SCALARS:
        return
    if kind is int:
        if not _INT_MIN <= value <= _INT_MAX:  # type: ignore[operator]
            raise PayloadError(f"{_where(where)} is an int beyond 64 bits; send it as a str")
    elif depth > DEPTH_MAX:
        raise PayloadError(f"{_where(where)} is nested more than {DEPTH_MAX} deep")
    elif kind is list or kind is tuple:
        for n, item in enumerate(value):  # type: ignore[arg-type, var-annotated]
            if type(item) not in _SCALARS:
                _check(item, (where, f"[{n}]"), depth + 1)
    elif kind is dict:
        for key, item in value.items():  # type: ignore[attr-defined]
            if type(key) is not str:
                raise PayloadError(
                    f"{_where(where)} is a dict with the key {key!r:.100} of type {_name(type(key))};"
                    " keys must be str"
                )
            if type(item) not in _SCALARS:
                _check(item, (where, f"[{key!r:.100}]"), depth + 1)
    else:
        raise PayloadError(
            f"{_where(where)} is of type {_name(kind)}; send None, bool, int, float, str, bytes, list or"
            " dict instead, e.g. its str() or its fields"
        )


def _where(where: object) -> str:
    """The path to a value, put together only for a message."""
    parts: list[str] = []
    while isinstance(where, tuple):
        where, part = where
        parts.append(part)
    return (where() if callable(where) else str(where)) + "".join(reversed(parts))


def _name(kind: type) -> str:
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def compress(parameters: bytes) -> bytes:
    """One zstd frame that declares its size."""
    import zstandard  # only large arguments need it, and every process pays for an import

    return zstandard.ZstdCompressor(level=3).compress(parameters)


def decode_parameters(activation: TaskActivation) -> tuple[list[object], dict[str, object]]:
    """The args and kwargs of an activation. Raises PayloadError, also for what would take too much memory."""
    packed = activation.parameters_bytes
    if not packed:
        return _from_json(activation.parameters)
    compression = activation.headers.get(COMPRESSION_HEADER, "")
    if compression == COMPRESSION:
        packed = _decompress(packed)
    elif compression:
        raise PayloadError(f"the arguments are compressed with {compression!r:.40}; only zstd is known")
    _check_bounds(packed)
    try:
        return _arguments(_unpack(packed))
    # TypeError: a key that is a list or a dict, to an older msgspec.
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, TypeError) as error:
        raise PayloadError(f"the arguments are no msgpack: {error}") from None


def _decompress(frame: bytes) -> bytes:
    """A frame says how large it will be; that is read before anything is made."""
    import zstandard

    try:
        declared = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise PayloadError(f"the arguments are no zstd frame: {error}") from None
    if declared > PAYLOAD_BYTES_MAX:
        raise PayloadError(f"the arguments declare {declared} bytes; at most {PAYLOAD_BYTES_MAX} are decoded")
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=PAYLOAD_BYTES_MAX).stream_reader(frame)
        data = reader.read((declared if declared >= 0 else PAYLOAD_BYTES_MAX) + 1)
    except zstandard.ZstdError as error:
        raise PayloadError(f"the arguments cannot be decompressed: {error}") from None
    if len(data) > PAYLOAD_BYTES_MAX:
        raise PayloadError(f"the arguments decompress to more than {PAYLOAD_BYTES_MAX} bytes")
    return data


# Whole width of a msgpack value by its first byte; of an array or a map that of its head. Minus the number of
# bytes that say how long it is, where the first byte does not.
_WIDTHS = (
    *(1 for _ in range(0x80)),  # small int
    *(1 for _ in range(0x20)),  # small map, small array
    *range(1, 0x21),  # short text
    *(1, 1, 1, 1, -1, -2, -4),  # nil, unused, false, true, bytes
    *(-1, -2, -4, 5, 9, 2, 3, 5, 9, 2, 3, 5, 9),  # extension, float, int
    *(3, 4, 6, 10, 18, -1, -2, -4, 3, 5, 3, 5),  # short extension, text, array, map
    *(1 for _ in range(0x20)),  # small negative int
)
_EXTENSIONS = (0xC7, 0xC8, 0xC9)
_JSON_VALUE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{,]', re.DOTALL)


def _check_bounds(packed: bytes) -> None:
    """Refuse what would take too much memory once it is decoded, before it does."""
    if len(packed) > PAYLOAD_BYTES_MAX:
        raise PayloadError(
            f"the arguments have {len(packed)} bytes; at most {PAYLOAD_BYTES_MAX} are decoded."
            " Store the data elsewhere and send its key"
        )
    # A value takes a byte at least.
    if len(packed) > VALUES_MAX and _count_values(packed) > VALUES_MAX:
        raise _too_many_values()


def _too_many_values() -> PayloadError:
    return PayloadError(
        f"the arguments have more than {VALUES_MAX} values; send fewer, or encode them yourself as one bytes"
    )


def _count_values(packed: bytes) -> int:
    """Values in msgpack, nested ones and keys included; no more than a few above VALUES_MAX are counted."""
    at, count, size, widths = 0, 0, len(packed), _WIDTHS
    while at < size and count <= VALUES_MAX:
        count += 1
        width = widths[packed[at]]
        if width > 0:
            at += width
        else:
            length = int.from_bytes(packed[at + 1 : at + 1 - width])
            at += 1 - width + length + (packed[at] in _EXTENSIONS)
    return count


def _from_json(text: str) -> tuple[list[object], dict[str, object]]:
    """The older form of a message."""
    if not text:
        return [], {}
    if len(text) > PAYLOAD_BYTES_MAX:
        raise PayloadError(
            f"the arguments have {len(text)} characters; at most {PAYLOAD_BYTES_MAX} are decoded"
        )
    if len(text) > VALUES_MAX and _count_json(text) > VALUES_MAX:
        raise _too_many_values()
    try:
        return _arguments(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"the arguments are no JSON: {error}") from None


def _count_json(text: str) -> int:
    """At least as many as there are values: texts, containers, and what a comma separates."""
    for count, _ in enumerate(_JSON_VALUE.finditer(text)):
        if count > VALUES_MAX:
            return count
    return 0


def _arguments(data: object) -> tuple[list[object], dict[str, object]]:
    if isinstance(data, dict):
        args, kwargs = data.get("args", []), data.get("kwargs", {})
        if isinstance(args, list) and isinstance(kwargs, dict) and all(isinstance(k, str) for k in kwargs):
            return args, kwargs
    raise PayloadError('the arguments are not of the form {"args": [...], "kwargs": {...}}')
