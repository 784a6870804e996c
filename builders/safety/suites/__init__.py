"""Suites of prompts, one module each: reads official files of benchmarks, writes nothing.

Every module has `read(folder, spec) -> Suite`, and facts: NAME, TITLE, FIGURE (what is judged), LICENCE, URL,
HUB (data set on the Hub; may be empty), PATTERNS (its files there), ROWS (how many the official files
have, by official smaller set; "" for all) and RULES (what judges are told, by group; "" for all others).
"""

from collections.abc import Iterator
from types import ModuleType

from builders.safety.items import Suite
from builders.safety.sources import Source, folder_of
from builders.safety.suites import figstep, harmbench, jailbreakv, mm_safetybench, mmmu, mossbench, xstest
from builders.safety.suites.spec import FILTERS, SuiteSpec, parse
from daco.errors import CorpusError, RecipeError

SUITES: dict[str, ModuleType] = {
    module.NAME: module
    for module in (mm_safetybench, jailbreakv, figstep, mossbench, xstest, harmbench, mmmu)
}
"""The suites by name."""


def read_suite(spec: str | SuiteSpec) -> Suite:
    """Read a suite; where its files come from the Hub, a note says which commit.

    Args:
        spec: `name[:subset][:variant=A+B][:group=C][:kind=D][=folder-or-hub-id[@revision]]`, the options
            there or behind the source; without a source, the suite's own data set on the Hub.

    Raises:
        RecipeError: no such suite or subset, or a spec of another form.
        CorpusError: the files are not in the official layout, or give no item.
        ArtefactNotFoundError: no such data set or revision.
        HubUnavailableError: the Hub does not answer.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    if (module := SUITES.get(spec.name)) is None:
        raise RecipeError(f"expected a suite of {sorted(SUITES)}, got {spec.name!r}")
    if spec.subset not in module.ROWS:
        known = " or ".join(filter(None, module.ROWS)) or "no subset"
        raise RecipeError(f"{spec.name}: expected {known}, got {spec.subset!r}")
    if not (place := spec.source or module.HUB):
        raise CorpusError(
            f"{spec.name}: expected a folder, as in '{spec.name}=folder', got none, and it has no data set "
            f"on the Hub; fetch {module.URL}"
        )
    source = folder_of(place, spec.revision, module.PATTERNS)
    suite: Suite = module.read(source.folder, spec)
    return suite._replace(
        notes=(*_told(suite, spec, module.ROWS[spec.subset]), *suite.notes, *_from(source, place))
    )


def _told(suite: Suite, spec: SuiteSpec, official: int) -> Iterator[str]:
    """What was asked for, and whether the files are as long as the official ones."""
    if spec.subset:
        yield f"the {spec.subset} set"
    for option, field in FILTERS.items():
        if values := getattr(spec, field):
            yield f"only {option} {', '.join(values)}"
    rows = len(suite.items) + suite.skipped.total()
    if rows != official and not (spec.variants or spec.groups or spec.kinds):
        yield f"{rows:,} rows where the official files have {official:,}"


def _from(source: Source, place: str) -> Iterator[str]:
    if source.commit:
        yield f"read from {place} at {source.commit}"
