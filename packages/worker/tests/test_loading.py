from __future__ import annotations

import sys
from pathlib import Path

import pytest

from penstock_worker.loading import AppLoadError, load_app

MODULES = {
    "good_app": "from penstock_client import App\napp = App('good', broker='127.0.0.1:1')\n",
    "not_app": "app = {}\n",
    "broken_app": "x = 1\nraise RuntimeError('boom')\n",
    "exits_app": "raise SystemExit(3)\n",
    "syntax_app": "def f(:\n",
    "missing_app": "import nowhere_to_be_found\n",
    "imports_app": (
        "from penstock_client import App\napp = App('i', broker='127.0.0.1:1', imports=['broken_app'])\n"
    ),
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def test_the_current_directory_is_importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    assert load_app("good_app:app").name == "good"


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("nowhere:app", ["no module 'nowhere'", "Start the worker in the directory"]),
        ("good_app.sub:app", ["no module 'good_app.sub'"]),
        ("missing_app:app", ["'missing_app'", "No module named 'nowhere_to_be_found'", "line 1"]),
        ("broken_app:app", ["'broken_app'", "RuntimeError: boom", "broken_app.py, line 2"]),
        ("exits_app:app", ["'exits_app'", "SystemExit: 3"]),
        ("syntax_app:app", ["'syntax_app'", "SyntaxError", "syntax_app.py, line 1"]),
        ("good_app:ap", ["has no 'ap'", "good_app:app"]),
        ("broken:app", ["no module 'broken'"]),
        ("not_app:nothing", ["has no 'nothing'", "no App"]),
        ("not_app:app", ["is of type dict", "not a penstock_client.App"]),
        ("imports_app:app", ["broken_app", "boom"]),
    ],
)
def test_what_is_wrong_is_named(path: str, parts: list[str]) -> None:
    with pytest.raises(AppLoadError) as raised:
        load_app(path)
    for part in parts:
        assert part in str(raised.value)
