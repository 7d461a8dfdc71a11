"""Every setting of the broker, with unit, default and limits. ``docs/configuration.md`` is made from this."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

ENV_PREFIX = "TASKBROKER_"
KIB, MIB, GIB = 1024, 1024**2, 1024**3
DAY = 86_400.0

_ANY_SIZE = TypeAdapter(ByteSize)
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}\Z")


def _size(value: object) -> object:
    """Lets a size be written with a unit, as in ``64MiB``."""
    return int(_ANY_SIZE.validate_python(value)) if isinstance(value, str) else value


def size_text(size: int) -> str:
    """A size as a person writes it: ``64MiB``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{name}"
    return f"{size}B"


def _topic(value: str) -> str:
    if not _TOPIC.match(value) or value in (".", ".."):
        raise ValueError("a topic's name is 1 to 249 of the characters A-Z a-z 0-9 . _ -")
    return value


def _bootstrap(value: str) -> str:
    for address in value.split(","):
        host, colon, port = address.strip().rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65_536):
            raise ValueError("host:port is expected, or several with commas between")
    return value


Port = Annotated[int, Field(ge=0, le=65_535)]
Seconds = Annotated[float, Field(gt=0, le=365 * DAY)]
Rows = Annotated[int, Field(ge=1, le=1_000_000_000)]
Bytes = Annotated[int, Field(ge=KIB, le=1024 * GIB), BeforeValidator(_size)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$")]
TopicName = Annotated[str, AfterValidator(_topic)]
Bootstrap = Annotated[str, AfterValidator(_bootstrap)]


# The settings in sections, by the first of each.
SECTIONS = {
    "ingest": "Intake",
    "grpc_addr": "Listening",
    "db_name": "Store",
    "max_pending_count": "Limits",
    "lease_seconds": "Executing",
    "shutdown_seconds": "Operating",
}


class ClusterSettings(BaseModel):
    """One Kafka cluster in ``kafka_clusters``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: Bootstrap = Field(description="Bootstrap servers, `host:port,host:port`.")


class TopicSettings(BaseModel):
    """One topic in ``kafka_topics``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster: str = Field(default="default", description="Its cluster, a name in `kafka_clusters`.")
    consumer_group: Name | None = Field(
        default=None, description="Consumer group; derived from the topic if absent."
    )
    produce_only: bool = Field(default=False, description="Only written to, as a dead letter topic is.")


def group_of(topic: str) -> str:
    """The consumer group of a topic that was given none: never the same for two topics."""
    return f"penstock-{topic}"


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a listener on ``address``."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False


def _consumed(data: dict[str, Any]) -> str | None:
    """The topic that ``kafka_topics`` says to consume; its validator has seen to it that there is one."""
    return next(
        (name for name, topic in (data.get("kafka_topics") or {}).items() if not topic.produce_only), None
    )


def _default_topic(data: dict[str, Any]) -> str:
    return _consumed(data) or "taskworker"


def _default_cluster(data: dict[str, Any]) -> str:
    clusters: dict[str, ClusterSettings] = data.get("kafka_clusters") or {}
    consumed = _consumed(data)
    name = data["kafka_topics"][consumed].cluster if consumed else "default"
    return clusters[name].address if name in clusters else "127.0.0.1:9092"


def _default_group(data: dict[str, Any]) -> str:
    consumed = _consumed(data)
    given: str | None = data["kafka_topics"][consumed].consumer_group if consumed else None
    return given or group_of(data.get("kafka_topic", ""))


def _default_dead_letters(data: dict[str, Any]) -> str:
    return f"{data.get('kafka_topic', '')}-dlq"


def _default_database(data: dict[str, Any]) -> Path:
    return Path(f"{data.get('db_name', '')}.sqlite")


def _default_broker_id(data: dict[str, Any]) -> str:
    return f"{socket.gethostname()}-{data.get('grpc_port', '')}"


def _default_metrics_port(data: dict[str, Any]) -> int:
    grpc_port: int = data.get("grpc_port", 0)
    if grpc_port == 0:
        return 0
    return grpc_port + 1000 if grpc_port + 1000 < 65_536 else grpc_port - 1000


class Settings(BaseSettings):
    """The broker's settings, checked and complete: what was not given has been derived from the rest.

    Reads nothing but its arguments; ``penstock_broker.config.load`` brings in file, environment and
    command line. Raises pydantic.ValidationError.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    ingest: Literal["kafka", "grpc"] = Field(
        default="kafka",
        description="With `grpc` no Kafka is used. `SendTasks` is served in both cases.",
    )
    kafka_clusters: dict[str, ClusterSettings] = Field(
        default_factory=dict,
        description="Kafka clusters by name, each with its `address`. The newer form of `kafka_cluster`.",
    )
    kafka_topics: dict[TopicName, TopicSettings] = Field(
        default_factory=dict,
        description="Topics by name, each with `cluster`, `consumer_group`, `produce_only`; one is consumed."
        " The newer form of `kafka_topic` and `kafka_consumer_group`; the two forms cannot be mixed.",
    )
    kafka_topic: TopicName = Field(
        default_factory=_default_topic,
        description="Topic to consume: one for each processing pool.",
        json_schema_extra={"default": "taskworker"},
    )
    kafka_cluster: Bootstrap = Field(
        default_factory=_default_cluster,
        description="Bootstrap servers, `host:port,host:port`.",
        json_schema_extra={"default": "127.0.0.1:9092"},
    )
    kafka_consumer_group: Name = Field(
        default_factory=_default_group,
        description="Consumer group, shared by the brokers of one pool and by no other.",
        json_schema_extra={"default": "penstock-<kafka_topic>"},
    )
    kafka_auto_offset_reset: Literal["earliest", "latest"] = Field(
        default="earliest",
        description="Where to start in a partition for which the group has no offset."
        " `latest` skips what was sent before.",
    )
    kafka_deadletter_topic: TopicName = Field(
        default_factory=_default_dead_letters,
        description="Topic for dead letters.",
        json_schema_extra={"default": "<kafka_topic>-dlq"},
    )
    kafka_deadletter_cluster: Bootstrap | None = Field(
        default=None,
        description="Accepted when it equals `kafka_cluster`: dead letters go to the cluster they came from.",
    )
    kafka_ledger_topic: TopicName = Field(
        default="penstock-ledger",
        description="Compacted topic in which brokers record what is unfinished, so that none loses a task"
        " with its disk. All pools may share it.",
    )
    kafka_retry_topic: TopicName | None = Field(
        default=None,
        description="Topic that retries wait in, for whoever consumes it. If absent they wait in the store.",
    )
    kafka_session_timeout_seconds: Annotated[float, Field(ge=6, le=300)] = Field(
        default=10.0,
        description="Seconds without a sign of life after which Kafka gives a broker's partitions away.",
    )
    create_missing_topics: bool = Field(default=False, description="Create topics that do not exist.")
    default_topic_partitions: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=1, description="Partitions of a topic that this broker creates."
    )

    grpc_addr: Name = Field(
        default="127.0.0.1",
        description="Address to listen on. Beyond loopback only with `grpc_shared_secret` or `insecure`.",
    )
    grpc_port: Port = Field(default=50_051, description="Port to listen on; 0 takes a free one.")
    grpc_shared_secret: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="Secrets, any of which may sign a call: one, several with commas between, or a JSON list."
        " To rotate, add the new one, change the workers, remove the old one.",
    )
    insecure: bool = Field(
        default=False,
        description="Listen beyond loopback without a secret: anyone who can connect can run tasks.",
    )
    v1_service: Literal["on", "off"] = Field(
        default="on", description="Answer under the name `sentry_protos.taskbroker.v1.ConsumerService` too."
    )
    broker_id: Name = Field(
        default_factory=_default_broker_id,
        description="Name of this broker, different for each and the same after a restart.",
        json_schema_extra={"default": "<host name>-<grpc_port>"},
    )

    db_name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^/\\\x00]+$")] = Field(
        default="penstock",
        description="Name of the SQLite file, without directory and extension, if `db_path` is not given.",
    )
    db_path: Path = Field(
        default_factory=_default_database,
        description="The SQLite file. Each broker needs one of its own.",
        json_schema_extra={"default": "<db_name>.sqlite"},
    )

    max_pending_count: Rows = Field(
        default=1_000_000, description="Activations held, in rows, at which the intake pauses."
    )
    pending_bytes_max: Bytes = Field(
        default=8 * GIB, description="Activations held, in bytes, at which the intake pauses."
    )
    namespace_share_max: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5,
        description="Part of these two that one namespace may hold. What more comes of it waits in the topic"
        " `<kafka_topic>-overflow`, and is consumed from there when the namespace has room.",
    )
    window_rows_max: Rows = Field(
        default=16_000,
        description="Pending activations held in memory, in rows; the others wait in the file.",
    )
    window_bytes_max: Bytes = Field(
        default=8 * MIB,
        description="Bodies of pending activations held in memory, in bytes; others are read when claimed.",
    )
    batch_rows_max: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=4096, description="New activations written in one transaction, in rows."
    )
    # An answer with the largest one is what workers take: 64 MiB.
    message_bytes_max: Annotated[int, Field(ge=KIB, le=60 * MIB), BeforeValidator(_size)] = Field(
        default=8 * MIB, description="Largest activation, and largest RPC message, in bytes."
    )
    dead_letters_rest_max: Rows = Field(
        default=10_000,
        description="Dead letters kept in the store because Kafka is not used or refuses them, in rows.",
    )

    lease_seconds: Seconds = Field(
        default=15.0,
        description="Seconds without a heartbeat after which a worker is gone and its tasks go to another.",
    )
    deadline_default_seconds: Seconds = Field(
        default=30.0, description="Seconds that a task may run if its activation names no deadline."
    )
    deadline_grace_seconds: Seconds = Field(
        default=3.0, description="Seconds after a task's deadline until the broker takes it back itself."
    )
    max_deliveries: Annotated[int, Field(ge=1, le=1_000)] = Field(
        default=5,
        description="Lost deliveries (the worker died or vanished) after which a task becomes a dead letter.",
    )
    unknown_task_seconds: Seconds = Field(
        default=3600.0,
        description="Seconds that a task is offered which no worker knows or whose arguments do not fit.",
    )
    unclaimable_seconds: Annotated[float, Field(ge=0, le=366 * DAY)] = Field(
        default=7 * DAY,
        description="Seconds after which a task that no worker asks for becomes a dead letter, counted from"
        " its arrival, the broker's start or the last request for its namespace; 0: never.",
    )
    received_at_age_max_seconds: Seconds = Field(
        default=7 * DAY,
        description="Oldest `received_at` believed, in seconds; the time of arrival replaces an older one.",
    )
    dedup_window_seconds: Seconds = Field(
        default=3600.0, description="Seconds for which the ids of finished tasks are remembered."
    )
    dedup_ids_max: Rows = Field(
        default=2_000_000,
        description="Ids remembered, in rows: of finished tasks, and of what other brokers took before.",
    )

    shutdown_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=10.0, description="Seconds after SIGTERM within which the broker has stopped."
    )
    metrics_addr: Name = Field(default="127.0.0.1", description="Address of the Prometheus endpoint.")
    metrics_port: Port = Field(
        default_factory=_default_metrics_port,
        description="Port of the Prometheus endpoint; 0 turns it off.",
        json_schema_extra={"default": "<grpc_port> + 1000"},
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level that is logged."
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="`console` for people, `json` for machines: one object a line."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The shared secrets in the clear, for checking signatures."""
        return tuple(secret.get_secret_value() for secret in self.grpc_shared_secret)

    @property
    def kafka_overflow_topic(self) -> str:
        """Where records wait whose namespace holds its share of the store."""
        return f"{self.kafka_topic}-overflow"

    def group_of(self, topic: str) -> str:
        """The group that reads a topic of this pool."""
        group = self.kafka_consumer_group
        return f"{group}-overflow" if topic == self.kafka_overflow_topic else group

    @property
    def grpc_address(self) -> str:
        """Where to listen, as gRPC writes it."""
        host = self.grpc_addr.strip("[]")
        host = f"[{host}]" if ":" in host else host
        return f"{host}:{self.grpc_port}"

    @property
    def metrics_port_is_default(self) -> bool:
        """Whether nobody chose the metrics port, so that finding it in use is no error."""
        return "metrics_port" not in self.model_fields_set

    @field_validator("grpc_shared_secret", mode="before")
    @classmethod
    def _split_secrets(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                raise ValueError('it begins with "[" but is no JSON list of strings') from None
            return value
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("grpc_shared_secret")
    @classmethod
    def _no_empty_secret(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(secret.get_secret_value() for secret in value):
            raise ValueError("an empty secret would let everyone in")
        try:
            "".join(secret.get_secret_value() for secret in value).encode()
        except UnicodeEncodeError:
            raise ValueError("it is not UTF-8") from None
        return value

    @field_validator("db_path")
    @classmethod
    def _names_a_file(cls, value: Path) -> Path:
        if not value.name:
            raise ValueError("the path of a file is expected")
        return value

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _other_words(cls, value: object) -> object:
        words = {"warn": "warning", "text": "console"}
        return words.get(value.lower(), value.lower()) if isinstance(value, str) else value

    @field_validator("v1_service", mode="before")
    @classmethod
    def _yaml_on_off(cls, value: object) -> object:
        # YAML reads an unquoted on or off as a boolean.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("kafka_topics")
    @classmethod
    def _one_consumed(
        cls, topics: dict[str, TopicSettings], info: ValidationInfo
    ) -> dict[str, TopicSettings]:
        if not topics:
            return topics
        consumed = [name for name, topic in topics.items() if not topic.produce_only]
        if len(consumed) != 1:
            found = ", ".join(consumed) or "none"
            raise ValueError(
                f"a broker consumes exactly one topic, here: {found}. Run one broker for each topic,"
                " and mark topics that are only written to with produce_only: true"
            )
        clusters = info.data.get("kafka_clusters", {})
        for name, topic in topics.items():
            if topic.cluster != topics[consumed[0]].cluster:
                raise ValueError(
                    f"{name} is on another cluster than {consumed[0]}; a broker uses one cluster"
                )
            if topic.cluster not in clusters and (clusters or topic.cluster != "default"):
                raise ValueError(
                    f"{name} is on cluster {topic.cluster!r}, which kafka_clusters does not have"
                )
        return topics

    @field_validator("grpc_addr", "metrics_addr")
    @classmethod
    def _address_only(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        if colon and port.isdecimal() and ":" not in host:
            raise ValueError(
                f"an address without a port is expected: {host}, and the port in its own setting"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self.model_fields_set
        new = sorted(given & {"kafka_topics", "kafka_clusters"})
        old = sorted(
            given & {"kafka_topic", "kafka_cluster", "kafka_consumer_group", "kafka_deadletter_cluster"}
        )
        if new and old:
            raise ValueError(
                f"{', '.join(new)} cannot be mixed with {', '.join(old)}: remove one of the two forms."
                " The maps say the same as the older names"
            )
        if len(self.kafka_clusters) > 1 and not self.kafka_topics:
            raise ValueError(
                "kafka_clusters has several clusters: kafka_topics must say which one the topic is on"
            )
        if self.kafka_deadletter_cluster not in (None, self.kafka_cluster):
            raise ValueError(
                f"kafka_deadletter_cluster is {self.kafka_deadletter_cluster}, but dead letters can only"
                f" go to kafka_cluster ({self.kafka_cluster}): remove the setting"
            )
        # Retries may go back to where they came from.
        used = {self.kafka_topic: "consumed", self.kafka_overflow_topic: "overflow"}
        for setting, use in (
            ("kafka_deadletter_topic", "dead letter"),
            ("kafka_ledger_topic", "ledger's"),
        ):
            topic = getattr(self, setting)
            if topic in used:
                raise ValueError(f"{setting} is the {used[topic]} topic ({topic}): name another one")
            used[topic] = use
        topic = self.kafka_retry_topic or ""
        if topic in (self.kafka_deadletter_topic, self.kafka_ledger_topic):
            raise ValueError(f"kafka_retry_topic is the {used[topic]} topic ({topic}): name another one")
        if not (is_loopback(self.grpc_addr) or self.grpc_shared_secret or self.insecure):
            raise ValueError(
                f"listening on {self.grpc_addr} without a secret would let anyone who can connect fetch and"
                " finish tasks. Either set a secret that the workers have too,"
                " TASKBROKER_GRPC_SHARED_SECRET=...,"
                " or accept the risk with TASKBROKER_INSECURE=1 (--insecure)"
            )
        return self
