"""One Kafka for all tests; everything else is started by a test and gone after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.pool import Pool, Pools
from tests.e2e.processes import FOREIGN
from tests.kafka_server import JavaKafka, Kafka, KafkaUnavailable, kafka_server, say

if TYPE_CHECKING:
    from collections.abc import Generator

TEST_SECONDS_MAX = 180
LOG_CHARACTERS_SHOWN = 4000
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS_MAX))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the end of each program's log."""
    report = yield
    pools = getattr(item, "funcargs", {}).get("pools")
    if report.failed and isinstance(pools, Pools):
        for program in pools.programs:
            report.sections.append((f"end of the log of {program.name}", program.log()[-LOG_CHARACTERS_SHOWN:]))
    return report


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    try:
        with kafka_server() as server:
            yield server
    except KafkaUnavailable as unavailable:
        pytest.fail(str(unavailable), pytrace=False)


@pytest.fixture(scope="session")
def own_kafka(kafka: Kafka) -> Iterator[JavaKafka]:
    """One that may be stopped."""
    if isinstance(kafka, JavaKafka):
        yield kafka
        return
    say("PENSTOCK_KAFKA may not be stopped: starting another for the tests that must")
    try:
        own = JavaKafka()
        own.start()
    except KafkaUnavailable as unavailable:
        if os.environ.get("PENSTOCK_KAFKA_REQUIRED", "") not in ("", "0"):
            pytest.fail(str(unavailable), pytrace=False)
        pytest.skip(f"NOT TESTED, no Kafka may be stopped here: {unavailable}")
    yield own
    own.remove()


@pytest.fixture
def stoppable_kafka(own_kafka: JavaKafka) -> Iterator[JavaKafka]:
    yield own_kafka
    if not own_kafka.running:
        own_kafka.start()


@pytest.fixture
def pools(kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pools]:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    pools = Pools(tmp_path, kafka.address)
    yield pools
    pools.close()
    pools.assert_no_traceback()


@pytest.fixture
def pool(pools: Pools) -> Pool:
    return pools.pool()
