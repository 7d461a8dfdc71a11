"""The simulation itself: a seed is one history, and what is wrong with a broker is found."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock_broker.dispatch.service import Consumers
from penstock_broker.dispatch.waiting import Waiting
from penstock_broker.domain import lifecycle
from penstock_broker.domain.activation import Activation, Status
from penstock_broker.domain.lifecycle import Event
from penstock_broker.domain.token import ClaimToken
from penstock_broker.ingest.cluster import Cluster
from penstock_broker.ingest.forwarder import Forwarder
from penstock_broker.ingest.intake import Intake
from penstock_broker.store.inflight import Inflight
from penstock_broker.store.memory import Memory
from penstock_broker.store.partitions import Partitions, Source
from tests.sim.pool import run_seed

ROOT = Path(__file__).parents[2]
# Every bug below is found well within these; CI runs more.
SEEDS = 60
SAME = 286


def test_a_seed_is_one_history() -> None:
    first, second = run_seed(SAME), run_seed(SAME)
    assert first.digest == second.digest
    assert first.steps > 1000
    assert run_seed(SAME + 1).digest != first.digest


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_history_does_not_depend_on_the_hashes_of_a_process(hash_seed: str) -> None:
    code = f"from tests.sim.pool import run_seed; print(run_seed({SAME}).digest)"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == run_seed(SAME).digest


# Of the histories below.
FEW_SEEDS = 10


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kinds",
    [
        ("disk fails", "disk full", "disk sync fails"),
        ("disk lost",),
        ("broker drained", "broker crash"),
        ("broker adopted",),
        ("old copy put back", "Kafka down"),
        ("Kafka client lost", "broker stopped"),
        ("broker crash in a rebalance",),
        ("broker stopped", "broker restart"),
    ],
    ids=lambda kinds: kinds[0].replace(" ", "-"),
)
def test_a_few_kinds_of_faults_again_and_again(kinds: tuple[str, ...]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(1, FEW_SEEDS + 1):
        result = run_seed(seed, kinds=kinds)
        assert not result.violation, f"seed {seed}"
        seen += result.faults
    assert seen.keys() == set(kinds)


# -- bugs, planted one at a time

Plant = Callable[[pytest.MonkeyPatch], None]


def answer_before_commit(patch: pytest.MonkeyPatch) -> None:
    async def finish(self: Consumers, settled: Any, ids: Any) -> Any:
        return [getattr(s, "answer", s) for s in settled]

    patch.setattr(Consumers, "_finish", finish)


def answer_before_cover(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Partitions, "all_held", lambda self, ids: [])


def token_not_checked(patch: pytest.MonkeyPatch) -> None:
    settle = Inflight.settle

    def unchecked(self: Inflight, token: ClaimToken, *arguments: Any, **options: Any) -> Any:
        row = self.memory.resident.get(token.seq)
        if row is not None:
            token = token._replace(claim=row.claim, epoch=row.claim_epoch or token.epoch)
            token = token._replace(nonce=self.database.nonces[token.epoch])
        return settle(self, token, *arguments, **options)

    patch.setattr(Inflight, "settle", unchecked)


def offset_before_rows(patch: pytest.MonkeyPatch) -> None:
    deliver = Intake.deliver

    def early(self: Intake, rows: list[Activation], size: int, taken: Mapping[int, tuple[int, int]]) -> None:
        deliver(self, rows, size, taken)
        for partition, (_, next_) in taken.items():
            if partition in self.readings:
                self.readings[partition].durable = next_
        self.commit_soon()

    patch.setattr(Intake, "deliver", early)


def claim_not_durable(patch: pytest.MonkeyPatch) -> None:
    async def at_once(self: Waiting, rows: list[Activation], seconds_max: float) -> list[Activation]:
        return self._store.startable(rows)

    patch.setattr(Waiting, "make_durable", at_once)


def uncovered_rows_kept(patch: pytest.MonkeyPatch) -> None:
    def keep(self: Inflight, source: Source, boundary: int) -> asyncio.Future[int]:
        kept: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        kept.set_result(0)
        return kept

    patch.setattr(Inflight, "drop_uncovered", keep)


def retry_beyond_the_budget(patch: pytest.MonkeyPatch) -> None:
    def again(row: Activation, event: Event, now: int, limits: Any, delay: int | None) -> Any:
        wait = row.retry_delay_ms if delay is None else delay
        return lifecycle._later(row, now, wait, attempts=row.attempts + 1)

    patch.setitem(lifecycle._DECISIONS, Event.RETRY, again)


def letter_dropped_before_acknowledged(patch: pytest.MonkeyPatch) -> None:
    publish = Forwarder._publish

    async def careless(self: Forwarder, rows: Any, publisher: Any, trimmed: bool) -> Any:
        safe, too_large, failed = await publish(self, rows, publisher, trimmed)
        lost = [failure.row for failure in failed]
        sent = [(row, self._compose(row, trimmed)) for row in lost]
        return safe + sent, too_large, []

    patch.setattr(Forwarder, "_publish", careless)


def release_not_counted(patch: pytest.MonkeyPatch) -> None:
    stayed = Memory._stayed

    def missed(self: Memory, row: Activation, change: Any) -> None:
        if change.status is not Status.PENDING:
            stayed(self, row, change)

    patch.setattr(Memory, "_stayed", missed)


def tails_not_read(patch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Intake, found: Any) -> list[Any]:
        return []

    patch.setattr(Intake, "tails", nothing)


def unread_partitions_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cluster, "unread", lambda self, seconds: [])


PLANTED = (
    unread_partitions_left,
    tails_not_read,
    answer_before_commit,
    answer_before_cover,
    token_not_checked,
    offset_before_rows,
    claim_not_durable,
    uncovered_rows_kept,
    retry_beyond_the_budget,
    letter_dropped_before_acknowledged,
    release_not_counted,
)


# What shows one of them, where it is rare among all kinds of faults.
SHOWN_BY: dict[Plant, tuple[str, ...]] = {
    answer_before_cover: ("broker cut off Kafka", "broker stopped"),
    claim_not_durable: ("power cut in a write", "disk slow"),
    tails_not_read: ("broker stopped", "broker restart"),
    unread_partitions_left: ("broker crash in a rebalance",),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    kinds = SHOWN_BY.get(plant, ())
    for seed in range(1, SEEDS + 1):
        if found := run_seed(seed, kinds=kinds).violation:
            print(f"seed {seed}: {found}")
            monkeypatch.undo()
            assert not run_seed(seed, kinds=kinds).violation, "without the bug too"
            return
    pytest.fail(f"{plant.__name__} went unnoticed in {SEEDS} histories")
