"""Rows of labelled atoms steer as all weights do: a TopK by its threshold, from the compact file too."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_sae
import torch
from release_fixture import write_model_release
from torch.utils._python_dispatch import TorchDispatchMode

import daco.load
from daco.errors import FormatError, IntegrityError, SteeringOnlyError
from daco.manifest import canonical_json, file_entry, release_files
from daco.methods import SAESteering
from daco.sae import SAE, LayerSAE
from daco.sae_files import write_layer
from daco.steering_sae import SteeringSAE
from daco.top_k import top_k

THRESHOLD = 1.25


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(size=(12, 32)) * 3)


def with_threshold(sae: SteeringSAE, threshold: float = THRESHOLD) -> SteeringSAE:
    layers = {
        number: dataclasses.replace(layer, jumprelu_threshold=threshold, jumprelu_agreement=0.875)
        for number, layer in sae.layers.items()
    }
    return dataclasses.replace(sae, layers=layers)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_rows_give_the_columns_of_the_whole_code(activation, z):
    sae = with_threshold(small_sae.steering_sae(activation=activation))
    for number, layer in sae.layers.items():
        method = SAESteering(sae, gamma=0.0, form="threshold")
        atoms = method.atoms(number)
        whole = layer.sae.as_jumprelu(THRESHOLD) if activation == "topk" else layer.sae
        expected = whole.encode(z)[:, atoms]
        change = method.change(number, z)
        torch.testing.assert_close(change.strengths, expected, rtol=1e-12, atol=1e-12)
        assert 0 < (expected > 0).sum() < expected.numel()
        torch.testing.assert_close(change.delta, -expected @ layer.sae.W_dec[atoms], rtol=1e-12, atol=1e-12)
        if activation != "topk":  # the one form there is
            assert torch.equal(SAESteering(sae, gamma=0.0).change(number, z).delta, change.delta)


def test_the_threshold_form_differs_from_topk_and_says_how_much(z):
    sae = with_threshold(small_sae.steering_sae())
    exact, rows = SAESteering(sae, gamma=0.0), SAESteering(sae, gamma=0.0, form="threshold")
    assert (exact.form, rows.form) == ("exact", "threshold")
    assert not torch.allclose(exact.change(1, z).delta, rows.change(1, z).delta)
    assert exact.notes() == []
    assert rows.notes() == [
        "TopK by its calibrated threshold; share of active atoms that both forms have, on held-out tokens: "
        "0.875 (layer 1), 0.875 (layer 2)"
    ]
    unmeasured = {n: dataclasses.replace(x, jumprelu_agreement=None) for n, x in sae.layers.items()}
    silent = SAESteering(dataclasses.replace(sae, layers=unmeasured), form="threshold")
    assert "tokens: not measured (layer 1)" in silent.notes()[0]
    assert SAESteering(with_threshold(small_sae.steering_sae(activation="relu")), form="exact").notes() == []


def test_the_threshold_of_the_kth_atom_is_the_exact_form(z):
    """With a threshold between the kth and the next pre-activation of a token, both forms are the same."""
    sae = small_sae.steering_sae()
    layer = sae.layers[1]
    for token in z[:, None]:
        values = layer.sae.pre_activations(token).relu()[0].sort(descending=True).values
        between = float((values[layer.sae.k - 1] + values[layer.sae.k]).detach() / 2)
        exact, rows = SAESteering(sae), SAESteering(with_threshold(sae, between), form="threshold")
        torch.testing.assert_close(exact.change(1, token), rows.change(1, token), rtol=1e-12, atol=1e-12)


def test_a_topk_without_a_threshold_has_no_threshold_form():
    with pytest.raises(SteeringOnlyError, match=r"threshold for TopK layers \[1, 2\], got none"):
        SAESteering(small_sae.steering_sae(), form="threshold")
    with pytest.raises(ValueError, match="form: expected one of"):
        SAESteering(small_sae.steering_sae(), form="rows")
    assert SAESteering(small_sae.steering_sae(activation="relu"), form="threshold").notes() == []


def test_topk_still_gives_ties_to_the_lower_index():
    pre = torch.from_numpy(np.random.default_rng(0).integers(-2, 4, (500, 11)).astype(float))
    for k in (1, 4, 11):
        order = (-pre.relu()).sort(dim=1, stable=True).indices[:, :k]
        expected = torch.zeros_like(pre).scatter(1, order, pre.relu().gather(1, order))
        assert torch.equal(top_k(pre, k), expected)


def test_a_model_is_steered_by_what_was_chosen(tiny_llava):
    model, _ = tiny_llava
    facts = daco.ModelFacts.of(model)
    sae = with_threshold(small_sae.steering_sae(facts, layers=(0, 1), dtype=torch.float32))
    chosen = {"remove": {"c3": 1.0, "c4": 0.5}, "keep": {1: [27]}, "form": "threshold", "gamma": 0.0}
    ids = torch.arange(5, 17)[None]
    with sae.steer(model, base_model_ok=True, **chosen) as run, torch.no_grad():
        steered = model(input_ids=ids).logits
    handle = sae.attach(model, base_model_ok=True, **chosen)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, steered)
    handle.remove()
    assert [layer.labelled for layer in run.report().layers] == [4, 3]  # atoms 3, 4, 26, 27
    assert any(layer.atoms for layer in run.report().layers)
    assert any("calibrated threshold" in note for note in run.report().notes)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, steered)


class Calls(TorchDispatchMode):
    """Names of the operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("form", ["exact", "threshold"])
def test_a_token_waits_for_nothing_and_reads_rows_alone(activation, form, z):
    sae = with_threshold(small_sae.steering_sae(activation=activation))
    method = SAESteering(sae, form=form)
    method.change(1, z)  # the weights are put in place once
    with Calls() as calls:
        method.change(1, z[:1])
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item"}
    assert not waiting & set(calls.names)
    assert len(calls.names) <= (18 if form == "exact" and activation == "topk" else 8)
    read = {name: t for name, t in vars(method._weights[1].on(z.device)).items() if t is not None}
    whole = [name for name, tensor in read.items() if small_sae.N_ATOMS in tensor.shape]
    assert whole == (["W_enc", "b_enc"] if form == "exact" and activation == "topk" else [])


# the compact files

N_ATOMS, D_MODEL, N_LABELLED = 3_001, 96, 300


def wide_layer(layer: int, activation: str = "topk", threshold: float | None = 1.5) -> LayerSAE:
    """A tenth of the atoms is labelled; enough of them that headers do not count."""
    draw = np.random.default_rng(layer)
    W_dec = torch.from_numpy(draw.normal(size=(N_ATOMS, D_MODEL)) / D_MODEL**0.5).float()
    rest = (torch.from_numpy(draw.normal(size=n)).float() / 10 for n in (N_ATOMS, D_MODEL))
    b_enc, b_dec = rest
    per_atom = (
        torch.from_numpy(draw.uniform(-0.5, 1.5, N_ATOMS)).float() if activation == "jumprelu" else None
    )
    k = 99 if activation == "topk" else None
    sae = SAE(W_dec.T.contiguous(), b_enc, W_dec, b_dec, activation, k, per_atom)
    poles = draw.uniform(0, 0.3, (2, N_ATOMS))
    labelled = draw.permutation(N_ATOMS)[:N_LABELLED]
    poles[np.arange(N_LABELLED) % 2, labelled] = draw.uniform(0.3001, 0.9, N_LABELLED)
    names = [[f"concept {i}", f"concept {i + 1}", "another"] for i in range(N_ATOMS)]
    atoms = pd.DataFrame({"atom": range(N_ATOMS), "polarity": "neutral", "nearest_concepts": names})
    atoms = atoms.assign(cos_undesirable=poles[0], cos_desirable=poles[1], firing_rate=0.125)
    atoms = atoms.assign(nearest_concept_ids=names, nearest_cosines=[[0.9, 0.5, 0.25]] * N_ATOMS)
    atoms = atoms.assign(group=[f"noun.{'abc'[i % 3]}" for i in range(N_ATOMS)])
    found = LayerSAE(layer, sae.requires_grad_(False), atoms, 3.5 + layer)
    found = dataclasses.replace(found, atoms=atoms.assign(polarity=found.labels(0.3)))
    assert (found.labels() != "neutral").sum() == N_LABELLED
    if activation == "topk" and threshold:
        found = dataclasses.replace(found, jumprelu_threshold=threshold, jumprelu_agreement=0.875)
    return found


def wide_release(folder: Path, activation: str = "topk", threshold: float | None = 1.5) -> Path:
    """A release of two such layers."""
    write_model_release(folder)
    config = json.loads((folder / "config.json").read_text())
    config["base_model"]["hidden_size"] = D_MODEL
    (folder / "config.json").write_text(canonical_json(config | {"activation": activation}))
    for layer in (1, 2):
        shutil.rmtree(folder / f"layers.{layer}")
        write_layer(folder, wide_layer(layer, activation, threshold), daco.ModelFacts(**config["base_model"]))
    return reseal(folder)


def reseal(folder: Path) -> Path:
    """Make the manifest list the files as they are."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: file_entry(folder / name) for name in release_files(folder)}
    (folder / "manifest.json").write_text(canonical_json(manifest))
    return folder


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("releases")
    return {name: wide_release(folder / name, name) for name in ("topk", "relu", "jumprelu")}


@pytest.fixture
def wide_z() -> torch.Tensor:
    return 3 * torch.from_numpy(np.random.default_rng(9).normal(size=(12, D_MODEL))).float()


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("eta", [None, 0.3, 0.5])
def test_both_loads_steer_bit_for_bit_alike(releases, activation, eta, wide_z):
    whole = SteeringSAE.from_pretrained(releases[activation])
    rows = SteeringSAE.from_pretrained(releases[activation], steering_only=True)
    some = {layer: {int(atom): 0.5 for atom in found.numbers[::3]} for layer, found in rows.layers.items()}
    for remove in (None, some):
        mine = SAESteering(rows, 0.25, eta, remove=remove)
        theirs = SAESteering(whole, 0.25, eta, form="threshold", remove=remove)
        for layer in (1, 2):
            atoms = mine.atoms(layer)
            assert atoms == theirs.atoms(layer)
            assert [mine.names(layer, i) for i in atoms] == [theirs.names(layer, i) for i in atoms]
            got, expected = mine.change(layer, wide_z), theirs.change(layer, wide_z)
            assert torch.equal(got.delta, expected.delta)
            assert torch.equal(got.strengths, expected.strengths)


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_and_as_the_unsliced_product_does(releases, activation, wide_z):
    whole = SteeringSAE.from_pretrained(releases[activation])
    method = SAESteering(SteeringSAE.from_pretrained(releases[activation], steering_only=True), gamma=0.0)
    for layer, found in whole.layers.items():
        sae = found.sae.as_jumprelu(1.5) if activation == "topk" else found.sae
        code = sae.encode(wide_z)
        code[:, torch.from_numpy(found.labels() != "undesirable")] = 0
        expected = -code @ sae.W_dec
        got = method.change(layer, wide_z)
        assert (got.delta - expected).norm() < 1e-5 * expected.norm()
        assert 0 < (got.strengths > 0).sum() < got.strengths.numel()
        assert torch.equal(got.strengths > 0, code[:, method.atoms(layer)] > 0)


def test_little_more_is_read_than_the_labelled_share(releases, monkeypatch):
    read: dict[str, int] = {}
    path_of = daco.load.Snapshot.path

    def counted(snapshot: daco.load.Snapshot, name: str) -> Path:
        path = path_of(snapshot, name)
        read[name] = path.stat().st_size
        return path

    monkeypatch.setattr(daco.load.Snapshot, "path", counted)
    for folder in releases.values():
        SteeringSAE.from_pretrained(folder)
        whole = sum(read.values())
        read.clear()
        SteeringSAE.from_pretrained(folder, steering_only=True)
        files = ["cfg.json", "steering.safetensors", "steering_atoms.parquet"]
        assert sorted(read) == sorted(
            ["config.json", *(f"layers.{i}/{name}" for i in (1, 2) for name in files)]
        )
        assert sum(read.values()) <= (N_LABELLED / N_ATOMS + 0.01) * whole
        read.clear()


def test_the_weights_need_not_be_there(releases, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(releases["topk"], folder)
    for layer in (1, 2):
        (folder / f"layers.{layer}" / "sae_weights.safetensors").unlink()
        (folder / f"layers.{layer}" / "atoms.parquet").unlink()
    assert len(SteeringSAE.from_pretrained(folder, steering_only=True).layers[1].atoms) == N_LABELLED
    with pytest.raises(IntegrityError, match="sae_weights"):
        SteeringSAE.from_pretrained(folder)


def test_a_release_of_before_has_its_names_in_the_table_of_all_atoms(releases, tmp_path, wide_z):
    folder = tmp_path / "before"
    shutil.copytree(releases["relu"], folder)
    for layer in (1, 2):
        (folder / f"layers.{layer}" / "steering_atoms.parquet").unlink()
    reseal(folder)
    methods = [
        SAESteering(SteeringSAE.from_pretrained(place, steering_only=True))
        for place in (folder, releases["relu"])
    ]
    assert torch.equal(*(method.change(2, wide_z).delta for method in methods))
    assert methods[0].names(2, methods[0].atoms(2)[5]) == methods[1].names(2, methods[1].atoms(2)[5])


def test_what_needs_more_than_the_rows_is_refused(releases):
    sae = SteeringSAE.from_pretrained(releases["topk"], steering_only=True)
    unlabelled = next(i for i in range(N_ATOMS) if i not in sae.layers[1].numbers)
    for chosen, message in (
        ({"eta": 0.29}, "expected eta from 0.3, at which the atoms that were loaded are labelled, got 0.29"),
        ({"form": "exact"}, r"the whole encoder of TopK layers \[1, 2\], got the labelled rows"),
        ({"remove": {1: [unlabelled]}}, rf"among the 300 labelled ones, got {unlabelled}; load without"),
    ):
        with pytest.raises(SteeringOnlyError, match=message):
            SAESteering(sae, **chosen)
    assert SAESteering(sae).form == "threshold"
    assert "0.875 (layer 1)" in SAESteering(sae).notes()[0]
    assert "labelled atoms alone" in SAESteering(sae, remove="noun.b").notes()[-1]


def test_a_release_of_a_topk_without_threshold_is_refused(tmp_path):
    folder = wide_release(tmp_path / "none", threshold=None)
    with pytest.raises(
        SteeringOnlyError, match=r"layers\.1: expected a calibrated threshold, .* load without"
    ):
        SteeringSAE.from_pretrained(folder, steering_only=True)
    assert SteeringSAE.from_pretrained(folder).layers[1].labelled_at is None


def test_rows_that_do_not_go_with_their_atoms_are_refused(releases, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(releases["relu"], folder)
    for other in ("atoms.parquet", "../layers.2/steering_atoms.parquet"):
        shutil.copy(folder / "layers.1" / other, folder / "layers.1" / "steering_atoms.parquet")
        reseal(folder)
        with pytest.raises(FormatError, match="expected the labelled atoms of steering"):
            SteeringSAE.from_pretrained(folder, steering_only=True)


def test_only_these_files_are_fetched_from_the_hub(releases, monkeypatch):
    fetched = []

    def download(repo: str, name: str, **options: object) -> str:
        fetched.append(name)
        return str(releases["topk"] / name)

    monkeypatch.setattr(daco.load, "hf_hub_download", download)
    sae = SteeringSAE.from_pretrained("org/daco-sae-tiny", layers=[2], steering_only=True)
    assert list(sae.layers) == [2]
    files = ["cfg.json", "steering.safetensors", "steering_atoms.parquet"]
    assert sorted(set(fetched)) == ["config.json", *(f"layers.2/{name}" for name in files), "manifest.json"]
