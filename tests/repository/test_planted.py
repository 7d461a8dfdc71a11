"""The planted bugs still fit the product they are planted into. What catches them: nox -s planted."""

import re

import pytest

from tests.planted.bug import ROOT, Bug, source_of
from tests.planted.bugs import BUGS


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_still_fits_its_module(bug: Bug) -> None:
    planted = bug.planted()
    assert planted != (source_of(bug.package) / bug.module).read_text()
    compile(planted, bug.file, "exec")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_tests_that_are_to_catch_it_exist(bug: Bug) -> None:
    assert bug.tests
    for test in bug.tests:
        file, _, name = test.partition("::")
        name = name.partition("[")[0]
        text = (ROOT / file).read_text()
        assert not name or re.search(rf"def {name}\(", text), f"{file} has no {name}"


def test_names_are_told_apart() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS)
