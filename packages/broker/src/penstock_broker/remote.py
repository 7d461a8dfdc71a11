"""Calls of the command line to a broker that runs."""

from __future__ import annotations

import getpass
import os
import socket
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from penstock_broker.config import Settings
from penstock_broker.errors import FatalError
from penstock_protocol import signature
from penstock_protocol.unavailable import said_by_broker
from penstock_protocol.v1 import admin_pb2

_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
CALL_SECONDS = 20.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}

M = TypeVar("M", bound=Message)


def call(settings: Settings, method: str, request: Message, answer: type[M]) -> M:
    """One call of AdminService to the broker that these settings are of. Raises FatalError."""
    address = f"{_EVERYWHERE.get(settings.grpc_addr, settings.grpc_addr)}:{settings.grpc_port}"
    path, body = f"/{_SERVICE}/{method}", request.SerializeToString()
    secrets = [secret.get_secret_value() for secret in settings.grpc_shared_secret]
    metadata = ((signature.HEADER, signature.sign(secrets[0], path, body)),) if secrets else ()
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        try:
            return answer.FromString(unary(body, timeout=CALL_SECONDS, metadata=metadata))
        except grpc.RpcError as error:
            raise _failure(error, address) from None


def _failure(error: grpc.RpcError, address: str) -> FatalError:
    code, details = error.code(), error.details()
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        if said_by_broker(details):
            return FatalError(f"the broker at {address}: {details}")
        return FatalError(
            f"no broker answers at {address}",
            "it must run; give its own settings: its file with -c, or TASKBROKER_GRPC_ADDR and _PORT",
        )
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return FatalError(
            f"the broker at {address} refuses the call: {details}",
            "set grpc_shared_secret (TASKBROKER_GRPC_SHARED_SECRET) to its secret",
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return FatalError(f"what answers at {address} is no Penstock broker, or an older one")
    return FatalError(details or f"the broker at {address} failed on the call: {code.name}")


def me() -> str:
    """Who calls, for the broker's log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no entry for this user id, as in some containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
