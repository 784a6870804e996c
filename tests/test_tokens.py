"""Proves that captions of one picture are on one side of what SAEs learn from, however a run went."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import LAYERS, Killed, digests, opened, small_recipe, stimulus_ids, write_corpus, write_links

from builders import activations as stage
from builders import stages
from builders.tokens import MODALITIES, SIDES, held_ids, held_out, read_ids, read_sides, sides_of
from builders.train_sae import token_split
from daco.errors import FormatError
from daco.manifest import sha256_file

CAPTIONS, HOLDOUT = 5, 0.4


def written(out, captions=CAPTIONS):
    """A corpus of so many captions a picture, in an order in which they do not stand together."""
    write_corpus(out, captions=captions)
    table = pq.read_table(out / "corpus" / "stimuli.parquet")
    order = np.random.default_rng(6).permutation(len(table))
    pq.write_table(table.take(pa.array(order)), out / "corpus" / "stimuli.parquet")
    write_links(out)
    return out


def run(out, killed_at=None, **changes):
    config = {"batch": 3, "shard_rows": 7} | changes
    stage.run(opened(small_recipe(activations=config), out, "activations", killed_at))
    return sorted((out / "activations" / "shards").iterdir())


def picture_of(out):
    return dict(
        zip(
            *pq.read_table(out / "corpus" / "stimuli.parquet", columns=["stimulus_id", "image_sha256"])
            .to_pydict()
            .values(),
            strict=True,
        )
    )


def test_captions_of_one_picture_are_never_on_both_sides(tmp_path):
    shards, pictures = run(written(tmp_path)), picture_of(tmp_path)
    assert len({pictures[i] for i in read_ids(shards[:1])} & {pictures[i] for i in read_ids(shards[1:])}) > 1
    sides = [[half.stimulus_ids for half in token_split(shards, n, HOLDOUT)] for n in range(len(LAYERS))]
    train, held = sides[0]
    assert sides[1] == sides[0]
    assert sorted(train + held) == sorted(read_ids(shards))
    assert min(len(train), len(held)) >= CAPTIONS - 1
    assert not {pictures[i] for i in train} & {pictures[i] for i in held}
    assert {i for i in train + held if held_out(i, HOLDOUT)} != set(held)  # by its own id some would stray
    assert held_ids(shards, HOLDOUT) == set(held)


def test_tokens_of_held_out_pictures_are_unlike_what_is_trained_on(tmp_path):
    """All captions of a picture have the same image tokens, for these stand before the text."""
    shards = run(written(tmp_path))
    train, held = token_split(shards, 1, HOLDOUT)
    image = MODALITIES.index("image")
    seen, unseen = (half.rows(np.flatnonzero(half.modality == image)) for half in (train, held))
    assert ((unseen[:, None] - seen).norm(dim=-1).min(1).values > 1e-2 * unseen.norm(dim=-1)).all()
    n = len(held.stimulus_ids)
    alike = unseen.reshape(n, -1, unseen.shape[-1])
    for one, two in zip(*np.triu_indices(n, 1), strict=True):
        same = held.pictures[one] == held.pictures[two]
        assert (float((alike[one] - alike[two]).norm() / alike[one].norm()) < 1e-4) == same


def test_pictures_with_one_caption_are_where_they_were(tmp_path):
    shards = run(written(tmp_path, captions=1))
    assert read_sides(shards) == read_ids(shards)
    assert held_ids(shards, HOLDOUT) == {i for i in read_ids(shards) if held_out(i, HOLDOUT)}
    for half in token_split(shards, 0, HOLDOUT):
        assert half.pictures.tolist() == list(range(len(half.stimulus_ids)))


@pytest.mark.parametrize("killed_at", [0, 2, 3])
def test_neither_a_kill_nor_shards_nor_the_order_of_the_corpus_changes_sides(tmp_path, killed_at):
    out = written(tmp_path)
    expected, files = held_ids(run(out), HOLDOUT), digests(out / "activations")
    assert SIDES in {name.rpartition("/")[2] for name in files}
    (out / "activations" / "stage.json").unlink()
    with pytest.raises(Killed):
        run(out, killed_at)
    run(out)
    assert digests(out / "activations") == files
    (out / "activations" / "stage.json").unlink()
    assert held_ids(run(out, shard_rows=100), HOLDOUT) == expected
    table = pq.read_table(out / "corpus" / "stimuli.parquet")
    pq.write_table(table.take(pa.array(range(len(table))[::-1])), out / "corpus" / "stimuli.parquet")
    (out / "activations" / "stage.json").unlink()
    assert held_ids(run(out), HOLDOUT) == expected


@pytest.mark.parametrize("captions", [1, 5])
def test_the_share_of_pictures_held_out_is_near_what_was_asked(captions):
    ids = stimulus_ids(4_000 * captions)
    sides = sides_of({i: f"{n % 4_000:064x}" for n, i in enumerate(ids)})
    held = [held_out(sides[i], 0.1) for i in ids]
    assert 0.08 < np.mean(held) < 0.12
    assert held[:4_000] * captions == held
    for share, all_or_none in ((0.0, False), (1.0, True)):
        assert {held_out(side, share) for side in sides.values()} == {all_or_none}


def test_a_side_goes_by_the_least_id_of_a_picture_and_else_by_its_own():
    ids = stimulus_ids(3)
    pictures = {ids[0]: "a", ids[1]: "", f"{ids[2]}-answer": "a", "text": "", "another-text": ""}
    least = min(ids[0], f"{ids[2]}-answer")
    assert sides_of(pictures) == dict.fromkeys(pictures, least) | {i: i for i, p in pictures.items() if not p}
    assert sides_of(dict(reversed(pictures.items()))) == sides_of(pictures)


def test_prompts_are_on_the_side_of_their_picture_also_where_a_caption_has_it(tmp_path, monkeypatch):
    out, folder = written(tmp_path / "run"), tmp_path / "table"
    folder.mkdir()
    row = pq.read_table(out / "corpus" / "stimuli.parquet").to_pylist()[0]
    content = (out / "corpus" / row["file"]).read_bytes()
    (folder / "shared.png").write_bytes(content)
    for name in ("own.png", "copy.png"):
        stage.open_image(content).rotate(180).save(folder / name)
    rows = [
        {"prompt": f"question {i}", "answer": f"answer {i}", "image": name}
        for name in ("shared.png", "own.png", "copy.png", None)
        for i in range(4)
    ]
    path = folder / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read: list[str] = []
    monkeypatch.setattr(stage, "sha256_file", lambda file: read.append(file.name) or sha256_file(file))
    shards = run(out, path=str(path), sources=["stimuli", "answers", "generated"])
    assert sorted(read) == ["copy.png", "own.png", "shared.png"]  # each once
    sides = dict(zip(read_ids(shards), read_sides(shards), strict=True))
    prompts = [p for source in ("answers", "generated") for p in stage.read_prompts(path, source)[0]]
    by_picture = {
        sha: {i for i, p in picture_of(out).items() if p == sha} for sha in picture_of(out).values()
    }
    for prompt in prompts:
        if prompt.image:
            by_picture.setdefault(sha256_file(prompt.image), set()).add(prompt.prompt_id)
        else:
            assert sides[prompt.prompt_id] == prompt.prompt_id
    for ids in by_picture.values():
        assert len({sides[i] for i in ids if i in sides}) <= 1
    assert len(by_picture[row["image_sha256"]] & sides.keys()) > 8
    own = by_picture[hashlib.sha256((folder / "own.png").read_bytes()).hexdigest()]
    assert len(own) == 16  # of `copy.png` as well


def test_a_picture_that_cannot_be_read_is_no_prompts_picture(tmp_path):
    prompts = [stage.Prompt(f"{name}-x", "q", "a", tmp_path / "gone.png") for name in "ab"]
    assert stage.pictures_of(prompts) == {"a-x": "", "b-x": ""}


def test_activations_that_do_not_say_what_belongs_together_are_refused_and_made_anew(tmp_path, monkeypatch):
    shards = run(written(tmp_path))
    (shards[1] / SIDES).unlink()
    with pytest.raises(FormatError, match=r"00001: expected sides.json, got none: an earlier version"):
        token_split(shards, 0, HOLDOUT)
    now = {name: stages.fingerprint(name, {}, {}) for name in ("activations", "corpus")}
    monkeypatch.setattr(stages, "LAYOUTS", {})
    before = {name: stages.fingerprint(name, {}, {}) for name in now}
    assert before["activations"] != now["activations"]
    assert before["corpus"] == now["corpus"]
