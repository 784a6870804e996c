"""Proves that the picture of a training shows every measurement there is, also while the training goes on."""

import pandas as pd
import pytest
from small_run import KilledWork, opened, small_recipe, write_activations, write_directions

from builders import train_sae
from cards import training
from daco.errors import ArtefactNotFoundError

SAE = {"n_atoms": 37, "k": 3, "steps": 9, "batch": 17, "eval_steps": 2, "checkpoint_steps": 2, "holdout": 0.3}


@pytest.fixture
def run(tmp_path):
    write_activations(tmp_path)
    write_directions(tmp_path)
    return tmp_path


def table(**changes) -> pd.DataFrame:
    rows = {"step": [0, 4, 9], "fve": [-3.0, 0.5, 0.9], "l0": [3.0, 3.0, 2.5], "dead": [9, 4, 1]}
    rows |= {"dense": [0, 0, 1], "own": [None] * 3, "drift_cos": [None] * 3}
    rows |= {f"fve_{name}": [None] * 3 for name in ("image", "prompt", "caption", "generated")}
    return pd.DataFrame(rows | changes)


def test_a_panel_for_every_measurement_that_there_is():
    plain = training.training_svg({"layer 1": table()})
    more = training.training_svg({"layer 1": table(fve_image=[0.1, 0.4, 0.8], drift_cos=[1.0, 0.9, 0.8])})
    assert plain.count("stroke-width: 1.4") == 4  # fve, l0, dead, dense
    assert more.count("stroke-width: 1.4") == 6
    assert plain == training.training_svg({"layer 1": table()})
    two = training.training_svg({"layer 1": table(), "layer 2": table(dead=[9, 9, 9])})
    assert two.count("stroke-width: 1.4") == 8 + 2  # two of them in the legend


def test_a_training_that_goes_on_is_shown_by_its_last_checkpoint(run, monkeypatch):
    with pytest.raises(ArtefactNotFoundError, match="expected measurements in sae/, got none"):
        training.tables(run)
    work = opened(small_recipe(sae=SAE), run, "sae", killed_at=9 + 6)  # in the second layer
    assert isinstance(work, KilledWork)
    with pytest.raises(RuntimeError):
        train_sae.run(work)
    found = training.tables(run)
    assert list(found) == ["layer 1", "layer 2"]
    assert found["layer 1"]["step"].tolist() == [0, 2, 4, 6, 8, 9]
    assert found["layer 2"]["step"].tolist() == [0, 2, 4, 6]


def test_the_command_writes_the_picture_or_says_what_is_missing(run, monkeypatch):
    picture = run / "training.svg"
    monkeypatch.setattr("sys.argv", ["training", str(run), str(picture)])
    with pytest.raises(SystemExit, match="ArtefactNotFoundError"):
        training.main()
    assert not picture.exists()
    train_sae.run(opened(small_recipe(sae=SAE), run, "sae"))
    training.main()
    assert picture.read_text("utf-8") == training.training_svg(training.tables(run))
