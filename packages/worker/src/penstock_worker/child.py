"""A child process: loads the application once, then executes one task at a time.

It knows no network: tasks come through one pipe, outcomes leave through another.
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
import signal
import sys
import threading
from time import monotonic
from typing import cast

from penstock_worker.frames import (
    Assign,
    Assignment,
    Finished,
    FrameReader,
    FromChild,
    LoadFailed,
    Progress,
    Ready,
    Stop,
    Withdraw,
    Withdrawn,
    encode,
    to_child_decoder,
)
from penstock_worker.stack import leave_to_main_thread, write_stack_to

_PR_SET_PDEATHSIG = 1
_READ_BYTES = 1 << 20


class Outbox:
    """The pipe to the parent."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, message: FromChild) -> None:
        frame = memoryview(encode(message))
        with self._lock:
            while frame:
                frame = frame[os.write(self._descriptor, frame) :]


class Inbox:
    """Tasks that wait here. Filled and emptied by the listening thread, so that the parent can take
    back what waits behind a long task."""

    def __init__(self) -> None:
        self._waiting: dict[int, Assignment] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def put(self, tasks: list[Assignment]) -> None:
        with self._changed:
            self._waiting.update((task.number, task) for task in tasks)
            self._changed.notify()

    def withdraw(self, numbers: list[int] | None) -> list[int]:
        """Remove these (None: all); those that were still here."""
        with self._changed:
            there = list(self._waiting) if numbers is None else [n for n in numbers if n in self._waiting]
            for number in there:
                del self._waiting[number]
            return there

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def take_now(self) -> Assignment | None:
        """The next task, if there is one."""
        with self._changed:
            return self._waiting.pop(next(iter(self._waiting))) if self._waiting else None

    def take(self) -> Assignment | None:
        """The next task, waiting for it; None: stop."""
        with self._changed:
            while not self._waiting:
                if self._stopped:
                    return None
                self._changed.wait()
            return self._waiting.pop(next(iter(self._waiting)))


def listen(descriptor: int, inbox: Inbox, outbox: Outbox) -> None:
    """The listening thread. A pipe at its end means that the parent is gone: so is the child."""
    leave_to_main_thread()
    reader = FrameReader(to_child_decoder)
    pipe = io.FileIO(descriptor, "r")
    while data := pipe.read(_READ_BYTES):
        for message in reader.feed(data):
            match message:
                case Assign():
                    inbox.put(message.tasks)
                case Withdraw():
                    outbox.send(Withdrawn(inbox.withdraw(message.numbers)))
                case Stop():
                    inbox.stop()
    os._exit(1)


def serve(app_path: str, inbox: Inbox, outbox: Outbox) -> None:
    """Load the application, then execute what comes until told to stop."""
    # The client, and all the user's modules, are imported here: an error in them is reported.
    from penstock_worker.loading import AppLoadError, load_app

    try:
        app = load_app(app_path)
    except AppLoadError as error:
        outbox.send(LoadFailed(str(error)))
        return
    from penstock_worker.execution import Execution

    # What tasks log should be seen; an application that has set up its logging keeps it.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    execution = Execution(app)
    outbox.send(Ready(app.name, sorted((task.namespace, task.name) for task in app.tasks.values())))
    finished: Finished | None = None
    pid = os.getpid()
    while True:
        task = inbox.take_now()
        if task is None:
            if finished is not None:
                outbox.send(Progress(finished, None, 0.0))
                finished = None
            task = inbox.take()
            if task is None:
                return
        started_at = monotonic()
        outbox.send(Progress(finished, task.number, started_at))
        finished = execution.run(task, started_at)
        if os.getpid() != pid:
            # The task has forked, and returned in the process it made as well: it is none of ours.
            return


def die_with_parent() -> None:
    """Be killed when the parent dies, also in the middle of a task. Elsewhere than on Linux the
    listening thread sees to it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore_signals() -> None:
    """The parent decides when to stop; a signal to the whole service must not cut tasks short.

    Handlers, not SIG_IGN: programs that tasks start must not inherit the deafness.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)


def main() -> None:
    app_path, (reads, writes, stack) = sys.argv[1], map(int, sys.argv[2:])
    die_with_parent()
    ignore_signals()
    write_stack_to(stack)
    # Programs that tasks start get none of these.
    for descriptor in (reads, writes, stack):
        os.set_inheritable(descriptor, False)
    # What a task printed should not be lost with a child that is killed.
    cast("io.TextIOWrapper", sys.stdout).reconfigure(line_buffering=True)
    inbox, outbox = Inbox(), Outbox(writes)
    threading.Thread(target=listen, args=(reads, inbox, outbox), name="penstock-parent", daemon=True).start()
    try:
        serve(app_path, inbox, outbox)
    except BrokenPipeError:
        # The parent is gone.
        os._exit(1)


if __name__ == "__main__":
    main()
