"""`import daco` stays light, and packages import one another in one direction only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["daco", "builders", "cards", "hub"]
"""Each may import itself and what stands before it."""


@pytest.mark.parametrize("package", ORDER)
def test_imports_never_go_back(package: str) -> None:
    later = set(ORDER[ORDER.index(package) + 1 :]) | {"tests", "benchmarks"}
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        names = {name.split(".")[0] for name in imported(path)}
        assert not names & later, f"{path.relative_to(ROOT)} imports {names & later}"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_import_daco_pulls_in_no_workshop_package() -> None:
    heavy = ("datasets", "jinja2", "ray", "nltk", "builders", "PIL", "matplotlib", "sklearn")
    code = f"import sys, daco; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("word", ["pickle", "trust_remote_code", "torch.load", "yaml.load("])
def test_unsafe_loading_is_not_used(word: str) -> None:
    for package in ORDER:
        for path in (ROOT / package).rglob("*.py"):
            code = "\n".join(
                line for line in path.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")
            )
            uses = [
                node
                for node in ast.walk(ast.parse(code))
                if isinstance(node, ast.Call | ast.Import | ast.ImportFrom)
            ]
            assert not any(word.rstrip("(") in ast.unparse(node).split("'")[0] for node in uses), path
