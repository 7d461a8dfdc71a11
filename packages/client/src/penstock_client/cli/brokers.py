"""Signed calls to the AdminService of one or several brokers."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterator, Mapping
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from penstock_client.cli.failures import NOT_FOUND, UNREACHABLE, USAGE, WRONG, Failure
from penstock_client.cli.output import say
from penstock_protocol import signature
from penstock_protocol.unavailable import said_by_broker
from penstock_protocol.v1 import admin_pb2

_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
_SECRETS = ("PENSTOCK_GRPC_SHARED_SECRET", "TASKBROKER_GRPC_SHARED_SECRET")
CALL_SECONDS = 20.0
_OPTIONS = (
    # Brokers are neighbours; a proxy for the outside world has no business in between.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)

M = TypeVar("M", bound=Message)


class Broker:
    """One broker."""

    def __init__(self, address: str, secret: str | None) -> None:
        self.address = address
        self._secret = secret
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)

    def call(self, method: str, request: Message, answer: type[M], seconds: float = CALL_SECONDS) -> M:
        """One call. Raises Failure, which says what to do about it."""
        path, body = f"/{_SERVICE.full_name}/{method}", request.SerializeToString()
        metadata = ((signature.HEADER, signature.sign(self._secret, path, body)),) if self._secret else ()
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(path)
        try:
            return answer.FromString(unary(body, timeout=seconds, metadata=metadata))
        except grpc.RpcError as error:
            raise self._failure(error, method) from None
        except DecodeError:
            raise Failure(f"what answers at {self.address} is no Penstock broker", code=UNREACHABLE) from None

    def _failure(self, error: grpc.RpcError, method: str) -> Failure:
        code, details = error.code(), error.details()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            if said_by_broker(details):
                return Failure(f"the broker at {self.address}: {details}", code=WRONG)
            return Failure(
                f"no broker answers at {self.address}",
                "is it running (penstock-broker serve), and is the address right? Say which brokers with"
                " --rpc-host-list or PENSTOCK_RPC_HOST_LIST",
                UNREACHABLE,
            )
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return Failure(
                f"the broker at {self.address} refuses the call: {details}",
                "set TASKBROKER_GRPC_SHARED_SECRET to the broker's secret",
                UNREACHABLE,
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return Failure(
                f"what answers at {self.address} has no {_SERVICE.name}.{method}",
                "it is no Penstock broker, or one older than this command",
                UNREACHABLE,
            )
        if code is grpc.StatusCode.NOT_FOUND:
            return Failure(f"{self.address}: {details}", code=NOT_FOUND)
        return Failure(f"the broker at {self.address} refused: {details or code.name}")

    def close(self) -> None:
        self._channel.close()


class Brokers:
    """All that a command was told of. One that does not answer is told, and the others are asked."""

    def __init__(self, addresses: str) -> None:
        secret = _secret(os.environ)
        self.all = [Broker(address, secret) for address in _addresses(addresses)]
        self._failures: list[Failure] = []

    def __enter__(self) -> Brokers:
        return self

    def __exit__(self, *error: object) -> None:
        for broker in self.all:
            broker.close()

    def each(self, method: str, request: Message, answer: type[M]) -> Iterator[tuple[Broker, M]]:
        """The answers of those that answer. Raises Failure when none is left that does."""
        for broker in list(self.all):
            try:
                yield broker, broker.call(method, request, answer)
            except Failure as failure:
                if failure.code == NOT_FOUND:
                    continue
                self._failures.append(failure)
                # Not asked again.
                self.all.remove(broker)
                if not self.all:
                    raise
                say(f"penstock: {failure.text}", error=True)

    def complete(self) -> None:
        """Raises Failure when a broker did not answer: what was shown is not all."""
        if self._failures:
            raise Failure(
                f"{len(self._failures)} of {len(self._failures) + len(self.all)} brokers did not answer:"
                " this is not all",
                self._failures[0].hint,
                UNREACHABLE,
            )


def me() -> str:
    """Who calls, for the brokers' logs."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no entry for this user id, as in some containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _addresses(text: str) -> list[str]:
    addresses = list(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or "/" in address or not (port.isdecimal() and 0 < int(port) < 65_536):
            raise Failure(f"--rpc-host-list: {address!r} is no address", "write HOST:PORT,HOST:PORT", USAGE)
    if not addresses:
        raise Failure("--rpc-host-list is empty", "write HOST:PORT,HOST:PORT", USAGE)
    return addresses


def _secret(environment: Mapping[str, str]) -> str | None:
    """A secret; of several, as brokers take them, the first."""
    for variable in _SECRETS:
        try:
            secrets = signature.secrets_in(environment.get(variable, ""))
        except ValueError as error:
            raise Failure(f"{variable}: {error}", code=USAGE) from None
        if secrets:
            return secrets[0]
    return None
