"""The edge: who is served, and what a caller is told when a call fails."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from penstock_broker.dispatch import rpc
from penstock_broker.dispatch.service import Refused
from penstock_broker.store.writer import StoreStopped
from penstock_protocol import signature

PATH = f"/{rpc.CONSUMER}/GetTasks"
HEALTH = "/grpc.health.v1.Health/Check"


class Edge:
    """A server whose one method remembers what it was given."""

    def __init__(self) -> None:
        self.served: list[bytes] = []
        self.observed: list[tuple[str, str]] = []
        self.failure: Exception | None = None
        self.call: Any = None

    async def method(self, request: bytes) -> bytes:
        self.served.append(request)
        if self.failure is not None:
            raise self.failure
        return b"answer"


@contextlib.asynccontextmanager
async def serving(*secrets: str, message_bytes_max: int = 1 << 20) -> AsyncIterator[Edge]:
    edge = Edge()
    server = rpc.build(
        {rpc.CONSUMER: {"GetTasks": edge.method}},
        secrets=secrets,
        healthy=lambda: True,
        message_bytes_max=message_bytes_max,
        observe=lambda path, code, seconds: edge.observed.append((path, code)),
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

        async def call(body: bytes, path: str = PATH, metadata: tuple[tuple[str, str], ...] = ()) -> bytes:
            raw: Any = channel.unary_unary(path)
            answer: bytes = await raw(body, metadata=metadata, timeout=10)
            return answer

        edge.call = call
        yield edge
    await server.stop(None)


def signed(secret: str, body: bytes) -> tuple[tuple[str, str], ...]:
    return ((signature.HEADER, signature.sign(secret, PATH, body)),)


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


async def test_an_unsigned_call_is_refused_before_it_is_parsed() -> None:
    async with serving("new", "old") as edge:
        for metadata in ((), signed("wrong", b"body"), signed("new", b"other body")):
            code, details = await code_of(edge.call(b"body", metadata=metadata))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert "not signed" in details
        assert edge.served == []
        assert edge.observed == [(PATH, "UNAUTHENTICATED")] * 3
        for secret in ("new", "old"):
            assert await edge.call(b"body", metadata=signed(secret, b"body")) == b"answer"
        # Orchestrators ask for it, and have no secret.
        assert await edge.call(b"", path=HEALTH)


async def test_without_a_secret_every_call_is_served() -> None:
    async with serving() as edge:
        assert await edge.call(b"body") == b"answer"
        assert edge.observed == [(PATH, "OK")]


async def test_a_message_that_is_too_large_is_refused_before_it_is_looked_at() -> None:
    async with serving(message_bytes_max=1000) as edge:
        assert await edge.call(bytes(900)) == b"answer"
        code, _ = await code_of(edge.call(bytes(1001)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert edge.served == [bytes(900)]


async def test_metadata_that_is_too_large_is_refused() -> None:
    async with serving() as edge:
        code, _ = await code_of(edge.call(b"body", metadata=(("x-large", "x" * 60_000),)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert edge.served == []
        assert await edge.call(b"body") == b"answer"


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (Refused(grpc.StatusCode.NOT_FOUND, "no pending task"), grpc.StatusCode.NOT_FOUND, "no pending task"),
        (StoreStopped(), grpc.StatusCode.UNAVAILABLE, "stopping"),
        # What went wrong inside is for the log: it may quote what nobody else should see.
        (ValueError("canary"), grpc.StatusCode.INTERNAL, "its log says why"),
    ],
)
async def test_a_failed_call_says_what_became_of_it(
    failure: Exception, code: grpc.StatusCode, says: str
) -> None:
    async with serving() as edge:
        edge.failure = failure
        told, details = await code_of(edge.call(b"body"))
        assert told is code
        assert says in details
        assert "canary" not in details
        assert edge.observed == [(PATH, code.name)]
