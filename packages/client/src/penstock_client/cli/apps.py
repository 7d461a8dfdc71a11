"""The namespaces of an application, without a broker."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from penstock_client.app import App
from penstock_client.cli.failures import USAGE, Failure
from penstock_client.errors import AppError, nearest


def load_app(path: str) -> App:
    """The App at MODULE:APP with all its modules. Raises Failure naming the cause."""
    name, separator, attribute = path.partition(":")
    if not (separator and name and attribute):
        raise Failure(f"{path!r} names no application", "write MODULE:APP, as in shop.tasks:app", USAGE)
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        module = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    # A module of the user may raise anything when imported, SystemExit included.
    except BaseException as error:  # noqa: BLE001
        raise Failure(
            f"importing {name!r} from {directory} failed: {type(error).__name__}: {error}", code=USAGE
        ) from None
    app = getattr(module, attribute, None)
    if not isinstance(app, App):
        near = nearest(attribute, [key for key, value in vars(module).items() if isinstance(value, App)], 0.0)
        hint = f"did you mean {name}:{near}?" if near else "it has no App at all"
        raise Failure(f"{path} is no penstock_client.App", hint, USAGE)
    try:
        app.load()
    except AppError as error:
        raise Failure(str(error), code=USAGE) from None
    return app


def routes(path: str) -> list[dict[str, Any]]:
    """Namespace, topic, where that route came from, and its tasks."""
    app = load_app(path)
    found = []
    for namespace in sorted(app.namespaces):
        topic, origin = app.route_of(namespace)
        tasks = sorted(task.name for task in app.tasks.values() if task.namespace == namespace)
        found.append({"namespace": namespace, "topic": topic, "origin": origin, "tasks": tasks})
    return found
