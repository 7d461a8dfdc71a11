"""The last stack of a child: what it was doing when it crashed, or was killed at its deadline."""

from __future__ import annotations

import faulthandler
import signal

# One that applications do not use. Where there is none, only crashes are written down.
STACK_SIGNAL: int | None = getattr(signal, "SIGRTMAX", None)


def write_stack_to(descriptor: int) -> None:
    """In the child: write the stacks to this file on a fatal signal, as which STACK_SIGNAL counts.

    It is done by the signal handler, so also in the middle of C code, and the process ends in it:
    what was interrupted does not go on.
    """
    faulthandler.enable(descriptor)
    if STACK_SIGNAL is not None:
        faulthandler.register(STACK_SIGNAL, descriptor, chain=True)


def leave_to_main_thread() -> None:
    """On a thread of ours: the signal is for the one that runs tasks."""
    if STACK_SIGNAL is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, (STACK_SIGNAL,))
