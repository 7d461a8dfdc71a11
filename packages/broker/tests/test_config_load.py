"""Where settings come from: precedence, origins, and what is said about what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from penstock_broker.config import Loaded, load
from penstock_broker.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.upper().startswith("TASKBROKER_"):
            monkeypatch.delenv(variable)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "broker.yaml"


def problems(file: Path | None = None, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, options)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_defaults_file_environment_command_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("# a comment\nkafka_topic: file\ndb_name: file\ngrpc_port: 1001\nlog_level: debug\n")
    monkeypatch.setenv("TASKBROKER_GRPC_PORT", "1002")
    monkeypatch.setenv("TASKBROKER_DB_NAME", "environment")
    loaded = load(file, {"grpc_port": "1003"})
    assert loaded.settings.kafka_topic == "file"
    assert loaded.settings.db_name == "environment"
    assert loaded.settings.grpc_port == 1003
    assert loaded.settings.max_deliveries == 5
    assert loaded.origins["kafka_topic"] == f"{file}:2"
    assert loaded.origins["db_name"] == "TASKBROKER_DB_NAME"
    assert loaded.origins["grpc_port"] == "--grpc-port"
    assert loaded.origins["max_deliveries"] == "default"
    assert loaded.warnings == ()


def test_nested_names_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKBROKER_KAFKA_CLUSTERS__DEFAULT__ADDRESS", "kafka:9092")
    monkeypatch.setenv("TASKBROKER_KAFKA_TOPICS__INGEST__CONSUMER_GROUP", "g")
    loaded = load()
    assert loaded.settings.kafka_cluster == "kafka:9092"
    assert loaded.settings.kafka_topic == "ingest"
    assert loaded.settings.kafka_consumer_group == "g"
    assert loaded.origins["kafka_clusters"] == "TASKBROKER_KAFKA_CLUSTERS__DEFAULT__ADDRESS"


def test_maps_are_merged_entry_by_entry(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(
        "kafka_clusters: {default: {address: 'file:1'}}\nkafka_topics: {t: {consumer_group: g}}\n"
    )
    monkeypatch.setenv("TASKBROKER_KAFKA_CLUSTERS__DEFAULT__ADDRESS", "environment:2")
    loaded = load(file)
    assert loaded.settings.kafka_cluster == "environment:2"
    assert loaded.settings.kafka_consumer_group == "g"
    assert loaded.origins["kafka_clusters"] == f"{file}:1, TASKBROKER_KAFKA_CLUSTERS__DEFAULT__ADDRESS"


def test_the_two_forms_cannot_be_mixed_across_sources(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("kafka_clusters: {default: {address: 'file:1'}}\n")
    monkeypatch.setenv("TASKBROKER_KAFKA_CLUSTER", "environment:2")
    [problem] = problems(file)
    assert "kafka_clusters cannot be mixed with kafka_cluster" in problem
    assert f"kafka_clusters: {file}:1" in problem
    assert "kafka_cluster: TASKBROKER_KAFKA_CLUSTER" in problem


def test_secrets_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for written, secrets in (("one", ("one",)), ("one,two", ("one", "two")), ('["a", "b"]', ("a", "b"))):
        monkeypatch.setenv("TASKBROKER_GRPC_SHARED_SECRET", written)
        assert load(None, {"grpc_addr": "0.0.0.0"}).settings.secrets == secrets


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKBROKER_KAFKA_DEADLETTER_CLUSTER", "")
    monkeypatch.setenv("TASKBROKER_NO_SUCH_THING", "")
    assert load().settings.kafka_deadletter_cluster is None


def test_an_unknown_variable_names_the_nearest_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKBROKER_GRPC_PRT", "1")
    assert problems() == [
        "TASKBROKER_GRPC_PRT (environment) is not a setting; did you mean TASKBROKER_GRPC_PORT?"
    ]


def test_a_port_in_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKBROKER_GRPC_ADDR", "127.0.0.1:50077")
    (problem,) = problems()
    assert "an address without a port is expected: 127.0.0.1" in problem


@pytest.mark.parametrize("variable", ["TASKBROKER_GRPC_PORT__X", "TASKBROKER_QQQ_WWW"])
def test_unknown_variables_are_never_ignored(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert variable in problems()[0]


def test_an_unknown_key_names_its_line_and_the_nearest_setting(file: Path) -> None:
    file.write_text("db_name: x\nmax_pending_cuont: 5\n")
    assert problems(file) == [
        f"max_pending_cuont ({file}:2) is not a setting; did you mean max_pending_count?"
    ]


@pytest.mark.parametrize("value", ["2026-99-99", "9" * 5000], ids=["no date", "no number"])
def test_a_value_that_yaml_refuses_is_no_yaml(file: Path, value: str) -> None:
    file.write_text(f"db_name: {value}\n")
    assert f"the configuration file {file} is not YAML" in problems(file)[0]


def test_an_unknown_key_inside_a_map(file: Path) -> None:
    file.write_text("kafka_topics: {t: {consumer_gruop: g}}\n")
    assert problems(file) == [
        f"kafka_topics.t.consumer_gruop ({file}:1) is not a setting; did you mean consumer_group?"
    ]


def test_what_kubernetes_sets_for_a_service_of_that_name_is_no_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "50051",
        "SERVICE_PORT_GRPC": "50051",
        "PORT": "tcp://10.0.0.1:50051",
        "PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "PORT_50051_TCP_ADDR": "10.0.0.1",
        "PORT_50051_TCP_PROTO": "tcp",
        "INGEST_SERVICE_HOST": "10.0.0.1",
        "INGEST_PORT": "tcp://10.0.0.1:50051",
    }.items():
        monkeypatch.setenv(f"TASKBROKER_{name}", value)
    assert load().warnings == ()
    monkeypatch.setenv("TASKBROKER_GRCP_PORT", "50051")
    assert "did you mean TASKBROKER_GRPC_PORT?" in problems()[0]


def test_settings_of_taskbroker_without_a_meaning_warn(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("sentry_dsn: https://x@y/1\nvacuum_anything: 5\n")
    monkeypatch.setenv("TASKBROKER_STATSD_ADDR", "127.0.0.1:8125")
    loaded = load(file)
    assert [warning.split()[0] for warning in loaded.warnings] == [
        "sentry_dsn",
        "vacuum_anything",
        "TASKBROKER_STATSD_ADDR",
    ]
    assert all("is ignored" in warning for warning in loaded.warnings)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("grpc_port", "abc", "a whole number from 0 to 65535 is expected"),
        ("grpc_port", "70000", "a whole number from 0 to 65535 is expected"),
        ("lease_seconds", "soon", "a number above 0, at most 31536000 is expected"),
        ("insecure", "maybe", "true or false is expected"),
        ("ingest", "rabbit", "`kafka` or `grpc` is expected"),
        ("window_bytes_max", "7 bananas", "a size from 1KiB to 1024GiB is expected"),
        ("broker_id", "two words", "a text without spaces is expected"),
    ],
)
def test_a_mistyped_value_says_where_what_and_what_is_expected(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"TASKBROKER_{name.upper()}"
    monkeypatch.setenv(variable, value)
    assert problems() == [f"{name} is {value!r} ({variable}): {expected}"]


def test_a_mistyped_secret_is_not_shown(file: Path) -> None:
    file.write_text("grpc_shared_secret: 31337\n")
    [problem] = problems(file)
    assert "31337" not in problem
    assert f"grpc_shared_secret ({file}:1)" in problem


def test_all_problems_are_told_at_once(file: Path) -> None:
    file.write_text("grpc_port: x\nlease_seconds: 0\nnonsense: 1\n")
    assert [problem.split()[0] for problem in problems(file)] == ["nonsense", "grpc_port", "lease_seconds"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\xfa", "is not YAML"),
        (b"- a\n- b\n", "must have `setting: value` lines"),
        (b"just text", "must have `setting: value` lines"),
        (b"grpc_port: 1\ndb_name: x\ngrpc_port: 2\n", "grpc_port is given twice"),
        (b"? [a, b]\n: 1\n", "is not"),
        (b"1: 2\n", "1 ("),
        (b"db_name: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        (b"#" * (1024 * 1024 + 1), "is larger than"),
        (b"x: " + b"[" * 5000, "is not YAML"),
    ],
)
def test_files_that_are_no_configuration(content: bytes, said: str, file: Path) -> None:
    file.write_bytes(content)
    assert said in problems(file)[0]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in problems(tmp_path / "missing.yaml")[0]
    assert "Is a directory" in problems(tmp_path)[0]


def test_an_empty_file_and_empty_values_change_nothing(file: Path) -> None:
    file.write_text("")
    assert load(file).settings == load().settings
    file.write_text("grpc_port:\n")
    assert load(file).origins["grpc_port"] == "default"


@pytest.mark.parametrize("text", ["zzz", "[1]", '{"default": 5}'])
def test_a_map_in_one_variable_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKBROKER_KAFKA_CLUSTERS", text)
    assert "TASKBROKER_KAFKA_CLUSTERS" in problems()[0]


def test_listening_in_the_open_on_purpose_warns() -> None:
    loaded: Loaded = load(None, {"grpc_addr": "0.0.0.0", "insecure": True})
    assert "0.0.0.0:50051" in loaded.warnings[0]
    assert load(None, {"insecure": True}).warnings == ()
