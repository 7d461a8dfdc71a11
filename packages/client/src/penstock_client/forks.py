"""A forked child has the connections of its parent but not their threads: it connects anew."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock_client.app import App

# Held by who connects, and by who forks: a child would wait for ever for modules that a thread which is not
# there was importing. Whoever connects may be interrupted by a signal's handler.
connecting = threading.RLock()

_connected: weakref.WeakSet[App] = weakref.WeakSet()


def watch(app: App) -> None:
    """Have ``app`` connect anew in children that are forked from now on."""
    _connected.add(app)


def _in_child() -> None:
    import ctypes

    for app in list(_connected):
        transport = app.forget_transport()
        # What it holds is never freed in this process: that would wait for threads that are not here.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(transport))
    _connected.clear()
    connecting.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=connecting.acquire, after_in_parent=connecting.release, after_in_child=_in_child
    )
