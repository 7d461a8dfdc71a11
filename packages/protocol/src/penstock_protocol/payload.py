"""The arguments of a call, as bytes: msgpack of ``{"args": [...], "kwargs": {...}}``, within bounds.

Arguments are None, bool, 64-bit int, float, str, bytes, list, and dict with str keys; a tuple becomes
a list. Anything else is refused by name: msgpack alone would silently turn a UUID, a Decimal, an enum
or a dataclass into something else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import msgspec

from penstock_protocol.v1.activation_pb2 import TaskActivation

# Decoded or decompressed, in bytes: what a hostile frame may ask for at most.
PAYLOAD_BYTES_MAX = 32 * 1024 * 1024
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
        if type(value) not in _SCALARS:
            _check(value, lambda name=name: f"argument {name!r}", 1)
    try:
        return _pack({"args": args, "kwargs": kwargs})
    except UnicodeEncodeError as error:
        raise PayloadError(f"a text among the arguments is not valid Unicode: {error.reason}") from None


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
    """The args and kwargs of an activation. Raises PayloadError, also beyond 32 MiB of msgpack."""
    packed = activation.parameters_bytes
    if not packed:
        return _from_json(activation.parameters)
    compression = activation.headers.get(COMPRESSION_HEADER, "")
    if compression == COMPRESSION:
        packed = _decompress(packed)
    elif compression:
        raise PayloadError(f"the arguments are compressed with {compression!r:.40}; only zstd is known")
    if len(packed) > PAYLOAD_BYTES_MAX:
        raise PayloadError(f"the arguments have {len(packed)} bytes; at most {PAYLOAD_BYTES_MAX} are decoded")
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
        window = zstandard.get_frame_parameters(frame).window_size
    except zstandard.ZstdError as error:
        raise PayloadError(f"the arguments are no zstd frame: {error}") from None
    if declared > PAYLOAD_BYTES_MAX or window > PAYLOAD_BYTES_MAX:
        raise PayloadError(
            f"the arguments declare {max(declared, window)} bytes; at most {PAYLOAD_BYTES_MAX} are decoded"
        )
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=PAYLOAD_BYTES_MAX).stream_reader(frame)
        data = reader.read(PAYLOAD_BYTES_MAX + 1)
    except zstandard.ZstdError as error:
        raise PayloadError(f"the arguments cannot be decompressed: {error}") from None
    if len(data) > PAYLOAD_BYTES_MAX:
        raise PayloadError(f"the arguments decompress to more than {PAYLOAD_BYTES_MAX} bytes")
    return data


def _from_json(text: str) -> tuple[list[object], dict[str, object]]:
    """The older form of a message."""
    if not text:
        return [], {}
    try:
        return _arguments(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"the arguments are no JSON: {error}") from None


def _arguments(data: object) -> tuple[list[object], dict[str, object]]:
    if isinstance(data, dict):
        args, kwargs = data.get("args", []), data.get("kwargs", {})
        if isinstance(args, list) and isinstance(kwargs, dict) and all(isinstance(k, str) for k in kwargs):
            return args, kwargs
    raise PayloadError('the arguments are not of the form {"args": [...], "kwargs": {...}}')
