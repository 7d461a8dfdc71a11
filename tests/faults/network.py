"""Networks that lose, delay and cut: a TCP proxy anywhere, and network namespaces where they are allowed."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

from tests.faults.disks import need, run
from tests.kafka_server import free_port


class Proxy:
    """Stands between a client and ``target`` and does to their connections what networks do."""

    def __init__(self, target: int, port: int = 0) -> None:
        self.target = target
        self.delay_seconds = 0.0
        self._flowing = threading.Event()
        self._flowing.set()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", port or free_port()))
        self.port: int = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, name=f"proxy {self.port}", daemon=True).start()

    def black_hole(self) -> None:
        """Nothing arrives any more; connections stay open, new ones are accepted and say nothing."""
        self._flowing.clear()

    def heal(self) -> None:
        self._flowing.set()

    def reset(self) -> None:
        """Cut every connection, in the middle of whatever it carries."""
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        # Closing alone leaves it listening for the thread that waits in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.heal()
        self.reset()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._flowing.wait()
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            client.close()
            return
        self._open |= {client, server}
        back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
        back.start()
        self._pump(client, server)
        back.join()
        self._open -= {client, server}
        client.close()
        server.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := self._next(source, sink):
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                self._flowing.wait()
                sink.sendall(data)
        # One side has nothing more to say; the other may.
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _next(self, source: socket.socket, sink: socket.socket) -> bytes:
        """What goes to ``sink`` next; nothing: the end."""
        return source.recv(1 << 16)


class FencedKafka(Proxy):
    """To a Kafka that names no server of its cluster while ``fenced``, as one that has stood still; if it
    ``leaves``, that is the last it says on any connection, as one does that is stopped."""

    def __init__(self, target: int, port: int = 0) -> None:
        self.fenced = False
        self.leaves = False
        # (client, correlation id) -> version of a request for metadata.
        self._asked: dict[tuple[socket.socket, int], int] = {}
        super().__init__(target, port)

    def _next(self, source: socket.socket, sink: socket.socket) -> bytes:
        """A whole request or answer."""
        size = _receive(source, 4)
        data = _receive(source, *struct.unpack(">i", size)) if size else b""
        if not data:
            return b""
        from_kafka = source.getpeername()[1] == self.target
        whole = self._answer(sink, data) if from_kafka else self._ask(source, data)
        framed = struct.pack(">i", len(whole)) + whole
        if whole != data and self.leaves:
            sink.sendall(framed)
            self.reset()
            return b""
        return framed

    def _ask(self, client: socket.socket, request: bytes) -> bytes:
        key, version, id = struct.unpack_from(">hhi", request)
        if key == _METADATA:
            self._asked[client, id] = version
        return request

    def _answer(self, client: socket.socket, answer: bytes) -> bytes:
        version = self._asked.pop((client, *struct.unpack_from(">i", answer)), None)
        if version is None or not self.fenced:
            return answer
        assert version >= 9, "numbers in it have 7 bits a byte"
        return _without_servers(answer)


# As Kafka's protocol numbers its requests.
_METADATA = 3


def _receive(source: socket.socket, size: int) -> bytes:
    """So many bytes, or nothing at the end."""
    data = source.recv(size, socket.MSG_WAITALL)
    return data if len(data) == size else b""


def _without_servers(answer: bytes) -> bytes:
    """An answer to a request for metadata with an empty list of servers."""
    # Correlation id, no tagged fields, throttle time.
    begin = at = 4 + 1 + 4
    count, at = _varint(answer, at)
    for _ in range(count - 1):
        at += 4  # its id
        host, at = _varint(answer, at)
        at += host - 1 + 4  # and port
        rack, at = _varint(answer, at)
        at += max(0, rack - 1) + 1  # no tagged fields
    return answer[:begin] + b"\x01" + answer[at:]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte at ``at``, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


class Namespace:
    """A network of its own, joined to this one by a cable; `lose` makes every packet vanish.

    ``here`` is this side's address, ``prefix`` runs a command on the other side.
    """

    def __init__(self) -> None:
        tag = f"{free_port():x}"
        self._name, self._near, self._far = f"pen-{tag}", f"pn{tag}", f"pf{tag}"
        number = free_port() % 250
        self.here, self._there = f"10.213.{number}.1", f"10.213.{number}.2"
        self.prefix = ("ip", "netns", "exec", self._name)
        run("ip", "netns", "add", self._name)
        run("ip", "link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self._name)
        run("ip", "addr", "add", f"{self.here}/24", "dev", self._near)
        run("ip", "link", "set", self._near, "up")
        inside = ("ip", "-n", self._name)
        run(*inside, "addr", "add", f"{self._there}/24", "dev", self._far)
        run(*inside, "link", "set", self._far, "up")
        run(*inside, "link", "set", "lo", "up")

    def lose(self) -> None:
        """To a neighbour that is not there: what is sent is gone, and no end is told."""
        nobody = "02:00:00:00:00:01"
        run("ip", "neigh", "replace", self._there, "lladdr", nobody, "dev", self._near, "nud", "permanent")
        inside = ("ip", "-n", self._name)
        run(*inside, "neigh", "replace", self.here, "lladdr", nobody, "dev", self._far, "nud", "permanent")

    def heal(self) -> None:
        run("ip", "neigh", "del", self._there, "dev", self._near)
        run("ip", "-n", self._name, "neigh", "del", self.here, "dev", self._far)

    def remove(self) -> None:
        run("ip", "netns", "del", self._name)


@contextlib.contextmanager
def proxy(target: int, port: int = 0) -> Iterator[Proxy]:
    with contextlib.closing(Proxy(target, port)) as made:
        yield made


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    need("ip", root=True)
    made = Namespace()
    try:
        yield made
    finally:
        made.remove()
