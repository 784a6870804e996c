"""Proves that the benchmark of the whole evaluation runs for a tiny model under methods of either release."""

import json

import pytest

from benchmarks import evaluation_command as bench


def test_it_measures_a_tiny_model_under_methods_of_saes_and_of_directions(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.evaluation.N_ATOMS", (400, 16))
    results = tmp_path / "results.json"
    sizes = ["--shape", "tiny", "--items", "3", "--max-answer", "2", "--judges", "rule"]
    bench.main([*sizes, "--methods", "none,daco,mop", "--results", str(results)])
    table = json.loads(results.read_text())
    assert [row["unit"] for row in table] == ["s", "s", "items x methods / s", "MiB"]
    assert all("3 items of made up, none,daco,mop" in row["work"] and row["value"] > 0 for row in table)


def test_suites_are_named_without_their_places():
    specs = "figstep:tiny=a/b,mm-safetybench:variant=TYPO=c,mmmu"
    assert bench.names_of(specs) == "figstep:tiny,mm-safetybench:variant=TYPO,mmmu"


def test_a_folder_with_files_in_it_is_refused_before_a_model_is_made(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit):
        bench.main(["--shape", "tiny", "--folder", str(tmp_path)])
    assert "expected an empty or new folder" in capsys.readouterr().err
