"""Proves `ConceptDictionary.recognise` against numpy, through edits and files; bad input is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from release_fixture import BASE, LAYERS, N_CONCEPTS, WORDS, write_dataset_release
from torch import Tensor

from daco import ConceptDictionary
from daco.errors import (
    ActivationError,
    FormatError,
    IntegrityError,
    ModelMismatchError,
    UnknownLayerError,
)
from daco.manifest import file_entry, read_manifest, validate, write_manifest
from daco.recognition import COLUMNS, MEASURED, Recogniser, discriminants, measured
from daco.tables import read_table, recognition_schema, write_table

D = BASE["hidden_size"]
NEVER = 4
"""A concept without a threshold."""


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recogniser(directions: Tensor, seed: int) -> Recogniser:
    """Readings that vary by far more along some lines than along others, about a mean far from zero."""
    root = draw(D, D, seed=seed) * torch.logspace(-1, 1, D)
    inverse = torch.linalg.inv((root @ root.T / D + 0.1 * torch.eye(D)).double()).float()
    table = pd.DataFrame({"threshold": np.linspace(0.2, 1.4, len(directions))})
    table.loc[NEVER, "threshold"] = np.nan
    table = table.assign(n_shown=7, precision=np.linspace(0.5, 0.9, len(table)), recall=0.25)
    vectors = discriminants(directions, inverse).float()
    return Recogniser(50 + draw(D, seed=seed + 1), inverse, vectors, measured(table), usual=1.5)


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> ConceptDictionary:
    plain = ConceptDictionary.from_pretrained(write_dataset_release(tmp_path_factory.mktemp("release")))
    found = {layer: recogniser(plain.raw(layer), 30 + layer) for layer in LAYERS}
    return dataclasses.replace(plain, recognisers=found)


def readings(dictionary: ConceptDictionary, n: int, seed: int = 3) -> dict[int, Tensor]:
    """Drawn as the recognisers say that readings vary."""
    found = {}
    for layer, one in dictionary.recognisers.items():
        root = torch.linalg.cholesky(torch.linalg.inv(one.inverse.double()))
        found[layer] = (one.mean + draw(n, D, seed=seed + layer).double() @ root.T).float()
    return found


def naive(dictionary: ConceptDictionary, layer: int, z: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores and distances, one reading and concept at a time."""
    one = dictionary.recognisers[layer]
    P, mean = one.inverse.numpy().astype(np.float64), one.mean.numpy().astype(np.float64)
    d = dictionary.raw(layer).numpy().astype(np.float64)
    scores = [[c @ P @ (x - mean) / np.sqrt(c @ P @ c) for c in d] for x in z.numpy().astype(np.float64)]
    return np.array(scores), np.array([(x - mean) @ P @ (x - mean) / D for x in z.double().numpy()])


def test_what_is_recognised_equals_the_naive_answer(dictionary: ConceptDictionary) -> None:
    given = readings(dictionary, 17)
    found = dictionary.recognise(given)
    assert tuple(found.columns) == COLUMNS
    usual = 0
    for layer in LAYERS:
        scores, distance = naive(dictionary, layer, given[layer])
        one = dictionary.recognisers[layer]
        np.testing.assert_allclose(one.scores(given[layer]), scores, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one.distance(given[layer]), distance, rtol=1e-9)
        threshold = one.concepts["threshold"].to_numpy()
        for reading in range(17):
            rows = found[(found["layer"] == layer) & (found["reading"] == reading)]
            over = scores[reading] - threshold
            expected = [c for c in np.argsort(-over) if over[c] >= 0] if distance[reading] <= 1.5 else []
            assert list(rows["concept"]) == [WORDS[c] for c in expected]
            np.testing.assert_allclose(rows["score"], scores[reading][expected], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(rows["threshold"], threshold[expected])
            np.testing.assert_allclose(rows["precision"], one.concepts["precision"].to_numpy()[expected])
            usual += bool(len(expected))
    assert 5 < usual < 34  # some readings show something, and some nothing
    assert WORDS[NEVER] not in set(found["concept"])
    assert found["reading"].is_monotonic_increasing


def test_at_most_n_are_named_the_most_certain_ones(dictionary: ConceptDictionary) -> None:
    given = readings(dictionary, 17)
    every, some = dictionary.recognise(given), dictionary.recognise(given, n=2)
    expected = every.groupby(["reading", "layer"], sort=False).head(2).reset_index(drop=True)
    pd.testing.assert_frame_equal(some, expected, check_like=False)
    assert len(some) < len(every)


def test_of_a_reading_unlike_the_stimuli_nothing_is_named(dictionary: ConceptDictionary) -> None:
    given = {1: readings(dictionary, 1)[1]}
    assert dictionary.recognise(given).attrs["notes"] == []
    one = dictionary.recognisers[1]
    far = {1: one.mean + 100 * (given[1] - one.mean)}
    found = dictionary.recognise(far)
    assert len(found) == 0
    (note,) = found.attrs["notes"]
    assert note.startswith("reading 0, layer 1: unlike the stimuli")
    assert note.endswith("99 % are within 1.5: nothing is named")
    anyway = dictionary.recognise(far, unusual_ok=True)
    assert len(anyway) > 0
    assert anyway.attrs["notes"][0].endswith("names may be wrong")


def test_blocks_do_not_change_what_is_found(
    dictionary: ConceptDictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, given = dictionary.recognisers[1], readings(dictionary, 11)
    z = given[1]
    given[2][9] += 100
    expected = one.scores(z), discriminants(dictionary.raw(1), one.inverse)
    whole = dictionary.recognise(given, n=3)
    monkeypatch.setattr("daco.recognition.BLOCK", 4)
    torch.testing.assert_close(one.scores(z), expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(discriminants(dictionary.raw(1), one.inverse), expected[1])
    found = dictionary.recognise(given, n=3)
    pd.testing.assert_frame_equal(found, whole)
    assert found.attrs["notes"] == whole.attrs["notes"]
    assert any(note.startswith("reading 9, layer 2: unlike") for note in found.attrs["notes"])
    assert {1, 10} <= set(found["reading"]) - {9}


def test_a_discriminant_of_nothing_is_zero(dictionary: ConceptDictionary) -> None:
    one, directions = dictionary.recognisers[1], dictionary.raw(1).clone()
    directions[2] = 0
    found = discriminants(directions, one.inverse)
    assert float(found[2].abs().sum()) == 0
    torch.testing.assert_close(found[3].float(), one.vectors[3])


def test_covariance_of_all_readings_gives_the_line_of_that_within_classes() -> None:
    z, shows = draw(400, D, seed=8).double() @ draw(D, D, seed=9).double(), torch.arange(400) % 5 == 0
    z[shows] += draw(D, seed=10).double()
    direction = z[shows].mean(0) - z[~shows].mean(0)
    within = torch.cat([z[shows] - z[shows].mean(0), z[~shows] - z[~shows].mean(0)])
    lines = [torch.linalg.solve(torch.cov(x.T, correction=0), direction) for x in (z, within)]
    assert float(torch.nn.functional.cosine_similarity(*lines, dim=0)) == pytest.approx(1, abs=1e-9)


# Bad input.


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ({1: draw(2, D) / 0}, {}, ActivationError, "layer 1: expected finite readings, got NaN or infinity"),
        ({1: draw(2, D - 1)}, {}, ModelMismatchError, r"expected readings \[n, 32\], got \[2, 31\]"),
        ({1: draw(D)}, {}, ModelMismatchError, r"expected readings \[n, 32\], got \[32\]"),
        ({0: draw(2, D)}, {}, UnknownLayerError, r"expected layers among \[1, 2\], got \[0\]"),
        ({1: draw(2, D)}, {"n": 0}, ValueError, "n: expected at least 1, got 0"),
    ],
)
def test_readings_that_are_none_are_refused(
    dictionary: ConceptDictionary, given: dict, options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        dictionary.recognise(given, **options)


def test_no_readings_are_no_names(dictionary: ConceptDictionary) -> None:
    for given in ({}, {1: torch.empty(0, D)}):
        found = dictionary.recognise(given)
        assert (len(found), tuple(found.columns), found.attrs["notes"]) == (0, COLUMNS, [])


def test_statistics_that_do_not_fit_are_refused(dictionary: ConceptDictionary) -> None:
    one = dictionary.recognisers[1]
    with pytest.raises(FormatError, match=r"shapes \[d\], \[d, d\] and \[13, d\]"):
        dataclasses.replace(one, inverse=one.inverse[:-1])
    with pytest.raises(FormatError, match=r"shapes \[d\], \[d, d\] and \[13, d\]"):
        dataclasses.replace(one, vectors=one.vectors[:-1])
    for change in ({"usual": float("nan")}, {"mean": one.mean / 0}, {"vectors": one.vectors * torch.nan}):
        with pytest.raises(FormatError, match="statistics of readings that are finite"):
            dataclasses.replace(one, **change)
    with pytest.raises(FormatError, match="layer 1: expected 13 concepts and width 32, got 12 and 32"):
        dataclasses.replace(dictionary, recognisers={1: one.rows(range(12))})


# New dictionaries from old ones.


def test_a_part_names_as_the_whole_does(dictionary: ConceptDictionary) -> None:
    given = readings(dictionary, 9)
    part = dictionary.subset(["gun", "river", "oak"], layers=[2])
    assert list(part.recognisers) == [2]
    every = dictionary.recognise({2: given[2]})
    expected = every[every["concept"].isin(["gun", "river", "oak"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part.recognise({2: given[2]}), expected)
    assert len(expected) > 0


def test_a_new_concept_has_scores_and_no_name(dictionary: ConceptDictionary) -> None:
    given = readings(dictionary, 9)
    negatives = {layer: z - 1 for layer, z in given.items()}
    larger = dictionary.extend("bow", given, negatives)
    pd.testing.assert_frame_equal(larger.recognise(given), dictionary.recognise(given))
    for layer in LAYERS:
        one = larger.recognisers[layer]
        scores = one.scores(given[layer])
        np.testing.assert_allclose(scores, naive(larger, layer, given[layer])[0], rtol=1e-5, atol=1e-5)
        last = one.concepts.iloc[-1]
        assert np.isnan(last["threshold"])
        assert last["n_shown"] == 0
        assert one.concepts.dtypes.equals(dictionary.recognisers[layer].concepts.dtypes)


@pytest.mark.parametrize("keep", ["ours", "theirs"])
@pytest.mark.parametrize("same", [True, False])
def test_thresholds_of_another_dictionary_hold_only_where_readings_vary_alike(
    dictionary: ConceptDictionary, keep: str, same: bool
) -> None:
    """Ours has the first nine concepts, the other all but the first three, one with another direction."""
    ours, theirs = dictionary.subset(WORDS[:9]), dictionary.subset(WORDS[3:])
    vectors = {layer: rows.clone() for layer, rows in theirs.vectors.items()}
    for rows in vectors.values():
        rows[2] *= -1
    found = {}
    for layer, one in theirs.recognisers.items():
        turned = discriminants(vectors[layer], one.inverse).float()
        table = one.concepts.assign(threshold=one.concepts["threshold"] + 0.5)
        mean = one.mean if same else one.mean + 1
        found[layer] = dataclasses.replace(one, concepts=table, mean=mean, vectors=turned)
    theirs = dataclasses.replace(theirs, vectors=vectors, recognisers=found)
    merged = ours.merge(theirs, on_conflict=keep).dictionary
    assert list(merged.concepts["concept"]) == WORDS
    for layer in LAYERS:
        one, plain = merged.recognisers[layer], dictionary.recognisers[layer].concepts["threshold"].to_numpy()
        expected = plain.copy()
        theirs_now = [*range(9, N_CONCEPTS), *([5] if keep == "theirs" else [])]  # new, or turned
        expected[theirs_now] = plain[theirs_now] + 0.5 if same else np.nan
        np.testing.assert_allclose(one.concepts["threshold"], expected)
        torch.testing.assert_close(one.vectors, discriminants(merged.raw(layer), one.inverse).float())
        torch.testing.assert_close(one.mean, dictionary.recognisers[layer].mean)


def test_what_another_dictionary_does_not_tell_stays_told(dictionary: ConceptDictionary) -> None:
    """It was loaded without recognition, and has another label and another direction."""
    plain = dataclasses.replace(dictionary, recognisers={})
    other = dataclasses.replace(plain, concepts=plain.concepts.assign(polarity="neutral"))
    kept = dictionary.merge(other, on_conflict="theirs").dictionary
    assert set(kept.concepts["polarity"]) == {"neutral"}
    for layer, one in dictionary.recognisers.items():
        pd.testing.assert_frame_equal(kept.recognisers[layer].concepts, one.concepts)
        assert torch.equal(kept.recognisers[layer].vectors, one.vectors)
    turned = {layer: torch.cat([rows[:2], -rows[2:3], rows[3:]]) for layer, rows in plain.vectors.items()}
    kept = dictionary.merge(dataclasses.replace(plain, vectors=turned), on_conflict="theirs").dictionary
    for layer, one in dictionary.recognisers.items():
        told = kept.recognisers[layer].concepts["threshold"].notna()
        assert set(np.flatnonzero(one.concepts["threshold"].notna() & ~told)) == {2}
        torch.testing.assert_close(kept.recognisers[layer].vectors[2], -one.vectors[2])
    assert plain.merge(dictionary).dictionary.recognisers == {}


# To disk and back.


def test_a_saved_dictionary_names_the_same(dictionary: ConceptDictionary, tmp_path: Path) -> None:
    dictionary.save_pretrained(tmp_path / "a", model="tiny")
    assert ConceptDictionary.from_pretrained(tmp_path / "a").recognisers == {}
    again = ConceptDictionary.from_pretrained(tmp_path / "a", recognition=True)
    given = readings(dictionary, 9)
    pd.testing.assert_frame_equal(again.recognise(given), dictionary.recognise(given))
    for layer, one in dictionary.recognisers.items():
        other = again.recognisers[layer]
        assert one.same_scale(other)
        assert one.usual == other.usual
        assert torch.equal(one.vectors, other.vectors)
        pd.testing.assert_frame_equal(one.concepts, other.concepts)
    table = read_table(
        tmp_path / "a/data/recognition_tiny/layer_1-00000-of-00001.parquet", recognition_schema(D)
    )
    assert table["threshold"].null_count == table["threshold"].to_pylist().count(None) == 1
    assert list(
        ConceptDictionary.from_pretrained(tmp_path / "a", layers=[2], recognition=True).recognisers
    ) == [2]
    dictionary.save_pretrained(tmp_path / "b", model="tiny")
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.0"])
def test_releases_of_older_formats_load_and_say_what_they_lack(tmp_path: Path, version: str) -> None:
    old = ConceptDictionary.from_pretrained(
        write_dataset_release(tmp_path, format_version=version), recognition=True
    )
    assert old.recognisers == {}
    with pytest.raises(
        FormatError, match="expected a dictionary that tells what is shown, got another: load it with"
    ):
        old.recognise({1: draw(2, D)})
    assert old.subset(WORDS[:3]).merge(old).dictionary.recognisers == {}


def broken(folder: Path, config: str, change: object) -> Path:
    """A saved dictionary, the table of layer 1 of one config changed and listed as it is."""
    path = f"data/{config}_tiny/layer_1-00000-of-00001.parquet"
    write_table(folder / path, change(read_table(folder / path)))  # type: ignore[operator]
    manifest = read_manifest(folder)
    manifest["files"][path] = file_entry(folder / path, manifest["files"][path]["rows"])
    write_manifest(folder, manifest)
    return folder


def not_finite(table: pa.Table, column: str) -> pa.Table:
    """The table with a NaN in its fourth row."""
    rows, kind = table[column].to_pylist(), table.schema.field(column).type
    rows[3] = [float("nan")] * D if column == "vector" else float("nan")
    return table.set_column(table.schema.get_field_index(column), column, pa.array(rows, kind))


def open_broken(folder: Path) -> None:
    assert (
        len(ConceptDictionary.from_pretrained(folder)) == N_CONCEPTS
    )  # of no concern where it is not asked for
    ConceptDictionary.from_pretrained(folder, recognition=True)


def test_broken_tables_are_refused(dictionary: ConceptDictionary, tmp_path: Path) -> None:
    for name in "abcdef":
        dictionary.save_pretrained(tmp_path / name, model="tiny")
    reverse = list(range(N_CONCEPTS))[::-1]
    with pytest.raises(
        FormatError, match=r"recognition_tiny/layer_1: expected the rows of `concepts` in order"
    ):
        open_broken(broken(tmp_path / "a", "recognition", lambda t: t.take(reverse)))
    with pytest.raises(FormatError, match="statistics_tiny/layer_1: expected dimensions 0 to 31"):
        open_broken(broken(tmp_path / "b", "statistics", lambda t: t.take(list(range(D))[::-1])))
    with pytest.raises(FormatError, match="expected column 'threshold'"):
        open_broken(broken(tmp_path / "c", "recognition", lambda t: t.drop_columns(["threshold"])))
    for name, config, column in (("e", "recognition", "vector"), ("f", "statistics", "mean")):
        with pytest.raises(
            FormatError, match=r"recognition_tiny or statistics_tiny, layer_1: expected statistics .* finite"
        ):
            open_broken(broken(tmp_path / name, config, lambda t, column=column: not_finite(t, column)))
    (tmp_path / "d" / "data/statistics_tiny/layer_2-00000-of-00001.parquet").unlink()
    with pytest.raises(IntegrityError, match="statistics_tiny"):
        open_broken(tmp_path / "d")


@pytest.mark.parametrize("usual", [{"7": 1.0}, {"1": 0}, {"1": "far"}, [1.0], {"1": float("inf")}])
def test_a_manifest_of_broken_distances_is_refused(
    dictionary: ConceptDictionary, tmp_path: Path, usual: object
) -> None:
    dictionary.save_pretrained(tmp_path / "a", model="tiny")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text("utf-8"))
    validate(manifest)
    manifest["models"]["tiny"]["usual"] = usual
    with pytest.raises(FormatError, match="expected usual as numbers above 0 of some layers"):
        validate(manifest)


def test_columns_are_those_of_the_format() -> None:
    assert ["concept_id", "concept", "vector", *MEASURED] == recognition_schema(3).names
