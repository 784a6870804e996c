"""Every row of CONTRIBUTING's table of failures names a test, an error or a count that there is."""

import ast
import re
from pathlib import Path

import pytest

from daco import errors

ROOT = Path(__file__).parent.parent
TITLE = "## What happens when input is bad"


def rows() -> list[tuple[str, str, str]]:
    """(input, what happens, test) of every row that is no heading."""
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition(f"{TITLE}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    assert all(len(row) == 3 for row in cells)
    return [row for row in cells if not row[0].startswith("**")]  # type: ignore[misc]


def collected_from(file: str) -> set[str]:
    """Names of the test functions that pytest collects from a file."""
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    return {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def sources() -> str:
    return "\n".join(path.read_text("utf-8") for path in (ROOT / "builders").rglob("*.py"))


def test_the_table_is_there() -> None:
    assert len(rows()) > 60
    assert len({row[0] for row in rows()}) == len(rows())


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_names_a_test_that_exists(row: tuple[str, str, str]) -> None:
    found = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", row[2])
    assert found, row[2]
    assert found[2] in collected_from(found[1]), row[2]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_names_errors_and_counts_that_exist(row: tuple[str, str, str]) -> None:
    for name in re.findall(r"`(\w+Error)`", row[1]):
        assert issubclass(getattr(errors, name), errors.DacoError)
        file = re.fullmatch(r"`(test_\w+\.py)::\w+`", row[2])
        assert file
        test = (ROOT / "tests" / file[1]).read_text("utf-8")
        assert name in test, f"{file[1]} never speaks of {name}"
    if counted := re.match(r"counted: `(\w+)` `(\w+)`", row[1]):
        assert f'"{counted[2]}"' in sources()


def test_every_error_is_in_the_table() -> None:
    told = " ".join(row[1] for row in rows())
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)} - {"DacoError"}
    assert {name for name in classes if f"`{name}`" not in told} == set()
