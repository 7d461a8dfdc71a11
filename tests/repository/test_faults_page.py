"""docs/faults.md has a line for every promise and fault, and the tests it names exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"

NUMBERS = {
    "P": [*range(1, 8)],
    "A": [1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 17, 18, 19],
    "B": [*range(1, 13), 14, 15, 19, 20],
    "C": [*range(1, 13), *range(14, 21), 23, 26],
    "D": [1, 2, 3],
    "E": [*range(1, 11), 13, 15, 16],
}
# Parts that do not exist: no test may be claimed for them.
NOT_BUILT = {"D1", "D2", "D3", "E4", "E15"}
_ROW = re.compile(r"\| ([A-Z]\d+) \|")
_TEST = re.compile(r"`((?:packages|tests)/[\w/]+\.py)::(\w+)`")


def rows() -> list[tuple[str, list[str]]]:
    """(number, cells) of every line."""
    lines = [line for line in PAGE.read_text().splitlines() if _ROW.match(line)]
    return [(line.split("|")[1].strip(), [cell.strip() for cell in line.split("|")[2:-1]]) for line in lines]


@cache
def names(path: str) -> set[str]:
    """Tests of a module: its functions, and what stands for a class of them."""
    module = ast.parse((ROOT / path).read_text())
    functions = {n.name for n in module.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    assigned = {
        target.id
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return {name for name in functions | assigned if name.lower().startswith("test")}


def test_every_promise_and_fault_has_its_line() -> None:
    wanted = [f"{letter}{number}" for letter, numbers in NUMBERS.items() for number in numbers]
    assert [number for number, _ in rows()] == wanted


def test_every_line_says_what_was_seen_and_every_test_it_names_exists() -> None:
    for number, cells in rows():
        _, seen, shown = cells[:3]
        assert seen, number
        named = _TEST.findall(shown)
        assert re.sub(_TEST, "", shown).strip() == "", f"{number}: what is shown by is no list of tests"
        for path, name in named:
            assert (ROOT / path).is_file(), f"{number}: {path} does not exist"
            assert name in names(path), f"{number}: {path} has no test {name}"
        assert not named or number not in NOT_BUILT, f"{number} is not built: no test can show it"
        assert named or "built" in seen, f"{number} is shown by nothing, and does not say so"
        assert "@" not in "".join(cells), f"{number} has a figure to be filled in"
