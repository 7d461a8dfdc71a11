"""Settings by themselves: defaults, what is derived, limits, what does not go together."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from penstock_broker.config import SECTIONS, Settings
from penstock_broker.config.expected import default_text, kind, placeholder, schema
from penstock_broker.config.settings import GIB, KIB, MIB, group_of, is_loopback, size_text
from penstock_broker.domain.lifecycle import Limits
from penstock_broker.server import store_limits
from penstock_broker.store.limits import StoreLimits

CLUSTERS: Any = {"main": {"address": "kafka:9092"}}
DLQ = {"cluster": "main", "produce_only": True}
TOPICS: Any = {"pool": {"cluster": "main"}, "pool-dlq": DLQ}
OTHER = {"cluster": "other", "produce_only": True}


def problems(**given: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Settings(**given)
    return [e["msg"] for e in caught.value.errors() if e["type"] != "default_factory_not_called"]


def test_the_defaults_that_operators_know() -> None:
    settings = Settings()
    assert settings.ingest == "kafka"
    assert settings.kafka_topic == "taskworker"
    assert settings.kafka_cluster == "127.0.0.1:9092"
    assert settings.kafka_auto_offset_reset == "earliest"
    assert settings.kafka_deadletter_topic == "taskworker-dlq"
    assert settings.grpc_address == "127.0.0.1:50051"
    assert settings.metrics_port == 51051
    assert settings.metrics_port_is_default
    assert settings.broker_id == f"{socket.gethostname()}-50051"
    assert settings.db_path == Path("penstock.sqlite")


def test_the_store_keeps_to_what_is_set() -> None:
    settings = Settings(
        max_pending_count=101,
        pending_bytes_max=102 * MIB,
        namespace_share_max=0.25,
        window_rows_max=103,
        window_bytes_max=104 * MIB,
        batch_rows_max=105,
        dedup_window_seconds=106.5,
        dedup_ids_max=107,
        dead_letters_rest_max=108,
        lease_seconds=10.5,
        deadline_grace_seconds=2.5,
        unclaimable_seconds=109.5,
        max_deliveries=9,
        unknown_task_seconds=110.5,
        kafka_retry_topic="retries",
    )
    assert store_limits(settings) == StoreLimits(
        rows_max=101,
        bytes_max=102 * MIB,
        namespace_share_max=0.25,
        window_rows_max=103,
        window_bytes_max=104 * MIB,
        batch_rows_max=105,
        dedup_window_ms=106_500,
        dedup_ids_max=107,
        dead_letters_rest_max=108,
        lease_ms=10_500,
        grace_ms=2_500,
        unclaimable_ms=109_500,
        lifecycle=Limits(max_deliveries=9, unknown_task_ms=110_500, retry_topic=True),
    )
    # Without Kafka there is no topic in which they could wait.
    assert not store_limits(Settings(ingest="grpc", kafka_retry_topic="retries")).lifecycle.retry_topic


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKBROKER_GRPC_PORT", "1")
    assert Settings().grpc_port == 50051


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().grpc_port = 1


def test_what_is_derived_follows_what_is_given() -> None:
    settings = Settings(kafka_topic="ingest", grpc_port=60000, db_name="beta", broker_id="b")
    assert settings.kafka_consumer_group == "penstock-ingest"
    assert settings.kafka_deadletter_topic == "ingest-dlq"
    assert settings.metrics_port == 61000
    assert settings.db_path == Path("beta.sqlite")
    assert Settings(db_name="beta", db_path=Path("/data/x.db")).db_path == Path("/data/x.db")
    assert not Settings(metrics_port=51051).metrics_port_is_default


def test_pools_that_differ_only_in_the_topic_never_share_a_group() -> None:
    assert group_of("a") != group_of("b")


@pytest.mark.parametrize(
    ("grpc_port", "metrics_port"), [(0, 0), (64535, 65535), (64536, 63536), (65535, 64535)]
)
def test_the_default_metrics_port_is_a_port(grpc_port: int, metrics_port: int) -> None:
    assert Settings(grpc_port=grpc_port).metrics_port == metrics_port


def test_kafka_in_the_newer_form() -> None:
    settings = Settings(kafka_clusters=CLUSTERS, kafka_topics=TOPICS)
    assert settings.kafka_topic == "pool"
    assert settings.kafka_cluster == "kafka:9092"
    assert settings.kafka_consumer_group == "penstock-pool"
    assert settings.kafka_deadletter_topic == "pool-dlq"


def test_the_newer_form_names_its_group_and_may_leave_out_the_topics() -> None:
    topics: Any = {"pool": {"cluster": "main", "consumer_group": "g"}}
    assert Settings(kafka_clusters=CLUSTERS, kafka_topics=topics).kafka_consumer_group == "g"
    only_address = Settings.model_validate({"kafka_clusters": {"default": {"address": "k:1"}}})
    assert (only_address.kafka_topic, only_address.kafka_cluster) == ("taskworker", "k:1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kafka_topics": {"a": {}, "b": {}}}, "exactly one topic, here: a, b"),
        ({"kafka_topics": {"a": {"produce_only": True}}}, "exactly one topic, here: none"),
        ({"kafka_topics": {"a": {"cluster": "x"}}}, "'x', which kafka_clusters does not have"),
        ({"kafka_clusters": CLUSTERS, "kafka_topics": {"a": {}}}, "'default', which kafka_clusters does not"),
        (
            {"kafka_clusters": CLUSTERS, "kafka_topics": TOPICS | {"c": OTHER}},
            "c is on another cluster than pool",
        ),
        ({"kafka_clusters": CLUSTERS | {"other": {"address": "o:1"}}}, "kafka_topics must say which"),
        (
            {"kafka_clusters": CLUSTERS, "kafka_topics": TOPICS, "kafka_topic": "x"},
            "be mixed with kafka_topic",
        ),
        ({"kafka_clusters": CLUSTERS, "kafka_cluster": "k:1"}, "cannot be mixed with kafka_cluster"),
        ({"kafka_deadletter_cluster": "elsewhere:9092"}, "only go to kafka_cluster (127.0.0.1:9092)"),
        ({"kafka_topic": "t", "kafka_deadletter_topic": "t"}, "is the consumed topic (t)"),
        ({"kafka_topic": "t", "kafka_deadletter_topic": "t-overflow"}, "is the overflow topic (t-overflow)"),
        ({"kafka_topic": "penstock-ledger"}, "kafka_ledger_topic is the consumed topic (penstock-ledger)"),
        ({"kafka_deadletter_topic": "l", "kafka_ledger_topic": "l"}, "is the dead letter topic (l)"),
        (
            {"kafka_retry_topic": "l", "kafka_ledger_topic": "l"},
            "kafka_retry_topic is the ledger's topic (l)",
        ),
        ({"kafka_topic": "a b"}, "1 to 249 of the characters"),
        ({"kafka_topic": ".."}, "1 to 249 of the characters"),
        ({"kafka_cluster": "kafka"}, "host:port is expected"),
        ({"kafka_cluster": "kafka:1,other:99999"}, "host:port is expected"),
    ],
)
def test_kafka_settings_that_cannot_work_are_refused(given: dict[str, Any], said: str) -> None:
    assert any(said in problem for problem in problems(**given)), problems(**given)


def test_a_dead_letter_cluster_that_is_the_same_is_accepted() -> None:
    assert Settings(kafka_cluster="k:1", kafka_deadletter_cluster="k:1").kafka_cluster == "k:1"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.53", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_secret(address: str) -> None:
    assert is_loopback(address)
    Settings(grpc_addr=address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.2", "broker-0", "[::]"])
def test_beyond_loopback_the_refusal_names_both_ways_out(address: str) -> None:
    [problem] = problems(grpc_addr=address)
    assert "TASKBROKER_GRPC_SHARED_SECRET" in problem
    assert "TASKBROKER_INSECURE=1" in problem
    Settings.model_validate({"grpc_addr": address, "grpc_shared_secret": "s"})
    Settings(grpc_addr=address, insecure=True)


def test_ipv6_addresses_are_written_in_brackets() -> None:
    assert Settings(grpc_addr="::1").grpc_address == "[::1]:50051"
    assert Settings(grpc_addr="[::1]").grpc_address == "[::1]:50051"


@pytest.mark.parametrize(
    ("given", "secrets"),
    [
        ("one", ("one",)),
        ("one, two", ("one", "two")),
        ('["a,b", "c"]', ("a,b", "c")),
        (["x", "y"], ("x", "y")),
        ("", ()),
    ],
)
def test_the_ways_to_write_secrets(given: object, secrets: tuple[str, ...]) -> None:
    assert Settings.model_validate({"grpc_shared_secret": given}).secrets == secrets


def test_what_no_call_can_be_signed_with_and_no_file_can_be_called_is_refused() -> None:
    with pytest.raises(ValidationError, match="not UTF-8"):
        Settings.model_validate({"grpc_shared_secret": "\udcff"})
    with pytest.raises(ValidationError, match="path of a file"):
        Settings.model_validate({"db_path": "/"})


def test_secrets_are_not_in_the_repr() -> None:
    assert "hunter2" not in repr(Settings.model_validate({"grpc_shared_secret": "hunter2"}))


@pytest.mark.parametrize(
    ("given", "said"), [("[broken", "no JSON list"), ([""], "let everyone in"), (["x", 1], "valid string")]
)
def test_secrets_that_are_none(given: object, said: str) -> None:
    assert any(said in problem for problem in problems(grpc_shared_secret=given))


@pytest.mark.parametrize(
    ("given", "size"), [("64MiB", 64 * MIB), (2048, 2048), ("2048", 2048), ("1 GiB", GIB)]
)
def test_sizes_may_have_a_unit(given: object, size: int) -> None:
    assert Settings.model_validate({"window_bytes_max": given}).window_bytes_max == size


def test_words_of_others_are_understood() -> None:
    assert Settings.model_validate({"log_format": "text", "log_level": "WARN"}).log_level == "warning"
    assert Settings.model_validate({"log_format": "text"}).log_format == "console"
    # YAML makes a boolean of an unquoted off.
    assert Settings.model_validate({"v1_service": False}).v1_service == "off"


def test_a_size_as_a_person_writes_it() -> None:
    assert [size_text(n) for n in (8 * GIB, 64 * MIB, KIB, 1500)] == ["8GiB", "64MiB", "1KiB", "1500B"]


@pytest.mark.parametrize(
    "name", [n for n in Settings.model_fields if "integer" in str(schema()[n].get("type"))]
)
def test_every_number_has_limits(name: str) -> None:
    limits = schema()[name]
    for beyond in (limits["minimum"] - 1, limits["maximum"] + 1):
        assert problems(**{name: beyond})


@pytest.mark.parametrize("name", [n for n in Settings.model_fields if n.endswith("_seconds")])
def test_every_time_has_limits(name: str) -> None:
    none = () if name == "unclaimable_seconds" else (0,)
    for beyond in (*none, -1, 1e12, float("inf"), float("nan")):
        assert problems(**{name: beyond})


def test_every_setting_is_described_with_its_values() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert kind(name)
        assert placeholder(name)
        unit = re.search(r"_(seconds|bytes|rows)(_max)?$", name)
        if unit:
            assert unit[1] in field.description.lower(), f"{name} does not name its unit"
    assert SECTIONS.keys() <= Settings.model_fields.keys()
    assert next(iter(SECTIONS)) == next(iter(Settings.model_fields))
    assert default_text("pending_bytes_max") == "8GiB"
    assert default_text("kafka_deadletter_cluster") == ""
