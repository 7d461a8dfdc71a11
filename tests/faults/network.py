"""Networks that lose, delay and cut: a TCP proxy anywhere, and network namespaces where they are allowed."""

from __future__ import annotations

import contextlib
import socket
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
            while data := source.recv(1 << 16):
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                self._flowing.wait()
                sink.sendall(data)
        # One side has nothing more to say; the other may.
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


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
    made = Proxy(target, port)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    need("ip", root=True)
    made = Namespace()
    try:
        yield made
    finally:
        made.remove()
