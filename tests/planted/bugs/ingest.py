"""In the broker's ingest and upkeep."""

from tests.planted.bug import BROKER, Bug

INTAKE = BROKER + "test_ingest_intake.py::"
KAFKA = BROKER + "test_ingest_kafka.py::"
ADMISSION = BROKER + "test_ingest_admission.py::"
FORWARDER = BROKER + "test_ingest_forwarder.py::"
OWNERSHIP = BROKER + "test_ingest_ownership.py::"
DIRECT = BROKER + "test_ingest_direct.py::"
UPKEEP = BROKER + "test_chores.py::"
TAILS = BROKER + "test_ingest_tails.py::"

BUGS = (
    # -- offsets
    Bug(
        "offset committed before the rows",
        "no offset leaves before the commit of its rows",
        "broker/ingest/intake.py",
        old="        self._storing.add(stored)\n",
        new=(
            "        self._storing.add(stored)\n"
            "        for partition, (_, next_) in taken.items():\n"
            "            self.readings[partition].durable = next_\n"
            "        self.commit_soon()\n"
        ),
        tests=(INTAKE + "test_nothing_is_committed_while_its_tick_is_being_written",),
    ),
    Bug(
        "offset committed for a partition no longer owned",
        "no offset of a partition that is not owned",
        "broker/ingest/intake.py",
        old="                self.readings[partition].held = True\n",
        new="                pass\n",
        tests=(INTAKE + "test_nothing_is_committed_for_a_partition_that_leaves",),
    ),
    Bug(
        "a commit that was asked for before a partition left is sent after it",
        "no offset of a partition that is not owned",
        "broker/ingest/poller.py",
        old="[p for p in asked if p.partition in self.tracks]",
        new="list(asked)",
        tests=(KAFKA + "test_what_was_to_be_committed_of_a_partition_that_has_left_is_not",),
    ),
    Bug(
        "a commit that was asked for before a partition left is sent when it is back",
        "no offset of a partition that is not owned",
        "broker/ingest/poller.py",
        old="[p for p in self._to_commit if p.partition not in again]",
        new="list(self._to_commit)",
        tests=(KAFKA + "test_what_was_to_be_committed_of_a_partition_that_has_left_is_not",),
    ),
    Bug(
        "a lost partition is still read",
        "no offset of a partition that is not owned",
        "broker/ingest/intake.py",
        old="            self.readings.pop(partition, None)\n            self.store.dispute(",
        new="            self.store.dispute(",
        tests=(INTAKE + "test_nothing_is_committed_for_a_partition_that_was_lost",),
    ),
    Bug(
        "cover for the wrong partition",
        "a row is covered when a commit has passed it",
        "broker/ingest/intake.py",
        old="        self.store.cover(source, offset)\n",
        new=(
            "        for source in list(self.store.sources()):\n"
            "            self.store.cover(source, offset)\n"
        ),
        tests=(INTAKE + "test_a_commit_covers_its_own_partition_only",),
    ),
    # -- what others have taken
    Bug(
        "the tail is not read",
        "the same message again is not run again",
        "broker/ingest/ownership.py",
        old="    return first if first < committed else None\n",
        new="    return None\n",
        tests=(TAILS + "test_what_another_broker_took_is_not_run_again",),
    ),
    Bug(
        "a partition begins before its tail is known",
        "the same message again is not run again",
        "broker/ingest/poller.py",
        old="        ready = [one for one in found if one.partition not in waiting]\n",
        new="        ready = found\n",
        tests=(TAILS + "test_nothing_is_taken_before_the_tail_is_known_and_others_go_on",),
        hangs=True,
    ),
    Bug(
        "only the newest part of a tail is read",
        "the same message again is not run again",
        "broker/ingest/tails.py",
        old="        if too_old or reading.begin <= reading.first:\n",
        new="        if reading.begin <= reading.tail.end:\n",
        tests=(TAILS + "test_what_another_broker_took_is_not_run_again",),
    ),
    Bug(
        "what was dropped counts as known",
        "the same message again is not run again",
        "broker/ingest/intake.py",
        old="            self._say_whose(source, partition, assigned=True)\n",
        new="",
        tests=(INTAKE + "test_what_others_have_taken_is_to_be_looked_through_before_a_partition_begins",),
    ),
    Bug(
        "a new topic's tasks are taken for those of the old one",
        "new tasks are never taken for old ones",
        "broker/ingest/tails.py",
        old="        if tail.end > high or first >= tail.end:\n",
        new="        if first >= tail.end:\n",
        tests=(TAILS + "test_tasks_of_a_topic_that_was_made_anew_are_not_taken_for_old_ones",),
        hangs=True,
    ),
    # -- membership
    Bug(
        "a broker that stood still starts what others have run",
        "one accepted outcome per attempt",
        "broker/ingest/membership.py",
        old="        stalled = now - self._turned_at > STALL_MS\n",
        new="        stalled = False\n",
        tests=(INTAKE + "test_a_broker_that_stood_still_starts_nothing_that_another_may_have_run",),
    ),
    Bug(
        "a stall that the thread sees first is nothing",
        "one accepted outcome per attempt",
        "broker/ingest/membership.py",
        old="        if now - self._turned_at > STALL_MS:\n            self._doubted_at = now\n",
        new="",
        tests=(INTAKE + "test_a_broker_that_stood_still_starts_nothing_that_another_may_have_run",),
    ),
    Bug(
        "a commit of before the stall ends the doubt",
        "one accepted outcome per attempt",
        "broker/ingest/membership.py",
        old="        if self._doubted_at is None or self._sent_at < self._doubted_at:\n",
        new="        if self._doubted_at is None:\n",
        tests=(INTAKE + "test_a_broker_that_stood_still_starts_nothing_that_another_may_have_run",),
    ),
    Bug(
        "each commit that is tried again is the first",
        "one accepted outcome per attempt",
        "broker/ingest/membership.py",
        old="        if self._waiting_since is None:\n            self._waiting_since = self._sent_at\n",
        new="        self._waiting_since = self._sent_at\n",
        tests=(INTAKE + "test_a_commit_that_is_tried_again_waits_since_it_was_first_sent",),
    ),
    Bug(
        "a refused commit covers",
        "a row is covered when a commit has passed it",
        "broker/ingest/intake.py",
        old="            if error is None:\n                self._acknowledge(partition, offset)\n                taken",
        new="            self._acknowledge(partition, offset)\n            if error is None:\n                taken",
        tests=(INTAKE + "test_a_failed_commit_is_repeated_and_covers_nothing",),
    ),
    Bug(
        "a failed commit is not repeated",
        "a row is covered in the end",
        "broker/ingest/intake.py",
        old="            self._timer = asyncio.get_running_loop().call_later(pause, self._paused_enough)\n",
        new="            if not failed:\n"
        "                self._timer = asyncio.get_running_loop().call_later(pause, self._paused_enough)\n",
        tests=(INTAKE + "test_a_failed_commit_is_repeated_and_covers_nothing",),
        hangs=True,
    ),
    # -- whose row
    Bug(
        "uncovered rows kept after another broker took them",
        "what another broker reads again is dropped here",
        "broker/ingest/intake.py",
        old="        self.store.drop_uncovered(source, bound)\n",
        new="",
        tests=(INTAKE + "test_a_refused_last_commit_leaves_the_question_open",),
    ),
    Bug(
        "rows of a lost partition start before it is known whose they are",
        "what another broker may run does not start here",
        "broker/ingest/intake.py",
        old="            self.store.dispute(self.store.source(self.topic, partition))\n",
        new="            pass\n",
        tests=(INTAKE + "test_rows_of_a_lost_partition_do_not_start_until_it_is_known_whose_they_are",),
    ),
    Bug(
        "whose the rows are is asked of the newest owner only",
        "below every newer owner's start the rows are one's own",
        "broker/ingest/ownership.py",
        old="        return min(newer)\n",
        new="        return newer[0]\n",
        tests=(OWNERSHIP + "test_boundary",),
    ),
    Bug(
        "the newest owner is left out when there are too many",
        "a commit says who reads the partition now",
        "broker/ingest/ownership.py",
        old="        entries.pop()\n",
        new="        entries.pop(0)\n",
        tests=(OWNERSHIP + "test_metadata_stays_within_its_limit_and_keeps_the_newest",),
    ),
    Bug(
        "rows of a topic that is no longer consumed wait for ever",
        "nothing is stranded by a change of settings",
        "broker/ingest/intake.py",
        old="            store.cover(source, max(source.next, source.uncovered[-1][0] + 1))\n",
        new="",
        tests=(INTAKE + "test_rows_of_another_topic_are_kept",),
    ),
    Bug(
        "an offset moved ahead is not counted",
        "a jump forward is an alarm with a count",
        "broker/ingest/intake.py",
        old="            self.offsets_skipped += start.skipped\n",
        new="",
        tests=(INTAKE + "test_an_offset_moved_ahead_is_an_alarm_with_a_count",),
    ),
    # -- the ledger
    Bug(
        "ledger record written after the fence",
        "who was adopted writes nothing any more",
        "broker/ingest/ledger_log.py",
        old='        self._transactional_id = f"penstock-ledger/{settings.kafka_consumer_group}/{broker_id}"\n',
        new='        self._transactional_id = f"penstock-ledger/{settings.kafka_consumer_group}/{broker_id}/{id(self)}"\n',
        tests=("tests/e2e/test_fence.py::test_nothing_is_written_after_the_fence",),
    ),
    Bug(
        "two brokers adopt the same one",
        "a task that was adopted is run by one broker",
        "broker/ingest/ledger_adopt.py",
        old="    if successor is not None and successor != ledger.me and await _goes_on(ledger, successor, broker_id):\n",
        new="    if False:\n",
        tests=(BROKER + "test_ledger_adopt.py::test_only_one_broker_at_a_time_adopts_another",),
    ),
    Bug(
        "an adoption that ended unasked answers the next one",
        "who is told that a broker was adopted can rely on it",
        "broker/departures.py",
        old="        if self._adopting is not None and self._adopting.done():\n",
        new="        if False:\n",
        tests=(
            BROKER
            + "test_ledger_adopt.py::test_an_adoption_that_ended_unasked_is_not_the_answer_to_the_next_one",
        ),
    ),
    # -- taking
    Bug(
        "a broker that stops commits what is revoked",
        "no offset of a partition that is not owned is committed",
        "broker/ingest/poller.py",
        old=(
            "        self._forget(numbers)\n"
            "        if self._fenced or self._stopping.is_set():\n"
            "            return\n"
        ),
        new=(
            "        if self._fenced or self._stopping.is_set():\n"
            "            return\n"
            "        self._forget(numbers)\n"
        ),
        tests=(KAFKA + "test_what_is_revoked_while_the_broker_stops_is_not_committed_any_more",),
    ),
    Bug(
        "a position that is read twice is taken twice",
        "a replay from Kafka is recognised by its position",
        "broker/ingest/taking.py",
        old="            if offset < track[1]:\n                self.replayed += 1\n                continue\n",
        new="",
        tests=(BROKER + "test_ingest_taking.py::test_a_position_that_was_read_is_not_taken_again",),
    ),
    Bug(
        "a message of a partition that went is taken",
        "what arrives of a partition that is gone is another broker's",
        "broker/ingest/taking.py",
        old="            if partition is None or offset is None or (track := tracks.get(partition)) is None:\n",
        new="            track = tracks.get(partition) or [1, 0]\n            if partition is None or offset is None:\n",
        tests=(BROKER + "test_ingest_taking.py::test_what_arrives_of_a_partition_that_went_is_dropped",),
    ),
    Bug(
        "a gate that never reopens",
        "a paused intake opens by itself",
        "broker/ingest/intake.py",
        old="        store.on_room(self.open)\n",
        new="",
        tests=(KAFKA + "test_a_full_store_pauses_and_goes_on_without_losing_its_membership",),
        hangs=True,
    ),
    Bug(
        "the gate leaks bytes",
        "what is stored no longer counts as on its way",
        "broker/ingest/gate.py",
        old="        self._stored_bytes += size\n",
        new="",
        tests=(BROKER + "test_ingest_taking.py::test_what_is_stored_makes_room_for_more",),
    ),
    Bug(
        "the gate counts only what is stored",
        "no more is taken than the store has room for",
        "broker/ingest/gate.py",
        old="min(self._room, IN_FLIGHT_ROWS_MAX) - (self._taken - self._stored))\n",
        new="min(self._room, IN_FLIGHT_ROWS_MAX))\n",
        tests=(BROKER + "test_ingest_taking.py::test_what_is_on_its_way_counts_as_taken",),
    ),
    Bug(
        "the intake waits for room in memory for ever",
        "what nobody claims holds up nobody",
        "broker/ingest/gate.py",
        old="        if mono < self._wait_until:\n            return 0\n        self._wait_until = mono + LEAD_MS_MAX\n        return wanted\n",
        new="        return 0\n",
        tests=(BROKER + "test_ingest_gate.py::test_what_nobody_claims_holds_up_nobody_for_long",),
    ),
    Bug(
        "the intake takes more than memory has room for",
        "while workers keep up nothing is read from the disk again",
        "broker/ingest/gate.py",
        old="            return min(wanted, max(1, self._lead()))\n",
        new="            return wanted\n",
        tests=(BROKER + "test_ingest_gate.py::test_no_more_is_taken_than_memory_has_room_for",),
    ),
    # -- admission
    Bug(
        "delayed row early by its fraction of a second",
        "nothing starts before its delay is over",
        "broker/ingest/admission.py",
        old="        received_at = seconds * 1000 + stamp.nanos // 1_000_000\n",
        new="        received_at = seconds * 1000\n",
        tests=(ADMISSION + "test_a_delay_counts_from_the_millisecond_it_was_sent",),
    ),
    Bug(
        "a producer's clock is believed",
        "a clock that is wrong by a year is corrected",
        "broker/ingest/admission.py",
        old="        if now - self.limits.received_at_age_ms_max <= received_at <= now + CLOCK_AHEAD_MS_MAX:\n",
        new="        if received_at > 0:\n",
        tests=(ADMISSION + "test_a_clock_that_is_wrong_is_replaced_by_ours",),
    ),
    Bug(
        "durations as they come",
        "huge durations are valid input",
        "broker/ingest/admission.py",
        old="    return (seconds if seconds < DURATION_SECONDS_MAX else DURATION_SECONDS_MAX) * 1000\n",
        new="    return seconds * 1000\n",
        tests=(ADMISSION + "test_huge_numbers_are_bounded",),
    ),
    Bug(
        "poison is skipped",
        "nothing is discarded silently",
        "broker/ingest/taking.py",
        old="            size += row.size\n",
        new="            if not row.taskname:\n                continue\n            size += row.size\n",
        tests=(BROKER + "test_ingest_taking.py::test_poison_is_taken_like_anything_else",),
    ),
    Bug(
        "poison is known by nothing",
        "the same poison, read again, is known as the same",
        "broker/ingest/admission.py",
        old='    return str(uuid.uuid5(_POSITIONS, f"{topic}/{partition}/{offset}"))\n',
        new="    return str(uuid.uuid4())\n",
        tests=(ADMISSION + "test_the_id_of_poison_is_its_position",),
    ),
    Bug(
        "a message may have millions of fields",
        "a bomb takes no more than its bound",
        "broker/wire.py",
        old="    return len(data) > _FROM_BYTES and _exceeds(data)\n",
        new="    return len(data) > 2**40 and _exceeds(data)\n",
        tests=(BROKER + "test_hostile_input.py::test_every_kind_is_stored_and_leaves_as_it_came",),
    ),
    # -- straight over gRPC
    Bug(
        "sent straight, answered before it is durable",
        "durable when answered",
        "broker/ingest/direct.py",
        old="        await self._store.answerable(self._store.insert(list(accepted.values())))\n",
        new="        self._store.insert(list(accepted.values()))\n",
        tests=(DIRECT + "test_what_is_accepted_is_in_the_file_when_answered",),
    ),
    Bug(
        "the same id twice in a request is accepted twice",
        "every answer is true",
        "broker/ingest/direct.py",
        old="            first = accepted.get(row.id)\n",
        new="            first = None\n",
        tests=(DIRECT + "test_each_answer_is_its_own",),
    ),
    # -- dead letters
    Bug(
        "dead letter sent without awaiting",
        "a dead letter leaves when the log has acknowledged it",
        "broker/ingest/forwarder.py",
        old="zip(rows, letters, await publisher.publish(letters), strict=True):\n",
        new="zip(rows, letters, [None] * len(letters), strict=True):\n",
        tests=(FORWARDER + "test_dead_letters_leave_once_acknowledged",),
        hangs=True,
    ),
    Bug(
        "what failed is not taken again",
        "a failed publish keeps the row, and it leaves later",
        "broker/ingest/forwarder.py",
        old="            self._store.outbox.give_back(self.route, [failure.row for failure in failed])\n",
        new="",
        tests=(FORWARDER + "test_a_failed_publish_keeps_the_row_and_raises_an_alarm",),
        hangs=True,
    ),
    Bug(
        "a dead letter has another id each time it is sent",
        "a dead letter that was sent twice is known as one",
        "broker/ingest/dead_letters.py",
        old='    return replay.forward_id(row.id, row.attempts, row.reason or "")\n',
        new='    return replay.forward_id(row.id, row.ready_at, row.reason or "")\n',
        tests=(FORWARDER + "test_a_forward_id_is_that_of_activation_attempt_and_reason",),
    ),
    # -- upkeep
    Bug(
        "a standstill is not noticed",
        "no lease is judged by time in which the broker stood still",
        "broker/upkeep/chores.py",
        old="        if overslept > STALL_MS:\n",
        new="        if overslept < 0:\n",
        tests=(UPKEEP + "test_a_broker_that_stood_still_judges_no_lease_by_that_time",),
    ),
    Bug(
        "what becomes due earlier does not end the sleep",
        "a delay ends when it is over",
        "broker/upkeep/chores.py",
        old="            self._earlier.set()\n",
        new="            pass\n",
        tests=(UPKEEP + "test_a_delay_that_is_shorter_than_the_sleep_ends_it",),
        hangs=True,
    ),
    Bug(
        "leases are judged when somebody calls",
        "a worker that vanished is noticed by itself",
        "broker/upkeep/chores.py",
        old='            Chore("leases", store.memory.leases.next_due, self._lapse),\n',
        new='            Chore("leases", lambda: None, self._lapse),\n',
        tests=(UPKEEP + "test_a_vanished_workers_lease_ends",),
        hangs=True,
    ),
    Bug(
        "a clock read outside the port",
        "time is a port: only clock.py reads a clock",
        "broker/upkeep/chores.py",
        old="            now = self._clock.mono_ms()\n            for chore",
        new="            import time\n\n            now = time.monotonic_ns() // 1_000_000\n            for chore",
        tests=("tests/repository/test_ports.py::test_no_clock_is_read_outside_the_port",),
    ),
    Bug(
        "a thread started elsewhere",
        "threads are a port: only those that are named start one",
        "broker/store/outbox.py",
        old="        await self._writer.committed()\n        for row in rows:\n",
        new="        await asyncio.to_thread(self._writer.committed)\n        for row in rows:\n",
        tests=("tests/repository/test_ports.py::test_no_thread_is_started_elsewhere",),
    ),
)
