"""What the broker reaches outside itself through, replaced by the simulation's: threads, Kafka's clients,
the gRPC server, random numbers, the space on the disk.

The product's code is the product's: only names of other libraries' objects in its modules are bound anew,
wherever they are, so that a module added later takes part without being listed here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures._base
import contextlib
import importlib
import os
import pkgutil
import secrets
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import confluent_kafka
import confluent_kafka.admin
import grpc
import structlog

import penstock_broker
from penstock_broker import metrics
from penstock_broker.writer_thread import WriterThread
from tests.sim import hub as hubs
from tests.sim import kafka_client
from tests.sim.disk import Disk
from tests.sim.hub import Hub
from tests.sim.kafka import Cluster
from tests.sim.network import Server


class SimThreading:
    """The part of ``threading`` that a process uses, for the process that runs."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.Lock = threading.Lock
        self.RLock = threading.RLock
        self.get_ident = threading.get_ident

    def Thread(  # noqa: N802 - the name it replaces
        self,
        target: Callable[..., object],
        args: tuple[object, ...] = (),
        name: str = "",
        daemon: bool = False,
    ) -> _Thread:
        return _Thread(self.hub, target, args, name)

    def Condition(self, lock: object = None) -> Condition:  # noqa: N802
        return Condition(self.hub)

    def Event(self) -> _Event:  # noqa: N802
        return _Event(self.hub)


class _Thread:
    def __init__(self, hub: Hub, target: Callable[..., object], args: tuple[object, ...], name: str) -> None:
        assert hub.process is not None
        self._hub = hub
        self._thread = hubs.Thread(hub.process, lambda: target(*args), name)

    def start(self) -> None:
        self._thread.start()

    def is_alive(self) -> bool:
        return not self._thread.finished

    def join(self, timeout: float | None = None) -> None:
        waiter = _current(self._hub)
        until = None if timeout is None else self._hub.now + timeout
        self._thread.joiners.append(waiter)
        while not self._thread.finished and (until is None or self._hub.now < until):
            waiter.wait(None if until is None else until - self._hub.now)


def _current(hub: Hub) -> hubs.Thread:
    if hub.thread is None:
        raise AssertionError("an event loop would block")
    return hub.thread


class Condition:
    """Threads take turns only where they wait, so there is nothing to lock."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._waiters: deque[tuple[hubs.Thread, list[bool]]] = deque()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def acquire(self, *arguments: object) -> bool:
        return True

    def release(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        thread = _current(self._hub)
        notified: list[bool] = []
        entry = (thread, notified)
        self._waiters.append(entry)
        until = None if timeout is None else self._hub.now + timeout
        while not notified and (until is None or self._hub.now < until):
            thread.wait(None if until is None else until - self._hub.now)
        if entry in self._waiters:
            self._waiters.remove(entry)
        return bool(notified)

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        until = None if timeout is None else self._hub.now + timeout
        while not (holds := predicate()):
            if until is not None and self._hub.now >= until:
                break
            self.wait(None if until is None else until - self._hub.now)
        return holds

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._waiters))):
            thread, notified = self._waiters.popleft()
            notified.append(True)
            thread.wake()

    def notify_all(self) -> None:
        self.notify(len(self._waiters))


class _Event:
    def __init__(self, hub: Hub) -> None:
        self._changed = Condition(hub)
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._changed.notify_all()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._changed.wait_for(lambda: self._set, timeout)


class SimWriterThread:
    """``WriterThread``, which meets the latency of the disk."""

    def run(self, work: Callable[[Any], Any], of: object) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        disk: Disk = loop.process.disk  # type: ignore[attr-defined]
        return loop.run_in_executor(None, disk.carry_out, work, of)

    def stop(self) -> None:
        pass


class SimSecrets:
    """``secrets`` out of the seed."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def token_hex(self, nbytes: int) -> str:
        return self._hub.random.randbytes(nbytes).hex()

    def randbits(self, k: int) -> int:
        return self._hub.random.getrandbits(k)


class SimOs:
    """``os``, but for the space on the disk of the machine."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _disk(self) -> Disk:
        assert self._hub.process is not None
        return self._hub.process.disk  # type: ignore[attr-defined, no-any-return]

    def statvfs(self, path: object) -> SimpleNamespace:
        return self._disk().statvfs()

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self._disk().allocate(length)


def _modules() -> list[ModuleType]:
    for found in pkgutil.walk_packages(penstock_broker.__path__, "penstock_broker."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    return [module for name, module in sorted(sys.modules.items()) if name.startswith("penstock_broker")]


_MODULES = _modules()


@contextlib.contextmanager
def replaced(hub: Hub, cluster: Cluster) -> Iterator[None]:
    """Within, every broker that is made lives in the simulation."""
    simulated = SimThreading(hub)
    instead = {
        id(threading): simulated,
        id(secrets): SimSecrets(hub),
        id(os): SimOs(hub),
        id(confluent_kafka.Consumer): partial(kafka_client.consumer, cluster),
        id(confluent_kafka.Producer): partial(kafka_client.producer, cluster),
        id(confluent_kafka.admin.AdminClient): partial(kafka_client.AdminClient, cluster),
        id(WriterThread): SimWriterThread,
        id(metrics.expose): lambda *arguments, **options: SimpleNamespace(close=lambda: None),
    }
    before: list[tuple[Any, str, object]] = [(concurrent.futures._base, "threading", threading)]
    for module in _MODULES:
        before += [
            (module, name, value)
            for name, value in vars(module).items()
            if id(value) in instead and not (value is metrics.expose and module is metrics)
        ]
    before.append((grpc.aio, "server", grpc.aio.server))
    grpc_server = lambda **options: Server(hub)  # noqa: E731
    for owner, name, value in before:
        setattr(owner, name, grpc_server if owner is grpc.aio else instead[id(value)])
    structlog.configure(processors=[_Log(hub)], cache_logger_on_first_use=False)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        structlog.reset_defaults()


class _Log:
    """What the product logs is part of the history."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def __call__(self, logger: object, method: str, event: MutableMapping[str, Any]) -> NoReturn:
        said = event.pop("event")
        error = event.pop("exc_info", None)
        fields = " ".join(f"{key}={value}" for key, value in event.items() if key != "database")
        who = self._hub.process.name if self._hub.process is not None else "?"
        self._hub.tell(who, f"{method}: {said} {fields}" + (f" {error!r}" if error else ""))
        raise structlog.DropEvent
