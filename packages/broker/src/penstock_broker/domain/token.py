"""Claim tokens: what a worker must name to report on, extend or release a claim."""

from __future__ import annotations

import struct
from typing import NamedTuple

_LAYOUT = struct.Struct(">IQqII")


class ClaimToken(NamedTuple):
    """Opaque to workers. ``epoch`` and ``nonce`` name the broker's start it was made under."""

    epoch: int
    seq: int
    id_hash: int
    nonce: int
    claim: int

    def encode(self) -> bytes:
        return _LAYOUT.pack(*self)


def decode_token(data: bytes) -> ClaimToken | None:
    """The token in ``data``, or None when it is not one of ours."""
    if len(data) != _LAYOUT.size:
        return None
    # Half of what ClaimToken._make takes.
    return tuple.__new__(ClaimToken, _LAYOUT.unpack(data))


encode_parts = _LAYOUT.pack
