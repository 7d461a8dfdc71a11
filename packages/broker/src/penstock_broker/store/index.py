"""The order of hand-out, in memory: a prefix of the rows per (application, namespace).

Round robin over applications, then over their namespaces; within a pair by (ready_at, seq).
What does not fit is spilled: it stays in the rows and is paged in when its turn comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from penstock_broker.domain.activation import Activation

# Void places that a queue may hold beside twice its rows.
VOID_ROWS = 64


def _place(row: Activation) -> tuple[int, int]:
    return row.ready_at, row.seq


class PairQueue:
    """Pending rows of one (application, namespace)."""

    __slots__ = (
        "application",
        "asked_at",
        "bytes",
        "came_back",
        "in_ring",
        "namespace",
        "paging",
        "pair",
        "paused_at",
        "ready",
        "rows",
        "spilled",
        "tail_ready_at",
        "tail_seq",
        "turn",
    )  # fmt: skip

    def __init__(self, pair: int, application: str, namespace: str) -> None:
        self.pair = pair
        self.application = application
        self.namespace = namespace
        # In memory, in order.
        self.ready: deque[Activation] = deque()
        # Room it takes in memory, that of rows about to enter included.
        self.rows = 0
        self.bytes = 0
        # Pending rows of this pair that are not in memory.
        self.spilled = 0
        # Of them, those that came back since a page was asked for: they cannot be in it.
        self.came_back = 0
        # Order key of the last row that was put into memory.
        self.tail_ready_at = -1
        self.tail_seq = -1
        self.paging = False
        self.in_ring = False
        # When it last had its turn, for workers that serve several of an application's namespaces.
        self.turn = 0
        # When a worker last wanted this pair by its name; first, when the pair was made.
        self.asked_at = -1
        # Since when an operator has it not handed out (wall clock); None: it is.
        self.paused_at: int | None = None

    def head(self) -> Activation | None:
        """The next of those in memory; what has left keeps its place for a while. Any thread may call it."""
        return next((row for row in list(self.ready) if row.reserved), None)


class Application:
    """The pairs of one application, those with work in the order of their turns."""

    __slots__ = ("asked_at", "in_ring", "queues", "ring")

    def __init__(self) -> None:
        self.queues: dict[str, PairQueue] = {}
        # May hold queues that have run empty; they are dropped when their turn comes.
        self.ring: deque[PairQueue] = deque()
        self.in_ring = False
        self.asked_at = -1


class ReadyIndex:
    """Pending rows by pair, bounded in rows and bytes."""

    def __init__(self, rows_max: int, bytes_max: int) -> None:
        self.rows_max = rows_max
        self.bytes_max = bytes_max
        self.rows = 0
        self.bytes = 0
        self.pairs: dict[int, PairQueue] = {}
        self._applications: dict[str, Application] = {}
        self._ring: deque[Application] = deque()
        self._turn = 0
        self._bytes_left = 0
        self._asked_at = -1

    def add_pair(self, pair: int, application: str, namespace: str) -> PairQueue:
        queue = self.pairs[pair] = PairQueue(pair, application, namespace)
        self._applications.setdefault(application, Application()).queues[namespace] = queue
        return queue

    def pair(self, application: str, namespace: str) -> PairQueue | None:
        app = self._applications.get(application)
        return app.queues.get(namespace) if app else None

    # -- putting rows in

    def reserve(self, queue: PairQueue, row: Activation) -> bool:
        """Whether a row that is about to be stored will enter memory; if not, it is spilled.

        A pair may use as much as is still free for all: one that floods leaves room for others.
        """
        fits = queue.spilled == 0 and (
            not queue.rows
            or (
                queue.bytes + row.size <= self.bytes_max - self.bytes
                and queue.rows < self.rows_max - self.rows
            )
        )
        if fits:
            self.take_room(queue, row)
        else:
            queue.spilled += 1
            row.spilled = 1
        return fits

    def room(self, queue: PairQueue) -> tuple[int, int] | None:
        """How many rows and bytes of a pair may be paged in now; one row if it has none in memory."""
        rows = self.rows_max - self.rows - queue.rows
        size = self.bytes_max - self.bytes - queue.bytes
        if rows > 0 and size > 0:
            return rows, size
        return None if queue.rows else (1, 1)

    def share(self) -> tuple[int, int]:
        """How many rows and bytes a pair may have in memory when there is no other."""
        return self.rows_max // 2, self.bytes_max // 2

    def lead(self, queue: PairQueue) -> tuple[int, int]:
        """How many more rows and bytes of a pair would enter memory; less than 0: so many are spilled."""
        if queue.spilled:
            return -queue.spilled, 0
        # Each that comes takes of what is left, and of what the pair may have of it.
        rows = self.rows_max - self.rows - queue.rows
        return rows // 2, (self.bytes_max - self.bytes - queue.bytes) // 2

    def enter(self, queue: PairQueue, row: Activation, ready: bool = True) -> None:
        """A stored row, its room reserved, takes its place at the end; one not ``ready`` only passes it."""
        if (row.ready_at, row.seq) > (queue.tail_ready_at, queue.tail_seq):
            queue.tail_ready_at, queue.tail_seq = row.ready_at, row.seq
        if not ready:
            return
        queue.ready.append(row)
        self._call(queue)

    def _call(self, queue: PairQueue) -> None:
        """A pair that has work gets its turns, unless it is paused."""
        if not queue.in_ring and queue.paused_at is None:
            app = self._applications[queue.application]
            queue.in_ring = True
            app.ring.append(queue)
            if not app.in_ring:
                app.in_ring = True
                self._ring.append(app)

    def pause(self, queue: PairQueue, at: int) -> None:
        """Its rows keep their places, but it has no turn."""
        queue.paused_at = at
        if queue.in_ring:
            queue.in_ring = False
            self._applications[queue.application].ring.remove(queue)

    def resume(self, queue: PairQueue) -> None:
        """It has its turns again."""
        queue.paused_at = None
        if queue.ready:
            self._call(queue)

    def put_back(self, queue: PairQueue, row: Activation) -> None:
        """A row that was taken just now takes its place at the front again."""
        self.take_room(queue, row)
        queue.ready.appendleft(row)
        self._call(queue)

    def give_turn_back(self, queue: PairQueue, *, named: bool) -> None:
        """It has the next turn of its application; ``named``: among those that name their namespaces."""
        if named:
            queue.turn = 0
        elif queue.in_ring:
            ring = self._applications[queue.application].ring
            # It had its turn lately, so it is near the end.
            behind = next(n for n, other in enumerate(reversed(ring)) if other is queue)
            ring.rotate(behind)
            ring.pop()
            ring.rotate(-behind)
            ring.appendleft(queue)

    def take_places(self, queue: PairQueue, rows: Sequence[Activation]) -> None:
        """Rows that were taken lately, their room counted, have the places again that they had."""
        front = []
        for row in sorted(rows, key=_place):
            while queue.ready and _place(queue.ready[0]) < _place(row):
                front.append(queue.ready.popleft())
            front.append(row)
        queue.ready.extendleft(reversed(front))
        self._call(queue)

    def page_in(self, queue: PairQueue, row: Activation) -> None:
        """A spilled row, read in order after the tail, is about to enter memory."""
        queue.spilled -= 1
        self.take_room(queue, row)

    def take_room(self, queue: PairQueue, row: Activation) -> None:
        """Count a row as held in memory."""
        row.reserved = True
        self.rows += 1
        self.bytes += row.size
        queue.rows += 1
        queue.bytes += row.size

    def unreserve(self, queue: PairQueue, row: Activation) -> None:
        """A row has left memory, or will not enter it after all."""
        if not row.reserved:
            return
        row.reserved = False
        self._give_room(queue, 1, row.size)

    def _give_room(self, queue: PairQueue, rows: int, size: int) -> None:
        self.rows -= rows
        self.bytes -= size
        queue.rows -= rows
        queue.bytes -= size

    def void(self, queue: PairQueue, row: Activation) -> None:
        """A row that waits was settled, expired or dropped. Its place stays until its turn, or until such
        places are most of the queue."""
        self.unreserve(queue, row)
        if len(queue.ready) > 2 * queue.rows + VOID_ROWS:
            queue.ready = deque(row for row in queue.ready if row.reserved)

    # -- taking rows out

    def ask(self, application: str | None, namespaces: tuple[str, ...], mono: int) -> None:
        """Remember that a worker wanted these names at ``mono`` (monotonic ms)."""
        if application is None:
            self._asked_at = mono
        elif app := self._applications.get(application):
            if not namespaces:
                app.asked_at = mono
            for namespace in namespaces:
                if queue := app.queues.get(namespace):
                    queue.asked_at = mono

    def asked_at(self, queue: PairQueue) -> int:
        """When a worker last wanted this pair (monotonic ms); when it was made, if none has."""
        return max(queue.asked_at, self._applications[queue.application].asked_at, self._asked_at)

    def any_ready(self, application: str | None, namespaces: tuple[str, ...]) -> bool:
        """Whether there may be something for a worker that serves these names."""
        if application is None:
            return bool(self._ring)
        app = self._applications.get(application)
        if app is None or not namespaces:
            return app is not None and bool(app.ring)
        return any(queue.ready for name in namespaces if (queue := app.queues.get(name)))

    def take(
        self, application: str | None, namespaces: tuple[str, ...], rows_max: int, bytes_max: int
    ) -> list[Activation]:
        """The next rows for a worker that serves these names, in turn; none once ``bytes_max`` is reached.

        No application: any. No namespaces: all of the application's.
        """
        taken: list[Activation] = []
        self._bytes_left = bytes_max
        if application is None:
            while self._ring and len(taken) < rows_max and self._bytes_left > 0:
                app = self._ring[0]
                self._take_in_turn(app.ring, 1 if len(self._ring) > 1 else rows_max - len(taken), taken)
                if app.ring:
                    self._ring.rotate(-1)
                else:
                    self._ring.popleft()
                    app.in_ring = False
        elif wanted := self._applications.get(application):
            if namespaces:
                self._take_named(wanted, namespaces, rows_max, taken)
            else:
                self._take_in_turn(wanted.ring, rows_max, taken)
        return taken

    def _take_in_turn(self, ring: deque[PairQueue], rows: int, taken: list[Activation]) -> None:
        """One row from each queue in turn; from the only one, all that are wanted."""
        until = len(taken) + rows
        while ring and len(taken) < until and self._bytes_left > 0:
            queue = ring[0]
            self._pop(queue, 1 if len(ring) > 1 else until - len(taken), taken)
            if queue.ready:
                ring.rotate(-1)
            else:
                ring.popleft()
                queue.in_ring = False

    def _take_named(
        self, app: Application, namespaces: tuple[str, ...], rows: int, taken: list[Activation]
    ) -> None:
        named = (app.queues.get(namespace) for namespace in namespaces)
        wanted = (q for q in named if q and q.ready and q.paused_at is None)
        turns = deque(sorted(wanted, key=lambda q: q.turn))
        while turns and len(taken) < rows and self._bytes_left > 0:
            queue = turns[0]
            self._turn += 1
            queue.turn = self._turn
            self._pop(queue, 1 if len(turns) > 1 else rows - len(taken), taken)
            if queue.ready:
                turns.rotate(-1)
            else:
                turns.popleft()

    def _pop(self, queue: PairQueue, rows: int, taken: list[Activation]) -> None:
        ready, before, size = queue.ready, len(taken), 0
        while ready and rows and size < self._bytes_left:
            row = ready.popleft()
            # What left while it waited is void.
            if row.reserved:
                row.reserved = False
                taken.append(row)
                rows -= 1
                size += row.size
        self._bytes_left -= size
        self._give_room(queue, len(taken) - before, size)
