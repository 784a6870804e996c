"""The evaluation's command: all suites from one call to one table, killed and taken up, by real files too."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import suite_files
from safety_stand_ins import releases, tiny
from typer.testing import CliRunner

from builders.__main__ import app
from builders.safety import run
from builders.safety.command import Evaluation, evaluate, place_of
from builders.safety.report import EVALUATION, REPORT
from builders.safety.run import Asking
from builders.safety.suites import SUITES
from daco.errors import ArtefactNotFoundError, ModelMismatchError, RecipeError

ROOT = Path(__file__).parents[1]
DATA = os.environ.get("DACO_TEST_DATA", "")
MAKERS = {
    "mm-safetybench": suite_files.make_mm_safetybench,
    "jailbreakv": suite_files.make_jailbreakv,
    "figstep": suite_files.make_figstep,
    "mossbench": suite_files.make_mossbench,
    "xstest": suite_files.make_xstest,
    "harmbench": suite_files.make_harmbench,
    "mmmu": suite_files.make_mmmu,
}


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny model with releases that fit it by shape, and all suites in their official layouts."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = tiny(request.param)
    for part in (model, processor):
        part.save_pretrained(folder / "mllm")
    sae, dictionary = releases(folder)
    _of_type(sae / "config.json", request.param)
    _of_type(dictionary / "manifest.json", request.param)
    for name, make in MAKERS.items():
        (folder / name).mkdir()
        make(folder / name)
    return {"folder": folder, "sae": sae, "dictionary": dictionary}


def _of_type(path: Path, kind: str) -> None:
    """The releases are of a LLaVA; here another architecture has the same shape."""
    from daco.manifest import file_entry, read_manifest, write_manifest

    path.write_text(path.read_text().replace('"llava"', f'"{kind}"'))
    if path.name == "config.json":
        manifest = read_manifest(path.parent)
        manifest["files"]["config.json"] = file_entry(path)
        write_manifest(path.parent, manifest)


def plan(places: dict[str, Path], out: Path, **changes: Any) -> Evaluation:
    folder = places["folder"]
    told: dict[str, Any] = {
        "model": str(folder / "mllm"),
        "out": out,
        "suites": tuple(f"{name}={folder / name}" for name in MAKERS),
        "judges": ("rule", "choice", "likelihood"),
        "sae": str(places["sae"]),
        "dictionary": str(places["dictionary"]),
        "dtype": "float32",
        "asking": Asking(batch=4, max_answer=4, base_model_ok=True),
    }
    return Evaluation(**(told | changes))


def test_all_suites_go_from_one_call_to_one_table(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(MAKERS) == set(SUITES)
    assert evaluate(plan(places, tmp_path))
    found = json.loads((tmp_path / EVALUATION).read_text())
    assert set(found["suites"]) == set(SUITES)
    for name, suite in found["suites"].items():
        told = {(f["figure"], f["kind"]) for f in suite["figures"]}
        assert (
            ("fluency", "choice") in told or ("fluency", "harmful") in told or ("fluency", "harmless") in told
        )
        if name == "mmmu":
            assert ("right", "choice") in told
        if name == "mossbench":
            assert ("refused", "harmless") in told
        if name in ("mm-safetybench", "jailbreakv", "figstep", "harmbench", "xstest"):
            assert ("unsafe", "harmful") in told
        for figure in suite["figures"]:
            assert set(figure["methods"]) == {"none", "prompting", "actadd", "mop", "daco"}
    assert "## mmmu" in (tmp_path / REPORT).read_text()
    assert "not run / 0.990" in (tmp_path / REPORT).read_text()
    before = (tmp_path / EVALUATION).read_bytes()
    monkeypatch.setattr(run, "ask", lambda *_: pytest.fail("asked again"))
    assert evaluate(plan(places, tmp_path))
    assert (tmp_path / EVALUATION).read_bytes() == before


def test_parts_wait_for_each_other(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SHARD", 2)
    suites = (f"xstest={places['folder'] / 'xstest'}",)
    part = {"suites": suites, "methods": ("none", "daco"), "judges": ("rule",)}
    first, second = (Asking(batch=4, max_answer=4, base_model_ok=True, part=(number, 2)) for number in (1, 2))
    assert not evaluate(plan(places, tmp_path, asking=first, **part))
    assert not (tmp_path / EVALUATION).exists()
    assert evaluate(plan(places, tmp_path, asking=second, **part))
    assert (tmp_path / EVALUATION).is_file()


def test_what_does_not_fit_together_is_refused_before_anything_is_asked(
    places: dict[str, Path], tmp_path: Path
) -> None:
    suite = f"xstest={places['folder'] / 'xstest'}"
    for changes, error, words in (
        ({"suites": ()}, RecipeError, "at least one"),
        ({"suites": (suite, suite)}, RecipeError, "each once"),
        ({"methods": ("none", "magic")}, RecipeError, "magic"),
        ({"methods": ("none", "daco", "daco")}, RecipeError, "each once"),
        ({"suites": (suite,), "sae": ""}, RecipeError, "daco: expected SAEs"),
        (
            {"suites": (suite,), "sae": "", "dictionary": "", "methods": ("mop",)},
            RecipeError,
            "mop: expected a dict",
        ),
        ({"suites": (suite,), "settings": ("daco.eta=2",)}, RecipeError, "daco: expected settings"),
        ({"suites": (suite,), "settings": ("daco.scope=sideways",)}, RecipeError, r"daco\.scope: expected"),
        ({"suites": (suite,), "settings": ("daco.dtype=float16",)}, RecipeError, "--set: expected one of"),
        ({"suites": (suite,), "judges": ("oracle",)}, RecipeError, "judge: expected one of"),
        ({"suites": (suite,), "judges": ("rule", "rule")}, RecipeError, "judges: expected each once"),
        ({"suites": (suite,), "judges": (f"guard:{tmp_path}/none",)}, ArtefactNotFoundError, "none"),
    ):
        with pytest.raises(error, match=words):
            evaluate(plan(places, tmp_path, **changes))
    assert not (tmp_path / "answers").exists()
    with pytest.raises(RecipeError, match="dtype: expected one of"):
        plan(places, tmp_path, dtype="float64")


def test_a_model_that_the_saes_are_not_for_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    model, processor = tiny("internvl")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "other")
    suites = (f"xstest={places['folder'] / 'xstest'}",)
    with pytest.raises(ModelMismatchError, match="model_type"):
        evaluate(plan(places, tmp_path / "out", model=str(tmp_path / "other"), suites=suites))
    assert not (tmp_path / "out" / "answers").exists()


def test_the_command_line_does_the_same(places: dict[str, Path], tmp_path: Path) -> None:
    folder = places["folder"]
    said = CliRunner().invoke(
        app,
        [
            *("evaluate", "--model", str(folder / "mllm"), "--out", str(tmp_path), "--dtype", "float32"),
            *("--sae", str(places["sae"]), "--dictionary", str(places["dictionary"]), "--base-model-ok"),
            *("--suites", f"xstest={folder / 'xstest'},figstep={folder / 'figstep'}"),
            *("--methods", "none,daco", "--judges", "rule", "--set", "daco.gamma=0.05"),
            *("--batch", "4", "--max-answer", "4", "--items", "3"),
        ],
        catch_exceptions=False,
    )
    assert said.exit_code == 0
    assert "gamma 0.05" in json.dumps(json.loads((tmp_path / EVALUATION).read_text())["protocol"]["settings"])
    again = CliRunner().invoke(app, ["report", "--out", str(tmp_path), "--into", str(places["sae"])])
    assert again.exit_code == 0
    assert again.output.startswith(said.output.rstrip()[:200])
    assert json.loads((places["sae"] / EVALUATION).read_text())["suites"]["figstep"]["items"] == 3


def test_a_place_is_a_folder_before_it_is_a_revision(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    assert place_of(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)
    assert place_of("org/name@v1.0.0") == ("org/name", "v1.0.0")
    assert place_of("org/name") == ("org/name", None)


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="needs DACO_TEST_DATA")
def test_real_files_are_evaluated_killed_and_taken_up_with_the_same_table(
    places: dict[str, Path], tmp_path: Path
) -> None:
    """MM-SafetyBench's questions with pictures drawn anew, and FigStep's own 50 pictures."""
    folder, tables = places["folder"], []
    suites = f"mm-safetybench:variant=TYPO={DATA}/mm_safetybench,figstep:tiny={DATA}/figstep"
    for out, kills in ((tmp_path / "whole", 0), (tmp_path / "killed", 2)):
        command = [
            *(sys.executable, "-m", "builders", "evaluate", "--model", str(folder / "mllm")),
            *("--out", str(out), "--dtype", "float32", "--sae", str(places["sae"])),
            *("--dictionary", str(places["dictionary"]), "--base-model-ok", "--suites", suites),
            *("--methods", "none,daco", "--judges", "rule", "--max-answer", "3", "--items", "66"),
        ]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for wanted in range(1, kills + 1):
            process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
            while len(list(out.glob("answers/**/0*.parquet"))) < 2 * wanted and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found = json.loads((out / EVALUATION).read_text())
        del found["costs"]
        tables.append(found)
    assert tables[0] == tables[1]
    told = tables[0]["suites"]
    assert (told["mm-safetybench"]["items"], told["figstep"]["items"]) == (66, 50)
    assert any("drawn anew" in note for note in told["mm-safetybench"]["notes"])
    assert not any("drawn anew" in note for note in told["figstep"]["notes"])
