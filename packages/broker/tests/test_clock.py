"""The wall clock goes on by the time that passes, whatever is done to the system's."""

from __future__ import annotations

import time

from structlog.testing import capture_logs

from penstock_broker.clock import SystemClock

SECOND = 1_000_000_000
HOUR = 3600 * SECOND


class Machine:
    def __init__(self, pause: int = 0) -> None:
        self.system = 1_800_000_000 * SECOND
        self.elapsed = 77 * SECOND
        # What passes after the next time that either of them is read.
        self.pause = pause
        self.clock = SystemClock(lambda: self._read(self.system), lambda: self._read(self.elapsed))

    def _read(self, now: int) -> int:
        pause, self.pause = self.pause, 0
        self.system += pause
        self.elapsed += pause
        return now

    def passes(self, ns: int, drift: int = 0) -> int:
        """Milliseconds by which the wall clock went on."""
        before = self.clock.wall_ms()
        self.elapsed += ns
        self.system += ns + drift
        return self.clock.wall_ms() - before


def test_it_is_the_system_clock() -> None:
    clock = SystemClock()
    before = time.time_ns() // 1_000_000
    assert before - 1 <= clock.wall_ms() <= time.time_ns() // 1_000_000 + 1


def test_a_clock_that_is_set_ahead_makes_nothing_due() -> None:
    machine = Machine()
    assert machine.passes(10 * SECOND, drift=HOUR) == 10_010
    assert machine.passes(60 * SECOND) == 60_060


def test_a_clock_that_is_set_back_holds_nothing_up() -> None:
    machine = Machine()
    assert machine.passes(10 * SECOND, drift=-HOUR) == 9_990
    assert machine.passes(60 * SECOND) == 59_940


def test_a_clock_that_runs_wrong_is_followed() -> None:
    machine = Machine()
    for _ in range(100):
        machine.passes(SECOND, drift=SECOND // 2000)
    assert machine.clock.wall_ms() == machine.system // 1_000_000


def test_a_pause_while_it_is_read_puts_it_ahead_of_no_clock() -> None:
    machine = Machine(pause=5_000_000)
    assert machine.clock.wall_ms() <= machine.system // 1_000_000
    for _ in range(10):
        machine.passes(10 * SECOND)
        machine.elapsed += 10 * SECOND
        machine.system += 10 * SECOND
        machine.pause = 5_000_000
        machine.clock.wall_ms()
        assert machine.clock.wall_ms() <= machine.system // 1_000_000


def test_it_never_goes_back() -> None:
    machine = Machine()
    for drift in (-HOUR, HOUR, -SECOND, 0, -2 * HOUR):
        assert machine.passes(1_000, drift) >= 0


def test_the_jump_is_told_once() -> None:
    machine = Machine()
    with capture_logs() as logs:
        machine.passes(SECOND, drift=HOUR)
        machine.passes(SECOND)
        machine.passes(SECOND, drift=-HOUR)
    assert [entry["event"].split(";")[0] for entry in logs] == [
        "the system clock was set",
        "the clock agrees with the system clock again",
    ]
