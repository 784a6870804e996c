"""The commands of `daco`, over the library: what they take, and what they print.

Read the Hub's address and token from huggingface_hub's own settings (`HF_ENDPOINT`, `HF_TOKEN`,
`hf auth login`); a token is never an argument and never printed.
"""

import sys
import warnings
from typing import Annotated, Any

import typer
from tqdm import tqdm

import daco
from daco import text_search
from daco.cli import releases, show
from daco.cli.base_model import load, open_image, place_of, quiet
from daco.dictionary import ConceptDictionary
from daco.dictionary_files import read_concepts
from daco.errors import DacoError
from daco.load import resolve
from daco.steering import SCOPES
from daco.steering_sae import SteeringSAE

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Concept dictionaries and steering SAEs for multimodal LLMs.",
)
concepts = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into a concept dictionary.")
app.add_typer(concepts, name="concepts")

Repo = Annotated[str, typer.Argument(metavar="REPO", help="org/name on the Hub, or a release folder.")]
Revision = Annotated[str | None, typer.Option(help="Tag, branch or commit; the newest when left out.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use the cache alone.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Count = Annotated[int, typer.Option("-n", "--number", min=1, help="How many at most.")]
Of = Annotated[str | None, typer.Option("--of", help="Short name of the model, where there are several.")]
Layer = Annotated[int | None, typer.Option(help="Layer; the middle one when left out.")]
Kind = Annotated[str | None, typer.Option("--type", help="model or dataset, where both have the name.")]
Model = Annotated[
    str | None, typer.Option(help="Base model: folder or org/name[@revision]; the release's when left out.")
]
Device = Annotated[str, typer.Option(help="As torch takes it; a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16, ...")]
BaseOk = Annotated[
    bool, typer.Option("--base-model-ok", help="Accept another base model: a fine-tune, a quantised copy.")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(daco.__version__)
        raise typer.Exit


@app.command()
def models(
    every: Annotated[bool, typer.Option("--all", help="Also those that were not tested in full.")] = False,
    as_json: Json = False,
) -> None:
    """Which models can be steered, and how that is known."""
    from daco.models import supported

    found = supported()
    if as_json:
        show.as_json({"transformers": found.attrs["transformers"], "models": show.records(found)})
        return
    counts = found["status"].value_counts()
    if every:
        show.table(show.records(found), ["name", "model_type", "takes", "status", "because"])
        said = ", ".join(f"{n} {status}" for status, n in counts.items())
    else:
        tested = show.records(found[found["status"] == "tested"])
        marks = list(dict.fromkeys(mark for row in tested for mark in row["shown"].split(", ")))
        rows = [row | {m.split()[0]: "yes" for m in row["shown"].split(", ")} for row in tested]
        show.table(rows, ["name", "model_type", *(mark.split()[0] for mark in marks)])
        show.say(f"\nyes: shown by a test; {', '.join(marks)}", style="dim")
        said = f"{len(tested)} tested; --all lists {len(found) - len(tested)} more"
    show.say(f"{said}; with transformers {found.attrs['transformers']}", style="dim")


@app.command()
def info(
    repo: Repo, revision: Revision = None, kind: Kind = None, offline: Offline = False, as_json: Json = False
) -> None:
    """What a release is. Version, layers, counts, licence, base model, figures."""
    found = releases.described(releases.find(repo, _kind(kind), revision, offline))
    if as_json:
        show.as_json(found)
        return
    show.say(f"{show.plain(found['name'])} {found['version']}, a {found['kind']} release")
    show.facts(_common(found) | (_of_dataset(found) if found["kind"] == "dataset" else _of_model(found)))
    show.say()
    if found["kind"] == "dataset":
        show.table([{"table": name, "rows": rows} for name, rows in found["rows"].items()], ["table", "rows"])
    else:
        columns = ["layer", "atoms", "undesirable", "desirable", "fve", "l0", "dead"]
        show.table(found["layers"], [c for c in columns if any(c in row for row in found["layers"])])
    for limit in found["limits"]:
        show.say(f"limit: {show.plain(limit)}")


def _common(found: dict[str, Any]) -> dict[str, Any]:
    sources = [f"{s['name']} ({s['licence'] or 'licence unknown'})" for s in found["sources"]]
    size = f"{found['files']} files, {found['bytes'] / 1e6:,.1f} MB"
    return {"commit": found["commit"], "licence": found["licence"], "sources": sources, "size": size}


def _of_dataset(found: dict[str, Any]) -> dict[str, Any]:
    counts = ", ".join(f"{n:,} {polarity}" for polarity, n in found["concepts"].items())
    rows: dict[str, Any] = {"concepts": f"{sum(found['concepts'].values()):,}: {counts}"}
    for name, facts in found["models"].items():
        rows[f"directions {show.plain(name)}"] = f"{_base(facts)}, layers {_span(facts['layers'])}"
    return rows


def _of_model(found: dict[str, Any]) -> dict[str, Any]:
    dictionary, steering = found["dictionary"], found["steering"]
    training = found.get("training", {})
    return {
        "base model": _base(found["base_model"]),
        "dictionary": " ".join(str(dictionary[key]) for key in ("dataset", "tag") if dictionary.get(key)),
        "activation": found["activation"] + (f", k = {training['k']}" if "k" in training else ""),
        "steering": ", ".join(f"{key} {steering[key]}" for key in ("eta", "gamma", "scope")),
    }


def _base(facts: dict[str, Any]) -> str:
    name = facts["id"] or "unknown id"
    revision = f"@{facts['revision']}" if facts["revision"] else ""
    shape = f"{facts['n_layers']} layers of width {facts['hidden_size']}"
    return f"{name}{revision} ({facts['model_type']}, {shape})"


def _span(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))


@app.command()
def verify(
    repo: Repo,
    revision: Revision = None,
    kind: Kind = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch what is not in the cache.")] = False,
    as_json: Json = False,
) -> None:
    """Compare a release's files with its manifest.

    Of a repo, those that the cache has; the exit code is 1 where one is broken.
    """
    snapshot = releases.cached(repo, _kind(kind), revision, download)
    files = tqdm(
        releases.check(snapshot),
        total=len(snapshot.manifest["files"]),
        unit="file",
        disable=None,
        leave=False,
    )
    checked = list(files)
    counts = {state: sum(one.state == state for one in checked) for state in ("whole", "not here", "broken")}
    wrong = [one for one in checked if one.state == "broken"]
    if as_json:
        show.as_json(
            {"name": snapshot.name, "commit": snapshot.commit, "counts": counts}
            | {"files": [one._asdict() for one in checked]}
        )
    else:
        for one in wrong:
            show.fail(one.problem)
        missing = (
            f", {counts['not here']} not in the cache (--download fetches them)" if counts["not here"] else ""
        )
        where = show.plain(snapshot.name) + (f" at {snapshot.commit}" if snapshot.commit else "")
        show.say(f"{where}: {counts['whole']} of {len(checked)} files are as the manifest says{missing}")
    if wrong:
        raise typer.Exit(1)


@concepts.command()
def search(
    repo: Repo,
    text: Annotated[list[str], typer.Argument(help="What is sought: words of a name or definition.")],
    n: Count = 10,
    revision: Revision = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Concepts by name, id or definition, best first."""
    table = read_concepts(resolve(repo, "dataset", revision=revision, local_files_only=offline))
    found = text_search.best(table, " ".join(text), n)
    _print_concepts(found, "score", as_json)


@concepts.command()
def nearest(
    repo: Repo,
    concept: Annotated[str, typer.Argument(help="Name or id of a concept.")],
    layer: Layer = None,
    n: Count = 10,
    of: Of = None,
    revision: Revision = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Concepts whose directions are nearest to one concept's."""
    snapshot = resolve(repo, "dataset", revision=revision, local_files_only=offline)
    if layer is None:
        known = next(iter(snapshot.manifest["models"].values()), {"layers": [0]})["layers"]
        layer = int(known[len(known) // 2])
    dictionary = ConceptDictionary.from_pretrained(
        repo, of, revision=snapshot.commit, layers=[layer], local_files_only=offline
    )
    found = dictionary.nearest(dictionary.direction(concept, layer), layer, n)
    if not as_json:
        show.say(f"layer {layer}")
    _print_concepts(found, "cosine", as_json)


@concepts.command()
def groups(
    repo: Repo, revision: Revision = None, of: Of = None, offline: Offline = False, as_json: Json = False
) -> None:
    """Groups of concepts, and how many of each polarity they have."""
    dictionary = ConceptDictionary.from_pretrained(
        repo, of, revision=revision, layers=[], local_files_only=offline
    )
    found = show.records(dictionary.groups())
    show.as_json(found) if as_json else show.table(found, list(found[0]))


@concepts.command()
def diff(
    older: Annotated[str, typer.Argument(help="org/name[@revision] or a folder.")],
    newer: Annotated[str, typer.Argument(help="Likewise.")],
    of: Of = None,
    moved: Annotated[float, typer.Option(help="Cosine below which a direction has moved.")] = 0.99,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """What tells a newer dictionary from an older one: concepts added, dropped, relabelled, moved."""
    pair = [_dictionary(name, of, offline) for name in (older, newer)]
    found = pair[0].diff(pair[1], moved)
    if as_json:
        parts = {
            name: show.records(getattr(found, name)) for name in ("added", "dropped", "relabelled", "moved")
        }
        show.as_json(parts | {"same": found.same})
        return
    show.say(found)
    rows = [{"change": c, **row} for c in ("added", "dropped") for row in show.records(getattr(found, c))]
    rows += [{"change": "relabelled", **row} for row in show.records(found.relabelled)]
    rows += [{"change": "moved", **row} for row in show.records(found.moved)]
    if rows:
        show.table(rows, ["change", "concept", "concept_id", "before", "after", "layer", "cosine"])


def _dictionary(
    name: str, of: str | None, offline: bool, layers: list[int] | None = None, recognition: bool = False
) -> ConceptDictionary:
    repo, _, revision = (name, "", "") if releases.is_folder(name) else name.partition("@")
    return ConceptDictionary.from_pretrained(
        repo,
        of,
        revision=revision or None,
        layers=layers,
        recognition=recognition,
        local_files_only=offline,
    )


def _print_concepts(found: Any, score: str, as_json: bool) -> None:
    rows = show.records(found)
    if as_json:
        show.as_json(rows)
    elif rows:
        ids = [] if show.console().is_terminal else ["concept_id"]  # of no use to people, and long
        show.table(rows, ["concept", "polarity", score, "group", "definition", *ids])
    else:
        show.say("nothing found")


SHOWN = ("layer", "concept", "polarity", "score", "threshold", "precision")
"""What `explain` prints of what is shown."""

EXPLAINED = ("layer", "atom", "polarity", "concepts", "positions", "image", "strength")
"""What `explain` prints of its table; JSON has all of it."""


@app.command()
def explain(
    repo: Repo,
    text: Annotated[str, typer.Option("-t", "--text", help="What the user says.")] = "",
    image: Annotated[list[str] | None, typer.Option("-i", "--image", help="What the user shows.")] = None,
    layers: Annotated[list[int] | None, typer.Option("-l", "--layer", help="Only these layers.")] = None,
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many atoms a layer.")] = 5,
    labelled: Annotated[
        bool, typer.Option("--labelled", help="Only desirable and undesirable atoms: those steering uses.")
    ] = False,
    dictionary: Annotated[
        str | None, typer.Option("-d", "--dictionary", help="Dataset release: tell what is shown, too.")
    ] = None,
    of: Of = None,
    model: Model = None,
    revision: Revision = None,
    device: Device = "",
    dtype: Dtype = "auto",
    base_model_ok: BaseOk = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Which atoms fire on a text and images. By name and strength, without steering.

    An atom's name says which side it takes, hardly what is shown: that is told by the dictionary that the
    release was made from (--dictionary), for texts and images like its captioned ones.
    """
    if not text and not image:
        raise ValueError("expected --text, --image or both, got neither")
    if dictionary and len(image or []) > 1:
        raise ValueError(f"--dictionary: expected at most one --image, got {len(image or [])}")
    from daco.prompts import chat_inputs, turn

    pictures = [open_image(path) for path in image or []]
    sae = SteeringSAE.from_pretrained(
        repo, revision=revision, layers=layers or None, local_files_only=offline
    )
    known = _dictionary(dictionary, of, offline, layers or sorted(sae.layers), True) if dictionary else None
    if known:
        known.recognise({})  # refused before a model is loaded, where the release does not hold what it takes
    mllm, processor = _base_model(sae, model, device, dtype)
    inputs = chat_inputs(processor, [[turn(processor, "user", text, len(pictures))]], [pictures])
    found = sae.explain(mllm, inputs, base_model_ok=base_model_ok)
    notes = found.attrs["notes"]
    shown = []
    if known:
        readings = known.read(mllm, processor, [text], pictures or None, base_model_ok=base_model_ok)
        table = known.recognise(readings)
        shown, notes = show.records(table.drop(columns="reading")), [*notes, *table.attrs["notes"]]
    if labelled:
        found = found[found["polarity"] != "neutral"]
    top = show.records(found.groupby("layer", sort=True).head(n).drop(columns="row"))
    tokens = int(inputs["input_ids"].shape[1])
    if as_json:
        show.as_json({"tokens": tokens, "atoms": top, "notes": notes} | ({"shown": shown} if known else {}))
        return
    if known:
        show.say("what is shown" if shown else "what is shown: nothing that can be named", style="bold")
        if shown:
            show.table(shown, SHOWN)
        show.say(
            "\natoms that fire: a name says which side an atom takes, hardly what is shown", style="bold"
        )
    show.table(top, EXPLAINED)
    hint = "" if labelled else "; --labelled: those that steering uses"
    hint += "" if known else "; --dictionary: what is shown"
    show.say(f"\n{tokens} tokens; strength: mean where it fires{hint}", style="dim")
    for note in notes:
        show.say(f"note: {show.plain(note)}", style="dim")


@app.command()
def chat(
    repo: Repo,
    image: Annotated[
        list[str] | None, typer.Option("-i", "--image", help="Shown with the first message.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Begin without steering.")] = False,
    gamma: Annotated[float | None, typer.Option(help="Strength of the desirable shift.")] = None,
    eta: Annotated[float | None, typer.Option(help="Cosine threshold of labels.")] = None,
    scope: Annotated[str | None, typer.Option(help=f"Where to steer: {', '.join(SCOPES)}.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token each time.")] = 0.0,
    model: Model = None,
    revision: Revision = None,
    device: Device = "",
    dtype: Dtype = "auto",
    base_model_ok: BaseOk = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Talk with a steered model. Lines from a pipe are taken as turns; /help lists the commands."""
    from daco.cli.chat import Chat, run_lines, run_terminal
    from daco.cli.conversation import Conversation, Settings

    if scope is not None and scope not in SCOPES:
        raise ValueError(f"--scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    for path in image or []:
        open_image(path)  # a wrong path is said at once, not when the model is there
    sae = SteeringSAE.from_pretrained(repo, revision=revision, local_files_only=offline)
    mllm, processor = _base_model(sae, model, device, dtype)
    note = sae.base_model.check(mllm, base_model_ok)
    settings = Settings(
        scope=scope or sae.defaults["scope"],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        base_model_ok=base_model_ok,
    )
    talk = Conversation(mllm, processor, sae, settings)
    talk.set(on=not off, gamma=gamma, eta=eta)
    talking = Chat(talk, as_json)
    if not as_json and show.is_terminal():
        _greet(talk, note)
    for path in image or []:
        talking.line(f"/image {path}")
    if show.is_terminal() and not as_json:
        run_terminal(talking)
    elif code := run_lines(talking):
        raise typer.Exit(code)


def _greet(talk: Any, note: str | None) -> None:
    sae, steering = talk.sae, talk.sae.defaults
    base = sae.base_model.id or sae.base_model.model_type
    show.say(f"{show.plain(base)}, steered by {show.plain(sae.name)} at layers {_span(sorted(sae.layers))}")
    given = {"gamma": talk.settings.gamma, "eta": talk.settings.eta, "scope": talk.settings.scope}
    said = ", ".join(f"{k} {steering[k] if v is None else v}" for k, v in given.items())
    state = "" if talk.settings.on else "; steering is off, /on begins"
    show.say(f"{said}{state}; /help lists the commands, ctrl-D leaves", style="dim")
    if note:
        show.say(f"note: {show.plain(note)}", style="dim")


def _base_model(sae: SteeringSAE, name: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    place, revision = place_of(sae.base_model, name)
    return load(place, revision, device, dtype)


def _kind(text: str | None) -> str | None:
    if text not in (None, *releases.KINDS):
        raise ValueError(f"--type: expected model or dataset, got {text!r}")
    return text


def as_options(error: Exception) -> str:
    """What an error says, with the option's name in place of the argument's."""
    return str(error).replace("pass base_model_ok=True", "give --base-model-ok")


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; our own errors end it with one line and exit code 1.

    Args:
        arguments: Instead of the process's own.
    """
    for stream in (sys.stdout, sys.stderr):
        if callable(reconfigure := getattr(stream, "reconfigure", None)):
            reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    quiet()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is in reports and notes
            app(arguments)
    except (DacoError, ValueError) as error:
        show.fail(as_options(error))
        return 1
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    return 0
