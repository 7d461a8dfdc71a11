"""The recipes in deploy/ name settings, files and options that exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock_broker.config import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RECIPES = sorted(DEPLOY.glob("images/*.Dockerfile"))


@pytest.mark.parametrize("recipe", [*RECIPES, DEPLOY / "compose.yaml"], ids=lambda path: path.name)
def test_every_setting_named_exists(recipe: Path) -> None:
    named = set(re.findall(r"\bTASKBROKER_([A-Z0-9_]+)", recipe.read_text()))
    assert named - {name.upper() for name in Settings.model_fields} == set()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_file_copied_from_the_tree_exists(recipe: Path) -> None:
    copied = re.findall(r"^COPY (?!--from)(\S+) ", recipe.read_text(), re.MULTILINE)
    assert [path for path in copied if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_an_image_is_built_in_stages_and_runs_as_nobody(recipe: Path) -> None:
    text = recipe.read_text()
    final = text.rpartition("\nFROM ")[2]
    assert text.count("\nFROM ") == 2
    assert re.search(r"^USER (?!0)\d+$", final, re.MULTILINE)
    assert "\nHEALTHCHECK " in final


def test_compose_starts_kafka_a_broker_and_a_worker() -> None:
    compose: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"kafka", "broker", "worker"}
    for name in ("broker", "worker"):
        context = DEPLOY / services[name]["build"]["context"]
        assert (context / services[name]["build"]["dockerfile"]).exists()
        assert services[name]["read_only"] is True
    assert set(compose["volumes"]) == {"kafka", "broker"}
