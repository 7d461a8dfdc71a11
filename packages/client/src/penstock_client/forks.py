"""A forked child has the connections of its parent but not their threads: it connects anew."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock_client.app import App

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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
