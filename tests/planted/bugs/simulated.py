"""Bugs that a simulated pool shows, under one kind of faults."""

from tests.planted.bug import Bug

FEW = "tests/sim/test_sim.py::test_a_few_kinds_of_faults_again_and_again"

BUGS = (
    Bug(
        "the ledger lags by two seconds",
        "what was acknowledged half a second before a disk is lost never runs again",
        "broker/ingest/ledger.py",
        old="RECORD_EVERY_SECONDS = 0.4\n",
        new="RECORD_EVERY_SECONDS = 2.0\n",
        tests=(f"{FEW}[disk-lost]",),
    ),
    Bug(
        "a broker goes on though another one has adopted it",
        "a fenced broker stops",
        "broker/ingest/ledger.py",
        old="            self._check_successor(successor, head)\n",
        new="            pass\n",
        tests=(f"{FEW}[broker-adopted]",),
    ),
    Bug(
        "an old copy of a database is gone on with",
        "an old copy is refused",
        "broker/ingest/ledger.py",
        old="            if head.sequence > self._sequence:\n",
        new="            if head.sequence < 0:\n",
        tests=(f"{FEW}[old-copy-put-back]",),
    ),
    Bug(
        "what the disk did not take is let out",
        "nothing is acknowledged that is not durable",
        "broker/store/writer.py",
        old="                self._tell_trouble(failing)\n            else:\n",
        new=(
            "                self._tell_trouble(failing)\n"
            "                self.trouble = None\n"
            "                return Written()\n"
            "            else:\n"
        ),
        tests=(f"{FEW}[disk-fails]",),
    ),
)
