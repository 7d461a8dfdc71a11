"""Finding the user's application, with errors that say what to do."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from penstock_client import App, AppError
from penstock_worker.settings import split_app_path


class AppLoadError(Exception):
    """The application cannot be loaded; the message says why and what to do."""


def load_app(path: str) -> App:
    """Import the application and all modules it declares. The current directory is importable.

    Raises: AppLoadError naming the module and the cause.
    """
    module_name, attribute = split_app_path(path)
    directory = str(Path.cwd())
    if directory not in sys.path and "" not in sys.path:
        sys.path.insert(0, directory)
    app = _attribute(_import(module_name, directory), attribute)
    if not isinstance(app, App):
        raise AppLoadError(
            f"{path} is of type {type(app).__qualname__}, not a penstock_client.App. Name the variable"
            " that holds the App."
        )
    try:
        app.load()
    except AppError as error:
        raise AppLoadError(str(error)) from error
    return app


def _import(name: str, directory: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise AppLoadError(
                f"There is no module {error.name!r}, neither in {directory} nor among the installed"
                " packages. Start the worker in the directory that holds it, or install it."
            ) from error
        raise AppLoadError(_import_failed(name, error)) from error
    # A module of the user may raise anything when imported, SystemExit included.
    except BaseException as error:
        raise AppLoadError(_import_failed(name, error)) from error


def _import_failed(name: str, error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and "importlib" not in frame.filename
    ]
    where = f", raised in {frames[-1].filename}, line {frames[-1].lineno}" if len(frames) > 1 else ""
    if isinstance(error, SyntaxError):
        where = f", in {error.filename}, line {error.lineno}"
    return f"Importing the module {name!r} failed: {type(error).__qualname__}: {error}{where}."


def _attribute(module: ModuleType, attribute: str) -> object:
    if hasattr(module, attribute):
        return getattr(module, attribute)
    apps = [name for name, value in vars(module).items() if isinstance(value, App)]
    nearest = apps or difflib.get_close_matches(attribute, list(vars(module)), n=1)
    hint = f" Did you mean {module.__name__}:{nearest[0]}?" if nearest else " It has no App at all."
    raise AppLoadError(f"The module {module.__name__!r} has no {attribute!r}.{hint}")
