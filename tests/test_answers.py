"""Proves that tokens of given and generated answers equal plain forwards, and that bad tables are named."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_run import LAYERS, Killed, digests, opened, small_recipe, write_corpus, write_links, write_polarity

from builders import activations as stage
from builders import answers, train_sae
from builders import directions as directions_stage
from builders.activations import linked_stimuli
from builders.forward import special_ids
from builders.mllm import chat_inputs
from builders.prompts import read_prompts
from builders.tiny import tiny_mllm
from builders.tokens import MODALITIES, held_out
from daco.errors import ActivationError, CorpusError, DiskError, RecipeError
from daco.sites import image_token_ids

PROMPTS = ["what is on the table?", "and now something\nmuch longer about the sea", "why"]
ANSWERS = ["a knife", "boats, boats and more boats by the sea", "<|im_end|> because"]
IMAGE, PROMPT, CAPTION, GENERATED = range(4)


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "internvl"])
def tiny(request):
    return tiny_mllm(request.param, [*PROMPTS, *ANSWERS], seed=3)


def pictures(n: int = 3) -> list[Image.Image]:
    draw = np.random.default_rng(1)
    sizes = [(33, 21), (40, 40), (25, 61)]
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes[:n]]


def alone(model, processor, prompt, image, said):
    """Block outputs of one prompt with its answer's tokens behind it, unpadded, and its ids."""
    inputs = dict(chat_inputs(processor, [prompt], None if image is None else [image]))
    for name, fill in (("input_ids", None), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            tail = said if fill is None else torch.full_like(said, fill)
            inputs[name] = torch.cat([inputs[name], tail[None]], 1)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    return inputs["input_ids"][0], torch.stack([states[layer + 1][0] for layer in LAYERS], dim=1)


@pytest.mark.parametrize("with_image", [True, False])
def test_tokens_of_given_answers_equal_unbatched_whole_forwards(tiny, with_image):
    model, processor = tiny
    images = pictures() if with_image else None
    read = answers.read_answers(model, processor, PROMPTS, images, ANSWERS, LAYERS, 99)
    said = answers.answer_ids(processor, ANSWERS, 99)
    special = torch.tensor(sorted(special_ids(model, processor)))
    for row, (prompt, ids) in enumerate(zip(PROMPTS, said, strict=True)):
        whole, z = alone(model, processor, prompt, images[row] if images else None, ids)
        keep = ~torch.isin(whole, special)
        torch.testing.assert_close(read.tokens[row], z[keep], rtol=1e-4, atol=1e-4)
        kinds = torch.full(whole.shape, PROMPT)
        kinds[torch.isin(whole, torch.tensor(image_token_ids(model)))] = IMAGE
        kinds[-len(ids) :] = GENERATED
        assert read.modality[row].tolist() == kinds[keep].tolist()
        assert (kinds == IMAGE).any() == with_image
    assert read.readings is None
    assert processor.tokenizer.decode(said[0]) == ANSWERS[0]


def test_answers_are_cut_and_spell_no_control_token(tiny):
    model, processor = tiny
    said = answers.answer_ids(processor, ANSWERS, 4)
    assert [len(ids) for ids in said] == [
        min(4, len(ids)) for ids in answers.answer_ids(processor, ANSWERS, 99)
    ]
    special = special_ids(model, processor)
    assert not special & set(torch.cat(answers.answer_ids(processor, ANSWERS, 99)).tolist())


def test_generated_answers_are_the_models_own_and_their_tokens_those_of_a_plain_forward(tiny):
    model, processor = tiny
    images = pictures()
    read = answers.read_answers(model, processor, PROMPTS, images, None, LAYERS, 7)
    never = sorted(special_ids(model, processor) | set(image_token_ids(model)))
    never.remove(processor.tokenizer.eos_token_id)
    for row, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
        inputs = chat_inputs(processor, [prompt], [image])
        said = model.generate(**inputs, max_new_tokens=7, do_sample=False, suppress_tokens=never)[0]
        said = said[inputs["input_ids"].shape[1] :]
        said = said[said != processor.tokenizer.eos_token_id]
        _, z = alone(model, processor, prompt, image, said)
        mine = read.tokens[row][read.modality[row] == GENERATED]
        assert len(mine) == len(said) > 0
        torch.testing.assert_close(mine, z[len(z) - len(said) :], rtol=1e-4, atol=1e-4)


def test_what_follows_the_end_of_an_answer_is_dropped(tiny):
    model, processor = tiny
    inputs = chat_inputs(processor, PROMPTS)
    whole = answers.generated_ids(model, processor, inputs, 6)
    end = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = int(whole[0][2])
    try:
        cut = answers.generated_ids(model, processor, inputs, 6)
    finally:
        model.generation_config.eos_token_id = end
    first = whole[0].tolist().index(int(whole[0][2]))
    assert cut[0].tolist() == whole[0][:first].tolist()


def write_table(folder, rows=None):
    """Prompts with answers, every other with an image; returns the table's path."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(pictures()):
        image.save(folder / f"{i}.png")
    rows = rows or [
        {
            "prompt": f"question {i}\nplease",
            "answer": f"answer number {i}",
            "image": f"{i % 3}.png" if i % 2 else None,
        }
        for i in range(11)
    ]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "table.jsonl"


@pytest.fixture
def upstream(tmp_path):
    out = tmp_path / "run"
    write_corpus(out)
    write_links(out)
    return out


def recipe(path, *sources, **changes):
    config = {
        "batch": 3,
        "shard_rows": 7,
        "max_answer": 5,
        "path": str(path),
        "sources": list(sources),
    } | changes
    return small_recipe(
        activations=config, sae={"n_atoms": 37, "k": 3, "steps": 4, "batch": 17, "holdout": 0.3}
    )


def run(out, path, *sources, killed_at=None, **changes):
    work = opened(recipe(path, *sources, **changes), out, "activations", killed_at)
    stage.run(work)
    return digests(out / "activations")


def kinds_of(out):
    return json.loads((out / "activations" / "facts.json").read_text())["modalities"]


def test_the_stage_reads_every_source_once_and_counts_each_kind(upstream, tmp_path):
    path = write_table(tmp_path / "table")
    run(upstream, path, "stimuli", "answers", "generated")
    shards = {path.name: path for path in (upstream / "activations" / "shards").iterdir()}
    names = [f"{i:05d}" for i in range(4)] + [
        f"{s}-{i:05d}" for s in ("answers", "generated") for i in range(2)
    ]
    assert sorted(shards) == names
    for name, shard in shards.items():
        assert (shard / "readings.safetensors").is_file() == name[0].isdigit()
    ids = [i for name in names for i in json.loads((shards[name] / "ids.json").read_text())]
    linked = len(linked_stimuli(upstream / "corpus", upstream / "stimuli" / "links.parquet"))
    assert len(ids) == len(set(ids)) == linked + 11 + 11
    stored = torch.cat([load_file(s / "tokens.safetensors")["modality"] for s in shards.values()])
    assert kinds_of(upstream) == {name: int((stored == i).sum()) for i, name in enumerate(MODALITIES)}
    assert min(kinds_of(upstream).values()) > 0
    counts = json.loads((upstream / "activations" / "done.json").read_text())["counts"]
    assert counts == {"in": len(ids), "out": len(ids), "skipped": {}}


def test_only_the_wanted_kinds_are_kept_and_the_others_counted(upstream, tmp_path):
    path = write_table(tmp_path / "table")
    run(upstream, path, "answers", modalities=["generated"])
    kinds = kinds_of(upstream)
    assert kinds.pop("generated") > 0
    assert set(kinds.values()) == {0}
    tokens = json.loads((upstream / "activations" / "facts.json").read_text())["tokens"]
    assert tokens["skipped"]["not_wanted"] > 0
    assert tokens["in"] == tokens["out"] + sum(tokens["skipped"].values())
    assert not list((upstream / "activations" / "shards").glob("0*/tokens.safetensors"))  # readings alone


def test_directions_and_saes_are_built_on_tokens_of_answers(upstream, tmp_path):
    run(upstream, write_table(tmp_path / "table"), "answers")
    write_polarity(upstream)
    directions_stage.run(opened(recipe("x", "answers"), upstream, "directions"))
    facts = json.loads((upstream / "directions" / "facts.json").read_text())
    run_of_stimuli = tmp_path / "other"
    write_corpus(run_of_stimuli)
    write_links(run_of_stimuli)
    write_polarity(run_of_stimuli)
    run(run_of_stimuli, "", "stimuli")
    directions_stage.run(opened(recipe("", "stimuli"), run_of_stimuli, "directions"))
    same = [load_file(o / "directions" / "directions.safetensors") for o in (upstream, run_of_stimuli)]
    assert torch.equal(same[0]["layer_1"], same[1]["layer_1"])  # readings are of stimuli always
    assert facts["R"] != json.loads((run_of_stimuli / "directions" / "facts.json").read_text())["R"]
    train_sae.run(opened(recipe("x", "answers"), upstream, "sae"))
    assert json.loads((upstream / "sae" / "layers.1" / "facts.json").read_text())["fve_generated"] is not None


@pytest.mark.parametrize("at", [1, 4, 5])
def test_killed_and_resumed_equals_undisturbed(upstream, tmp_path, at):
    path = write_table(tmp_path / "table")
    expected = run(upstream, path, "stimuli", "generated")
    (upstream / "activations" / "stage.json").unlink()
    with pytest.raises(Killed):
        run(upstream, path, "stimuli", "generated", killed_at=at)
    assert len([*(upstream / "activations" / "shards").iterdir()]) == at
    assert run(upstream, path, "stimuli", "generated") == expected


@pytest.mark.parametrize("suffix", ["parquet", "tsv", "csv", "jsonl"])
def test_every_kind_of_table_gives_the_same_prompts(tmp_path, suffix):
    rows = [{"prompt": f"question {i}", "answer": f"answer {i}"} for i in range(3)]
    path = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        mark = "\t" if suffix == "tsv" else ","
        path.write_text(
            "".join(f"{a}{mark}{b}\n" for a, b in [("prompt", "answer"), *(r.values() for r in rows)])
        )
    prompts, skipped = read_prompts(path, "answers")
    assert [(p.prompt, p.answer, p.image) for p in prompts] == [(*r.values(), None) for r in rows]
    assert not skipped
    assert [p.answer for p in read_prompts(path, "generated")[0]] == [None] * 3


def test_a_prompt_is_held_out_with_all_its_answers(tmp_path):
    rows = [{"prompt": f"question {i}", "answer": f"answer {j}"} for i in range(40) for j in range(3)]
    path = write_table(tmp_path / "table", rows)
    both = [*read_prompts(path, "answers")[0], *read_prompts(path, "generated")[0]]
    assert len(both) == len({p.prompt_id for p in both}) == 120 + 40
    sides = {p.prompt: {held_out(q.prompt_id, 0.5) for q in both if q.prompt == p.prompt} for p in both}
    assert all(len(side) == 1 for side in sides.values())
    assert 8 < sum(side == {True} for side in sides.values()) < 32


def test_rows_that_cannot_be_used_are_counted_by_reason(upstream, tmp_path):
    good = {"prompt": "a\x00b\ud800c", "answer": "yes"}
    rows = [
        good,
        good,
        {"prompt": " ", "answer": "yes"},
        {"prompt": 3, "answer": "yes"},
        {"prompt": "why", "answer": ""},
        {"prompt": "why"},
        {"prompt": "why " * 3_000, "answer": "so"},
        {"prompt": "why", "answer": "so " * 4_000},
        {"prompt": "why", "answer": "so", "image": "../run/corpus/stimuli.parquet"},
        {"prompt": "why", "answer": "so", "image": "nowhere.png"},
        {"prompt": "why", "answer": "so", "image": {"bytes": "x"}},
        {"prompt": "why", "answer": "so", "image": "broken.png"},
    ]
    path = write_table(tmp_path / "table", rows)
    (path.parent / "broken.png").write_bytes(b"no image")
    run(upstream, path, "answers")
    counts = json.loads((upstream / "activations" / "done.json").read_text())["counts"]
    linked = len(linked_stimuli(upstream / "corpus", upstream / "stimuli" / "links.parquet"))
    assert counts["in"] == linked + len(rows)
    assert counts["out"] == linked + 1
    assert counts["skipped"] == {
        "duplicate_row": 1,
        "empty_answer": 2,
        "empty_prompt": 2,
        "long_answer": 1,
        "long_prompt": 1,
        "missing_image": 1,
        "outside_folder": 1,
        "unreadable_image": 2,
    }
    assert read_prompts(path, "answers")[0][0].prompt == "a b c"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "expected a table of prompts at .*none.jsonl, got none; check activations.path"),
        ("t.jsonl", '{"answer": "a"}', r"expected column 'prompt', got \['answer'\]"),
        ("t.tsv", "prompt\tanswers\nwhy\tso\n", r"expected column 'answer', got \['prompt', 'answers'\]"),
        ("t.jsonl", '{"prompt": "a", "answer": "b"}\n{"pro', "t.jsonl: expected JSON, got .* in line 2"),
        ("t.jsonl", "[1]", r"expected an object, got '\[1\]' in line 1"),
        ("t.jsonl", "", r"expected column 'prompt', got \[\]"),
        ("t.tsv", "prompt\tanswer\n", "expected at least one usable row, got none of 0"),
        (
            "t.tsv",
            "prompt\tanswer\nwhy\t \n",
            "expected at least one usable row, got none of 1 .*empty_answer",
        ),
        ("t.parquet", "no parquet", "expected parquet, got .*; write it again"),
        ("t.xlsx", "x", "expected a .tsv, .csv or .parquet file, got '.xlsx'"),
    ],
)
def test_a_bad_table_is_named(upstream, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=says):
        run(upstream, tmp_path / name, "answers")
    assert not list((upstream / "activations" / "shards").iterdir())


def test_a_table_without_a_column_does_not_discard_what_is_there(tmp_path):
    (tmp_path / "t.tsv").write_text("question\nwhy\n")
    with pytest.raises(CorpusError, match="expected column 'prompt'"):
        stage.check(recipe(tmp_path / "t.tsv", "generated"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"sources": ["stimuli", "web"]},
            r"activations.sources: expected some of .* got \['stimuli', 'web'\]",
        ),
        ({"sources": []}, "activations.sources: expected some of"),
        ({"sources": ["answers"]}, "activations.path: expected a table of prompts where activations.sources"),
        ({"path": "t.tsv"}, "activations.path: .* none elsewhere, got 't.tsv'"),
        ({"modalities": ["image", "image"]}, "activations.modalities: expected some of .* each once"),
        ({"max_answer": 0}, "activations.max_answer: expected at least 1, got 0"),
    ],
)
def test_sources_that_do_not_fit_together_are_refused(changes, says):
    with pytest.raises(RecipeError, match=says):
        small_recipe(activations=changes)


def test_no_usable_prompt_in_a_shard_is_refused(upstream, tmp_path):
    path = write_table(tmp_path / "table", [{"prompt": "why", "answer": "so", "image": "0.png"}])
    (path.parent / "0.png").write_bytes(b"no image")
    with pytest.raises(ActivationError, match=r"got none of 1 \(.*unreadable_image"):
        run(upstream, path, "answers")


def test_a_full_disk_is_named_and_running_again_goes_on(upstream, tmp_path, monkeypatch):
    path = write_table(tmp_path / "table")
    expected = run(upstream, path, "stimuli", "answers")
    (upstream / "activations" / "stage.json").unlink()
    save, calls = stage.save_file, []

    def full(tensors, file):
        calls.append(file)
        if len(calls) == 4:
            file.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_file", full)
        with pytest.raises(DiskError, match=r"room for the activations of shard 00001, got .*No space left"):
            run(upstream, path, "stimuli", "answers")
    assert (upstream / "activations" / "shards" / "00000").is_dir()
    assert not (upstream / "activations" / "shards" / "00001").exists()
    assert run(upstream, path, "stimuli", "answers") == expected
