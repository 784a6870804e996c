"""The wheel holds only `daco`, and works installed alone in an empty environment.

Builds the wheel, lists it, installs it with its dependencies alone, loads a release there and steers with it.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from release_fixture import write_model_release

ROOT = Path(__file__).parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        check_entries(wheel)
        release = folder / "release"
        write_model_release(release)
        python = install_alone(wheel, folder / "venv")
        subprocess.run([python, "-I", ROOT / "tests" / "wheel_alone.py", release], check=True, cwd=folder)
    print(f"{wheel.name}: only daco inside, works alone")


def build(folder: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.whl"))


def check_entries(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    foreign = [name for name in names if not name.startswith("daco")]
    assert not foreign, f"expected only daco in the wheel, got {foreign}"
    assert {"daco/__init__.py", "daco/py.typed"} <= set(names), names


def install_alone(wheel: Path, venv: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", constraints, wheel], check=True)
    return python


if __name__ == "__main__":
    main()
