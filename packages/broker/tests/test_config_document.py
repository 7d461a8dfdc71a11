"""docs/configuration.md is what the settings say."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock_broker.config import Settings
from penstock_broker.config.document import document

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_every_setting_has_a_row() -> None:
    for name in Settings.model_fields:
        assert f"\n| `{name}` | " in document()


@pytest.mark.skipif(not PAGE.parent.exists(), reason="not in a checkout")
def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), "nox -s docs -- write"
