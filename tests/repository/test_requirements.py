"""The locks hold hashes for everything and the address of nothing."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_no_address(lock: Path) -> None:
    found = re.findall(r".*(?:://|\bfile:|--(?:extra-)?index|--find-links|-i |-f ).*", lock.read_text())
    assert found == []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_requirement_is_pinned_and_hashed(lock: Path) -> None:
    entries = re.split(r"\n(?=\S)", lock.read_text().strip())
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+==[^ ]+", entry), entry
        assert lock.stem == "constraints" or "--hash=sha256:" in entry, entry
