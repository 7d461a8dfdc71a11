"""One child process: its pipes, its death, and what is known of it then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import IO

from penstock_worker.claim import Claim
from penstock_worker.frames import (
    FrameError,
    FrameReader,
    FromChild,
    ToChild,
    encode,
    from_child_decoder,
)
from penstock_worker.stack import STACK_SIGNAL

# While tasks are short a child is read from this often, not after every task.
READ_PAUSE_SECONDS = 0.002
# A pipe that stays open after the death of its process is held by a process the task started.
EOF_SECONDS_MAX = 1.0
# A stopped process cannot finish: what it has written by then is final.
STOP_TO_KILL_SECONDS = 0.02
# It writes down where it is, which needs no interpreter, and dies of that; if not in this time, of SIGKILL.
STACK_SECONDS = 0.02
STACK_BYTES_MAX = 16_384


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


class KillReason(Enum):
    DEADLINE = "deadline"
    REVOKED = "revoked"
    GRACE_OVER = "grace_over"
    BROKEN_PIPE = "broken_pipe"


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended."""

    exit_code: int | None
    signal: int | None
    peak_rss_bytes: int
    # Where it was, if it could still write that down.
    stack: str = ""

    @property
    def cause(self) -> str:
        """A short label: `"exit 3"`, `"SIGKILL"`."""
        if self.signal is None:
            return f"exit {self.exit_code}"
        try:
            return signal.Signals(self.signal).name
        except ValueError:
            # A real-time signal has no name.
            return str(self.signal)

    def __str__(self) -> str:
        how = "exited with code" if self.signal is None else "was killed by"
        what = self.exit_code if self.signal is None else f"signal {self.signal} ({self.cause})"
        return f"{how} {what}; peak RSS {self.peak_rss_bytes / 2**20:.0f} MiB"


class Child:
    """A spawned interpreter that runs `penstock_worker.child`.

    It is started as a command rather than through `multiprocessing`, so that it does not import
    the parent's command line (and gRPC with it), and is the leader of a process group, so that
    Ctrl-C reaches only the parent and a kill also reaches what its task started.
    """

    def __init__(
        self,
        on_message: Callable[[Child, FromChild], None],
        on_death: Callable[[Child, Death], None],
    ) -> None:
        self._on_message, self._on_death = on_message, on_death
        self.state = State.STARTING
        self.pid = 0
        # In order of execution; the first may be running.
        self.assigned: dict[int, Claim] = {}
        self.running: Claim | None = None
        self.kill_reason: KillReason | None = None
        self.withdrawing = False
        self._frames = FrameReader(from_child_decoder)
        # The child writes its last stack here; closed when it is buried.
        self._stack: IO[bytes]
        self._reader: asyncio.ReadTransport | None = None
        self._writer: asyncio.WriteTransport | None = None
        self._death: Death | None = None
        self._at_eof = False
        self._dead = asyncio.Event()

    async def start(self, app_path: str) -> None:
        """Start the interpreter and connect its pipes.

        Raises: OSError when the machine has no more processes, memory or files.
        """
        loop = asyncio.get_running_loop()
        self._stack = tempfile.TemporaryFile()  # noqa: SIM115
        ends: list[int] = []
        try:
            ends += os.pipe()
            ends += os.pipe()
            child_reads, parent_writes, parent_reads, child_writes = ends
            given = (child_reads, child_writes, self._stack.fileno())
            # Returns as soon as the interpreter is loaded, within milliseconds.
            process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-m", "penstock_worker.child", app_path, *map(str, given)],
                stdin=subprocess.DEVNULL,
                pass_fds=given,
                process_group=0,
            )
        except OSError:
            for end in ends:
                os.close(end)
            raise
        os.close(child_reads)
        os.close(child_writes)
        self.pid = process.pid
        self._reader, _ = await loop.connect_read_pipe(lambda: _Pipe(self), os.fdopen(parent_reads, "rb", 0))
        self._writer, _ = await loop.connect_write_pipe(
            asyncio.BaseProtocol, os.fdopen(parent_writes, "wb", 0)
        )
        threading.Thread(
            target=_await_exit, args=(process, loop, self._exited), name=f"child-{self.pid}", daemon=True
        ).start()

    def send(self, message: ToChild) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))

    def busy_seconds(self, now: float) -> float:
        """For how long the current task has been running."""
        if self.running is None or self.running.started_at is None:
            return 0.0
        return now - self.running.started_at

    def received(self, data: bytes, *, pause: bool) -> None:
        try:
            for message in self._frames.feed(data):
                self._on_message(self, message)
        except FrameError:
            self.kill(KillReason.BROKEN_PIPE)
            return
        if pause and len(self.assigned) > 1 and self._reader is not None and not self._reader.is_closing():
            self._reader.pause_reading()
            asyncio.get_running_loop().call_later(READ_PAUSE_SECONDS, self.resume_reading)

    def resume_reading(self) -> None:
        if self._reader is not None and not self._reader.is_closing():
            self._reader.resume_reading()

    def kill(self, reason: KillReason) -> None:
        """Kill it and what its task started, now."""
        if self._death is None and self.pid:
            self.kill_reason = self.kill_reason or reason
            self._signal(signal.SIGKILL)

    def kill_running(self, claim: Claim, reason: KillReason) -> None:
        """Kill it if this task is what it runs: stopped first, so that a task that has just ended
        is not taken for a running one, and the next task is not killed in its place."""
        if self._death is None and self.kill_reason is None and self.running is claim:
            self._signal(signal.SIGSTOP)
            asyncio.get_running_loop().call_later(STOP_TO_KILL_SECONDS, self._judge, claim, reason)

    def _judge(self, claim: Claim, reason: KillReason) -> None:
        self.resume_reading()
        # The next turn of the loop reads what it wrote before it was stopped.
        asyncio.get_running_loop().call_later(READ_PAUSE_SECONDS, self._kill_or_continue, claim, reason)

    def _kill_or_continue(self, claim: Claim, reason: KillReason) -> None:
        if self._death is not None:
            return
        if self.running is not claim:
            self._signal(signal.SIGCONT)
        elif STACK_SIGNAL is None:
            self.kill(reason)
        else:
            self.kill_reason = reason
            # Sent while it is stopped, so that it goes on into its death and not into the next task.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, STACK_SIGNAL)
            self._signal(signal.SIGCONT)
            asyncio.get_running_loop().call_later(STACK_SECONDS, self.kill, reason)

    def _signal(self, number: int) -> None:
        # It has just died by itself, and its exit is on the way; or all that is left of its group is
        # another user's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def wait_dead(self) -> None:
        await self._dead.wait()

    def _exited(self, death: Death) -> None:
        self._death = death
        asyncio.get_running_loop().call_later(EOF_SECONDS_MAX, self.reached_eof)
        self.resume_reading()
        self._bury()

    def reached_eof(self) -> None:
        if not self._at_eof:
            self._at_eof = True
            if self._death is None:
                # It closed its pipe but lives: of no use any more.
                asyncio.get_running_loop().call_later(EOF_SECONDS_MAX, self.kill, KillReason.BROKEN_PIPE)
            self._bury()

    def _bury(self) -> None:
        # Both: it cannot write any more, and all it wrote has been read.
        if self._death is None or not self._at_eof or self.state is State.DEAD:
            return
        if self._reader is not None and self._writer is not None:
            self._reader.close()
            self._writer.close()
        if self.state is not State.STOPPING:
            # What its task started must not outlive it.
            self._signal(signal.SIGKILL)
        self._on_death(self, replace(self._death, stack=self._last_stack()))
        self._stack.close()
        self.state = State.DEAD
        self._dead.set()

    def _last_stack(self) -> str:
        size = os.fstat(self._stack.fileno()).st_size
        written = os.pread(self._stack.fileno(), STACK_BYTES_MAX, max(0, size - STACK_BYTES_MAX))
        return written.decode("utf-8", "replace")


class _Pipe(asyncio.Protocol):
    def __init__(self, child: Child) -> None:
        self._child = child

    def data_received(self, data: bytes) -> None:
        self._child.received(data, pause=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._child.reached_eof()


def _await_exit(
    process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop, exited: Callable[[Death], None]
) -> None:
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    peak_bytes = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    number = -code if code < 0 else None
    death = Death(
        None if code < 0 else code, signal.SIGKILL if number == STACK_SIGNAL else number, peak_bytes
    )
    if not loop.is_closed():
        loop.call_soon_threadsafe(exited, death)
