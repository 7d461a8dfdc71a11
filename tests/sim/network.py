"""The network between machines, and gRPC over it: calls are bytes, answers too, and either may be lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import grpc

from tests.sim.hub import Hub, Process, settle


class CallFailed(Exception):
    """A call without an answer, or with another one than a message."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.message = message


class _Aborted(Exception):
    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        self.message = message


class Network:
    """Who reaches whom, and how fast."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._cut: set[frozenset[str]] = set()
        # Of messages, while it lasts.
        self.loss = 0.0
        self.slow = 1.0
        self.servers: dict[str, Server] = {}

    def cut(self, one: str, other: str) -> None:
        self._cut.add(frozenset((one, other)))

    def heal(self, one: str, other: str) -> None:
        self._cut.discard(frozenset((one, other)))

    def heal_all(self) -> None:
        self._cut.clear()
        self.loss, self.slow = 0.0, 1.0

    def reaches(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self._cut

    def delivers(self, one: str, other: str) -> bool:
        """Whether a message arrives that is sent now."""
        return self.reaches(one, other) and not (self.loss and self.hub.chance(self.loss))

    def latency(self) -> float:
        return self.hub.between(0.0002, 0.002) * self.slow

    async def call(self, client: Process, to: str, path: str, request: bytes, seconds: float) -> bytes:
        """A unary call from ``client``. Raises CallFailed."""
        answer: asyncio.Future[bytes] = client.loop.create_future()
        call = _Call(self, client, to, path, request, answer)
        call.send()
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError:
            call.cancel()
            raise CallFailed("DEADLINE_EXCEEDED") from None
        except asyncio.CancelledError:
            call.cancel()
            raise


class _Call:
    def __init__(
        self, network: Network, client: Process, to: str, path: str, request: bytes, answer: Any
    ) -> None:
        self.network = network
        self.client = client
        self.to = to
        self.path = path
        self.request = request
        self.answer: asyncio.Future[bytes] = answer
        self.task: asyncio.Task[None] | None = None
        self.server: Server | None = None
        self.cancelled = False

    def send(self) -> None:
        network = self.network
        if network.delivers(self.client.name, self.to):
            network.hub.later(network.latency(), self._arrive)

    def _arrive(self) -> None:
        server = self.network.servers.get(self.to)
        if server is None or not server.accepting or not server.process.alive:
            self.fail("UNAVAILABLE")
            return
        self.server = server
        server.calls[self] = None
        server.process.enter(self._start, server.process.blocked_until)

    def _start(self) -> None:
        assert self.server is not None
        if not self.cancelled:
            self.server.on_request(self.path, self.client.name, self.request)
            self.task = self.server.process.loop.run_main(self._handle(self.server))

    async def _handle(self, server: Server) -> None:
        try:
            response = await server.method(self.path)(self.request, _Context())
        except _Aborted as aborted:
            self.fail(aborted.code.name, aborted.message)
        except asyncio.CancelledError:
            self.fail("CANCELLED")
        else:
            server.on_answer(self.path, self.client.name, self.request, response)
            self._reply(lambda: settle(self.answer, response, None))
        finally:
            server.calls.pop(self, None)

    def _reply(self, tell: Callable[[], object]) -> None:
        network = self.network
        if network.delivers(self.client.name, self.to):
            network.hub.later(network.latency(), lambda: self.client.enter(tell))

    def fail(self, code: str, message: str = "") -> None:
        self._reply(lambda: settle(self.answer, None, CallFailed(code, message)))

    def cancel(self) -> None:
        """The client gives up; the server learns it if it can be reached."""
        network = self.network
        if network.delivers(self.client.name, self.to):
            network.hub.later(network.latency(), self._cancelled)

    def _cancelled(self) -> None:
        self.cancelled = True
        if self.server is not None and self.task is not None:
            self.server.on_cancel(self.path, self.client.name, self.request)
            self.server.process.enter(self.task.cancel)


class _Context:
    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, code: grpc.StatusCode, message: str) -> None:
        raise _Aborted(code, message)


class Server:
    """What ``grpc.aio.server()`` gives, on the simulated network, under the name of its process."""

    def __init__(self, hub: Hub) -> None:
        assert hub.process is not None
        self.process = hub.process
        self.accepting = False
        self.calls: dict[_Call, None] = {}
        self._handlers: list[Any] = []
        self._methods: dict[str, Callable[..., Any]] = {}
        # Told of each call: method, client, request (and response).
        self.on_request: Callable[[str, str, bytes], None] = lambda *told: None
        self.on_answer: Callable[[str, str, bytes, bytes], None] = lambda *told: None
        self.on_cancel: Callable[[str, str, bytes], None] = lambda *told: None
        self.process.on_death.append(self._died)

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        pass

    def add_insecure_port(self, address: str) -> int:
        return 50_051

    async def start(self) -> None:
        self.accepting = True

    async def stop(self, grace: float | None) -> None:
        self.accepting = False
        tasks = [call.task for call in self.calls if call.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
            for task in tasks:
                task.cancel()

    def method(self, path: str) -> Callable[..., Any]:
        if path not in self._methods:
            details = SimpleNamespace(method=path, invocation_metadata=())
            found = [h for handler in self._handlers if (h := handler.service(details)) is not None]
            self._methods[path] = found[0].unary_unary
        return self._methods[path]

    def _died(self) -> None:
        self.accepting = False
        for call in list(self.calls):
            call.fail("UNAVAILABLE")
