from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Pool, pool
from tests.kafka_server import ForeignKafka, JavaKafka, MockKafka, kafka_server

LOG_CHARACTERS = 6000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what its processes logged last."""
    report = yield
    if report.when == "call" and report.failed:
        for made in item.funcargs.values():
            if isinstance(made, Pool):
                logs = [(f"log of {one.name}", one.text()[-LOG_CHARACTERS:]) for one in made.processes]
                report.sections.extend(logs)
    return report


@pytest.fixture(scope="session")
def kafka() -> Iterator[ForeignKafka | JavaKafka | MockKafka]:
    """One Kafka for all tests; PENSTOCK_KAFKA_REQUIRED=1 wants a real one."""
    with kafka_server() as server:
        yield server


@pytest.fixture
def own_kafka(kafka: ForeignKafka | JavaKafka | MockKafka) -> JavaKafka:
    """The Kafka, for tests that stop it."""
    if not isinstance(kafka, JavaKafka):
        pytest.fail("this test stops and starts Kafka: unset PENSTOCK_KAFKA, and have java and mvn installed")
    return kafka


@pytest.fixture
def kafka_pool(kafka: ForeignKafka | JavaKafka | MockKafka, tmp_path: Path) -> Iterator[Pool]:
    """A pool on Kafka; its topic is still to be created."""
    with pool(tmp_path, kafka.address) as made:
        yield made


@pytest.fixture
def direct_pool(tmp_path: Path) -> Iterator[Pool]:
    """A pool without Kafka."""
    with pool(tmp_path, None) as made:
        yield made
