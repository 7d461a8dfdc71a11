"""How much a message could become: asked of its bytes, before protobuf makes objects of them."""

from __future__ import annotations

FIELDS_MAX = 10_000
# Smaller ones cannot have so many fields that it matters, and are the rule.
_FROM_BYTES = 64 * 1024

_VARINT, _FIXED64, _BYTES, _GROUP, _END_GROUP, _FIXED32 = range(6)


def has_too_many_fields(data: bytes) -> bool:
    """Whether the message has more than FIELDS_MAX fields, or entries of repeated ones.

    Two bytes are a whole field, and 40 to 70 bytes of memory: 8 MiB would become hundreds. Only large
    messages are looked at, and only as far as the limit: milliseconds at most.
    """
    return len(data) > _FROM_BYTES and _exceeds(data)


def _exceeds(data: bytes) -> bool:
    at, size = 0, len(data)
    try:
        for _ in range(FIELDS_MAX):
            if at >= size:
                return False
            tag, at = _varint(data, at)
            kind = tag & 7
            if kind == _BYTES:
                length, at = _varint(data, at)
                at += length
            elif kind == _VARINT:
                _, at = _varint(data, at)
            elif kind == _FIXED64:
                at += 8
            elif kind == _FIXED32:
                at += 4
            elif kind not in (_GROUP, _END_GROUP):  # a group's fields are counted as its neighbours
                return False
    except IndexError:
        return False  # cut off, or nonsense: the parser says so
    return at < size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    if value < 0x80:
        return value, at + 1
    value, shift = value & 0x7F, 7
    for _ in range(9):
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
    raise IndexError("no varint has more than ten bytes")
