"""In looking into the database, and copying it."""

from tests.planted.bug import BROKER, Bug

LOOKING = BROKER + "test_looking.py::"
COPYING = BROKER + "test_copying.py::"
COMMANDS = BROKER + "test_db_commands.py::"

BUGS = (
    Bug(
        "a query may do what it likes",
        "queries only read",
        "broker/store/looking.py",
        old="        connection.authorizer = _only_reading(refused)\n",
        new="",
        tests=(LOOKING + "test_it_only_reads",),
    ),
    Bug(
        "the bounds of a query hold for the ticks after it",
        "a query does not disturb ticks",
        "broker/store/looking.py",
        old="        for id, value in limits.items():\n            connection.limit(id, value)\n",
        new="",
        tests=(LOOKING + "test_it_is_interrupted_after_a_second",),
    ),
    Bug(
        "a query waits for a tick",
        "the database can be looked into while the disk fails",
        "broker/store/writer.py",
        old="        answer: T = await self._handoff(work, self._memory.database)\n        return answer\n",
        new="        found: list[T] = []\n        self._memory.batch.calls.append(lambda database: found.append(work(database)))\n"
        "        await self.committed()\n        return found[0]\n",
        tests=(LOOKING + "test_a_query_is_answered_while_the_disk_takes_nothing",),
    ),
    Bug(
        "who gives up on a query lets the next one in before the ticks",
        "a query holds up a tick once",
        "broker/dispatch/looking.py",
        old="                await asyncio.wait([work])\n",
        new="                pass\n",
        tests=(LOOKING + "test_a_query_whose_caller_has_given_up_is_one_at_a_time_too",),
    ),
    Bug(
        "a query is handed to a writer that has stopped",
        "no call hangs",
        "broker/store/writer.py",
        old="        if self.stopping or self.failed:\n            raise StoreStopped\n        answer: T",
        new="        answer: T",
        tests=(LOOKING + "test_every_query_ends_when_the_broker_stops",),
    ),
    Bug(
        "looking into the file of a stopped broker copies its log back",
        "looking changes nothing",
        "broker/store/looking.py",
        old="connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, int(left))",
        new="connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)",
        tests=(LOOKING + "test_what_a_killed_broker_left_is_read_and_stays_as_it_is",),
    ),
    Bug(
        "a backup overwrites what is there",
        "a backup overwrites nothing",
        "broker/db.py",
        old="    if file.exists():\n        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))\n",
        new="",
        tests=(COMMANDS + "test_what_comes_to_be_there_meanwhile_is_not_overwritten",),
    ),
    Bug(
        "a backup holds the writer until it is whole",
        "a step of a backup is short",
        "broker/store/copying.py",
        old="STEP_PAGES = 256",
        new="STEP_PAGES = -1",
        tests=(COPYING + "test_the_copy_is_the_database_as_of_a_commit_though_ticks_write_meanwhile",),
    ),
    Bug(
        "what a backup has left stays for good",
        "a backup that broke off is deleted",
        "broker/store/database.py",
        old="            forget_backups(self.path)\n            self._rewrite_log()\n",
        new="            self._rewrite_log()\n",
        tests=(COPYING + "test_what_was_left_is_deleted_at_the_start_and_nothing_else",),
    ),
)
