"""Brings the settings together: defaults < YAML file < environment < command line, with their origins."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError

from penstock_broker.config.expected import expected
from penstock_broker.config.settings import ENV_PREFIX, ClusterSettings, Settings, TopicSettings, is_loopback
from penstock_broker.errors import ConfigError

FILE_BYTES_MAX = 1024 * 1024
SHOWN_CHARACTERS_MAX = 80
# Settings whose value is never shown.
SECRET = frozenset({"grpc_shared_secret"})

# Settings of Sentry's taskbroker that mean nothing here, and what to look at instead.
FOREIGN: dict[str, str] = {
    "default_metrics_tags": "metrics are at metrics_addr:metrics_port, for Prometheus to label",
    "log_filter": "see log_level",
    "max_processing_attempts": "see max_deliveries",
    "max_processing_deadline": "a worker ends a task at its own deadline",
    "sentry_dsn": "errors are in the log and in the dead letters",
    "sentry_env": "errors are in the log and in the dead letters",
    "statsd_addr": "metrics are at metrics_addr:metrics_port, for Prometheus",
}
FOREIGN_PREFIXES: dict[str, str] = {
    "vacuum_": "the store needs no vacuum",
    "upkeep_": "upkeep has no interval: things happen when they are due",
}
# What Kubernetes sets in every pod of a namespace that has a service called taskbroker.
_SERVICE_LINK = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP|SCTP)(_.*)?|PORT)\Z")

_MAPS: dict[str, Iterable[str]] = {
    "kafka_clusters": ClusterSettings.model_fields,
    "kafka_topics": TopicSettings.model_fields,
}


@dataclass(frozen=True)
class Loaded:
    """Settings with where each came from: ``file:line``, an environment variable, an option, or "default"."""

    settings: Settings
    origins: Mapping[str, str]
    warnings: tuple[str, ...]


@dataclass
class _Collected:
    """Values and origins by setting, what is wrong with them and what is only odd."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, name: str, value: object, origin: str) -> None:
        """Puts ``value`` above what was there; maps are merged entry by entry."""
        before = self.values.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            self.values[name] = _merged(before, value)
            self.origins[name] = f"{self.origins[name]}, {origin}"
        else:
            self.values[name] = value
            self.origins[name] = origin

    def unknown(self, name: str, written: str, origin: str) -> None:
        """``name`` is no setting; ``written`` is how its author spells it."""
        note = FOREIGN.get(name) or next(
            (why for p, why in FOREIGN_PREFIXES.items() if name.startswith(p)), None
        )
        if note:
            self.warnings.append(
                f"{written} ({origin}) has no meaning for this broker and is ignored: {note}"
            )
        else:
            self.problems.append(
                f"{written} ({origin}) is not a setting{_nearest(name, Settings.model_fields, written)}"
            )


def load(file: Path | None = None, options: Mapping[str, object] | None = None) -> Loaded:
    """Reads ``file`` and the environment; ``options`` are those of the command line that were given.

    Raises ConfigError with every problem found, each naming the setting, its value, where it came
    from and what is expected.
    """
    found = _Collected()
    if file is not None:
        _read_file(file, found)
    _read_environment(found)
    for name, value in (options or {}).items():
        found.add(name, value, "--" + name.replace("_", "-"))
    settings = None
    try:
        settings = Settings(**found.values)
    except ValidationError as error:
        found.problems += _described(error, found.origins)
    if settings is None or found.problems:
        raise ConfigError(found.problems, "penstock-broker serve --help explains every setting")
    if settings.insecure and not settings.grpc_shared_secret and not is_loopback(settings.grpc_addr):
        found.warnings.append(
            f"insecure: anyone who can connect to {settings.grpc_address} can fetch and finish tasks"
        )
    origins = {name: found.origins.get(name, "default") for name in Settings.model_fields}
    return Loaded(settings, origins, tuple(found.warnings))


def _read_file(path: Path, found: _Collected) -> None:
    try:
        with path.open("rb") as opened:
            text = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(
            [f"cannot read the configuration file {path}: {error.strerror}"],
            "give -c the path of a YAML file",
        ) from None
    if len(text) > FILE_BYTES_MAX:
        raise ConfigError([f"the configuration file {path} is larger than {FILE_BYTES_MAX} bytes"])
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([f"the configuration file {path} is not YAML: {_one_line(error)}"]) from None
    if content is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError([f"the configuration file {path} must have `setting: value` lines"])
    lines: dict[str, int] = {}
    for key, _ in root.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            found.problems.append(f"{name} is given twice ({path}:{lines[name]} and {path}:{line})")
        lines[name] = line
    for name, value in content.items():
        origin = f"{path}:{lines.get(str(name), 1)}"
        if name not in Settings.model_fields:
            found.unknown(str(name), str(name), origin)
        elif value is not None:
            found.add(name, value, origin)


def _read_environment(found: _Collected) -> None:
    written: dict[str, list[str]] = {}
    for variable, value in os.environ.items():
        if not variable.upper().startswith(ENV_PREFIX) or value == "":
            continue
        name, nested, _ = variable[len(ENV_PREFIX) :].lower().partition("__")
        if name in Settings.model_fields and (not nested or name in _MAPS):
            written.setdefault(name, []).append(variable)
        elif not _is_service_link(variable, value):
            found.unknown(name, variable, "environment")
    try:
        values = EnvSettingsSource(Settings)()
    except SettingsError:
        # The source names no variable; only the maps are parsed by it, and only when given whole.
        whole = ", ".join(v for name in _MAPS for v in written.get(name, ()) if "__" not in v)
        found.problems.append(
            f"{whole} (environment) is not a JSON object; or set single values,"
            f" as in {ENV_PREFIX}KAFKA_CLUSTERS__DEFAULT__ADDRESS=kafka:9092"
        )
        raise ConfigError(found.problems) from None
    for name, value in values.items():
        found.add(name, value, ", ".join(sorted(written[name])))


def _is_service_link(variable: str, value: str) -> bool:
    """Whether Kubernetes put ``variable`` there for a service that is called taskbroker-something."""
    name = variable[len(ENV_PREFIX) :].upper()
    return bool(_SERVICE_LINK.match(name)) and (
        not name.endswith("PORT") or "SERVICE" in name or "://" in value
    )


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _described(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    """One text for each thing that pydantic found wrong."""
    details: list[Any] = error.errors(include_url=False)
    # What is derived from a setting in error is reported with that setting.
    return [_describe(d, origins) for d in details if d["type"] != "default_factory_not_called"]


def _describe(detail: dict[str, Any], origins: Mapping[str, str]) -> str:
    where = [str(part) for part in detail["loc"] if part != "[key]"]
    said = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else ""
    if not where:
        named = [f"{name}: {origins[name]}" for name in origins if re.search(rf"\b{name}\b", said)]
        return said + (f" ({'; '.join(named)})" if named else "")
    name = where[0]
    origin = origins.get(name, "default")
    if detail["type"] == "extra_forbidden":
        return f"{'.'.join(where)} ({origin}) is not a setting{_nearest(where[-1], _MAPS.get(name, ()))}"
    if detail["type"] == "missing":
        return f"{'.'.join(where)} is missing ({origin})"
    value = "" if name in SECRET else f" is {_shown(detail['input'])}"
    return f"{'.'.join(where)}{value} ({origin}): {said or expected(where)}"


def _nearest(name: str, known: Iterable[str], written: str = "") -> str:
    """A hint at the setting that is meant, in the form in which the wrong one was ``written``."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    if not nearest:
        return "; penstock-broker serve --help lists them"
    variable = written.startswith(ENV_PREFIX)
    return f"; did you mean {ENV_PREFIX + nearest[0].upper() if variable else nearest[0]}?"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS_MAX else text[: SHOWN_CHARACTERS_MAX - 3] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
