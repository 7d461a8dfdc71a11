"""Admission: bytes become an activation, or a dead letter that says what is wrong with them."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from dataclasses import dataclass
from zlib import crc32

from google.protobuf.message import DecodeError

from penstock_broker.config import Settings
from penstock_broker.domain.activation import (
    CONTENT_MASK,
    NO_SOURCE,
    Activation,
    OnExceeded,
    Reason,
    Status,
    hash_id,
)
from penstock_broker.wire import FIELDS_MAX, has_too_many_fields
from penstock_protocol.v1.activation_pb2 import SentOn, TaskActivation

ID_CHARS_MAX = 256
NAMESPACE_CHARS_MAX = 256
APPLICATION_CHARS_MAX = 256
TASKNAME_CHARS_MAX = 512
# Ten years: any longer duration means the same.
DURATION_SECONDS_MAX = 315_360_000
# Attempts, and deliveries lost, that somebody else has counted: one more of them is still a number of the
# messages they are told in.
COUNTED_MAX = 2**31
NAMES_MAX = 10_000
# A producer's clock may be ahead of ours by this much.
CLOCK_AHEAD_MS_MAX = 60_000

_POSITIONS = uuid.UUID("6b1f6f0e-6d0c-5d0f-9d2e-0f7f1d3c5a11")
_POLICIES = (OnExceeded.UNSPECIFIED, OnExceeded.DISCARD, OnExceeded.DEADLETTER)
_parse = TaskActivation.FromString


def position_id(topic: str, partition: int, offset: int) -> str:
    """The id of what has none of its own: the same wherever and whenever that position is read."""
    return str(uuid.uuid5(_POSITIONS, f"{topic}/{partition}/{offset}"))


def is_position_id(row: Activation) -> bool:
    """Whether the row was refused at admission, and so is named after its position."""
    return row.source != NO_SOURCE and not row.taskname


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What admission needs of the settings."""

    message_bytes_max: int = 8 * 1024 * 1024
    received_at_age_ms_max: int = 7 * 86_400_000
    deadline_default_ms: int = 30_000

    @classmethod
    def of(cls, settings: Settings) -> AdmissionLimits:
        return cls(
            settings.message_bytes_max,
            int(settings.received_at_age_max_seconds * 1000),
            int(settings.deadline_default_seconds * 1000),
        )


class Refusal(ValueError):
    """Bytes that are no usable activation. ``reason``: which kind; the text says what is wrong."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Admission:
    """Admits messages and counts what it met. For one thread."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        # Messages whose received_at was not believable and was replaced.
        self.clocks_corrected = 0
        self.refused: Counter[str] = Counter()
        # (application, namespace, taskname) -> the same strings, so that rows share them, and where the
        # content of each such activation begins.
        self._names: dict[tuple[str, str, str], tuple[str, str, str, int]] = {}

    def admit(
        self,
        value: bytes | None,
        now: int,
        source: int = NO_SOURCE,
        offset: int = -1,
        topic: str = "",
        partition: int = -1,
    ) -> Activation:
        """The activation in ``value``, parsed once; ``now`` is the wall clock in epoch ms.

        What is no usable activation comes back as one that is FORWARDING, with reason and error: a
        dead letter. It is named after its position in the log and belongs to no namespace.
        """
        try:
            return self._activation(value, now, source, offset)
        except Refusal as refusal:
            self.refused[refusal.reason] += 1
            return Activation(
                id=position_id(topic, partition, offset),
                application="",
                namespace="",
                taskname="",
                body=value or b"",
                received_at=now,
                ready_at=now,
                source=source,
                offset=offset,
                status=Status.FORWARDING,
                reason=refusal.reason,
                error=json.dumps({"type": str(refusal.reason), "message": str(refusal)}),
                size=len(value or b""),
            )

    def _activation(self, value: bytes | None, now: int, source: int, offset: int) -> Activation:
        limits = self.limits
        if not value:
            raise Refusal(Reason.NOT_AN_ACTIVATION, "the message is empty")
        if len(value) > limits.message_bytes_max:
            raise Refusal(
                Reason.INVALID,
                f"the message has {len(value)} bytes; message_bytes_max is {limits.message_bytes_max}",
            )
        if has_too_many_fields(value):
            raise Refusal(
                Reason.INVALID,
                f"the TaskActivation has more than {FIELDS_MAX} fields or headers: send what they say as"
                " arguments",
            )
        try:
            message = _parse(value)
        except DecodeError as error:
            raise Refusal(Reason.NOT_AN_ACTIVATION, _why_unparseable(value, error)) from None
        id, names = message.id, (message.application, message.namespace, message.taskname)
        known = self._names.get(names) or self._learn(names, message)
        if not 0 < len(id) <= ID_CHARS_MAX:
            raise Refusal(Reason.INVALID, _what_is_invalid(message))
        application, namespace, taskname, begun = known
        # What it asks for, hashed: the task and its arguments. Not when or how often: a copy of it may have
        # been sent at another time.
        content = crc32(message.parameters_bytes, begun)
        if message.parameters:
            content = crc32(message.parameters.encode("utf-8", "surrogatepass"), content)
        content = content % CONTENT_MASK + 1

        received_at = self._received_at(message, now)
        ready_at, status = received_at, Status.PENDING
        if message.delay:
            # `received_at` is cut to the millisecond: what was cut off counts here.
            ready_at += _ms(message.delay) + (message.received_at.nanos % 1_000_000 > 0)
            if ready_at > now:
                status = Status.DELAYED
        expires_at = received_at + _ms(message.expires) if message.HasField("expires") else None
        deadline = message.processing_deadline_duration
        deadline_ms = _ms(deadline) if deadline else limits.deadline_default_ms
        if not message.HasField("retry_state"):
            row = Activation(
                id, application, namespace, taskname, value, received_at, ready_at, expires_at, deadline_ms,
                source=source, offset=offset, status=status, content=content, id_hash=hash_id(id),
                size=len(value),
            )  # fmt: skip
            if message.HasField("sent_on"):
                _go_on(row, message.sent_on, now)
            return row
        retry = message.retry_state
        policy = retry.on_attempts_exceeded
        row = Activation(
            id, application, namespace, taskname, value, received_at, ready_at, expires_at, deadline_ms,
            retry.max_attempts or 1,
            _POLICIES[policy] if 0 <= policy <= 2 else OnExceeded.UNSPECIFIED,
            retry.at_most_once,
            _ms(retry.delay_on_retry),
            source, offset, status,
            attempts=_counted(retry.attempts), content=content, id_hash=hash_id(id), size=len(value),
        )  # fmt: skip
        if message.HasField("sent_on"):
            _go_on(row, message.sent_on, now)
        return row

    def _learn(self, names: tuple[str, str, str], message: TaskActivation) -> tuple[str, str, str, int]:
        """Names that are met for the first time. Raises Refusal when they cannot be any."""
        application, namespace, taskname = names
        if not (
            0 < len(taskname) <= TASKNAME_CHARS_MAX
            and len(namespace) <= NAMESPACE_CHARS_MAX
            and len(application) <= APPLICATION_CHARS_MAX
        ):
            raise Refusal(Reason.INVALID, _what_is_invalid(message))
        if len(self._names) >= NAMES_MAX:
            self._names.clear()
        begun = crc32("\0".join(names).encode("utf-8", "surrogatepass"))
        self._names[names] = known = (*names, begun)
        return known

    def _received_at(self, message: TaskActivation, now: int) -> int:
        """When it was sent, in epoch ms, if that is believable; else now."""
        stamp = message.received_at
        seconds = stamp.seconds
        if not seconds:
            return now
        received_at = seconds * 1000 + stamp.nanos // 1_000_000
        if now - self.limits.received_at_age_ms_max <= received_at <= now + CLOCK_AHEAD_MS_MAX:
            return received_at
        self.clocks_corrected += 1
        return now


def _go_on(row: Activation, hop: SentOn, now: int) -> None:
    """Another broker had it: it goes on where it stood there. What came over gRPC no broker has sent."""
    if row.source == NO_SOURCE or not hop.forward_id:
        return
    # Under another id it is another activation, whatever else of these bytes was kept.
    row.sent_on = hash_id(f"{hop.forward_id}/{row.id}")
    if 0 < hop.received_at_ms <= now + CLOCK_AHEAD_MS_MAX:
        if row.expires_at is not None:
            row.expires_at += hop.received_at_ms - row.received_at
        row.received_at = hop.received_at_ms
    row.ready_at = min(hop.due_at_ms, now + _ms(DURATION_SECONDS_MAX))
    row.status = Status.DELAYED if row.ready_at > now else Status.PENDING
    row.lost = _counted(hop.deliveries_lost)


def _ms(seconds: int) -> int:
    return (seconds if seconds < DURATION_SECONDS_MAX else DURATION_SECONDS_MAX) * 1000


def _counted(times: int) -> int:
    return times if times < COUNTED_MAX else COUNTED_MAX


def _why_unparseable(value: bytes, error: DecodeError) -> str:
    if value.lstrip()[:1] in (b"{", b"["):
        return "the message looks like JSON; a serialized TaskActivation is expected"
    if "UTF-8" in str(error):
        return "a text field of the TaskActivation is not UTF-8"
    return "the message is no serialized TaskActivation"


def _what_is_invalid(message: TaskActivation) -> str:
    bounds = {
        "id": ID_CHARS_MAX,
        "taskname": TASKNAME_CHARS_MAX,
        "namespace": NAMESPACE_CHARS_MAX,
        "application": APPLICATION_CHARS_MAX,
    }
    if not message.id and not message.taskname:
        return "the message has neither an id nor a taskname: probably no TaskActivation"
    for name in ("id", "taskname"):
        if not getattr(message, name):
            return f"the TaskActivation has no {name}"
    name, bound = next((n, b) for n, b in bounds.items() if len(getattr(message, n)) > b)
    return f"the {name} has {len(getattr(message, name))} characters; {bound} are allowed"
