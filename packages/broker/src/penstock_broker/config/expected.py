"""What a setting's value may be, in words: for error messages and for the document of settings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from penstock_broker.config.settings import Settings, size_text

SIZES = frozenset(name for name in Settings.model_fields if name.endswith("bytes_max"))


@cache
def schema() -> dict[str, dict[str, Any]]:
    """The JSON schema of each setting."""
    properties: dict[str, dict[str, Any]] = Settings.model_json_schema(by_alias=False)["properties"]
    return properties


def expected(where: Sequence[str]) -> str:
    """What is expected at ``where``: a setting's name, then the keys within it."""
    name = where[0]
    if name == "grpc_shared_secret":
        return "a text is expected, several with commas between, or a list of texts"
    if len(where) > 1 or name in ("kafka_clusters", "kafka_topics"):
        return "a map of names is expected, as in docs/configuration.md"
    return f"{kind(name)} is expected"


def default_text(name: str) -> str:
    """The default of setting ``name`` as a person would write it; empty if there is none."""
    value: Any = schema()[name].get("default")
    if name in SIZES:
        return size_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value) if value not in (None, [], {}) else ""


def placeholder(name: str) -> str:
    """What stands for the value of setting ``name`` in a usage line."""
    field = _described_type(name)
    if "enum" in field:
        return "|".join(field["enum"])
    if name in SIZES:
        return "SIZE"
    return {"integer": "NUMBER", "number": "SECONDS"}.get(field["type"], "TEXT")


def _described_type(name: str) -> dict[str, Any]:
    field = schema()[name]
    return next((option for option in field.get("anyOf", ()) if option["type"] != "null"), field)


def kind(name: str) -> str:
    """The values of setting ``name``, as in "a whole number from 0 to 65535"."""
    field = _described_type(name)
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "boolean":
        return "true or false"
    if name in SIZES:
        return f"a size from {size_text(field['minimum'])} to {size_text(field['maximum'])}"
    if field["type"] == "integer":
        return f"a whole number from {field['minimum']} to {field['maximum']}"
    if field["type"] == "number":
        least = f"from {field['minimum']:g}" if "minimum" in field else f"above {field['exclusiveMinimum']:g}"
        return f"a number {least}, at most {field['maximum']:.0f}"
    if field.get("format") == "path":
        return "a path"
    if field["type"] == "object":
        return "a map"
    if field["type"] == "array":
        return "a text or a list of texts"
    return "a text without spaces" if "pattern" in field else "a text"
