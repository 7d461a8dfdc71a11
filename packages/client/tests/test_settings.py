"""Settings: defaults < file < environment < arguments; mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock_client import ConfigError
from penstock_client.settings import load_settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KAFKA", "BROKER", "TOPIC", "CONFIG", "ROUTE_OVERRIDES", "LINGER_MS"):
        monkeypatch.delenv(f"PENSTOCK_{name}", raising=False)


def test_later_sources_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "client.yaml"
    path.write_text("kafka: file:9092\ntopic: from-file\nlinger_ms: 5\n")
    monkeypatch.setenv("PENSTOCK_CONFIG", str(path))
    monkeypatch.setenv("PENSTOCK_TOPIC", "from-environment")
    settings = load_settings({"linger_ms": 2, "topic": None})
    assert (settings.kafka, settings.topic, settings.linger_ms) == ("file:9092", "from-environment", 2)


@pytest.mark.parametrize(
    "text",
    [
        "taskworker:\n  route:\n    overrides:\n      ingest.errors: slow\n",
        "taskworker.route.overrides:\n  ingest.errors: slow\n",
        "taskworker:\n  route.overrides: {ingest.errors: slow}\n",
        "route_overrides: {ingest.errors: slow}\n",
    ],
)
def test_routes_are_written_as_operators_know_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "client.yaml"
    path.write_text(text)
    settings = load_settings({}, path)
    assert settings.topic_of("ingest.errors") == ("slow", "taskworker.route.overrides")
    assert settings.topic_of("other") == ("taskworker", "topic")


def test_routes_in_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_ROUTE_OVERRIDES", '{"reports": "slow"}')
    assert load_settings({}).route_overrides == {"reports": "slow"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kafak: a:1", ["client.yaml", "'kafak'", "'kafka'"]),
        ("taskworker: {route: {overides: {a: b}}}", ["overides", "taskworker.route.overrides"]),
        ("linger_ms: soon", ["linger_ms", "'soon'", "client.yaml"]),
        ("linger_ms: -1", ["negative"]),
        ("delivery_timeout_seconds: 0", ["cannot be 0"]),
        ("linger_ms: .nan", ["without end"]),
        ("topic: 7", ["topic", "a text is expected"]),
        ("strict_kwargs: maybe", ["off, warn or error"]),
        ("route_overrides: [a]", ["mapping of namespace to topic"]),
        ("- a list", ["must be a mapping"]),
        ("a: [", ["no YAML"]),
        ("{kafka: 'a:1', broker: 'b:1'}", ["both kafka", "remove one"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "client.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_settings({}, path)
    for word in words:
        assert word in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_settings({}, tmp_path / "nowhere.yaml")


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_LINGER_MS", "soon")
    with pytest.raises(ConfigError, match="PENSTOCK_LINGER_MS"):
        load_settings({})


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("PENSTOCK_KAKFA", "PENSTOCK_KAFKA"),
        ("PENSTOCK_TOPICS", "PENSTOCK_TOPIC"),
        ("PENSTOCK_ROUTES_OVERRIDE", "PENSTOCK_ROUTE_OVERRIDES"),
    ],
)
def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, meant: str) -> None:
    monkeypatch.setenv(variable, "x")
    with pytest.raises(ConfigError, match=f"unknown setting {variable} .*did you mean {meant}\\?"):
        load_settings({})


def test_variables_of_others_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests', the worker's, and what Kubernetes sets for services called penstock-broker and penstock.
    for variable in (
        "PENSTOCK_KAFKA_REQUIRED", "PENSTOCK_RPC_HOST_LIST", "PENSTOCK_BROKER_PORT",
        "PENSTOCK_BROKER_SERVICE_HOST", "PENSTOCK_PORT", "PENSTOCK_CONFIG",
    ):  # fmt: skip
        monkeypatch.setenv(variable, "" if variable == "PENSTOCK_CONFIG" else "tcp://10.0.0.1:50051")
    assert load_settings({}).broker == ""


def test_of_several_secrets_the_first_signs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PENSTOCK_GRPC_SHARED_SECRET", '["new", "old"]')
    assert load_settings({}).grpc_shared_secret == "new"
    monkeypatch.setenv("PENSTOCK_GRPC_SHARED_SECRET", "newer,new")
    assert load_settings({}).grpc_shared_secret == "newer"
    assert load_settings({"grpc_shared_secret": "given"}).grpc_shared_secret == "given"
    path = tmp_path / "client.yaml"
    path.write_text("grpc_shared_secret: {hush: 1}\n")
    monkeypatch.setenv("PENSTOCK_GRPC_SHARED_SECRET", "hush\udcff")
    with pytest.raises(ConfigError, match="not UTF-8") as refusal:
        load_settings({})
    assert "hush" not in str(refusal.value)
    monkeypatch.delenv("PENSTOCK_GRPC_SHARED_SECRET")
    with pytest.raises(ConfigError, match=r"grpc_shared_secret = \(hidden\)") as refusal:
        load_settings({}, path)
    assert "hush" not in str(refusal.value)


def test_no_more_arguments_are_allowed_than_workers_decode() -> None:
    with pytest.raises(ConfigError, match=r"payload_bytes_max.*workers decode at most"):
        load_settings({"payload_bytes_max": 5 * 1024 * 1024})
