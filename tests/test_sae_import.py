"""Proves that folders of SAELens and sparsify become SAEs of the same numbers; what does not fit is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from daco.errors import ArtefactNotFoundError, DacoError, FormatError, IntegrityError
from daco.sae_import import read_sae

SAELENS = {"architecture": "topk", "k": 5, "d_in": 32, "d_sae": 37, "dtype": "float32", "device": "cpu"}
SPARSIFY = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": 5, "d_in": 32}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(**others: torch.Tensor) -> dict[str, torch.Tensor]:
    made = {
        "W_enc": draw(32, 37, seed=1),
        "b_enc": draw(37, seed=2),
        "W_dec": draw(37, 32, seed=3),
        "b_dec": draw(32, seed=4),
    }
    return made | others


def saelens(folder: Path, w: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    (folder / "cfg.json").write_text(json.dumps(SAELENS | changes))
    save_file(w or tensors(), folder / "sae_weights.safetensors")
    return folder


def sparsify(folder: Path, w: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    theirs = {names.get(n, n): t.T.contiguous() if n == "W_enc" else t for n, t in (w or tensors()).items()}
    (folder / "cfg.json").write_text(json.dumps(SPARSIFY | changes))
    save_file(theirs, folder / "sae.safetensors")
    return folder


def naive(
    w: dict[str, torch.Tensor], z: torch.Tensor, rescale: bool = False, centre: bool = True
) -> torch.Tensor:
    """A TopK's reconstruction as SAELens writes it."""
    norms = w["W_dec"].norm(dim=1)
    pre = (z - centre * w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    pre = pre * norms if rescale else pre
    values, atoms = pre.topk(5, dim=1)
    codes = torch.zeros_like(pre).scatter(1, atoms, values.relu())
    return (codes / norms if rescale else codes) @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_every_way_of_saelens_gives_the_same_reconstruction(tmp_path, rescale, centre):
    folder = saelens(tmp_path, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=centre)
    z = 3 * draw(12, 32, seed=9)
    torch.testing.assert_close(
        read_sae(folder)(z), naive(tensors(), z, rescale, centre), rtol=1e-4, atol=1e-4
    )


def test_saelens_s_other_activations_are_known(tmp_path):
    assert read_sae(saelens(tmp_path, architecture="standard", k=None)).activation == "relu"
    w = tensors(threshold=torch.rand(37))
    sae = read_sae(saelens(tmp_path, w, architecture="jumprelu", k=None))
    assert sae.activation == "jumprelu"
    assert torch.equal(sae.threshold, w["threshold"])


def test_a_folder_of_sparsify_gives_the_same_reconstruction(tmp_path):
    z = 3 * draw(12, 32, seed=9)
    torch.testing.assert_close(read_sae(sparsify(tmp_path))(z), naive(tensors(), z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "changes", "says"),
    [
        (
            saelens,
            {"architecture": "gated"},
            "architecture: expected standard, topk or jumprelu, got 'gated'",
        ),
        (saelens, {"normalize_activations": "layer_norm"}, "normalize_activations: expected none"),
        (saelens, {"reshape_activations": "hook_z"}, "reshape_activations: expected none, got 'hook_z'"),
        (saelens, {"w": tensors(threshold=torch.ones(37))}, "expected tensors"),
        (saelens, {"k": None}, "k: expected 1 to 37"),
        (saelens, {"w": tensors(b_dec=torch.ones(31))}, "b_dec: expected"),
        (sparsify, {"activation": "groupmax"}, "activation: expected topk, got 'groupmax'"),
        (sparsify, {"transcode": True}, "transcode: expected False, got True"),
        (sparsify, {"w": tensors(W_skip=torch.ones(32, 32))}, "expected tensors"),
    ],
)
def test_what_an_sae_cannot_express_is_refused(tmp_path, make, changes, says):
    with pytest.raises(FormatError, match=says):
        read_sae(make(tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("cfg.json", None, ArtefactNotFoundError, "expected an SAE's folder with cfg.json"),
        ("cfg.json", b"{", IntegrityError, "expected JSON"),
        ("cfg.json", b"[]", FormatError, "expected a JSON object"),
        ("cfg.json", b'{"a": 1}', FormatError, "that of SAELens >= 6 or sparsify"),
        ("sae_weights.safetensors", None, ArtefactNotFoundError, "beside cfg.json"),
        ("sae_weights.safetensors", b"\x80\x04pickle", IntegrityError, "expected safetensors"),
    ],
)
def test_a_broken_folder_is_named(
    tmp_path: Path, name: str, content: bytes | None, error: type[DacoError], says: str
) -> None:
    file = saelens(tmp_path) / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=says):
        read_sae(tmp_path)
