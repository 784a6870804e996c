"""The tiny CLIP trains, resumes to the same bytes and loads like any CLIP; captions are never interpreted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import make_folder, tiny_recipe
from PIL import Image
from small_run import Killed, digests, opened

from builders import clip, corpus
from builders.clip import (
    MAX_TOKENS,
    Trainer,
    augment,
    batch_rows,
    info_nce,
    is_held_out,
    learning_rate,
    load_clip,
    sample_part,
    sample_texts,
    square,
    train_tokenizer,
    truth,
)
from builders.recipe import Recipe
from builders.stages import Work, done
from daco.errors import ActivationError, ArtefactNotFoundError, CorpusError, UnsupportedModelError
from daco.tables import read_table

CAPTIONS = ["knife, red, sharp thing", "a blue ball on the beach", "heart, green"]


def with_corpus(folder: Path, out: Path, **sections: dict) -> Recipe:
    recipe = tiny_recipe(folder, **sections)
    corpus.run(opened(recipe, out, "corpus"))
    return recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A finished clip stage, and its recipe."""
    out = tmp_path_factory.mktemp("clip")
    recipe = with_corpus(make_folder(out / "pics"), out / "run")
    clip.run(opened(recipe, out / "run", "clip"))
    return recipe, out / "run"


def test_the_stage_writes_a_model_a_curve_and_counts(trained: tuple[Recipe, Path]) -> None:
    _, out = trained
    counts = done(out, "clip")["counts"]
    assert counts["in"] == 24
    assert counts["out"] == 24 - counts["skipped"]["held_out"]
    assert 1 <= counts["skipped"]["held_out"] <= 12
    curve = read_table(out / "clip" / "training.parquet").to_pandas()
    assert curve["step"].tolist() == list(range(7))
    assert np.isfinite(curve["loss"]).all()
    assert not (out / "clip" / "shards").exists()


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_killed_training_resumes_to_the_same_bytes(
    trained: tuple[Recipe, Path], killed_at: int, tmp_path: Path
) -> None:
    recipe, out = trained
    corpus.run(opened(recipe, tmp_path, "corpus"))
    with pytest.raises(Killed):
        clip.run(opened(recipe, tmp_path, "clip", killed_at=killed_at))
    work = opened(recipe, tmp_path, "clip")
    assert [path.name for path in work.shards()] == (["step-00000003"] if killed_at == 4 else [])
    clip.run(work)
    assert digests(tmp_path / "clip") == digests(out / "clip")


def test_a_checkpoint_restores_weights_and_moments_exactly(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path).clip
    images = torch.randint(
        0, 256, (3, 3, 27, 27), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    first, second = (Trainer(config, images, CAPTIONS, 3) for _ in range(2))
    for _ in range(2):
        first.step()
    first.save(tmp_path)
    second.restore(tmp_path)
    first.step()
    second.step()
    assert first.curve == second.curve
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(first.adam.state[a]["exp_avg_sq"], second.adam.state[b]["exp_avg_sq"])


def test_what_is_written_does_not_tell_how_the_tokenizer_was_last_called(tmp_path: Path) -> None:
    """A run killed after its last step writes with a tokenizer that was never called."""
    images = torch.zeros(3, 3, 27, 27, dtype=torch.uint8)
    trainer = Trainer(tiny_recipe(tmp_path).clip, images, CAPTIONS, 0)
    trainer.write(tmp_path / "unused")
    trainer.processor.tokenizer(CAPTIONS, padding=True, truncation=True, max_length=5)
    trainer.write(tmp_path / "used")
    assert digests(tmp_path / "unused") == digests(tmp_path / "used")


def test_training_learns_to_tell_a_few_pictures_apart(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, clip={"steps": 60, "learning_rate": 3e-3, "batch": 3, "holdout": 0.0}).clip
    images = torch.stack([torch.full((3, 27, 27), v, dtype=torch.uint8) for v in (0, 128, 255)])
    trainer = Trainer(config, images, ["knife", "ball", "heart"], 0)
    for _ in range(60):
        trainer.step()
    assert trainer.curve[0]["loss"] > 0.5
    assert trainer.curve[-1]["loss"] < 0.1
    assert trainer.curve[-1]["accuracy"] == 1.0


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path).clip, torch.zeros(3, 3, 27, 27, dtype=torch.uint8), CAPTIONS, 0)
    with torch.no_grad():
        trainer.model.logit_scale.fill_(torch.nan)
    with pytest.raises(ActivationError, match="clip step 0: expected a finite loss"):
        trainer.step()


def test_the_saved_model_embeds_unit_rows_that_depend_on_one_item_alone(trained: tuple[Recipe, Path]) -> None:
    _, out = trained
    loaded = load_clip(out / "clip" / "model")
    texts = ["knife", "knife, red, and a much longer caption " * 9, ""]
    rows = loaded.embed_texts(texts)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(rows[0], loaded.embed_texts(["knife"])[0])
    pictures = [Image.new("RGB", size, "red") for size in ((13, 9), (24, 24), (1, 1))]
    rows = loaded.embed_images(pictures)
    assert rows.shape == (3, 32)
    torch.testing.assert_close(rows[1], loaded.embed_images(pictures[1:2])[0])


def test_special_tokens_that_a_caption_spells_stay_text(trained: tuple[Recipe, Path]) -> None:
    _, out = trained
    loaded = load_clip(out / "clip" / "model")
    rows = loaded.embed_texts(["<|endoftext|> knife", "<|endoftext|> ball"])
    assert (rows[0] - rows[1]).abs().max() > 1e-4  # interpreted, both would end at once and be equal


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    with pytest.raises(ArtefactNotFoundError, match="expected a CLIP or SigLIP at"):
        load_clip(tmp_path / "nowhere")
    config = BertConfig(
        hidden_size=32, num_attention_heads=1, intermediate_size=37, vocab_size=99, num_hidden_layers=1
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    train_tokenizer(CAPTIONS, 560).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedModelError, match="got BertModel"):
        load_clip(tmp_path / "bert")


def test_a_siglip_embeds_too(tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    tower = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 37, "num_hidden_layers": 1}
    tokenizer = train_tokenizer(CAPTIONS, 560)
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config=tower | {"image_size": 24, "patch_size": 12})
    SiglipModel(config).save_pretrained(tmp_path)
    SiglipProcessor(SiglipImageProcessor(size={"height": 24, "width": 24}), tokenizer).save_pretrained(
        tmp_path
    )
    loaded = load_clip(tmp_path)
    assert loaded.embed_images([Image.new("RGB", (13, 9))]).shape == (1, 32)
    torch.testing.assert_close(loaded.embed_texts(["a", "b c"]).norm(dim=1), torch.ones(2))


def test_a_model_of_the_recipe_is_noted_and_nothing_trained(
    trained: tuple[Recipe, Path], tmp_path: Path
) -> None:
    _, out = trained
    recipe = with_corpus(out.parent / "pics", tmp_path, clip={"model": str(out / "clip" / "model")})
    clip.run(opened(recipe, tmp_path, "clip"))
    assert list(done(tmp_path, "clip")["files"]) == ["facts.json"]
    assert clip.clip_of(Work(recipe, tmp_path, "embeddings")).embed_texts(["x"]).shape == (1, 32)


def test_too_few_pairs_to_train_on_is_an_error(tmp_path: Path) -> None:
    recipe = with_corpus(make_folder(tmp_path / "pics", 3), tmp_path / "run", clip={"holdout": 1.0})
    with pytest.raises(CorpusError, match="expected at least 2 pairs to train a CLIP on, got 0 of 3"):
        clip.run(opened(recipe, tmp_path / "run", "clip"))


def test_the_tokenizer_knows_every_byte_and_is_the_same_every_time() -> None:
    first, second = (train_tokenizer(CAPTIONS * 5, 560) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) <= 560
    assert first.model_max_length == MAX_TOKENS
    ids = first("Knife 🔪 žluť")["input_ids"]
    assert (ids[0], ids[-1]) == (first.bos_token_id, first.eos_token_id)
    assert first.eos_token_id not in ids[1:-1]  # the unknown token is the end token: nothing is unknown
    assert first.eos_token_id == len(first) - 1


def test_holdout_is_a_share_by_hash() -> None:
    ids = [f"{i * 2654435761 % 2**32:08x}00000000" for i in range(1000)]
    assert 150 < sum(is_held_out(name, 0.2) for name in ids) < 250
    assert not any(is_held_out(name, 0.0) for name in ids)
    assert all(is_held_out(name, 1.0) for name in ids)


def test_batches_of_an_epoch_hold_every_pair_once() -> None:
    steps = [batch_rows(13, 5, seed=2, step=step) for step in range(13)]
    places = np.concatenate(steps)
    for epoch in range(5):
        assert sorted(places[13 * epoch : 13 * (epoch + 1)]) == list(range(13))
    assert (places[:13] != places[13:26]).any()


def test_parts_of_captions_are_names_keywords_or_runs_of_words() -> None:
    rng = np.random.default_rng(0)
    parts = [sample_part("knife, red, sharp thing, blade, cut", {}, rng) for _ in range(400)]
    assert 180 < parts.count("knife") < 290
    assert max(part.count(",") for part in parts) == 2
    runs = [sample_part("a blue ball", {"blue": 9, "ball": 1}, rng) for _ in range(400)]
    assert set(runs) == {"a", "blue", "ball", "a blue", "blue ball", "a blue ball"}
    assert runs.count("ball") > 200 > 3 * runs.count("blue")  # the rarer word is drawn more often
    assert sample_part(",", {}, rng) == ","
    batches = [sample_texts(CAPTIONS, {}, rng) == CAPTIONS for _ in range(300)]
    assert 10 < sum(batches) < 60


def test_a_text_is_true_of_every_image_whose_caption_has_its_words() -> None:
    expected = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    assert torch.equal(truth(["red", "knife", "ball"], ["knife, red", "Red knife", "ball, blue"]), expected)
    assert truth(["unseen", "b"], ["a", "b"])[0, 0]  # its own image, whatever the caption says


def test_info_nce_ignores_true_texts_of_other_images_and_matches_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(4)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(5, 7, generator=generator), dim=1) for _ in range(2)
    )
    true = torch.eye(5, dtype=torch.bool)
    true[0, 3] = true[3, 0] = True
    total = 0.0
    for i in range(5):
        for asked, given in ((images, texts), (texts, images)):
            logits = [6.0 * float(asked[i] @ given[j]) for j in range(5) if i == j or not true[i, j]]
            total += np.log(np.exp(logits).sum()) - 6.0 * float(asked[i] @ given[i])
    assert info_nce(images, texts, torch.tensor(6.0), true).loss.item() == pytest.approx(total / 10, rel=1e-5)


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.4)
    assert max(rates) == 2.0
    assert rates[-1] < 0.01


def test_images_are_cropped_to_the_middle_and_augmented_by_the_draw() -> None:
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
    assert square(wide, 10).float().mean() > 250
    images = torch.arange(2 * 3 * 9 * 9).reshape(2, 3, 9, 9).to(torch.uint8)
    one, two = (augment(images, 7, np.random.default_rng(seed)) for seed in (1, 1))
    assert one.shape == (2, 3, 7, 7)
    assert torch.equal(one, two)
    assert any(not torch.equal(augment(images, 7, np.random.default_rng(s)), one) for s in range(5))
