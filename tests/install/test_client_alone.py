"""A producer installs the client's wheel, and what comes with it is small."""

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient, NewTopic

from penstock_protocol.payload import decode_parameters
from penstock_protocol.v1.activation_pb2 import TaskActivation
from tests.install.environment import distributions, run
from tests.kafka_server import kafka_server

NOT_FOR_PRODUCERS = {"grpcio", "grpc", "typer", "pydantic", "pydantic-settings", "rich"}


@pytest.fixture(scope="module")
def python(wheels: Path, clean_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the client's wheel, its locked dependencies and nothing else."""
    home = tmp_path_factory.mktemp("producer")
    uv = (sys.executable, "-m", "uv")
    interpreter = home / "bin" / "python"
    run(*uv, "venv", "--quiet", "--python", sys.executable, "--allow-existing", home)
    install = (*uv, "pip", "install", "--quiet", "--python", interpreter)
    run(*install, "--require-hashes", "-r", "requirements/client.txt")
    # Without an index: what the lock has not brought must be a wheel of ours, or it is missing.
    run(*install, "--refresh", "--no-index", "--find-links", wheels, "penstock-client")
    return interpreter


def test_nothing_a_producer_does_not_need_comes_along(python: Path) -> None:
    found = distributions(python)
    assert {name for name in found if name.startswith("penstock-")} == {
        "penstock-client",
        "penstock-protocol",
    }
    assert found & NOT_FOR_PRODUCERS == set()


def test_the_command_says_what_it_needs(python: Path) -> None:
    ran = subprocess.run([python.parent / "penstock", "status"], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "pip install 'penstock-client[cli]'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_it_sends_a_task_through_kafka(python: Path, clean_environ: dict[str, str], tmp_path: Path) -> None:
    topic = f"install-{uuid.uuid4().hex}"
    with kafka_server() as kafka:
        create_topic(kafka.address, topic)
        script = Path(__file__).with_name("producer.py")
        environ = clean_environ | {"PENSTOCK_TOPIC": topic}
        report = json.loads(run(python, "-I", script, kafka.address, cwd=tmp_path, env=environ))
        activation = first_message(kafka.address, topic)
    assert activation.id == report["id"]
    assert (activation.application, activation.namespace, activation.taskname) == (
        "shop",
        "orders",
        "orders.confirm",
    )
    assert decode_parameters(activation) == ([7], {"coupon": "X"})
    roots = {module.partition(".")[0] for module in report["modules"]}
    assert roots & NOT_FOR_PRODUCERS == set()
    assert {root for root in roots if root.startswith("penstock_")} == {
        "penstock_client",
        "penstock_protocol",
    }


def create_topic(address: str, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": address})
    admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result(30)


def first_message(address: str, topic: str) -> TaskActivation:
    consumer = Consumer(
        {"bootstrap.servers": address, "group.id": "install-test", "auto.offset.reset": "earliest"}
    )
    try:
        consumer.subscribe([topic])
        message = consumer.poll(60)
        assert message is not None, f"nothing in {topic}"
        assert message.error() is None, message.error()
        value = message.value()
        assert value is not None
        return TaskActivation.FromString(value)
    finally:
        consumer.close()
