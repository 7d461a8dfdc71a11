"""Activations sent straight to the broker over gRPC: durable when answered."""

from __future__ import annotations

import json

from google.protobuf.message import DecodeError

from penstock_broker.domain.activation import Activation, Reason, Status
from penstock_broker.domain.conflict import conflict_text, in_conflict
from penstock_broker.ingest.admission import Admission
from penstock_broker.store.inflight import Inflight
from penstock_broker.wire import FIELDS_MAX, has_too_many_fields
from penstock_protocol.v1 import producer_pb2
from penstock_protocol.v1.raw_pb2 import RawSendTasksRequest

_MAKE_ROOM = "try again when workers have made room, or raise it"
# Why the intake is paused -> what to say to who sends.
_PAUSED = {
    "rows": f"the limit is max_pending_count (TASKBROKER_MAX_PENDING_COUNT); {_MAKE_ROOM}",
    "bytes": f"the limit is pending_bytes_max (TASKBROKER_PENDING_BYTES_MAX); {_MAKE_ROOM}",
    "disk": "the disk of the broker is nearly full; try again when it has space",
}


class IntakePaused(Exception):
    """The store has no room for a request. The text names the limit."""


class Draining(Exception):
    """The broker takes nothing more."""

    def __init__(self) -> None:
        super().__init__("this broker is being drained and takes no new tasks; send to another one")


class InvalidRequest(Exception):
    """The bytes are no SendTasksRequest, or one that is too large. The text says which."""


class Direct:
    """ProducerService.SendTasks."""

    def __init__(self, store: Inflight, admission: Admission) -> None:
        self._store = store
        self.admission = admission
        self.draining = False

    async def send(self, request: bytes) -> bytes:
        """Admit and store a SendTasksRequest; the serialized SendTasksResponse, once all is durable.

        What is no usable activation is rejected to the caller. Raises IntakePaused when there is no
        room for all of it (then nothing was stored), Draining, InvalidRequest, StoreStopped,
        DiskFailing.
        """
        if self.draining:
            raise Draining
        if has_too_many_fields(request):
            raise InvalidRequest(f"the request has more than {FIELDS_MAX} activations: send fewer at a time")
        try:
            values = RawSendTasksRequest.FromString(request).activations
        except DecodeError:
            raise InvalidRequest("the request is no SendTasksRequest") from None
        self._store.require_disk()
        now = self._store.clock.wall_ms()
        answers = []
        accepted: dict[str, Activation] = {}
        for value in values:
            row = self.admission.admit(value, now)
            if row.status is Status.FORWARDING:
                answers.append(_rejected(f"{row.reason}: {json.loads(row.error or '{}').get('message', '')}"))
                continue
            first = accepted.get(row.id)
            known = self._store.content_of(row.id) if first is None else first.content
            if known is not None and in_conflict(row, known):
                answers.append(_rejected(f"{Reason.CONFLICT}: {conflict_text(row.id)}"))
            elif known is not None:
                answers.append(producer_pb2.SendAnswer(result=producer_pb2.SEND_RESULT_DUPLICATE))
            else:
                accepted[row.id] = row
                answers.append(producer_pb2.SendAnswer(result=producer_pb2.SEND_RESULT_ACCEPTED))
        room = self._store.room()
        if len(accepted) > room:
            _, reason = self._store.intake_state()
            raise IntakePaused(
                f"no room for {len(accepted)} more activations, only for {room}: {_PAUSED[reason or 'rows']}"
            )
        # Also when there is nothing new: what a duplicate's first copy waits for comes before.
        await self._store.answerable(self._store.insert(list(accepted.values())))
        return producer_pb2.SendTasksResponse(answers=answers).SerializeToString()


def _rejected(reason: str) -> producer_pb2.SendAnswer:
    return producer_pb2.SendAnswer(result=producer_pb2.SEND_RESULT_REJECTED, reason=reason)
