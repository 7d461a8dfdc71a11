"""AdminService's calls about a whole broker: draining this one, and adopting one that never returns.

Both take long: the first call starts them, and further ones ask how far they are. They go on when nobody
asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import structlog

from penstock_broker.dispatch.rpc import Method
from penstock_broker.dispatch.service import Refused, parse
from penstock_broker.ingest.drain import DrainReport
from penstock_broker.ingest.ledger_adopt import AdoptedHere, AdoptError, AdoptReport
from penstock_broker.ingest.parts import Ingest
from penstock_protocol.v1 import admin_pb2 as pb

log = structlog.get_logger("admin")

# How long a call waits for the end before it says how far it is.
ANSWER_SECONDS = 1.0
GRACE_SECONDS_MAX = 86_400.0
NAME_CHARS_MAX = 200


class Departures:
    """One drain, or one adoption, at a time."""

    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest
        self._draining: asyncio.Task[DrainReport] | None = None
        self._adopting: asyncio.Task[AdoptReport] | None = None
        self._adopted = ""
        # Of the last adoption, if it ended while nobody asked.
        self._untold: AdoptReport | None = None

    def methods(self) -> dict[str, Method]:
        return {"Drain": self.drain, "Adopt": self.adopt}

    async def drain(self, request: bytes) -> bytes:
        asked = parse(pb.DrainRequest, request)
        if not 0 <= asked.grace_seconds <= GRACE_SECONDS_MAX:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "grace_seconds is from 0 to a day")
        if self._adopting is not None and not self._adopting.done():
            # What it has stored of it and not recorded yet would be handed over, and adopted once more.
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this broker is adopting {self._adopted!r} now: drain it when it has finished",
            )
        if self._ingest.restores():
            # Stopped in the middle, it would say "drained" with tasks that only the ledger has.
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                "this broker has not restored yet what a lost disk may have held: drain it when it has",
            )
        if self._draining is None:
            log.warning("draining", grace_seconds=asked.grace_seconds, by=asked.by[:NAME_CHARS_MAX])
            self._draining = _start(self._ingest.drain(asked.grace_seconds), "drain")
        draining = self._draining
        await _wait(draining)
        report = self._ingest.drain_report()
        if draining.done():
            # Asked again, it goes on with what could not leave.
            if draining is self._draining:
                self._draining = None
            # As it ended: of what has left since, the ledger may not know.
            report = draining.result()
        if report is None:
            return pb.DrainResponse(phase="leaving the consumer group").SerializeToString()
        return pb.DrainResponse(
            finished=report.finished,
            phase=report.phase,
            left=[pb.StateCount(state=state, tasks=tasks) for state, tasks in report.left.items()],
            ended=report.ended,
            handed_over=report.handed_over,
            reasons=report.reasons,
        ).SerializeToString()

    async def adopt(self, request: bytes) -> bytes:
        asked = parse(pb.AdoptRequest, request)
        broker_id = asked.broker_id[:NAME_CHARS_MAX]
        if self._adopting is not None and self._adopting.done():
            # Whether what it tells still holds, only the ledger knows: the broker may have come back since.
            self._untold = None if self._adopting.exception() else self._adopting.result()
            self._adopting = None
        if self._draining is not None or self._ingest.drain_report() is not None:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION, "this broker is drained, and goes: let another one adopt"
            )
        if self._adopting is None:
            log.warning(
                "adoption asked for", broker=broker_id, force=asked.force, by=asked.by[:NAME_CHARS_MAX]
            )
            self._adopting = _start(self._ingest.adopt(broker_id, asked.force), "adopt")
            self._adopted = broker_id
        elif broker_id != self._adopted:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this broker is adopting {self._adopted!r} now: ask again when it has finished",
            )
        adopting = self._adopting
        await _wait(adopting)
        if not adopting.done():
            return pb.AdoptResponse().SerializeToString()
        if adopting is self._adopting:
            self._adopting = None
        untold, self._untold = self._untold, None
        try:
            report = adopting.result()
        except AdoptError as error:
            if not isinstance(error, AdoptedHere) or untold is None or untold.broker_id != broker_id:
                raise Refused(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
            report = untold
        return pb.AdoptResponse(
            finished=True, partitions=report.partitions, adopted=report.adopted, lost=report.lost
        ).SerializeToString()

    async def stop(self) -> None:
        """Give up on what is under way."""
        tasks = [task for task in (self._draining, self._adopting) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _start(work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    return asyncio.create_task(work, name=name)


async def _wait(task: asyncio.Task[Any]) -> None:
    await asyncio.wait([task], timeout=ANSWER_SECONDS)
