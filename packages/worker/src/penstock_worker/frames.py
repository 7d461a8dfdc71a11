"""What a parent and its child say to each other over their two pipes.

A frame is a four-byte length and a msgpack array. Activations travel as the bytes they arrived
in: only the child parses them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

FRAME_BYTES_MAX = 1 << 30
_LENGTH = struct.Struct("<I")


class FrameError(Exception):
    """The other end of the pipe wrote something that is no frame."""


class Assignment(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One claimed task on its way into a child."""

    number: int
    activation: bytes
    claim_token: bytes
    attempt: int
    # On the monotonic clock, which all processes of a machine share; None: never expires.
    expires_at: float | None


class Assign(msgspec.Struct, array_like=True, tag="assign"):
    tasks: list[Assignment]


class Withdraw(msgspec.Struct, array_like=True, tag="withdraw"):
    """Give back what has not started: these, or everything."""

    numbers: list[int] | None


class Stop(msgspec.Struct, array_like=True, tag="stop"):
    """Leave when the current task is done."""


ToChild = Assign | Withdraw | Stop


class Error(msgspec.Struct, array_like=True, frozen=True):
    """An exception as text, each part bounded."""

    type: str
    message: str
    traceback: str


class Outcome(msgspec.Struct, array_like=True, frozen=True):
    """How one execution ended: a `TaskOutcomeStatus`, or a `ReleaseReason` if it never began."""

    status: int
    release_reason: int = 0
    error: Error | None = None
    retry_delay_ms: int | None = None


class Finished(msgspec.Struct, array_like=True, frozen=True):
    number: int
    outcome: Outcome
    namespace: str
    run_seconds: float


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """The application is loaded."""

    application: str
    # (namespace, taskname) of every registered task.
    tasks: list[tuple[str, str]]


class LoadFailed(msgspec.Struct, array_like=True, tag="load_failed"):
    message: str


class Progress(msgspec.Struct, array_like=True, tag="progress"):
    """What ended and what begins, in one frame, written before it begins.

    The parent therefore knows at any time which task runs, and a child that dies takes no
    outcome with it. One small pipe write costs less than half a microsecond.
    """

    finished: Finished | None
    started: int | None
    # Monotonic clock.
    started_at: float


class Withdrawn(msgspec.Struct, array_like=True, tag="withdrawn"):
    """These were given back, and will not start here."""

    numbers: list[int]


FromChild = Ready | LoadFailed | Progress | Withdrawn

T = TypeVar("T")

to_child_decoder: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
from_child_decoder: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)
_encoder = msgspec.msgpack.Encoder()


def encode(message: ToChild | FromChild) -> bytearray:
    """The message as one frame."""
    frame = bytearray(_LENGTH.size)
    _encoder.encode_into(message, frame, _LENGTH.size)
    _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
    return frame


class FrameReader(Generic[T]):
    """Bytes in, messages out."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Yield every message completed by these bytes.

        Raises: FrameError when they are no frame.
        """
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, at)
                if length > FRAME_BYTES_MAX:
                    raise FrameError(f"a frame of {length} bytes; the limit is {FRAME_BYTES_MAX}")
                start = at + _LENGTH.size
                if len(buffer) - start < length:
                    break
                at = start + length
                yield self._decode(bytes(buffer[start:at]))
        finally:
            del buffer[:at]

    def _decode(self, body: bytes) -> T:
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise FrameError(f"not a frame: {error}") from error
