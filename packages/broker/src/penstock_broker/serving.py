"""Running a broker, and ending with a message, whether or not there was a command line to read."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import structlog

from penstock_broker import logs
from penstock_broker.config import Loaded, load
from penstock_broker.errors import FatalError


def main() -> None:
    """``penstock-broker serve`` without an option, as in the image: then nothing is imported to read one,
    which would stay as long as the broker runs, 4 MB."""
    with messages():
        sys.exit(serve(load()))


def serve(loaded: Loaded, reconcile: bool = False) -> int:
    """Run a broker until SIGTERM. The exit code. Raises FatalError."""
    settings = loaded.settings
    logs.configure(settings.log_level, settings.log_format, secrets=settings.secrets)
    for warning in loaded.warnings:
        structlog.get_logger().warning(warning)
    from penstock_broker import server  # late: other commands need neither Kafka nor gRPC nor SQLite

    return server.serve(settings, reconcile)


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """What an operator can correct ends in a message and an exit code."""
    # gRPC's own lines on stderr say in other words what the errors below say.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        yield
    except FatalError as error:
        for line in error.message.splitlines():
            print(f"penstock-broker: {logs.escaped(line)}", file=sys.stderr)
        for line in error.hint.splitlines():
            print(f"  {logs.escaped(line)}", file=sys.stderr)
        sys.exit(error.exit_code)
