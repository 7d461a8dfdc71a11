"""What a worker is told at its start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from penstock_protocol.signature import secrets_in

DEFAULT_BROKERS = "127.0.0.1:50051"
DEFAULT_GRACE_SECONDS = 30.0
SLOTS_MAX = 1024
EXIT_USAGE = 2
# What follows is what was read of a command line.
HANDED_OVER = "--handed-over"
SECRET_VARIABLES = ("TASKBROKER_GRPC_SHARED_SECRET", "PENSTOCK_GRPC_SHARED_SECRET")


class SettingsError(ValueError):
    """A setting is wrong; the message names it and shows a right one."""


@dataclass(frozen=True, slots=True)
class Settings:
    app_path: str
    brokers: tuple[str, ...]
    # Child processes; each executes one task at a time.
    slots: int
    # Empty: all namespaces of the application.
    namespaces: tuple[str, ...] = ()
    # How long running tasks may go on after SIGTERM.
    grace_seconds: float = DEFAULT_GRACE_SECONDS
    secret: str | None = field(default=None, repr=False)
    metrics_addr: str = "127.0.0.1"
    metrics_port: int | None = None
    log_level: str = "info"
    log_format: str = "console"

    def handed_over(self) -> str:
        """What `take_over` makes the same of. The secret is in the environment."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "secret"})


def take_over(handed: str, environ: Mapping[str, str]) -> Settings:
    """The settings that another process has read of its command line."""
    values = json.loads(handed)
    for name in ("brokers", "namespaces"):
        values[name] = tuple(values[name])
    return Settings(**values, secret=secret_from(environ))


def split_app_path(path: str) -> tuple[str, str]:
    """`"shop.tasks:app"` as module and attribute.

    Raises: SettingsError when it does not have that form.
    """
    module, separator, attribute = path.partition(":")
    valid = separator and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
    if not valid:
        raise SettingsError(
            f"{path!r} does not name an application: write MODULE:APP, for example shop.tasks:app"
            " for the variable `app` in shop/tasks.py."
        )
    return module, attribute


def parse_brokers(text: str) -> tuple[str, ...]:
    """`"broker-0:50051,broker-1:50051"` as addresses, each once.

    Raises: SettingsError naming the entry that is no address.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise SettingsError(f"--rpc-host-list is empty: name at least one broker, like {DEFAULT_BROKERS}.")
    return tuple(dict.fromkeys(_address(entry) for entry in entries))


def _address(entry: str) -> str:
    host, separator, port = entry.rpartition(":")
    if "/" in entry:
        problem = "has a scheme or a path"
    elif not separator or not host or (":" in host and not host.startswith("[")):
        problem = "has no port"
    elif not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        problem = f"has the port {port!r}, which is not a number from 1 to 65535"
    else:
        return entry
    raise SettingsError(
        f"--rpc-host-list: {entry!r} {problem}. Write HOST:PORT,HOST:PORT, like"
        " broker-0:50051,broker-1:50051."
    )


def secret_from(environment: Mapping[str, str]) -> str | None:
    """The secret calls are signed with: of several, as brokers take them, the first.

    Raises: SettingsError when the variable holds none.
    """
    for variable in SECRET_VARIABLES:
        try:
            secrets = secrets_in(environment.get(variable, ""))
        except ValueError as error:
            raise SettingsError(f"{variable}: {error}.") from None
        if secrets:
            return secrets[0]
    return None
