"""The evaluation as one call: loads what is compared, asks, has the answers judged, and makes the table.

Reads a model, a model release, a dataset release and suites; writes the folder of `builders.safety.run`.
Judges that need a model of their own are loaded after the answers are there, one after the other.
"""

import dataclasses
import gc
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from builders.mllm import load_mllm
from builders.safety.asking import GREEDY
from builders.safety.items import Suite
from builders.safety.judges import check_spec, judges_of
from builders.safety.judges.fluency import LikelihoodJudge
from builders.safety.methods import BY_DICTIONARY, build, parse_settings
from builders.safety.report import missing, write_report
from builders.safety.run import Asking, answer_all, cells_of, jobs_of, judge_all, judge_facts, record, thinned
from builders.safety.suites import read_suite
from builders.safety.verdicts import Judge
from daco.dictionary import ConceptDictionary
from daco.errors import RecipeError
from daco.sites import ModelFacts
from daco.steering_sae import SteeringSAE

DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("none", "prompting", "actadd", "mop", "daco")


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, as texts: see `python -m builders evaluate --help`."""

    model: str
    """Hub id with `@revision`, or a folder."""
    out: Path
    """The run's folder; running again resumes."""
    suites: tuple[str, ...]
    """Specs of `builders.safety.suites.read_suite`."""
    judges: tuple[str, ...] = ("rule", "choice")
    """Specs of `builders.safety.judges.judges_of`."""
    methods: tuple[str, ...] = METHODS
    """Keys of `builders.safety.methods.METHODS`."""
    sae: str = ""
    """A model release: repo with `@revision`, or a folder."""
    dictionary: str = ""
    """A dataset release likewise; empty: the one the SAEs name."""
    settings: tuple[str, ...] = ()
    """`method.setting=value`."""
    directions: str = ""
    """Short name of the model in it, where the dictionary has directions of several."""
    dtype: str = "bfloat16"
    """Of the model."""
    base_url: str = ""
    """Server of OpenAI's protocol, for judges `endpoint:`."""
    rubric: Path | None = None
    """Wording of the rubric, in place of ours."""
    categories: Path | None = None
    """JSON of category and text, for guards whose template takes them."""
    asking: Asking = field(default_factory=Asking)
    """How the model is asked."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.dtype not in DTYPES:
            raise RecipeError(f"dtype: expected one of {DTYPES}, got {self.dtype!r}")


class Place(NamedTuple):
    """Where something is loaded from."""

    name: str
    revision: str | None


def place_of(text: str) -> Place:
    """`org/name@revision`, `org/name`, or a folder whatever its name."""
    name, at, revision = text.rpartition("@")
    if not at or Path(text).exists():
        return Place(text, None)
    return Place(name, revision)


def evaluate(plan: Evaluation) -> bool:
    """Do what is not done yet, as far as this process's part goes; True where the table could be made.

    Raises:
        RecipeError: what was asked for does not fit together.
        CorpusError: a suite is not in its official layout.
        ArtefactNotFoundError: there is no such model, release or suite.
        ModelMismatchError: the SAEs or directions belong to another model.
        EndpointError: a judge's server refused.
        DiskError: there is no room.
    """
    given = parse_settings(plan.methods, plan.settings)
    for spec in plan.judges:
        check_spec(spec, plan.base_url)  # before hours of answers
    suites = _suites(plan)
    steering, dictionary = _built_from(plan)
    arms = build(given, steering, dictionary)
    model, processor = _load(plan)
    judges = _judges(plan, model, processor)
    for made_for in (steering and steering.base_model, dictionary and dictionary.model):
        if made_for:
            made_for.check(model, plan.asking.base_model_ok)  # before anything is asked
    cells = cells_of(model, processor, suites, arms, plan.asking)
    jobs = jobs_of(cells, plan.asking.part)
    facts = protocol(plan, model, steering, dictionary)
    record(plan.out, cells, [judge_facts(judge, cells) for judge in judges], facts)
    answer_all(plan.out, model, processor, jobs, plan.asking)
    while judges:
        if not isinstance(judges[0], LikelihoodJudge):
            model = processor = None  # makes room for the judge's own
            gc.collect()
        judge_all(plan.out, judges.pop(0), jobs)
    if missing(plan.out):
        return False
    write_report(plan.out)
    return True


def protocol(
    plan: Evaluation, model: Any, steering: SteeringSAE | None, dictionary: ConceptDictionary | None
) -> dict[str, Any]:
    """What the table must say of how it was made."""
    found = dataclasses.asdict(ModelFacts.of(model))
    del found["fingerprint"]
    releases = {
        "sae": [{"name": steering.name, "commit": steering.commit}] if steering else [],
        "dictionary": dictionary.sources if dictionary else [],
    }
    from_hub = {what: [one for one in some if one.get("commit")] for what, some in releases.items()}
    return {
        "model": found | {"dtype": plan.dtype},
        "decoding": GREEDY | {"greedy": True, "max_answer": plan.asking.max_answer},
        "from": {
            what: some for what, some in from_hub.items() if some
        },  # a folder's path says nothing elsewhere
    }


def _suites(plan: Evaluation) -> list[Suite]:
    found = [thinned(read_suite(spec), plan.asking.items) for spec in plan.suites]
    names = [suite.name for suite in found]
    if len(set(names)) != len(names) or not names:
        raise RecipeError(f"suites: expected each once and at least one, got {names}")
    return found


def _built_from(plan: Evaluation) -> tuple[SteeringSAE | None, ConceptDictionary | None]:
    """The SAEs and directions that the methods need, and no others."""
    needed = set(plan.methods)
    sae = place_of(plan.sae)
    steering = SteeringSAE.from_pretrained(sae.name, revision=sae.revision) if plan.sae else None
    if not needed & set(BY_DICTIONARY):
        return steering, None
    named = steering.config["dictionary"] if steering else {}
    told = plan.dictionary or (f"{named['dataset']}@{named['tag']}" if named.get("dataset") else "")
    if not told:
        return steering, None
    place = place_of(told)
    return steering, ConceptDictionary.from_pretrained(
        place.name, plan.directions or None, revision=place.revision
    )


def _load(plan: Evaluation) -> tuple[Any, Any]:
    place = place_of(plan.model)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    model, processor = load_mllm(place.name, place.revision, plan.dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def _judges(plan: Evaluation, model: Any, processor: Any) -> list[Judge]:
    """The judges, those that ask the evaluated model first; weights of their own are loaded when needed.

    Raises:
        RecipeError: two of one name and figure, whose verdicts nobody could tell apart.
    """
    settings = {"base_url": plan.base_url, "rubric": plan.rubric, "categories": plan.categories}
    settings |= {"dtype": plan.dtype, "batch": plan.asking.batch, "cache": plan.out / "judged"}
    found = [
        judge
        for spec in plan.judges
        for judge in judges_of(spec, **settings, model=model, processor=processor)
    ]
    names = [(judge.name, judge.figure) for judge in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(
            f"judges: expected each once, got {twice[0][0]!r} twice; rename one, or leave it out"
        )
    return sorted(found, key=lambda judge: not isinstance(judge, LikelihoodJudge))
