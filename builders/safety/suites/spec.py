"""What is asked for by one word of a command line, such as `mm-safetybench:tiny:variant=TYPO=/data/mm`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.safety.items import KINDS
from daco.errors import RecipeError

FILTERS = {"variant": "variants", "group": "groups", "kind": "kinds"}
"""Options with values, and the field of a spec that each one fills; several values are joined by `+`."""

_OPTION = re.compile(rf":(?:(?P<filter>{'|'.join(FILTERS)})=(?P<values>[^:=]+)|(?P<subset>[\w-]+))")


@dataclass(frozen=True)
class SuiteSpec:
    """A suite, where to read it, and what of it."""

    name: str
    """Of the suite, such as `figstep`."""
    source: str = ""
    """A folder, or a Hub id; empty: the suite's own place on the Hub."""
    revision: str = ""
    """Commit, tag or branch of a Hub id; empty: the default branch."""
    subset: str = ""
    """An official smaller set, such as `tiny`; empty: all."""
    variants: tuple[str, ...] = ()
    """Only these forms; empty: all."""
    groups: tuple[str, ...] = ()
    """Only these scenarios, policies or subjects; empty: all."""
    kinds: tuple[str, ...] = ()
    """Only these kinds of items; empty: all."""

    def takes(self, variant: str = "", group: str = "", kind: str = "") -> bool:
        """Whether an item of these is asked for; a value that is not known yet passes."""
        pairs = ((self.variants, variant), (self.groups, group), (self.kinds, kind))
        return all(not wanted or not value or value in wanted for wanted, value in pairs)


def parse(text: str) -> SuiteSpec:
    """Read `name[:subset][:variant=A+B][:group=C][:kind=D][=folder-or-hub-id[@revision]]`.

    The options may stand behind the source too, as in `figstep=/data/figstep:tiny`.

    Raises:
        RecipeError: it is not of that form, or says something twice.
    """
    fields: dict[str, Any] = {"name": (name := re.match(r"[\w-]*", text)[0])}  # type: ignore[index]
    if not name:
        raise RecipeError(f"expected a suite such as 'figstep' or 'figstep=folder', got {text!r}")
    rest = _options(text[len(name) :], fields, text)
    if rest.startswith("="):
        source, behind = _source(rest[1:])
        if _options(behind, fields, text) or not source:
            raise RecipeError(f"{text!r}: expected a folder or a Hub id behind '=', got {rest[1:]!r}")
        folder = Path(source).is_dir()
        fields["source"], _, fields["revision"] = (source, "", "") if folder else source.partition("@")
        rest = ""
    if rest:
        raise RecipeError(
            f"{text!r}: expected options such as ':tiny' or ':variant=A+B', then '=folder', got {rest!r}"
        )
    if unknown := set(fields.get("kinds", ())) - set(KINDS):
        raise RecipeError(f"{text!r}: expected kinds of {KINDS}, got {sorted(unknown)}")
    return SuiteSpec(**fields)


def _options(text: str, fields: dict[str, Any], whole: str) -> str:
    """Take options off the front of `text` into `fields`; returns what is left."""
    while found := _OPTION.match(text):
        field = FILTERS[found["filter"]] if found["filter"] else "subset"
        if field in fields:
            raise RecipeError(
                f"{whole!r}: expected one {found['filter'] or 'subset'}, got two; join them by '+'"
            )
        fields[field] = tuple(found["values"].split("+")) if found["filter"] else found["subset"]
        text = text[found.end() :]
    return text


def _source(text: str) -> tuple[str, str]:
    """The source, and the options behind it; a folder that has a colon in its name is taken whole."""
    if Path(text).is_dir():
        return text, ""
    source, colon, options = text.partition(":")
    return source, colon + options
