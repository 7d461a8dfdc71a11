"""An id that is taken already, by an activation that asks for something else."""

from __future__ import annotations

import json
from hashlib import blake2b

from penstock_broker.domain.activation import Activation, Reason


def in_conflict(row: Activation, known: int) -> bool:
    """Whether ``row`` is not a copy of the activation of its id whose content is ``known``."""
    return bool(known and row.content) and known != row.content


def refuse_conflict(row: Activation, now: int) -> None:
    """The first one keeps the id. This one becomes a dead letter under a name of its own, the same for
    each of its copies."""
    row.die(Reason.CONFLICT, now)
    row.error = json.dumps({"type": "conflict", "message": conflict_text(row.id)})
    row.sent_on = 0
    name = f"{row.id}/{row.content}".encode("utf-8", "surrogatepass")
    row.id = f"conflict-{blake2b(name, digest_size=16).hexdigest()}"


def conflict_text(id: str) -> str:
    """What a person is told."""
    return (
        f"the id {id} belongs to another task already, which has another name or other arguments; that one"
        " was kept: send this one again under an id of its own"
    )
