"""Small finished stages for the tests of later ones: made-up activations, directions and links."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save_file

from builders import train_sae
from builders.recipe import Recipe, recipe_of
from builders.stages import Work, fingerprint
from builders.token_choice import keep_tokens
from daco.manifest import canonical_json
from daco.tables import CONCEPTS, LINKS, STIMULI, table_of, write_table

D_MODEL, LAYERS, N_CONCEPTS = 32, (1, 2), 11


class Killed(RuntimeError):
    """Stands for a kill of the process."""


class KilledWork(Work):
    """A stage that dies before item number `at` of its progress bars, counted over all of them."""

    at = 0

    def progress(self, items: Iterable, total: int | None = None, unit: str = "it") -> Iterable:
        for item in items:
            if self.at == 0:
                raise Killed(f"before {item}")
            self.at -= 1
            yield item


def opened(recipe: Recipe, out: Path, stage: str, killed_at: int | None = None) -> Work:
    """Work of a stage, its folder made ready as the pipeline does."""
    work = Work(recipe, out, stage) if killed_at is None else KilledWork(recipe, out, stage)
    if killed_at is not None:
        work.at = killed_at
    out.mkdir(parents=True, exist_ok=True)
    assert work.open(fingerprint(stage, {}, {}))
    return work


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def small_recipe(**sections: dict) -> Recipe:
    """A recipe whose activations are at LAYERS."""
    base = {"model": {"tiny": "llava", "name": "toy"}, "activations": {"layers": list(LAYERS)}}
    return recipe_of({name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}})


def stimulus_ids(n: int) -> list[str]:
    return [hashlib.sha256(f"small{i}".encode()).hexdigest()[:16] for i in range(n)]


def write_ids(shard: Path, ids: list[str], sides: list[str] | None = None) -> None:
    """Ids of a shard's stimuli, each with a picture of its own unless `sides` says otherwise."""
    (shard / "ids.json").write_text(json.dumps(ids))
    (shard / "sides.json").write_text(json.dumps(sides or ids))


def dictionary(seed: int = 3) -> dict[str, torch.Tensor]:
    """Raw directions of every layer, with norms far from 1."""
    draw = torch.Generator().manual_seed(seed)
    return {f"layer_{layer}": 5 * torch.randn(N_CONCEPTS, D_MODEL, generator=draw) for layer in LAYERS}


def write_activations(out: Path, n_stimuli: int = 23, shard: int = 9, seed: int = 5) -> None:
    """Tokens that are sparse sums of the dictionary's directions, about a mean, with noise."""
    directions = torch.stack([*dictionary().values()], dim=1)  # [n_concepts, n_layers, d_model]
    draw = np.random.default_rng(seed)
    ids = stimulus_ids(n_stimuli)
    work = opened(small_recipe(), out, "activations")
    for number, start in enumerate(range(0, n_stimuli, shard)):
        part = ids[start : start + shard]
        tokens = [_tokens(directions, draw) for _ in part]
        with work.shard(f"{number:05d}") as folder:
            save_file(keep_tokens(part, tokens, max_norm=100.0)[0], folder / "tokens.safetensors")
            readings = torch.stack([z[-1] for z in tokens])
            save_file({"readings": readings}, folder / "readings.safetensors")
            write_ids(folder, part)
    facts = {"model": model_facts(), "layers": list(LAYERS), "tokens": {"in": 0, "out": 0, "skipped": {}}}
    (work.folder / "facts.json").write_text(canonical_json(facts))
    work.finish({"in": n_stimuli, "out": n_stimuli, "skipped": {}})


def _tokens(directions: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    n = int(draw.integers(5, 14))
    code = draw.gamma(2.0, size=(n, N_CONCEPTS)) * (draw.random((n, N_CONCEPTS)) < 0.25)
    noise = draw.normal(scale=0.3, size=(n, *directions.shape[1:]))
    return (
        torch.einsum("nc,cld->nld", torch.from_numpy(code).float(), directions)
        + torch.from_numpy(noise + 4).float()
    )


def model_facts() -> dict:
    shape = {"model_type": "llava", "hidden_size": D_MODEL, "n_layers": 4}
    return {"id": "", "revision": "", "fingerprint": {"0.self_attn.q_proj.weight": "0.5 -0.25"}} | shape


def write_directions(out: Path) -> None:
    """The dictionary as the directions stage leaves it."""
    work = opened(small_recipe(), out, "directions")
    save_file(dictionary(), work.folder / "directions.safetensors")
    save_file(
        {f"layer_{layer}": torch.full((D_MODEL,), 4.0 + layer) for layer in LAYERS},
        work.folder / "baseline.safetensors",
    )
    facts = {
        "model": model_facts(),
        "layers": list(LAYERS),
        "R": {str(layer): 10.0 + layer for layer in LAYERS},
        "n_positive": [4] * N_CONCEPTS,
        "n_negative": [4] * N_CONCEPTS,
    }
    (work.folder / "facts.json").write_text(canonical_json(facts))
    work.finish({"in": 8 * N_CONCEPTS, "out": 8 * N_CONCEPTS, "skipped": {}})


POLARITIES = ("undesirable", "desirable", "neutral")


def concept_rows(polarities: tuple[str, ...] = POLARITIES) -> list[dict]:
    """Eleven concepts whose polarities take turns."""
    return [
        {
            "concept_id": f"user:concept-{i}",
            "concept": f"concept {i}",
            "synset": "",
            "pos": "n",
            "definition": f"the {i}th thing",
            "group": "noun.artifact",
            "rank": i,
            "polarity": polarities[i % len(polarities)],
            "polarity_source": "table",
            "n_positive": 3,
        }
        for i in range(N_CONCEPTS)
    ]


def write_polarity(out: Path, polarities: tuple[str, ...] = POLARITIES) -> None:
    """The concepts as the polarity stage leaves them."""
    work = opened(small_recipe(), out, "polarity")
    write_table(work.folder / "concepts.parquet", table_of(concept_rows(polarities), CONCEPTS))
    work.finish({"in": N_CONCEPTS, "out": N_CONCEPTS, "skipped": {}})


def write_sae(out: Path, **changes: object) -> None:
    """SAEs of a few steps, by the real stage."""
    sizes = {"n_atoms": 37, "k": 3, "steps": 4, "batch": 17, "holdout": 0.3}
    train_sae.run(opened(small_recipe(sae=sizes | changes), out, "sae"))


def write_corpus(out: Path, n: int = 29, captions: int = 1) -> None:
    """Pairs with small images, so many captions each; the first 23 are those of `write_activations`."""
    work = opened(small_recipe(), out, "corpus")
    (work.folder / "images").mkdir()
    draw = np.random.default_rng(2)
    ids, rows = [*stimulus_ids(23), *(f"{i:016x}" for i in range(n - 23))], []
    for i, stimulus in enumerate(ids):
        if i % captions == 0:
            pixels = draw.integers(0, 256, (21, 33, 3), dtype=np.uint8)
        file = work.folder / "images" / f"{stimulus}.png"
        Image.fromarray(pixels).save(file)
        rows.append(
            {
                "stimulus_id": stimulus,
                "caption": f"a photo of thing {i % N_CONCEPTS} and thing {i % 3}",
                "image_url": f"https://example.org/{i}.png",
                "image_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "width": 33,
                "height": 21,
                "source": "small",
                "source_key": str(i),
                "file": f"images/{file.name}",
            }
        )
    write_table(
        work.folder / "stimuli.parquet", table_of(rows, STIMULI.append(pa.field("file", pa.string())))
    )
    work.finish({"in": n, "out": n, "skipped": {}})


def write_links(out: Path) -> None:
    """Three positives and three negatives a concept, over the first 23 stimuli."""
    work = opened(small_recipe(), out, "stimuli")
    ids, draw, rows = stimulus_ids(23), np.random.default_rng(8), []
    for concept in concept_rows():
        for rank, stimulus in enumerate(draw.choice(ids, 6, replace=False)):
            link = {"concept_id": concept["concept_id"], "concept": concept["concept"], "rank": rank % 3}
            role = "positive" if rank < 3 else "negative"
            rows.append(
                link
                | {"stimulus_id": str(stimulus), "role": role}
                | {"dist": 1.0 + rank, "sim_image": 0.3, "sim_text": 0.8 - rank / 10}
            )
    write_table(work.folder / "links.parquet", table_of(rows, LINKS))
    work.finish({"in": len(rows), "out": len(rows), "skipped": {}})
