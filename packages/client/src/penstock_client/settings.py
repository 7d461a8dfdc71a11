"""Settings of a producer: defaults < YAML file < environment < arguments of App.

The file is named by PENSTOCK_CONFIG, the variables are PENSTOCK_ and the name of the setting.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock_client.errors import ConfigError, nearest
from penstock_protocol.payload import PAYLOAD_BYTES_MAX

KIB, MIB = 1024, 1024 * 1024
OVERRIDES = "taskworker.route.overrides"


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Where tasks go, and within which bounds."""

    # Kafka's bootstrap servers, host:port,host:port.
    kafka: str = ""
    # A broker that takes tasks directly, host:port; no Kafka is used then.
    broker: str = ""
    # Signs calls to ``broker``.
    grpc_shared_secret: str = field(default="", repr=False)
    # Topic of every namespace that has no route of its own.
    topic: str = "taskworker"
    # Namespace -> topic.
    route_overrides: Mapping[str, str] = field(default_factory=dict)
    # How long delay() may take when the buffer is full, and how long wait=True waits.
    send_timeout_seconds: float = 2.0
    # How long a task that was handed over is tried before its future fails.
    delivery_timeout_seconds: float = 30.0
    # How long a task may wait for others to share a request with.
    linger_ms: float = 1.0
    buffer_messages_max: int = 100_000
    # Encoded arguments: a warning from the first, refused above the second.
    payload_warn_bytes: int = 64 * KIB
    payload_bytes_max: int = MIB
    # A task without **kwargs cannot take what newer code sends.
    strict_kwargs: Literal["off", "warn", "error"] = "warn"

    def topic_of(self, namespace: str) -> tuple[str, str]:
        """The topic of a namespace, and where that route came from."""
        if namespace in self.route_overrides:
            return self.route_overrides[namespace], OVERRIDES
        return self.topic, "topic"


def load_settings(
    arguments: Mapping[str, object], config: str | os.PathLike[str] | None = None
) -> ClientSettings:
    """The settings, from all their sources; ``arguments`` that are None are not given.

    Raises ConfigError naming the setting, the value and where it came from.
    """
    values = _given(arguments, config)
    checked: dict[str, Any] = {
        name: _checked(name, value, origin) for name, (value, origin) in values.items()
    }
    settings = ClientSettings(**checked)
    if settings.kafka and settings.broker:
        _, kafka_from = values["kafka"]
        _, broker_from = values["broker"]
        raise ConfigError(
            f"both kafka ({kafka_from}) and broker ({broker_from}) are set; tasks go one way: remove one"
        )
    return settings


def setting_origins(
    arguments: Mapping[str, object], config: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Where each setting that was given came from; what is not in it has its default."""
    return {name: origin for name, (_, origin) in _given(arguments, config).items()}


def _given(
    arguments: Mapping[str, object], config: str | os.PathLike[str] | None
) -> dict[str, tuple[Any, str]]:
    """The values from all sources, and where each came from."""
    values: dict[str, tuple[Any, str]] = {}
    path = config or os.environ.get("PENSTOCK_CONFIG")
    if path:
        values |= _from_file(os.fspath(path))
    values |= _from_environment(os.environ)
    return values | {name: (value, f"App({name}=)") for name, value in arguments.items() if value is not None}


# 0 would mean "without bound" to librdkafka.
_POSITIVE = ("delivery_timeout_seconds", "buffer_messages_max", "payload_bytes_max")
_FIELDS = {f.name: f for f in dataclasses.fields(ClientSettings)}


def _from_file(path: str) -> dict[str, tuple[object, str]]:
    # Only a producer that has a file pays for these.
    from pathlib import Path

    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is no YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"the configuration {path} must be a mapping of settings")
    values: dict[str, tuple[object, str]] = {}
    for name, value in _dotted(data):
        known = "route_overrides" if name == OVERRIDES else name
        if known not in _FIELDS:
            raise ConfigError(f"{path}: unknown setting {name!r}{_nearest(name)}")
        values[known] = (value, path)
    return values


def _dotted(data: Mapping[object, object], prefix: str = "") -> list[tuple[str, object]]:
    """``a: {b: 1}`` and ``a.b: 1`` are the same."""
    found: list[tuple[str, object]] = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if (
            isinstance(value, dict)
            and name not in (OVERRIDES, "route_overrides")
            and OVERRIDES.startswith(name)
        ):
            found += _dotted(value, f"{name}.")
        else:
            found.append((name, value))
    return found


def _nearest(name: str) -> str:
    near = nearest(name, [*_FIELDS, OVERRIDES])
    return f"; did you mean {near!r}?" if near else f"; known are {', '.join(sorted(_FIELDS))}"


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    values: dict[str, tuple[object, str]] = {}
    for name in _FIELDS:
        variable = f"PENSTOCK_{name.upper()}"
        if text := environment.get(variable):
            values[name] = (text, variable)
    known = {f"PENSTOCK_{name.upper()}" for name in _FIELDS}
    for variable in sorted(environment.keys() - known):
        _refuse_misspelt(variable, known)
    return values


def _refuse_misspelt(variable: str, known: Collection[str]) -> None:
    """Raises ConfigError for what is nearly one of ours.

    Not for every unknown one: other parts of Penstock have variables of their own, and Kubernetes sets
    PENSTOCK_BROKER_PORT and the like for a service of that name.
    """
    if not variable.startswith("PENSTOCK_"):
        return
    name = variable.removeprefix("PENSTOCK_")
    names = {other.removeprefix("PENSTOCK_") for other in known}
    near = nearest(name, names, similarity=0.8)
    if near and abs(len(near) - len(name)) <= 2:
        raise ConfigError(f"unknown setting {variable} in the environment; did you mean PENSTOCK_{near}?")


def _checked(name: str, value: object, origin: str) -> object:
    """``value`` as the type of its setting."""
    kind = _FIELDS[name].type
    try:
        if name == "route_overrides":
            return _routes(value)
        if name == "strict_kwargs":
            if value not in ("off", "warn", "error"):
                raise ValueError("off, warn or error is expected")
            return value
        if kind in ("int", "float"):
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError("a number is expected")
            number = int(value) if kind == "int" else float(value)
            if not 0 <= number < float("inf"):
                raise ValueError("it cannot be negative or without end")
            if not number and name in _POSITIVE:
                raise ValueError("it cannot be 0")
            if name == "payload_bytes_max" and number > PAYLOAD_BYTES_MAX:
                raise ValueError(f"workers decode at most {PAYLOAD_BYTES_MAX} bytes")
            return number
        if name == "grpc_shared_secret":
            return _first_secret(value)
        if not isinstance(value, str):
            raise ValueError("a text is expected")
    except ValueError as error:
        shown = "(hidden)" if name == "grpc_shared_secret" else repr(value)
        raise ConfigError(f"{name} = {shown} ({origin}): {error}") from None
    return value


def _first_secret(value: object) -> str:
    """A secret, or of several, as brokers and workers take them, the first: it signs."""
    # Late: it takes hashlib and hmac along, a twentieth of this package's import.
    from penstock_protocol.signature import secrets_in

    if isinstance(value, str):
        value = secrets_in(value)
    secret = value[0] if isinstance(value, list) and value else value
    if not isinstance(secret, str) or not secret:
        raise ValueError("a text, or a list of texts of which the first signs, is expected")
    return secret


def _routes(value: object) -> dict[str, str]:
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, Mapping) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in value.items()
    ):
        raise ValueError(
            'a mapping of namespace to topic is expected, as in {"reports": "taskworker-reports"}'
        )
    return dict(value)
