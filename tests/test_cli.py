"""Proves the command line: what it prints, text and JSON; one-line errors; nothing hostile comes through."""

import dataclasses
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny
from hub_fixture import LocalHub, local_hub  # noqa: F401
from PIL import Image
from release_fixture import D_MODEL, LAYERS, N_ATOMS, WORDS, write_dataset_release, write_model_release
from test_load import edit_json

import daco
from builders.mllm import load_mllm
from daco.cli import app, show
from daco.cli.conversation import _Stream
from daco.manifest import MANIFEST, canonical_json
from daco.prompts import chat_inputs, turn
from daco.recognition import Recogniser, measured
from hub.publish import publish
from hub.remote import Target

HOSTILE = "evil\x1b[31m\x9b2J [bold]x[/bold] \u202eabc\x07\r\n:smile:"
ROOT = Path(__file__).parent.parent


class Folders(SimpleNamespace):
    """A dataset release, a model release and its base model, with a picture."""

    dataset: str
    model: str
    base: str
    image: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("cli")
    write_dataset_release(root / "dataset")
    write_model_release(root / "model")
    model, processor = tiny("llava", n_layers=3, hidden=D_MODEL)
    model.save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    Image.fromarray(np.full((40, 51, 3), 200, dtype=np.uint8)).save(root / "grey.png")
    names = {"dataset": "dataset", "model": "model", "base": "base", "image": "grey.png"}
    return Folders(**{name: str(root / path) for name, path in names.items()})


Daco = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Daco:
    """Runs a command here; returns its exit code, what it printed, and its errors."""

    def run(*arguments: str, lines: str = "") -> tuple[int, str, str]:
        import io

        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        capfd.readouterr()
        code = app.run([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


def said(result: tuple[int, str, str]) -> Any:
    """The JSON of a command that succeeded."""
    assert result[0] == 0, result
    return json.loads(result[1])


def refused(result: tuple[int, str, str], *texts: str) -> None:
    """One line of error, exit code 1, no traceback."""
    code, out, error = result
    assert (code, out) == (1, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for text in texts:
        assert text in error


# Releases.


def test_help_lists_the_commands_and_wrong_usage_ends_with_2(cli: Daco) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for name in ("models", "info", "verify", "concepts", "explain", "chat"):
        assert f"  {name}" in out
    assert cli("--version")[:2] == (0, f"{daco.__version__}\n")
    code, _, error = cli("info")
    assert code == 2
    assert "Missing argument 'REPO'" in error


def test_models_prints_what_tests_showed(cli: Daco) -> None:
    found = said(cli("models", "--json"))
    tested = [row["name"] for row in found["models"] if row["status"] == "tested"]
    assert len(tested) > 10
    code, out, _ = cli("models")
    assert code == 0
    assert all(name in out for name in tested)
    assert len(cli("models", "--all")[1].splitlines()) == len(found["models"]) + 2


def test_info_says_what_a_release_is(cli: Daco, folders: Folders) -> None:
    code, out, _ = cli("info", folders.dataset)
    assert code == 0
    assert out.startswith("DACO-tiny 1.0.0, a dataset release\nlicence")
    assert "13: 3 desirable, 7 undesirable, 3 neutral" in out
    assert f"org/tiny-vl@{'f' * 40} (llava, 3 layers of width 32), layers 1, 2" in out
    assert "directions_tiny_vl/layer_1\t13" in out
    found = said(cli("info", folders.model, "--json"))
    assert (found["kind"], found["licence"], found["activation"]) == ("model", "cc-by-4.0", "topk")
    assert [row["layer"] for row in found["layers"]] == list(LAYERS)
    assert found["layers"][0]["atoms"] == N_ATOMS
    assert found["layers"][0]["fve"] == pytest.approx(0.51)
    assert found["steering"]["gamma"] == 0.5
    assert "fve" in cli("info", folders.model)[1]


def test_verify_finds_every_file_that_is_not_as_the_manifest_says(cli: Daco, tmp_path: Path) -> None:
    folder = write_dataset_release(tmp_path / "release")
    files = json.loads((folder / MANIFEST).read_text())["files"]
    found = said(cli("verify", folder, "--json"))
    assert found["counts"] == {"whole": len(files), "not here": 0, "broken": 0}
    names = sorted(files)
    with (folder / names[0]).open("r+b") as file:
        file.seek(9)
        file.write(b"\0")
    (folder / names[1]).unlink()
    (folder / "stray.txt").write_text("?")
    code, out, error = cli("verify", folder)
    assert code == 1
    for line, text in zip(
        error.splitlines(), [names[0], names[1], "stray.txt: not in the manifest"], strict=True
    ):
        assert line.startswith(f"error: {text}")
    assert f"{len(files) - 2} of {len(files) + 1} files are as the manifest says" in out


MAIN = "import sys; from daco.cli import main; sys.argv[0] = 'daco'; sys.exit(main())"


def test_verify_looks_at_what_the_cache_has_and_downloads_when_told(
    local_hub: LocalHub,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = write_model_release(tmp_path / "release")
    (folder / "README.md").unlink(missing_ok=True)
    publish(folder, Target("org/sae", "model", local_hub.url, "hf_local"))
    empty = MAIN.replace("sys.exit(main())", "sys.stderr = sys.stdout; assert main() == 1")
    assert "org/sae: expected a release in the cache, got none; --download fetches it" in " ".join(
        local_hub.run(empty, "verify", "org/sae").split()
    )
    said = json.loads(local_hub.run(MAIN, "info", "org/sae", "--json"))
    assert said["kind"] == "model"
    assert len(said["commit"]) == 40
    counts = json.loads(local_hub.run(MAIN, "verify", "org/sae", "--json"))["counts"]
    assert counts["broken"] == 0
    assert counts["whole"] == 4  # config, evaluation and the atoms of two layers: what info read
    assert counts["not here"] > 0
    n_files = sum(counts.values())
    out = local_hub.run(MAIN, "verify", "org/sae", "--download")
    assert f"{n_files} of {n_files} files are as the manifest says" in out


# Concepts.


def test_concepts_are_searched_and_compared(cli: Daco, folders: Folders, tmp_path: Path) -> None:
    dictionary = daco.ConceptDictionary.from_pretrained(folders.dataset)
    found = said(cli("concepts", "search", folders.dataset, "knive", "--json"))
    assert [row["concept"] for row in found] == list(dictionary.search("knive")["concept"])
    assert cli("concepts", "search", folders.dataset, "zzzz")[1] == "nothing found\n"
    found = said(cli("concepts", "nearest", folders.dataset, "gun", "--layer", 2, "-n", 3, "--json"))
    expected = dictionary.nearest(dictionary.direction("gun", 2), 2, 3)
    assert [row["concept"] for row in found] == list(expected["concept"])
    assert [row["cosine"] for row in found] == pytest.approx(list(expected["cosine"]))
    assert said(cli("concepts", "groups", folders.dataset, "--json"))[0]["n_concepts"] == len(WORDS)
    dictionary.subset(WORDS[1:]).save_pretrained(tmp_path / "newer", model="tiny_vl")
    found = said(cli("concepts", "diff", folders.dataset, tmp_path / "newer", "--json"))
    assert [row["concept"] for row in found["dropped"]] == ["knife"]
    assert "dropped\tknife" in cli("concepts", "diff", folders.dataset, tmp_path / "newer")[1]


# A model.


def explained(folders: Folders, text: str) -> tuple[Any, Any, Any]:
    """Model, SAE and inputs, as `explain` has them."""
    model, processor = load_mllm(folders.base)
    inputs = chat_inputs(processor, [[turn(processor, "user", text, 1)]], [[Image.open(folders.image)]])
    return model, daco.SteeringSAE.from_pretrained(folders.model), inputs


def explaining(folders: Folders) -> tuple[Any, ...]:
    """The command line of an explanation."""
    of_what = ("-t", "a blue square", "-i", folders.image)
    return ("explain", folders.model, "--model", folders.base, *of_what)


def test_explain_names_the_atoms_that_fire(cli: Daco, folders: Folders) -> None:
    arguments = explaining(folders)
    found = said(cli(*arguments, "-l", 2, "-n", 4, "--json"))
    model, sae, inputs = explained(folders, "a blue square")
    with daco.capture.capture(model, [2]) as captured, torch.no_grad():
        model(**inputs)
    code = sae.layers[2].sae.encode(captured.activations[2][0]).detach().numpy()
    order = np.argsort(-code.sum(0), kind="stable")[:4]
    assert [row["atom"] for row in found["atoms"]] == order.tolist()
    for row in found["atoms"]:
        on = code[:, row["atom"]] > 0
        assert row["positions"] == on.sum()
        assert row["strength"] == pytest.approx(code[on, row["atom"]].mean(), rel=1e-4)
        assert row["concepts"] == sae.layers[2].names(row["atom"])[:3]
    assert "not confirmed" in found["notes"][0]
    labelled = said(cli(*arguments, "--labelled", "-n", 99, "--json"))["atoms"]
    assert labelled
    assert {row["polarity"] for row in labelled} <= {"undesirable", "desirable"}
    code, out, _ = cli(*arguments)
    assert code == 0
    assert out.startswith("layer\tatom\tpolarity")


def recognising(folders: Folders, folder: Path, usual: float, words: list[str] = WORDS) -> str:
    """The dictionary, which recognises every second concept whatever is read, of usual readings."""
    known = daco.ConceptDictionary.from_pretrained(folders.dataset)
    known = dataclasses.replace(known, concepts=known.concepts.assign(concept=words))
    table = pd.DataFrame({"threshold": [-1e6, 1e6] * 6 + [None], "n_shown": 7})
    table = measured(table.assign(precision=0.75, recall=0.5))
    one = Recogniser(torch.zeros(D_MODEL), torch.eye(D_MODEL), torch.ones(13, D_MODEL), table, usual)
    dataclasses.replace(known, recognisers={1: one, 2: one}).save_pretrained(folder, model="tiny_vl")
    return str(folder)


def test_explain_tells_what_is_shown_beside_the_atoms(cli: Daco, folders: Folders, tmp_path: Path) -> None:
    arguments = explaining(folders)
    near, far = recognising(folders, tmp_path / "near", 1e9), recognising(folders, tmp_path / "far", 1e-9)
    found = said(cli(*arguments, "-d", near, "-l", 2, "--json"))
    assert found["atoms"] == said(cli(*arguments, "-l", 2, "--json"))["atoms"]
    assert {row["concept"] for row in found["shown"]} == set(WORDS[::2]) - {WORDS[12]}
    assert {(row["layer"], row["precision"]) for row in found["shown"]} == {(2, 0.75)}
    known = daco.ConceptDictionary.from_pretrained(near, recognition=True)
    model, processor = load_mllm(folders.base)
    with pytest.warns(UserWarning, match="not confirmed"):
        readings = known.read(model, processor, ["a blue square"], [Image.open(folders.image)])
    scores = known.recognise({2: readings[2]}).set_index("concept")["score"]
    for row in found["shown"]:
        assert row["score"] == pytest.approx(scores[row["concept"]], rel=1e-4)
    code, out, _ = cli(*arguments, "-d", near)
    assert code == 0
    assert out.index("what is shown\nlayer\tconcept\tpolarity\tscore") < out.index(
        "atoms that fire: a name says"
    )
    assert "--dictionary" not in out
    found = said(cli(*arguments, "-d", far, "--json"))
    assert found["shown"] == []
    assert sum("unlike the stimuli" in note for note in found["notes"]) == 2
    assert "nothing that can be named" in cli(*arguments, "-d", far)[1]
    refused(cli(*arguments, "-d", folders.dataset), "expected a dictionary that tells what is shown")
    refused(cli(*arguments, "-i", folders.image, "-d", near), "--dictionary: expected at most one --image")
    manifest = json.loads((tmp_path / "far" / MANIFEST).read_text("utf-8"))
    for name in ("directions", "recognition", "statistics"):
        manifest["configs"][f"{name}_other"] = manifest["configs"][f"{name}_tiny_vl"]
    manifest["models"]["other"] = manifest["models"]["tiny_vl"]
    (tmp_path / "far" / MANIFEST).write_text(canonical_json(manifest))
    refused(cli(*arguments, "-d", far), "expected model to be one of ['other', 'tiny_vl'], got None")
    assert said(cli(*arguments, "-d", far, "--of", "other", "--json"))["shown"] == []
    hostile = recognising(folders, tmp_path / "hostile", 1e9, [HOSTILE, *WORDS[1:]])
    code, out, error = cli(*arguments, "-d", hostile)
    assert code == 0
    assert "\tevil [31m 2J [bold]x[/bold] abc   :smile:\t" in out
    assert not set("\x1b\x9b\x07\r\u202e") & set(out + error)


def chat(cli: Daco, folders: Folders, lines: str, *options: str) -> tuple[int, list[dict[str, Any]]]:
    code, out, error = cli(
        "chat", folders.model, "--model", folders.base, "--max-new-tokens", 6, "--json", *options, lines=lines
    )
    assert error == ""
    return code, [json.loads(line) for line in out.splitlines()]


def test_chat_answers_as_generate_does_steered_and_not(cli: Daco, folders: Folders) -> None:
    code, found = chat(cli, folders, f"/image {folders.image}\na blue square\n/off\n/again\n")
    assert code == 0
    assert [set(row) & {"note", "answer"} for row in found] == [{"note"}, {"answer"}, {"note"}, {"answer"}]
    model, sae, inputs = explained(folders, "a blue square")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folders.base)

    def answer() -> str:
        new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True).strip()

    plain = answer()
    with pytest.warns(UserWarning, match="not confirmed"), sae.steer(model) as run:
        steered = answer()
    assert (found[1]["answer"], found[3]["answer"]) == (steered, plain)
    assert found[1]["steered"]
    assert not found[3]["steered"]
    assert found[1]["positions"] == run.report().positions
    atoms = {(layer.layer, atom.atom) for layer in run.report().layers for atom in layer.atoms}
    assert {(atom["layer"], atom["atom"]) for atom in found[1]["atoms"]} == atoms
    assert atoms


def test_chat_goes_on_after_mistakes_and_says_so_by_its_exit_code(cli: Daco, folders: Folders) -> None:
    wrong = ["/gamma -1", "/gamma x", "/scope sky", "/image none.png", "/nonsense", "/again"]
    lines = "\n".join([*wrong, "/gamma 0.25", "/atoms", "hello", "/atoms"])
    code, found = chat(cli, folders, lines)
    assert code == 1
    errors = [row["error"] for row in found if "error" in row]
    assert len(errors) == 6
    assert all("expected" in error and "got" in error for error in errors)
    assert found[-2]["method"].endswith("gamma 0.25")
    assert found[-3] == {"note": "no answer was steered yet"}
    assert chat(cli, folders, "/off\nhello\n/atoms")[1][-1] == {"note": "the last answer was not steered"}
    assert found[-1]["atoms"] == found[-2]["atoms"]


def test_chat_remembers_and_forgets(cli: Daco, folders: Folders) -> None:
    code, found = chat(cli, folders, "hello\nhello\n/reset\nhello\n/quit\nnever read\n")
    answers = [row for row in found if "answer" in row]
    assert code == 0
    assert len(answers) == 3
    assert answers[1]["positions"] > answers[0]["positions"]  # the second prompt holds the first turn
    assert answers[2] == answers[0]


def test_chat_with_a_model_of_text_alone(cli: Daco, folders: Folders, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folders.base)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    release = write_model_release(tmp_path / "model")
    base = json.loads((release / "config.json").read_text())["base_model"]
    edit_json(release, "config.json", base_model=base | {"model_type": "llama"})
    text = Folders(model=str(release), base=str(tmp_path / "base"))
    code, found = chat(cli, text, f"hello\n/image {folders.image}\nlook\n")
    assert found[0]["positions"] > 0
    assert code == 1
    assert "expected text alone, got an image" in found[-1]["error"]


# What is hostile, broken or missing.


def test_nothing_a_terminal_obeys_is_printed(cli: Daco, tmp_path: Path) -> None:
    words = [HOSTILE, *WORDS[1:]]
    folder = write_dataset_release(tmp_path / "d", words=words, name=HOSTILE)
    for arguments in (
        ("concepts", "search", folder, "evil"),
        ("concepts", "nearest", folder, "gun", "-n", 99),
        ("concepts", "groups", folder),
        ("info", folder),
        ("concepts", "nearest", folder, "evil\x1b[31m"),
        ("concepts", "search", folder, "evil", "--json"),
    ):
        _, out, error = cli(*arguments)
        for character in "\x1b\x9b\x07\r\u202e":
            assert character not in out + error, arguments
    assert "[bold]x[/bold] abc   :smile:" in cli("concepts", "search", folder, "evil")[1]


def test_plain_text_keeps_letters_and_drops_what_acts() -> None:
    assert show.plain(HOSTILE) == "evil [31m 2J [bold]x[/bold] abc   :smile:"
    assert show.plain("Ünïcödé 漢字 🙂\n\tx", lines=True) == "Ünïcödé 漢字 🙂\n\tx"
    assert show.one_line("a\nb hf_abcdefghijklmnop c") == "a b hf_*** c"


def test_a_streamed_answer_cannot_act_on_a_terminal(tiny_llava: tuple) -> None:
    tokenizer, parts = tiny_llava[1].tokenizer, []
    stream = _Stream(tokenizer, parts.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt is not repeated
    for token in tokenizer(f"  hi {HOSTILE}\nthere", add_special_tokens=False)["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(parts).startswith("hi evil [31m")
    assert "\x1b" not in "".join(parts)
    assert "".join(parts).rstrip("\n").endswith("\nthere")


def test_errors_are_one_line(cli: Daco, folders: Folders, tmp_path: Path) -> None:
    refused(cli("info", "/no/where/at/all"), "expected an existing folder or a repo id")
    refused(cli("concepts", "search", folders.model, "x"), "expected a dataset release, got a model release")
    refused(cli("concepts", "search", folders.dataset, "-", "_"), "expected words to search for")
    refused(cli("concepts", "nearest", folders.dataset, "knive"), "nearest: ['knife'")
    refused(cli("concepts", "nearest", folders.dataset, "gun", "--layer", 9), "layers among [1, 2], got [9]")
    refused(cli("info", folders.dataset, "--type", "space"), "--type: expected model or dataset")
    refused(cli("explain", folders.model), "expected --text, --image or both")
    refused(cli("explain", folders.model, "-i", folders.model), "expected an image at")
    model = ("--model", folders.base)
    refused(cli("chat", folders.model, *model, "--scope", "sky"), "expected one of all, image")
    refused(cli("chat", folders.model, *model, "--gamma", "-2"), "gamma: expected a number")
    refused(cli("chat", folders.model, "--model", tmp_path), "expected a model that transformers can load")
    broken = write_dataset_release(tmp_path / "broken")
    manifest = json.loads((broken / MANIFEST).read_text())
    (broken / MANIFEST).write_text(json.dumps(manifest | {"kind": "hat", "version": 1}))
    refused(cli("info", broken), "breaks the format", "expected MAJOR.MINOR.PATCH")


def test_a_wrong_image_is_said_before_a_model_is_loaded(cli: Daco, folders: Folders) -> None:
    refused(cli("chat", folders.model, "--model", "/no/model/here", "-i", "none.png"), "expected an image at")


@pytest.mark.parametrize(
    ("cause", "named"),
    [
        ("no libfoo", "got: no libfoo; check name"),
        (
            "operator torchvision::nms",
            "built for another torch; install the torchvision that goes with torch",
        ),
    ],
)
def test_an_import_that_fails_is_named_by_its_cause(
    cause: str, named: str, cli: Daco, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise ImportError("Could not import module 'LlamaConfig'") from RuntimeError(cause)

    monkeypatch.setattr("daco.cli.base_model._load", broken)
    refused(cli("explain", folders.model, "--model", folders.base, "-t", "hello"), named)


def test_other_weights_are_refused_by_the_options_name(cli: Daco, folders: Folders, tmp_path: Path) -> None:
    release = write_model_release(tmp_path / "model")
    edit_json(release, "config.json", base_model_fingerprint={"0.self_attn.q_proj.weight": "9 " * 8})
    explain = ("explain", release, "--model", folders.base, "-t", "hello")
    refused(
        cli(*explain), "expected the weights of org/tiny-vl, got others in 1 of 1", "give --base-model-ok"
    )
    assert (
        "base_model_ok: expected the weights" in said(cli(*explain, "--base-model-ok", "--json"))["notes"][0]
    )


def test_a_release_that_names_no_base_model_asks_for_one(cli: Daco, tmp_path: Path) -> None:
    release = write_model_release(tmp_path / "model")
    base = json.loads((release / "config.json").read_text())["base_model"]
    edit_json(release, "config.json", base_model=base | {"id": "", "revision": ""})
    refused(
        cli("chat", release), "expected --model, a folder or org/name of a llava with 3 layers of width 32"
    )


def test_code_and_pickle_of_a_repo_are_never_run(cli: Daco, folders: Folders, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    names = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (evil / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    refused(cli("chat", folders.model, "--model", evil), "expected a model that transformers can load")
    assert not mark.exists()
    pickled = tmp_path / "pickled"
    subprocess.run(["cp", "-r", folders.base, pickled], check=True)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(cli("chat", folders.model, "--model", pickled), "expected a model that transformers can load")


def test_without_its_extra_it_says_what_to_install() -> None:
    code = f"import sys; sys.modules['typer'] = None; {MAIN}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == (
        "error: expected the packages of the command line, got no typer; run `pip install 'daco[cli]'`\n"
    )


def test_a_person_at_a_terminal_talks_and_leaves(folders: Folders) -> None:
    code = f"from builders.vision import ensure_torchvision; ensure_torchvision(); {MAIN}"
    command = [sys.executable, "-W", "ignore", "-c", code, "chat", folders.model, "--model", folders.base]
    ours, theirs = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "120"}
    talk = subprocess.Popen(
        [*command, "--max-new-tokens", "3"], stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=ROOT
    )
    os.close(theirs)
    try:
        screen = until(ours, "> ")
        assert "steered by" in screen
        os.write(ours, b"hello\n")
        assert "[steered" in until(ours, "> ")
        os.write(ours, b"/off\n")
        assert "steering is off" in until(ours, "> ")
        os.write(ours, b"\x04")
        assert talk.wait(timeout=20) == 0
    finally:
        talk.kill()
        os.close(ours)


def until(terminal: int, mark: str, seconds: float = 60) -> str:
    """What a terminal shows up to a mark at the end."""
    shown, end = "", time.monotonic() + seconds
    while not shown.endswith(mark) or shown.count("\n") < 2:
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], shown
        shown += os.read(terminal, 4096).decode("utf-8", "replace")
    return shown


def test_tables_stand_aligned_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    show.table(
        [{"concept": "[red]knife[/red]", "cosine": 0.5, "polarity": "undesirable"}], ["concept", "cosine"]
    )
    out = capsys.readouterr().out
    assert "[red]knife[/red]" in out
    assert "0.500" in out
    rows = [{"concept": "knife", "definition": "what cuts " * 20, "polarity": "undesirable", "n": 7}]
    show.table(rows, ["concept", "definition", "polarity", "n"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert len(plain) == 3  # a row is a line: what is long is cut, what is short is whole
    assert all(len(line) <= 60 for line in plain)
    assert plain[2].startswith("knife    what cuts ")
    assert plain[2].rstrip().endswith("…  undesirable  7")
    frame = pd.DataFrame({"a": np.array([1, 2], dtype=np.int32), "b": [0.5, float("nan")]})
    assert show.records(frame) == [{"a": 1, "b": 0.5}, {"a": 2, "b": None}]
