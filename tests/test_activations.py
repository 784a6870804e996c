"""Proves readings and tokens against plain, unbatched forwards, and that masks and kills lose nothing."""

import contextlib
import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import (
    LAYERS,
    Killed,
    digests,
    opened,
    small_recipe,
    stimulus_ids,
    write_corpus,
    write_ids,
    write_links,
)

from builders import activations as stage
from builders import forward
from builders.corpus import open_image
from builders.mllm import chat_inputs
from builders.tiny import tiny_mllm
from builders.token_choice import keep_tokens, median_of, norm_counts
from builders.tokens import MODALITIES, TokenShards, held_out
from daco.errors import ActivationError
from daco.sites import image_token_ids

CAPTIONS = ["a knife on a table", "two dogs", "a very long caption about a red car by the sea"]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "internvl"])
def tiny(request):
    return tiny_mllm(request.param, CAPTIONS, seed=3)


def pictures(n: int):
    from PIL import Image

    draw = np.random.default_rng(1)
    sizes = [(33, 21), (40, 40), (25, 61)]
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes[:n]]


def whole(model, processor, caption, image):
    """Inputs of one stimulus, and block outputs as transformers gives them, [tokens, layers, d_model]."""
    inputs = chat_inputs(processor, [caption], [image])
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    return inputs, torch.stack([states[layer + 1][0] for layer in LAYERS], dim=1)


def ordinary(model, processor, inputs):
    special = forward.special_ids(model, processor)
    return torch.tensor([int(i) not in special for i in inputs["input_ids"][0]])


def test_readings_and_tokens_equal_unbatched_whole_forwards(tiny):
    model, processor = tiny
    images = pictures(3)
    read = forward.read_batch(model, processor, CAPTIONS, images, LAYERS)
    for row, (caption, image) in enumerate(zip(CAPTIONS, images, strict=True)):
        inputs, z = whole(model, processor, caption, image)
        torch.testing.assert_close(read.readings[row], z[-1], rtol=1e-4, atol=1e-4)
        keep = ordinary(model, processor, inputs)
        torch.testing.assert_close(read.tokens[row], z[keep], rtol=1e-4, atol=1e-4)
        assert 0 < int(keep.sum()) < len(keep)
    lengths = [
        len(chat_inputs(processor, [c], [i])["input_ids"][0]) for c, i in zip(CAPTIONS, images, strict=True)
    ]
    assert read.masked["padding"] == sum(max(lengths) - n for n in lengths) > 0
    kept = sum(map(len, read.tokens))
    assert kept + read.masked["padding"] + read.masked["special"] == 3 * max(lengths)
    assert read.readings.dtype == torch.float32


def test_image_places_are_kept_special_tokens_are_not(tiny):
    model, processor = tiny
    special = forward.special_ids(model, processor)
    ids = chat_inputs(processor, CAPTIONS[:1], pictures(1))["input_ids"][0].tolist()
    image = next(i for i in image_token_ids(model) if i in ids)
    assert ids.count(image) > 1
    assert image not in special
    assert {processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id} <= special


def test_tokens_are_told_apart_as_image_prompt_and_caption(tiny):
    model, processor = tiny
    read = forward.read_batch(model, processor, [*CAPTIONS[:2], " "], pictures(3), LAYERS)
    image, prompt, caption = (MODALITIES.index(name) for name in ("image", "prompt", "caption"))
    for text, picture, kinds in zip([*CAPTIONS[:2], " "], pictures(3), read.modality, strict=True):
        inputs = chat_inputs(processor, [text], [picture])
        ids = inputs["input_ids"][0][ordinary(model, processor, inputs)]
        assert (kinds == image).tolist() == [int(i) in image_token_ids(model) for i in ids]
        assert processor.tokenizer.decode(ids[kinds == caption]).strip() == text.strip()
        assert (kinds == prompt).any()


@pytest.mark.parametrize("reading", ["caption_last", "caption_mean"])
def test_other_readings_stay_within_the_caption(tiny, reading):
    model, processor = tiny
    images = pictures(3)
    read = forward.read_batch(model, processor, CAPTIONS, images, LAYERS, reading)
    for row, (caption, image) in enumerate(zip(CAPTIONS, images, strict=True)):
        inputs, z = whole(model, processor, caption, image)
        text = [processor.tokenizer.decode([i]) for i in inputs["input_ids"][0].tolist()]
        places = [i for i in range(len(text)) if caption in "".join(text[i:])]
        first = places[-1]
        n = next(n for n in range(1, len(text)) if caption in "".join(text[first : first + n]))
        inside = z[first : first + n]
        expected = inside[-1] if reading == "caption_last" else inside.mean(0)
        torch.testing.assert_close(read.readings[row], expected, rtol=1e-4, atol=1e-4)


def test_nan_activations_are_refused(tiny):
    model, processor = tiny
    weight = model.get_decoder().layers[LAYERS[-1]].mlp.down_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = math.nan
        with pytest.raises(ActivationError, match=r"NaN or infinity at layers \[2\]"):
            forward.read_batch(model, processor, CAPTIONS[:1], pictures(1), LAYERS)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_what_is_only_too_large_to_be_squared_is_not_refused(tiny, monkeypatch):
    model, processor = tiny
    batch = forward.prepared(model, processor, CAPTIONS, pictures(3))
    z = {layer: torch.full((*batch.kinds.shape, 4), 1e30, dtype=torch.bfloat16) for layer in LAYERS}
    padded = batch.inputs["attention_mask"] == 0
    z[LAYERS[0]][padded] = torch.nan
    fake = SimpleNamespace(activations=z, run=lambda **inputs: None)
    monkeypatch.setattr(forward, "capture", lambda *a, **k: contextlib.nullcontext(fake))
    read = forward.read_prepared(model, processor, batch, LAYERS)
    assert padded.any()
    assert read.readings.isfinite().all()  # what is padding has no weight, not the weight 0
    assert all(tokens.isfinite().all() for tokens in read.tokens)
    assert all(norms.isinf().all() for norms in read.norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_come_with_the_tokens(tiny, dtype):
    model, processor = tiny
    model = copy.deepcopy(model).to(dtype)
    inputs = forward.prepared(model, processor, CAPTIONS, pictures(3))
    inputs.inputs["pixel_values"] = inputs.inputs["pixel_values"].to(dtype)
    read = forward.read_prepared(model, processor, inputs, LAYERS)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for tokens, norms in zip(read.tokens, read.norms, strict=True):
        assert norms.dtype == wanted
        assert torch.equal(norms, tokens.to(wanted).norm(dim=-1))
    given = keep_tokens(stimulus_ids(3), read.tokens, 1.5, modality=read.modality, norms=read.norms)
    found = keep_tokens(stimulus_ids(3), read.tokens, 1.5, modality=read.modality)
    assert given[1] == found[1]
    for name, kept in found[0].items():
        assert torch.equal(given[0][name], kept), name


def stimulus_tokens(n: int = 7, seed: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(3 + i, 2, 32, generator=draw) for i in range(n)]


def test_norm_outliers_at_any_layer_are_dropped_and_counted():
    tokens = stimulus_tokens()
    tokens[1][2, 0] *= 1000
    tokens[4][0, 1] *= 1000
    modality = [torch.arange(len(z), dtype=torch.uint8) % 4 for z in tokens]
    kept, left_out = keep_tokens(stimulus_ids(7), tokens, max_norm=10.0, modality=modality)
    assert left_out["norm_outlier"] == 2
    expected = torch.cat([tokens[0], tokens[1][[0, 1, 3]], *tokens[2:4], tokens[4][1:], *tokens[5:]])
    assert torch.equal(kept["tokens"], expected)
    assert kept["n_tokens"].tolist() == [3, 3, 5, 6, 6, 8, 9]
    assert kept["modality"][:6].tolist() == [0, 1, 2, 0, 1, 3]
    torch.testing.assert_close(kept["norms"], expected.norm(dim=-1))


def test_counts_of_norms_add_up_to_the_median_of_all_shards():
    norms = torch.exp(torch.randn(2_001, 2, generator=torch.Generator().manual_seed(4)) * 3 + 2)
    parts = [norm_counts(part) for part in norms.split(150)]
    whole = sum(parts[1:], parts[0])
    assert torch.equal(whole, norm_counts(norms))
    assert int(whole.sum()) == 2 * len(norms)
    torch.testing.assert_close(median_of(whole), norms.median(0).values, rtol=0.022, atol=0)
    assert median_of(norm_counts(torch.empty(0, 2))).tolist() == [0.0, 0.0]
    assert (median_of(norm_counts(torch.tensor([[0.0, 1e30]]))) > 0).all()  # out of range: in the last bins


def test_an_outlier_is_one_against_the_median_of_all_shards_so_far():
    tokens = [100 * z for z in stimulus_tokens(4)]
    before = norm_counts(torch.cat(stimulus_tokens(7, seed=3)).norm(dim=-1))
    alone, left_out = keep_tokens(stimulus_ids(4), tokens, max_norm=10.0)
    assert len(alone["tokens"]) == 18
    assert left_out["norm_outlier"] == 0
    later, left_out = keep_tokens(stimulus_ids(4), tokens, max_norm=10.0, before=before)
    assert len(later["tokens"]) == 0
    assert left_out["norm_outlier"] == 18
    many = before // 100  # most of what was seen lies in this shard
    assert len(keep_tokens(stimulus_ids(4), tokens, max_norm=10.0, before=many)[0]["tokens"]) == 18


def test_at_most_so_many_tokens_of_a_stimulus_by_seed_and_id():
    tokens, ids = stimulus_tokens(), stimulus_ids(7)
    kept, left_out = keep_tokens(ids, tokens, 1e9, at_most=4, seed=1)
    assert kept["n_tokens"].tolist() == [3, 4, 4, 4, 4, 4, 4]
    assert left_out["not_drawn"] == sum(map(len, tokens)) - 27
    alone, _ = keep_tokens(ids[5:6], tokens[5:6], 1e9, at_most=4, seed=1)
    assert torch.equal(alone["tokens"], kept["tokens"][19:23])
    other, _ = keep_tokens(ids, tokens, 1e9, at_most=4, seed=2)
    assert not torch.equal(other["tokens"], kept["tokens"])


def test_token_shards_split_by_stimulus_and_read_any_row(tmp_path):
    ids, start = stimulus_ids(25), 0
    expected = {True: [], False: []}
    kinds: dict[bool, list[int]] = {True: [], False: []}
    for number, size in enumerate((9, 1, 15)):
        folder = tmp_path / f"{number:05d}"
        folder.mkdir()
        tokens = stimulus_tokens(size, seed=number)
        part = ids[start : start + size]
        modality = [torch.arange(len(z), dtype=torch.uint8) % 3 for z in tokens]
        save_file(keep_tokens(part, tokens, 1e9, modality=modality)[0], folder / "tokens.safetensors")
        write_ids(folder, part)
        for stimulus, z, kind in zip(part, tokens, modality, strict=True):
            expected[held_out(stimulus, 0.4)].append(z[:, 1])
            kinds[held_out(stimulus, 0.4)] += kind.tolist()
        start += size
    for held, parts in expected.items():
        shards = TokenShards(sorted(tmp_path.iterdir()), 1, 0.4, held)
        z = torch.cat(parts)
        assert len(parts) >= 5
        assert len(shards) == len(z)
        assert torch.equal(torch.cat([*shards.blocks(6)]), z)
        assert shards.modality.tolist() == kinds[held]
        index = np.random.default_rng(3).integers(len(z), size=50)
        assert torch.equal(shards.rows(index), z[torch.from_numpy(index)])


def test_held_out_share_is_near_what_was_asked():
    ids = [f"{i:016x}" for i in range(4000)]
    assert 0.08 < sum(held_out(i, 0.1) for i in ids) / 4000 < 0.12
    assert not any(held_out(i, 0.0) for i in ids)
    assert all(held_out(i, 1.0) for i in ids)


@pytest.fixture
def upstream(tmp_path):
    write_corpus(tmp_path)
    write_links(tmp_path)
    return tmp_path


def run(out, killed_at=None, **changes):
    config = {"batch": 3, "shard_rows": 7} | changes
    stage.run(opened(small_recipe(activations=config), out, "activations", killed_at))
    return digests(out / "activations")


def test_stage_reads_every_linked_stimulus_once_in_order(upstream):
    run(upstream)
    shards = sorted((upstream / "activations" / "shards").iterdir())
    ids = [i for shard in shards for i in json.loads((shard / "ids.json").read_text())]
    linked = set(pq.read_table(upstream / "stimuli" / "links.parquet")["stimulus_id"].to_pylist())
    corpus = pq.read_table(upstream / "corpus" / "stimuli.parquet").to_pylist()
    assert ids == [row["stimulus_id"] for row in corpus if row["stimulus_id"] in linked]
    assert [len(load_file(s / "readings.safetensors")["readings"]) for s in shards][:2] == [7, 7]
    counts = json.loads((upstream / "activations" / "done.json").read_text())["counts"]
    assert counts == {"in": len(linked), "out": len(linked), "skipped": {}}
    tokens = json.loads((upstream / "activations" / "facts.json").read_text())["tokens"]
    stored = sum(len(load_file(s / "tokens.safetensors")["tokens"]) for s in shards)
    assert tokens["out"] == stored == tokens["in"] - sum(tokens["skipped"].values())


def test_stage_equals_a_plain_forward_with_the_saved_model(upstream):
    run(upstream)
    work = opened(small_recipe(), upstream, "other")
    model, processor = stage.open_mllm(work.recipe.model, upstream / "activations")
    row = pq.read_table(upstream / "corpus" / "stimuli.parquet").to_pylist()[1]
    shard = upstream / "activations" / "shards" / "00000"
    position = json.loads((shard / "ids.json").read_text()).index(row["stimulus_id"])
    image = open_image(upstream / "corpus" / row["file"])
    _, z = whole(model, processor, row["caption"], image)
    found = load_file(shard / "readings.safetensors")["readings"][position]
    torch.testing.assert_close(found, z[-1], rtol=1e-4, atol=1e-4)


def test_facts_name_no_place(upstream):
    run(upstream)
    facts = json.loads((upstream / "activations" / "facts.json").read_text())
    assert (facts["model"]["id"], facts["model"]["revision"]) == ("", "")
    assert facts["model"]["hidden_size"] == 32
    for file in (upstream / "activations").rglob("*.json"):
        assert str(upstream) not in file.read_text()


@pytest.mark.parametrize("at", [0, 1, 3])
def test_killed_and_resumed_equals_undisturbed(upstream, at):
    expected = run(upstream)
    (upstream / "activations" / "stage.json").unlink()
    with pytest.raises(Killed):
        run(upstream, killed_at=at)
    assert len([*(upstream / "activations" / "shards").iterdir()]) == at
    assert run(upstream) == expected


@pytest.mark.parametrize("at", [0, 2])
def test_outliers_of_a_shard_are_judged_by_all_before_it_also_after_a_kill(upstream, monkeypatch, at):
    seen, keep = [], stage.keep_tokens

    def noted(*arguments, before, **options):
        seen.append(before)
        return keep(*arguments, before=before, **options)

    monkeypatch.setattr(stage, "keep_tokens", noted)
    with pytest.raises(Killed):
        run(upstream, killed_at=at)
    run(upstream)
    shards = sorted((upstream / "activations" / "shards").iterdir())
    counts = [load_file(shard / "tokens.safetensors")["norm_counts"].long() for shard in shards]
    assert seen[0] is None
    assert len(seen) == len(shards) == 4
    for number, before in enumerate(seen[1:], start=1):
        assert torch.equal(before, sum(counts[:number]))


def test_an_unreadable_image_is_skipped_and_counted(upstream):
    victim = pq.read_table(upstream / "stimuli" / "links.parquet")["stimulus_id"][0].as_py()
    (upstream / "corpus" / "images" / f"{victim}.png").write_bytes(b"no image")
    run(upstream)
    counts = json.loads((upstream / "activations" / "done.json").read_text())["counts"]
    assert counts["skipped"] == {"unreadable_image": 1}
    assert counts["out"] == counts["in"] - 1


def test_no_usable_stimulus_is_refused(upstream):
    for image in (upstream / "corpus" / "images").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(ActivationError, match="expected usable stimuli in a shard, got none of 7"):
        run(upstream)


def test_links_to_no_stimulus_of_the_corpus_are_refused(tmp_path):
    write_corpus(tmp_path)
    write_links(tmp_path)
    (tmp_path / "corpus" / "stage.json").unlink()
    table = pq.read_table(tmp_path / "corpus" / "stimuli.parquet").slice(23)
    pq.write_table(table, tmp_path / "corpus" / "stimuli.parquet")
    with pytest.raises(ActivationError, match="expected links to stimuli of the corpus, got none"):
        run(tmp_path)
