"""AdminService's calls about the database itself, which nothing but its broker can open."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc
import structlog

from penstock_broker.dispatch.rpc import Method
from penstock_broker.dispatch.service import Refused, parse
from penstock_broker.store import looking
from penstock_broker.store.copying import CannotCopy, backup_of
from penstock_broker.store.database import Database
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.writer import StoreStopped
from penstock_protocol.v1 import admin_pb2 as pb

log = structlog.get_logger("admin")

# How long a call waits for the end of a backup before it says how far it is.
ANSWER_SECONDS = 1.0
# Between two steps of a backup: what is left of the disk and the writer is the ticks'.
PAUSE_SECONDS = 0.01
NAME_CHARS_MAX = 100


class Looking:
    """One query, and one backup, at a time: a tick never waits for more than one of each."""

    def __init__(self, store: Inflight) -> None:
        self._store = store
        self._asking = asyncio.Lock()
        # Ends in why it has failed, if it has.
        self._copying: asyncio.Task[str] | None = None
        # Of the last backup: who asked for it, its number, and how far it is.
        self._id, self._number = "", 0
        self._copied = (0, 0)

    def methods(self) -> dict[str, Method]:
        return {"QueryDatabase": self.query_database, "BackUpDatabase": self.back_up_database}

    async def query_database(self, request: bytes) -> bytes:
        asked = parse(pb.QueryDatabaseRequest, request)
        limit = min(asked.limit or looking.ROWS_MAX, looking.ROWS_MAX)

        def look(database: Database) -> bytes:
            found = looking.query(database.connection, asked.sql, limit, self._store.clock.mono_ms)
            return answer_of(found).SerializeToString()

        async with self._asking:
            work = asyncio.ensure_future(self._store.aside(look))
            try:
                return await asyncio.shield(work)
            except looking.CannotQuery as error:
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
            finally:
                # Also when the caller has given up: else those who do would keep the writer from the ticks.
                await asyncio.wait([work])

    async def back_up_database(self, request: bytes) -> bytes:
        asked = parse(pb.BackUpDatabaseRequest, request)
        if not 0 < len(asked.id) <= NAME_CHARS_MAX:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"id has 1 to {NAME_CHARS_MAX} characters")
        if asked.id != self._id:
            if self._copying is not None and not self._copying.done():
                raise Refused(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "a backup is being made already: {:,} of {:,} pages".format(*self._copied),
                )
            self._id, self._number = asked.id, self._number + 1
            log.warning("a backup is made", number=self._number, by=asked.by[:NAME_CHARS_MAX])
            self._copying = asyncio.create_task(self._copy(), name="backup")
        copying = self._copying
        assert copying is not None
        await asyncio.wait([copying], timeout=ANSWER_SECONDS)
        if copying.done() and (why := copying.result()):
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, why)
        copied, pages = self._copied
        return pb.BackUpDatabaseResponse(
            finished=copying.done(), pages_copied=copied, pages=pages, number=self._number
        ).SerializeToString()

    async def _copy(self) -> str:
        aside, path = self._store.aside, backup_of(self._store.database.path, self._number)
        self._copied = (0, 0)
        try:
            await aside(lambda database: database.begin_copy(path))
            while not self._copied[1] or self._copied[0] < self._copied[1]:
                self._copied = await aside(Database.copy_on)
                await asyncio.sleep(PAUSE_SECONDS)
        except CannotCopy as error:
            log.warning("the backup has failed", path=str(path), error=str(error))
            return str(error)
        finally:
            # What is not finished. If the store has stopped, it does so when it is closed.
            with suppress(StoreStopped):
                await aside(Database.drop_copy)
        log.info("the backup is finished", path=str(path), pages=self._copied[1])
        return ""

    async def stop(self) -> None:
        """Give up the backup that is being made."""
        if self._copying is not None:
            self._copying.cancel()
            await asyncio.gather(self._copying, return_exceptions=True)


def answer_of(found: looking.Answer) -> pb.QueryDatabaseResponse:
    answer = pb.QueryDatabaseResponse(columns=found.columns, more=found.more)
    for row in found.rows:
        values = answer.rows.add().values
        for value in row:
            to = values.add()
            if isinstance(value, int):
                to.integer = value
            elif isinstance(value, float):
                to.real = value
            elif isinstance(value, str):
                to.text = value
            elif value is not None:
                to.blob = value
    return answer
