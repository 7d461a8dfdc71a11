"""AdminService: bytes in, bytes out, for operators. Reads are bounded, and done in a tick of the store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence

import grpc
import structlog

from penstock_broker.dispatch.explain import Explanation
from penstock_broker.dispatch.roster import Roster
from penstock_broker.dispatch.service import COVER_SECONDS_MAX, Refused, parse
from penstock_broker.dispatch.waiting import Waiting
from penstock_broker.domain.activation import Activation, Reason, Status, hash_id
from penstock_broker.store.batch import ARRIVALS, Answer, Report
from penstock_broker.store.database import Database, RestingLetter
from penstock_broker.store.index import PairQueue
from penstock_broker.store.inflight import Inflight
from penstock_protocol import replay
from penstock_protocol.v1 import admin_pb2 as pb

log = structlog.get_logger("admin")

PAGE_TASKS_MAX = 500
# Rows that one page may look at to find those that match.
SCAN_ROWS_MAX = 5_000
PAGE_NAMESPACES = 500
IDS_MAX = 1_000
LETTERS_MAX = 100
# Of the stories of dead letters. A page may have a piece more, and any client of gRPC takes 4 MiB.
PAGE_STORIES_CHARS_MAX = 1024 * 1024
PIECE_LETTERS = 5
AHEAD_MAX = 10_000
NAME_CHARS_MAX = 100
# SQLite's integers.
SEQ_MAX = 2**63 - 1
# A task that is claimed, or comes back, between the look at it and the deed is looked at again.
TRIES_MAX = 3

_CANCELLABLE = frozenset((Status.PENDING, Status.DELAYED, Status.PROCESSING))

_STATES = {
    Status.PENDING: pb.TASK_STATE_PENDING,
    Status.DELAYED: pb.TASK_STATE_DELAYED,
    Status.PROCESSING: pb.TASK_STATE_PROCESSING,
    Status.FORWARDING: pb.TASK_STATE_FORWARDING,
}

Verb = Callable[[int], Answer | Report]


class Admin:
    """What operators call. ``describe`` adds to a status what is not the store's; ``admit`` makes an
    activation of bytes; ``lag`` says how many messages of its partitions the broker has still to read."""

    def __init__(
        self,
        store: Inflight,
        waiting: Waiting,
        roster: Roster,
        *,
        describe: Callable[[pb.GetStatusResponse], None],
        admit: Callable[[bytes, int], Activation],
        lag: Callable[[], int | None],
    ) -> None:
        self._store = store
        self._memory = store.memory
        self._waiting = waiting
        self._roster = roster
        self._describe = describe
        self._admit = admit
        self._lag = lag

    async def get_status(self, request: bytes) -> bytes:
        parse(pb.GetStatusRequest, request)
        store, memory = self._store, self._memory
        state, reason = store.intake_state()
        answer = pb.GetStatusResponse(
            store_id=store.store_id,
            epoch=store.epoch,
            intake_state=state.lower(),
            intake_reason=reason,
            rows=memory.rows,
            rows_max=store.limits.rows_max,
            bytes=memory.bytes,
            bytes_max=store.limits.bytes_max,
            books_difference=store.imbalance(),
            dead_letters_resting=store.outbox.resting,
            waiting_requests=len(self._waiting),
            workers=sum(1 for _ in self._roster.lately(store.clock.mono_ms())),
        )
        for (_, term), n in memory.books.items():
            if term in ARRIVALS:
                answer.accepted += n
            else:
                answer.ended += n
        states = dict.fromkeys(list(Status)[1:], 0)
        for queue in memory.index.pairs.values():
            counts = memory.counts[queue.pair]
            for status in states:
                states[status] += counts[status]
            answer.paused_namespaces += queue.paused_at is not None
            answer.oldest_pending_seconds = max(answer.oldest_pending_seconds, self._oldest(queue))
        for status, tasks in states.items():
            answer.states.add(state=status.name.lower(), tasks=tasks)
        answer.unclaimable = sum(rows for _, rows in store.unclaimable.pending())
        self._describe(answer)
        return answer.SerializeToString()

    def _oldest(self, queue: PairQueue) -> float:
        """Seconds that the next of a pair has been pending."""
        head = queue.head()
        return max(0, self._store.clock.wall_ms() - head.ready_at) / 1000 if head else 0.0

    def _unasked_ms(self, queue: PairQueue) -> int:
        return self._store.clock.mono_ms() - self._memory.index.asked_at(queue)

    # -- tasks

    async def list_tasks(self, request: bytes) -> bytes:
        asked = parse(pb.ListTasksRequest, request)
        wanted, after_seq = asked.filter, _seq(asked.after_seq)
        pairs = self._pairs(wanted)
        answer = pb.ListTasksResponse()
        if pairs is not None and not pairs:
            return answer.SerializeToString()
        rows, go_on = await self._store.read(
            lambda database: database.held(
                after_seq,
                SCAN_ROWS_MAX,
                pairs,
                wanted.state,
                wanted.taskname if wanted.HasField("taskname") else None,
                min(asked.limit or PAGE_TASKS_MAX, PAGE_TASKS_MAX),
            )
        )
        for row in rows:
            self._fill(answer.tasks.add(), row, brief=True)
        if go_on is not None:
            answer.next_after_seq = go_on
        return answer.SerializeToString()

    def _pairs(self, wanted: pb.TaskFilter | pb.DeadLetterFilter) -> list[int] | None:
        """The pairs that a filter names; None: all."""
        if not (wanted.HasField("application") or wanted.HasField("namespace")):
            return None
        return [
            queue.pair
            for queue in self._memory.index.pairs.values()
            if (not wanted.HasField("application") or wanted.application == queue.application)
            and (not wanted.HasField("namespace") or wanted.namespace == queue.namespace)
        ]

    def _fill(self, task: pb.HeldTask, row: Activation, brief: bool = False) -> None:
        """``brief``: without the traceback of the last error."""
        task.seq, task.id, task.bytes = row.seq, row.id, row.size
        task.application, task.namespace, task.taskname = row.application, row.namespace, row.taskname
        task.state = _STATES[row.status]
        task.attempts, task.max_attempts, task.deliveries_lost = row.attempts, row.max_attempts, row.lost
        task.at_most_once, task.deadline_ms = row.at_most_once, row.deadline_ms
        task.received_at, task.ready_at = row.received_at, row.ready_at
        task.reason, task.error = row.reason or "", row.error or ""
        if brief and row.error:
            error = json.loads(row.error)
            task.error = json.dumps({"type": error.get("type"), "message": error.get("message", "")[:500]})
        if row.expires_at is not None:
            task.expires_at = row.expires_at
        if (source := self._memory.partitions.get(row.source)) is not None:
            task.topic, task.partition, task.offset = source.topic, source.partition, row.offset
        claimed = self._memory.resident.get(row.seq)
        if claimed is not None and claimed.status is Status.PROCESSING:
            task.worker_id = claimed.worker
            if claimed.started:
                clock = self._store.clock
                task.started_at = clock.wall_ms() - (clock.mono_ms() - claimed.started)

    async def get_task(self, request: bytes) -> bytes:
        id = parse(pb.AdminServiceGetTaskRequest, request).id
        answer = pb.AdminServiceGetTaskResponse()
        if (row := (await self._held([id])).get(id)) is not None:
            self._fill(answer.task, row)
            answer.activation = row.body or b""
        return answer.SerializeToString()

    async def _held(self, ids: Iterable[str]) -> dict[str, Activation]:
        """Those of ``ids`` that are in the store, as they are there, with their bodies."""
        seqs = [seq for id in ids if (seq := self._memory.seq_of(hash_id(id))) is not None]
        rows = await self._store.read(lambda database: database.load(seqs))
        return {row.id: row for row in rows}

    async def explain_task(self, request: bytes) -> bytes:
        id = parse(pb.ExplainTaskRequest, request).id
        answer = pb.ExplainTaskResponse(ahead_max=AHEAD_MAX)
        explanation = Explanation(self._store, answer)
        row = (await self._held([id])).get(id)
        if row is not None:
            self._fill(answer.task, row)
            if row.status is Status.PENDING:
                answer.ahead = await self._ahead(row)
            explanation.held(self._memory.resident.get(row.seq, row), self._waiting.holds(row))
        elif (letter := await self._store.read(lambda database: database.dead_letter_of(id))) is not None:
            explanation.dead(id, letter.reason, letter.at)
        elif (last := self._memory.finished.left(hash_id(id))) is not None:
            explanation.finished(id, hash_id(id), last)
        else:
            explanation.unknown(self._lag())
        return answer.SerializeToString()

    async def _ahead(self, row: Activation) -> int:
        before, found = self._store.control.ahead(row, AHEAD_MAX)
        if found or before >= AHEAD_MAX:
            return before
        queue, room = self._memory.index.pairs[row.pair], AHEAD_MAX - before
        tail = queue.tail_ready_at, queue.tail_seq
        return before + await self._store.read(
            lambda database: database.count_spilled_between(tail, row, room)
        )

    async def retry_tasks(self, request: bytes) -> bytes:
        asked = parse(pb.RetryTasksRequest, request)
        run_now, delayed = self._store.control.run_now, frozenset((Status.DELAYED,))
        before, answers = await self._apply(asked.ids, run_now, delayed)
        absent = [id for id in asked.ids if id not in before]
        dead: set[str] = set()
        if absent:
            # All in one tick: of most ids that an operator names, another broker holds the task.
            dead = await self._store.read(
                lambda database: {id for id in absent if database.dead_letter_of(id) is not None}
            )
        results = []
        for id in asked.ids:
            if answers.get(id) is Answer.APPLIED:
                results.append(pb.RETRY_RESULT_PENDING_NOW)
            elif (row := before.get(id)) is not None:
                forwarding = row.status is Status.FORWARDING
                results.append(pb.RETRY_RESULT_FORWARDING if forwarding else pb.RETRY_RESULT_NOT_DELAYED)
            else:
                results.append(self._why_absent(id, id in dead))
        _record("tasks were made to run now", asked.by, before, answers)
        return pb.RetryTasksResponse(results=results).SerializeToString()

    def _why_absent(self, id: str, dead: bool) -> pb.RetryResult:
        if dead:
            return pb.RETRY_RESULT_DEAD_LETTER
        finished = self._memory.finished.left(hash_id(id)) is not None
        return pb.RETRY_RESULT_FINISHED if finished else pb.RETRY_RESULT_UNKNOWN

    async def cancel_tasks(self, request: bytes) -> bytes:
        asked = parse(pb.CancelTasksRequest, request)
        unheard: set[int] = set()

        def cancel(id_hash: int) -> Answer | Report:
            row = self._memory.resident.get(self._memory.seq_of(id_hash) or 0)
            if row is not None and self._waiting.holds(row):
                unheard.add(id_hash)
            return self._store.control.cancel(id_hash)

        before, answers = await self._apply(asked.ids, cancel, _CANCELLABLE)
        _record("tasks were cancelled", asked.by, before, answers)
        results = []
        for id in asked.ids:
            row = before.get(id)
            if answers.get(id) is Answer.APPLIED:
                claimed = row is not None and row.status is Status.PROCESSING
                running = claimed and hash_id(id) not in unheard
                results.append(pb.CANCEL_RESULT_KILLED if running else pb.CANCEL_RESULT_CANCELLED)
            elif row is not None and row.status is Status.FORWARDING:
                results.append(pb.CANCEL_RESULT_FORWARDING)
            else:
                finished = self._memory.finished.left(hash_id(id)) is not None
                results.append(pb.CANCEL_RESULT_FINISHED if finished else pb.CANCEL_RESULT_UNKNOWN)
        applied = [i for i, id in enumerate(asked.ids) if answers.get(id) is Answer.APPLIED]
        for i in await self._not_ours(asked.ids, applied):
            results[i] = pb.CANCEL_RESULT_ANOTHER_BROKERS
        return pb.CancelTasksResponse(results=results).SerializeToString()

    async def _not_ours(self, ids: Sequence[str], applied: Sequence[int]) -> list[int]:
        """Which of those cancelled another broker has taken over, once that is known."""
        try:
            async with asyncio.timeout(COVER_SECONDS_MAX):
                covered = await self._store.covered([hash_id(ids[i]) for i in applied])
        except TimeoutError:
            raise Refused(
                grpc.StatusCode.UNAVAILABLE,
                "cancelled here, but Kafka has not acknowledged the offset that this depends on: until it"
                " has, another broker may take over the partition and run it",
            ) from None
        return [i for i, ours in zip(applied, covered, strict=True) if not ours]

    async def _apply(
        self, ids: Sequence[str], verb: Verb, to: frozenset[Status]
    ) -> tuple[dict[str, Activation], dict[str, Answer]]:
        """Do ``verb`` to those of ``ids`` in one of these states. What was there before, and the answers."""
        if len(ids) > IDS_MAX:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"{len(ids)} ids: at most {IDS_MAX} in a call")
        before: dict[str, Activation] = {}
        answers: dict[str, Answer] = {}
        waiting = list(dict.fromkeys(ids))
        for _ in range(TRIES_MAX):
            before |= (held := await self._held(waiting))
            told = {id: verb(hash_id(id)) for id in waiting if id in held and held[id].status in to}
            await self._store.answerable(self._store.committed())
            answers |= {id: a.answer if isinstance(a, Report) else a for id, a in told.items()}
            waiting = [id for id in told if answers[id] is Answer.STALE]
            if not waiting:
                break
        return before, answers

    # -- namespaces

    async def list_namespaces(self, request: bytes) -> bytes:
        after = parse(pb.ListNamespacesRequest, request).after
        answer, balances = pb.ListNamespacesResponse(), self._store.control.balances()
        pairs = range(after + 1, min(after + PAGE_NAMESPACES, len(self._memory.counts)) + 1)
        for pair in pairs:
            queue, counts = self._memory.index.pairs[pair], self._memory.counts[pair]
            answer.namespaces.add(
                application=queue.application,
                namespace=queue.namespace,
                pending=counts[Status.PENDING],
                delayed=counts[Status.DELAYED],
                processing=counts[Status.PROCESSING],
                forwarding=counts[Status.FORWARDING],
                oldest_pending_seconds=self._oldest(queue),
                paused_at=queue.paused_at,
                unasked_seconds=self._unasked_ms(queue) / 1000,
                books_difference=balances[pair],
            )
        for (pair, term), n in self._memory.books.items():
            if pair in pairs:
                answer.namespaces[pair - after - 1].books.add(term=term, tasks=n)
        if pairs and pairs[-1] < len(self._memory.counts):
            answer.next_after = pairs[-1]
        return answer.SerializeToString()

    async def pause_namespace(self, request: bytes) -> bytes:
        asked = parse(pb.PauseNamespaceRequest, request)
        if max(len(asked.application), len(asked.namespace)) > 256:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "a name has at most 256 characters")
        # Also one of which no task has come yet: of several brokers, all are told.
        queue = self._store.pair(asked.application, asked.namespace)
        if queue is None:
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "this broker has too many namespaces")
        changed = self._store.control.pause(queue)
        return await self._paused(pb.PauseNamespaceResponse(changed=changed), queue, asked.by)

    async def resume_namespace(self, request: bytes) -> bytes:
        asked = parse(pb.ResumeNamespaceRequest, request)
        queue = self._memory.index.pair(asked.application, asked.namespace)
        if queue is None:
            name = f"{asked.application[:NAME_CHARS_MAX]}/{asked.namespace[:NAME_CHARS_MAX]}"
            raise Refused(grpc.StatusCode.NOT_FOUND, f"this broker has never had a task of {name}")
        changed = self._store.control.resume(queue)
        return await self._paused(pb.ResumeNamespaceResponse(changed=changed), queue, asked.by)

    async def _paused(
        self, answer: pb.PauseNamespaceResponse | pb.ResumeNamespaceResponse, queue: PairQueue, by: str
    ) -> bytes:
        await self._store.answerable(self._store.committed())
        answer.pending = self._memory.counts[queue.pair][Status.PENDING]
        if answer.changed:
            log.warning(
                "a namespace was resumed" if queue.paused_at is None else "a namespace was paused",
                application=queue.application,
                namespace=queue.namespace,
                pending=answer.pending,
                by=by[:NAME_CHARS_MAX],
            )
        return answer.SerializeToString()

    # -- workers

    async def list_workers(self, request: bytes) -> bytes:
        parse(pb.ListWorkersRequest, request)
        mono = self._store.clock.mono_ms()
        answer, holds = pb.ListWorkersResponse(), {}
        for seen in self._roster.lately(mono):
            worker = seen.identity
            holds[worker.worker_id] = answer.workers.add(
                worker_id=worker.worker_id,
                hostname=worker.hostname,
                pid=worker.pid,
                version=worker.version,
                slots=worker.slots,
                application=seen.application,
                namespaces=seen.namespaces,
                seen_seconds_ago=(mono - seen.at) / 1000,
            )
        for row in self._memory.leases.held():
            if (status := holds.get(row.worker)) is not None:
                status.holds += 1
                status.started += bool(row.started)
        return answer.SerializeToString()

    # -- dead letters that rest here

    async def list_dead_letters(self, request: bytes) -> bytes:
        asked = parse(pb.ListDeadLettersRequest, request)
        wanted, limit = asked.filter, min(asked.limit or PAGE_TASKS_MAX, PAGE_TASKS_MAX)
        pairs, after_seq = self._pairs(wanted), _seq(asked.after_seq)
        answer = pb.ListDeadLettersResponse()
        taskname = wanted.taskname if wanted.HasField("taskname") else None
        reason = wanted.reason if wanted.HasField("reason") else None

        def page(database: Database) -> tuple[list[RestingLetter], bool]:
            """The letters, and whether they were the last."""
            letters: list[RestingLetter] = []
            chars, after = 0, after_seq
            while len(letters) < limit and chars < PAGE_STORIES_CHARS_MAX:
                n = min(PIECE_LETTERS, limit - len(letters))
                piece = database.dead_letters(after, pairs, taskname, reason, n)
                letters += piece
                if len(piece) < n:
                    return letters, True
                chars += sum(len(letter.story) for letter in piece)
                after = piece[-1].seq
            return letters, False

        letters, last = await self._store.read(page)
        for letter in letters:
            if wanted.from_at <= letter.at and (
                not wanted.HasField("until_at") or letter.at < wanted.until_at
            ):
                self._fill_letter(answer.letters.add(), letter)
        if not last:
            answer.next_after_seq = letters[-1].seq
        return answer.SerializeToString()

    def _fill_letter(self, to: pb.DeadLetter, letter: RestingLetter) -> None:
        queue = self._memory.index.pairs[letter.pair]
        to.seq, to.id, to.taskname, to.reason = letter.seq, letter.id, letter.taskname, letter.reason
        to.application, to.namespace = queue.application, queue.namespace
        to.dead_at, to.story, to.bytes = letter.at, letter.story, letter.size

    async def get_dead_letter(self, request: bytes) -> bytes:
        id = parse(pb.GetDeadLetterRequest, request).id
        answer = pb.GetDeadLetterResponse()
        letter = await self._store.read(lambda database: database.dead_letter_of(id))
        if letter is not None:
            self._fill_letter(answer.letter, letter)
            answer.activation = letter.body or b""
        return answer.SerializeToString()

    async def replay_dead_letters(self, request: bytes) -> bytes:
        """What is sent is durable before its dead letter is dropped; repeated, it has the same id."""
        asked = parse(pb.ReplayDeadLettersRequest, request)
        seqs = self._bounded(asked.seqs)
        letters = {
            letter.seq: letter
            for letter in await self._store.read(lambda database: database.load_dead_letters(seqs))
        }
        if len(letters) > self._store.room():
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room: the intake of this broker is paused")
        rows = {seq: row for seq, letter in letters.items() if (row := self._replayed(letter)) is not None}
        await self._store.answerable(self._store.insert(list(rows.values())))
        await self._store.outbox.drop_resting(list(rows))
        answer = pb.ReplayDeadLettersResponse()
        for seq in seqs:
            if (row := rows.get(seq)) is not None:
                answer.replayed.add(result=pb.REPLAY_RESULT_SENT, id=row.id)
            elif seq in letters:
                answer.replayed.add(result=pb.REPLAY_RESULT_NOT_AN_ACTIVATION)
            else:
                answer.replayed.add(result=pb.REPLAY_RESULT_UNKNOWN)
        if rows:
            log.warning(
                "dead letters were replayed",
                count=len(rows),
                ids={letters[seq].id: row.id for seq, row in rows.items()},
                by=asked.by[:NAME_CHARS_MAX],
            )
        return answer.SerializeToString()

    def _replayed(self, letter: RestingLetter) -> Activation | None:
        attempts = json.loads(letter.story)["attempts"]
        name = replay.letter_name(replay.forward_id(letter.id, attempts, letter.reason), letter.at)
        now = self._store.clock.wall_ms()
        activation = replay.replayed(letter.body or b"", name, 1, now)
        row = None if activation is None else self._admit(activation.SerializeToString(), now)
        # One that admission refuses would only be a dead letter again.
        refused = row is None or row.reason in (Reason.INVALID, Reason.NOT_AN_ACTIVATION)
        return None if refused else row

    async def discard_dead_letters(self, request: bytes) -> bytes:
        asked = parse(pb.DiscardDeadLettersRequest, request)
        seqs = self._bounded(asked.seqs)
        letters = await self._store.read(lambda database: database.load_dead_letters(seqs))
        discarded = await self._store.outbox.drop_resting(seqs)
        if discarded:
            log.warning(
                "dead letters were discarded",
                count=discarded,
                ids=[letter.id for letter in letters],
                by=asked.by[:NAME_CHARS_MAX],
            )
        return pb.DiscardDeadLettersResponse(discarded=discarded).SerializeToString()

    def _bounded(self, seqs: Sequence[int]) -> list[int]:
        if len(seqs) > LETTERS_MAX:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT, f"{len(seqs)} dead letters: at most {LETTERS_MAX} in a call"
            )
        return list(dict.fromkeys(map(_seq, seqs)))


def _seq(number: int) -> int:
    """A number of a row, or of a dead letter, that the database can look for. Raises Refused."""
    if number > SEQ_MAX:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"{number} is the number of nothing")
    return number


def _record(what: str, by: str, before: dict[str, Activation], answers: dict[str, Answer]) -> None:
    """One line in the broker's log for what an operator did."""
    done = [id for id, answer in answers.items() if answer is Answer.APPLIED]
    if done:
        names = {before[id].taskname for id in done}
        log.warning(
            what, count=len(done), tasknames=sorted(names)[:10], ids=done[:100], by=by[:NAME_CHARS_MAX]
        )
