"""Judges of answers behind one function: the string rule, options of a choice, guard models, language models.

Reads models and asks servers; writes the cache of what they said.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.safety.judges.cache import JudgeCache
from builders.safety.verdicts import Judge
from daco.errors import FormatError, RecipeError

SPECS = (
    "rule",
    "choice",
    "likelihood",
    "guard:<id or folder>[@revision]",
    "endpoint:<model>",
    "fluency:<model>",
)


@dataclass(frozen=True)
class JudgeSettings:
    """What judges need beside their name."""

    base_url: str = ""
    """Server of OpenAI's chat protocol for `endpoint:`; empty: a provider of Hugging Face."""
    provider: str = "auto"
    """Provider of Hugging Face, where there is no `base_url`."""
    timeout: float = 120.0
    """Seconds an endpoint's answer may take."""
    workers: int = 8
    """Questions to an endpoint at once."""
    rubric: Path | None = None
    """File of rules in place of the suites' own words, see `rubric.read_rules`."""
    batch: int = 8
    """Conversations that a guard sees at once."""
    dtype: str = "bfloat16"
    """Of a guard's weights."""
    categories: Path | None = None
    """JSON of category and text for guards whose template takes them."""
    controversial: str = "unsafe"
    """What Qwen3Guard's third level counts as: `unsafe` or `safe`."""
    cache: Path | None = None
    """Folder of what judges said; None: in memory."""
    model: Any = None
    """The evaluated model, unsteered, for `likelihood`."""
    processor: Any = None
    """Its processor."""

    def __post_init__(self) -> None:
        for name in ("workers", "batch"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise RecipeError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype!r}")
        if not self.timeout > 0:
            raise RecipeError(f"timeout: expected seconds, got {self.timeout}")


Maker = tuple[tuple[str, ...], Callable[[str], Judge]]
"""Figures that a judge can tell, and what makes it for one of them."""


def judge_of(spec: str, figure: str = "", **settings: Any) -> Judge:
    """One judge of one figure.

    Args:
        spec: One of `SPECS`.
        figure: One of `builders.safety.verdicts.FIGURES`; empty: the first that this judge can tell.
        settings: Fields of `JudgeSettings`.

    Raises:
        RecipeError: no such judge, or it cannot tell this figure.
        ArtefactNotFoundError: a guard model that is not there.
        UnsupportedModelError: a model that is no guard.
        FormatError: a file of rules or categories of another form.
        EndpointError: a provider of Hugging Face, and nobody is logged in.
    """
    figures, make = _maker(spec, JudgeSettings(**settings))
    if figure and figure not in figures:
        raise RecipeError(f"{spec}: expected a figure among {list(figures)}, got {figure!r}")
    return make(figure or figures[0])


def check_spec(spec: str, base_url: str = "") -> None:
    """Raise RecipeError where there is no such judge; loads and asks nothing."""
    kind, colon, name = spec.strip().partition(":")
    alone = kind in ("rule", "choice", "likelihood") and not colon
    guard = kind == "guard" and bool(name.partition("@")[0])
    endpoint = kind in ("endpoint", "fluency") and bool(colon) and bool(name or base_url)
    if not (alone or guard or endpoint):
        raise RecipeError(f"judge: expected one of {list(SPECS)}, got {spec!r}")


def judges_of(spec: str, **settings: Any) -> list[Judge]:
    """All figures that a judge can tell, one judge each, which share its model; see `judge_of`."""
    figures, make = _maker(spec, JudgeSettings(**settings))
    return [make(figure) for figure in figures]


def _maker(spec: str, settings: JudgeSettings) -> Maker:
    check_spec(spec, settings.base_url)
    kind, _, name = spec.strip().partition(":")
    if kind == "rule":
        from builders.safety.judges.rule import FIGURES, RuleJudge

        return FIGURES, RuleJudge
    if kind == "choice":
        from builders.safety.judges.choice import ChoiceJudge

        return (ChoiceJudge.figure,), lambda _: ChoiceJudge()
    if kind == "likelihood":
        return _likelihood(settings)
    return _guard(name, settings) if kind == "guard" else _endpoint(name, settings, kind)


def _likelihood(settings: JudgeSettings) -> Maker:
    from builders.safety.judges.fluency import LikelihoodJudge

    if settings.model is None or settings.processor is None:
        raise RecipeError("likelihood: expected the evaluated model and its processor, got none")
    judge = LikelihoodJudge(settings.model, settings.processor, settings.batch)
    return (judge.figure,), lambda _: judge


def _guard(name: str, settings: JudgeSettings) -> Maker:
    from builders.safety.judges.guard import FIGURES, Guard, GuardJudge

    where, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    categories = _categories(settings.categories) if settings.categories else None
    cache = JudgeCache(settings.cache)
    guard = Guard(where, revision, cache, settings.batch, settings.dtype, categories)
    figures = FIGURES if guard.says_refusal else FIGURES[:1]
    return figures, lambda figure: GuardJudge(guard, figure, settings.controversial)


def _endpoint(name: str, settings: JudgeSettings, kind: str) -> Maker:
    from builders.endpoint import Endpoint
    from builders.safety.judges.rubric import FIGURES, RubricJudge, read_rules

    rules = read_rules(settings.rubric) if settings.rubric else None
    endpoint = Endpoint(name, settings.base_url, settings.provider, settings.timeout)
    cache = JudgeCache(settings.cache)
    figures = ("fluency",) if kind == "fluency" else FIGURES
    return figures, lambda figure: RubricJudge(endpoint, figure, rules, cache, settings.workers)


def _categories(path: Path) -> dict[str, str]:
    try:
        told = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"categories: expected a JSON file at {path}, got {error}") from error
    if not isinstance(told, dict) or not told or not all(isinstance(v, str) for v in told.values()):
        raise FormatError(f'categories: expected {{"S1": "text"}} in {path.name}, got {type(told).__name__}')
    return told
