"""What the wheels hold and what they ask for."""

import email
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PACKAGES = ("protocol", "client", "worker", "broker")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_is_typed_licensed_and_holds_nothing_else(wheels: Path, package: str) -> None:
    (wheel,) = wheels.glob(f"penstock_{package}-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"penstock_{package}/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    strays = [name for name in names if not name.startswith((f"penstock_{package}/", f"penstock_{package}-"))]
    assert strays == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_of_this_repository_are_asked_for_by_range(wheels: Path, package: str) -> None:
    (wheel,) = wheels.glob(f"penstock_{package}-*.whl")
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    headers = email.message_from_bytes(archive.read(metadata))
    asked = [Requirement(text) for text in headers.get_all("Requires-Dist", [])]
    for requirement in asked:
        if requirement.name.startswith("penstock-"):
            assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}, requirement
        else:
            assert "==" not in str(requirement.specifier), requirement
    assert headers["Requires-Python"] == ">=3.11"
    assert headers["License-Expression"] == "Apache-2.0"
