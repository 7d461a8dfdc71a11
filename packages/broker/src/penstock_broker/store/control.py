"""What operators do to the store: cancel, run now, pause and resume; and the books, pair by pair."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from penstock_broker.domain.activation import Activation, Status
from penstock_broker.domain.lifecycle import OUTCOMES, Event
from penstock_broker.domain.token import ClaimToken
from penstock_broker.store.batch import ARRIVALS, Answer, Report
from penstock_broker.store.finished import is_report
from penstock_broker.store.index import PairQueue
from penstock_broker.store.memory import Memory
from penstock_broker.store.writer import Writer

_CANCELLED = OUTCOMES[Event.CANCEL]
_WAITING = frozenset((Status.PENDING, Status.DELAYED))


class Control:
    """As with a worker's reports: an Answer may be told once ``committed`` resolves and the id is covered;
    a Report has its answer only when committed."""

    def __init__(self, memory: Memory, writer: Writer) -> None:
        self._memory = memory
        self._writer = writer

    def cancel(self, id_hash: int) -> Answer | Report:
        """It leaves. UNKNOWN: not here; STALE: it is on its way out, or was claimed this moment."""
        memory = self._memory
        seq = memory.seq_of(id_hash)
        if seq is None:
            return Answer.UNKNOWN
        row, now = memory.resident.get(seq), memory.clock.wall_ms()
        if row is None:
            return self._report(Report(Event.CANCEL, now, seq, only=_WAITING))
        # Remembered as the end of the claim, so that its worker is told.
        outcome = _CANCELLED if row.status is Status.PROCESSING else 0
        memory.change(row, Event.CANCEL, now, outcome=outcome)
        return Answer.APPLIED

    def was_cancelled(self, token: ClaimToken) -> bool:
        """Whether the claim of a token ended because an operator cancelled the task."""
        last = self._memory.finished.get(token.id_hash)
        return last is not None and is_report(last, token.epoch, token.seq, token.claim, _CANCELLED)

    def run_now(self, id_hash: int) -> Answer | Report:
        """What is left of a delay or back-off is skipped. UNKNOWN: not here; STALE: it does not wait so."""
        memory = self._memory
        seq = memory.seq_of(id_hash)
        if seq is None:
            return Answer.UNKNOWN
        if seq in memory.resident:
            return Answer.STALE
        only = frozenset((Status.DELAYED,))
        return self._report(Report(Event.RUN_NOW, memory.clock.wall_ms(), seq, only=only))

    def _report(self, report: Report) -> Report:
        self._memory.batch.reports.append(report)
        self._memory.work.set()
        return report

    # -- pairs

    def pause(self, queue: PairQueue) -> bool:
        """Its rows are not handed out any more; whether they were. Durable when ``committed``."""
        if queue.paused_at is not None:
            return False
        memory, at = self._memory, self._memory.clock.wall_ms()
        memory.index.pause(queue, at)
        memory.batch.calls.append(lambda database: database.pause(queue.pair, at))
        memory.work.set()
        return True

    def resume(self, queue: PairQueue) -> bool:
        """Its rows are handed out again; whether they were not. Durable when ``committed``."""
        if queue.paused_at is None:
            return False
        memory = self._memory
        memory.index.resume(queue)
        # A pause is no time in which workers failed to ask for it.
        queue.asked_at = memory.clock.mono_ms()
        memory.batch.calls.append(lambda database: database.pause(queue.pair, None))
        memory.work.set()
        return True

    # -- reading

    def ahead(self, row: Activation, at_most: int) -> tuple[int, bool]:
        """Rows in memory before ``row`` in the order of its pair, and whether ``row`` is among them."""
        ready = self._memory.index.pairs[row.pair].ready
        before = 0
        for other in islice(ready, at_most):
            if other.seq == row.seq:
                return before, True
            before += other.reserved
        return before, False

    def balances(self) -> dict[int, int]:
        """Per pair: accepted minus ended minus in flight. 0 each, unless something is lost.

        On the event loop only: there it holds between any two steps.
        """
        memory = self._memory
        balances: Counter[int] = Counter({pair: -sum(counts) for pair, counts in memory.counts.items()})
        for arrival in self._writer.arrivals:
            balances.update(row.pair for row in arrival.rows)
        for books in (memory.books, memory.batch.books):
            for (pair, term), n in books.items():
                balances[pair] += n if term in ARRIVALS else -n
        return dict(balances)
