"""A recipe is read as typed, and a wrong section, field, type, range or override is refused by name."""

from pathlib import Path

import pytest

from builders.recipe import load_recipe, public_recipe, recipe_of
from daco.errors import RecipeError

MODEL = {"model": {"tiny": "llava"}}


def test_fields_are_read_with_their_types(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[model]\ntiny = "llava"\n[activations]\nlayers = [1, 2]\n[atoms]\neta = 1\n', "utf-8")
    recipe = load_recipe(
        path, ["corpus.path=/some/where", "corpus.rows=7", "corpus.redistribute_images=true"]
    )
    assert recipe.activations.layers == (1, 2)
    assert recipe.atoms.eta == 1.0
    assert isinstance(recipe.atoms.eta, float)
    assert (recipe.corpus.path, recipe.corpus.rows, recipe.corpus.redistribute_images) == (
        "/some/where",
        7,
        True,
    )


def test_local_places_never_reach_a_manifest(tmp_path: Path) -> None:
    place = str(tmp_path)
    corpus, model, clip = {"path": place, "images": place}, {"id": place}, {"model": place}
    facts = public_recipe(recipe_of({"corpus": corpus, "model": model, "clip": clip}))
    assert place not in repr(facts)
    hub = public_recipe(recipe_of({"model": {"id": "org/model"}, "clip": {"model": "org/clip"}}))
    assert (hub["model"]["id"], hub["clip"]["model"]) == ("org/model", "org/clip")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"corpse": {}}, "unknown section 'corpse'"),
        ({"corpus": {"pth": "x"}}, "[corpus]: unknown field 'pth'"),
        ({"corpus": 3}, "expected a table of fields"),
        ({"corpus": {"rows": "7"}}, "corpus.rows: expected int, got '7'"),
        ({"corpus": {"rows": True}}, "corpus.rows: expected int, got True"),
        ({"activations": {"layers": [1, "2"]}}, "activations.layers: expected int, got '2'"),
        ({"activations": {"layers": 1}}, "activations.layers: expected a list, got 1"),
        ({"activations": {"layers": [2, 1]}}, "expected rising layer numbers"),
        ({"corpus": {"kind": "zip"}}, "corpus.kind: expected one of"),
        ({"stimuli": {"template": "a photo"}}, "expected '{concept}' in it"),
    ],
)
def test_a_broken_recipe_is_refused(sections: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of(MODEL | sections)
    assert message in str(caught.value)


def test_a_real_and_a_tiny_model_together_are_refused() -> None:
    with pytest.raises(RecipeError, match="got both"):
        recipe_of({"model": {"id": "org/model", "tiny": "llava"}})


def test_a_recipe_needs_a_model() -> None:
    with pytest.raises(RecipeError, match="expected an `id`"):
        recipe_of({})


@pytest.mark.parametrize("override", ["corpus.path", "corpus=1", "=1", "path=1"])
def test_a_broken_override_is_refused(tmp_path: Path, override: str) -> None:
    (tmp_path / "r.toml").write_text('[model]\ntiny = "llava"\n', "utf-8")
    with pytest.raises(RecipeError, match=r"expected section\.field=value"):
        load_recipe(tmp_path / "r.toml", [override])


def test_no_file_and_no_toml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected a recipe file, got none"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "r.toml").write_text("[model\n", "utf-8")
    with pytest.raises(RecipeError, match="expected TOML"):
        load_recipe(tmp_path / "r.toml")
