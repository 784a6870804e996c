"""An evaluation asks every item once under every method, keeps all of it, and goes on where it was killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safety_stand_ins import METHODS, Length, arms, cells, items, quick, releases, suite, tiny
from small_run import digests

from builders.answers import generated_ids
from builders.safety import run
from builders.safety.asking import Pace, ask, batches, inputs_of, opened
from builders.safety.items import Picture
from builders.safety.methods import build, parse_settings
from builders.safety.run import Asking, answer_all, jobs_of, judge_all, judge_facts, part_of, record, thinned
from daco.dictionary import ConceptDictionary
from daco.errors import RecipeError
from daco.steering_sae import SteeringSAE
from daco.tables import read_table

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return tiny()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return arms(tmp_path_factory.mktemp("releases"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SHARD", 4)


def read(out: Path, cell: Any) -> Any:
    tables = [read_table(path, run.ANSWERS).to_pandas() for path in run.shard_files(cell.folder(out))]
    return pd.concat(tables, ignore_index=True)


def test_every_item_is_asked_under_every_method_and_all_of_it_is_kept(
    tmp_path: Path, model: Any, made: Any
) -> None:
    found = cells(model, [suite()], made)
    answer_all(tmp_path, *model, jobs_of(found, (1, 1)), quick())
    assert [cell.arm.name for cell in found] == list(METHODS)
    answers = {}
    for cell in found:
        table = read(tmp_path, cell)
        assert table["item_id"].tolist() == [item.item_id for item in cell.suite.items]
        assert table["prompt"].tolist() == [item.prompt for item in cell.suite.items]
        assert set(table["method"]) == {cell.arm.name}
        assert set(table["setting"]) == {str(cell.arm)}
        assert table["answer"].notna().all()
        assert (table["trouble"] == "").all()
        answers[cell.arm.name] = table["answer"].tolist()
        costs = [
            json.loads(p.with_suffix(".json").read_text()) for p in run.shard_files(cell.folder(tmp_path))
        ]
        assert all(cost["steps"] > 0 and cost["seconds"] > 0 for cost in costs)
        assert all((cost["positions"] > 0) == (cell.arm.method is not None) for cost in costs)
    assert answers["daco"] != answers["none"]
    assert answers["prompting"] != answers["none"]


def test_a_batch_says_what_each_item_says_alone(model: Any) -> None:
    """Left padding and company change no answer: compared with a plain loop of one item a call."""
    some = items(9)
    for rows in batches(some, 4):
        together = ask(*model, [some[r] for r in rows], opened([some[r] for r in rows]).pictures, 5)
        for row, answer in zip(rows, together, strict=True):
            alone = inputs_of(model[1], [some[row]], opened([some[row]]).pictures, None)
            said = generated_ids(*model, alone, 5)
            assert answer.text == model[1].tokenizer.batch_decode(said, skip_special_tokens=True)[0].strip()
            assert (answer.n_tokens, answer.cut) == (len(said[0]), len(said[0]) == 5)


def test_batches_hold_each_item_once_and_never_mix_pictures_with_none() -> None:
    some = items(23)
    found = batches(some, 4)
    assert sorted(row for rows in found for row in rows) == list(range(23))
    assert all(len({len(some[row].pictures) for row in rows}) == 1 for rows in found)
    assert max(map(len, found)) == 4


def test_a_picture_that_cannot_be_read_leaves_its_item_out_and_no_other(
    tmp_path: Path, model: Any, made: Any
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    some = items(5)
    some[1] = some[1]._replace(pictures=(Picture(path=tmp_path / "broken.png"),))
    found = cells(model, [suite()._replace(items=tuple(some))], made[:1])
    answer_all(tmp_path, *model, jobs_of(found, (1, 1)), quick())
    table = read(tmp_path, found[0])
    assert table["answer"].isna().tolist() == [False, True, False, False, False]
    assert table["trouble"][1].startswith("unreadable picture")
    judge = Length()
    judge_all(tmp_path, judge, jobs_of(found, (1, 1)))
    assert judge.asked == 4


def test_a_prompt_that_the_window_does_not_hold_leaves_its_item_out_and_no_other(
    tmp_path: Path, model: Any, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [item._replace(pictures=()) for item in items(6)]
    n_tokens = [int(inputs_of(model[1], [item], [[]], None)["attention_mask"].sum()) for item in some]
    longest = max(n_tokens)
    assert min(n_tokens) < longest
    asking = quick()
    config = model[0].config.get_text_config()
    for window, fit in ((longest + asking.max_answer - 1, [n < longest for n in n_tokens]), (3, [False] * 6)):
        monkeypatch.setattr(config, "max_position_embeddings", window)
        found = cells(model, [suite()._replace(items=tuple(some))], made[:1])
        answer_all(tmp_path / str(window), *model, jobs_of(found, (1, 1)), asking)
        table = read(tmp_path / str(window), found[0])
        assert table["answer"].notna().tolist() == fit
        for n, why, ok in zip(n_tokens, table["trouble"], fit, strict=True):
            told = f"longer than the model reads: {n} + {asking.max_answer} tokens, {window} at most"
            assert why == ("" if ok else told)


def test_nothing_is_asked_or_judged_twice(
    tmp_path: Path, model: Any, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cells(model, [suite()], made)
    jobs, judge = jobs_of(found, (1, 1)), Length()
    answer_all(tmp_path, *model, jobs, quick())
    judge_all(tmp_path, judge, jobs)
    before, asked = digests(tmp_path), judge.asked
    monkeypatch.setattr(run, "ask", lambda *_: pytest.fail("asked again"))
    answer_all(tmp_path, *model, jobs, quick())
    judge_all(tmp_path, judge, jobs)
    assert (digests(tmp_path), judge.asked) == (before, asked)


def test_another_setting_model_or_item_is_another_cell(model: Any, made: Any, tmp_path: Path) -> None:
    own = {cell.arm.name: cell.name for cell in cells(model, [suite()], made)}
    stronger = arms(tmp_path / "stronger", METHODS, ["daco.gamma=0.5"])
    changed = {cell.arm.name: cell.name for cell in cells(model, [suite()], stronger)}
    assert [name for name in METHODS if own[name] != changed[name]] == ["daco"]
    for other in (
        cells(model, [suite(10)], made),
        cells(model, [suite()], made, quick(max_answer=6)),
        cells(tiny("qwen2_5_vl"), [suite()], made),
    ):
        assert all(cell.name != own[cell.arm.name] for cell in other)
    for part in ("language_model.layers.1", "vision_tower", "multi_modal_projector"):
        changed = tiny()
        with torch.no_grad():
            next(changed[0].model.get_submodule(part).parameters()).add_(0.1)
        assert all(cell.name != own[cell.arm.name] for cell in cells(changed, [suite()], made))
    changed = tiny()
    changed[1].image_processor.do_normalize = False
    assert all(cell.name != own[cell.arm.name] for cell in cells(changed, [suite()], made))
    assert {cell.arm.name: cell.name for cell in cells(model, [suite()], made, quick(batch=2))} == own


def test_other_saes_or_directions_of_the_same_settings_are_other_cells(
    model: Any, made: Any, tmp_path: Path
) -> None:
    own = {cell.arm.name: cell.name for cell in cells(model, [suite()], made)}
    sae_folder, dictionary_folder = releases(tmp_path)
    sae, dictionary = (
        SteeringSAE.from_pretrained(sae_folder),
        ConceptDictionary.from_pretrained(dictionary_folder),
    )
    given = parse_settings(METHODS, [])
    assert {c.arm.name: c.name for c in cells(model, [suite()], build(given, sae, dictionary))} == own
    with torch.no_grad():
        sae.layers[1].sae.W_dec[3] *= 1.5
        dictionary.vectors[2][5] += 0.25
    found = {c.arm.name: c.name for c in cells(model, [suite()], build(given, sae, dictionary))}
    assert [name for name in METHODS if found[name] != own[name]] == ["actadd", "mop", "daco"]


def test_a_model_s_own_settings_of_generation_change_no_answer(model: Any) -> None:
    some = items(4)[1:3]
    pictures = opened(some).pictures
    before = [answer.text for answer in ask(*model, some, pictures, 6)]
    config = model[0].generation_config
    old = config.repetition_penalty, config.num_beams
    try:
        config.repetition_penalty, config.num_beams = 5.0, 3
        assert [answer.text for answer in ask(*model, some, pictures, 6)] == before
    finally:
        config.repetition_penalty, config.num_beams = old


def test_decoding_is_timed_behind_the_first_token(model: Any) -> None:
    times = iter([10.0])
    pace = Pace(lambda: next(times))
    some = items(4)[1:3]
    said = ask(*model, some, opened(some).pictures, 5, None, pace)
    assert pace.first == 10.0
    assert max(answer.n_tokens for answer in said) - 1 <= pace.steps <= 4


def test_parts_together_make_what_one_process_makes(tmp_path: Path, model: Any, made: Any) -> None:
    found = cells(model, [suite(11)], made)
    answer_all(tmp_path / "one", *model, jobs_of(found, (1, 1)), quick())
    for part in ((2, 3), (3, 3), (1, 3)):
        answer_all(tmp_path / "three", *model, jobs_of(found, part), quick())
    kept = [
        {n: d for n, d in digests(tmp_path / name).items() if n.endswith(".parquet")}
        for name in ("one", "three")
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 3 * len(METHODS)


def test_thinned_items_are_spread_over_the_suite() -> None:
    few = thinned(suite(10), 4)
    assert [item.item_id for item in few.items] == ["ours/0", "ours/2", "ours/5", "ours/7"]
    assert few.notes[-1] == "4 of 10 items, spread evenly"
    whole = suite(10)
    assert thinned(whole, 10) is whole
    assert thinned(whole, 0) is whole


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "a/b", "1/2/3"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="part: expected"):
        Asking(part=part_of(text))


@pytest.mark.parametrize("changes", [{"batch": 0}, {"max_answer": 0}, {"items": -1}])
def test_numbers_that_cannot_be_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="expected at least"):
        Asking(**changes)


RECORDS = """
    import sys
    from pathlib import Path
    from builders.safety.run import read_record, record

    for _ in range(200):
        record(Path(sys.argv[1]), [], [], {"model": {"id": "x" * 20_000}})
        read_record(Path(sys.argv[1]))
"""


def test_parts_may_write_the_record_at_the_same_time(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(RECORDS), str(tmp_path)]
    parts = [
        subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [(part.communicate()[1][-300:], part.returncode) for part in parts] == [("", 0)] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from safety_stand_ins import Length, arms, cells, quick, suite, tiny
    from builders.safety import run

    out, kill_at = Path({out!r}), {kill_at}
    run.SHARD = 4
    model = tiny()
    made = arms(Path({out!r} + "-releases-" + str(os.getpid())))
    found = cells(model, [suite(11)], made)
    jobs = run.jobs_of(found, (1, 1))
    count = 0
    write = run.write_table
    def counted(path, table):
        global count
        if count == kill_at:
            path.with_name(f".{{path.name}}.partial").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return write(path, table)
    run.write_table = counted
    run.answer_all(out, *model, jobs, quick())
    run.judge_all(out, Length(), jobs)
"""


def evaluated(out: Path, kill_at: int = -1) -> int:
    script = textwrap.dedent(SCRIPT.format(tests=str(ROOT / "tests"), out=str(out), kill_at=kill_at))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, timeout=300).returncode


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_tables(tmp_path: Path) -> None:
    out, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    assert evaluated(undisturbed) == 0
    for kill_at in (2, 6, 9):  # in answers, in later answers, in scores
        assert evaluated(out, kill_at) == -signal.SIGKILL
        assert not list(out.glob("**/00000.parquet")) or all(
            read_table(path).num_rows for path in out.glob("**/0*.parquet")
        )
    assert evaluated(out) == 0
    tables = [
        {n: d for n, d in digests(folder).items() if n.endswith(".parquet") and "/." not in n}
        for folder in (out, undisturbed)
    ]
    assert tables[0] == tables[1]


def test_the_record_says_what_is_compared(tmp_path: Path, model: Any, made: Any) -> None:
    found = cells(model, [suite(), suite(7, "theirs", "harmless")], made)
    record(tmp_path, found, [judge_facts(Length(), found)], {"model": {"id": "a/b"}})
    told = run.read_record(tmp_path)
    assert {name: facts["items"] for name, facts in told["suites"].items()} == {"ours": 9, "theirs": 7}
    assert told["suites"]["ours"]["skipped"] == {"missing_image": 2}
    assert len(told["cells"]) == 2 * len(METHODS)
    assert told["judges"][0]["suites"] == ["ours"]
    with pytest.raises(RecipeError, match="expected the folder of an evaluation"):
        run.read_record(tmp_path / "elsewhere")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RecipeError, match="expected JSON"):
        run.read_record(tmp_path)
