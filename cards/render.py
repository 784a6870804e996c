"""Renders the card of a release folder: facts through escaping filters into a template, metadata as YAML."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cards import escape
from cards.facts import card_facts

TEMPLATES = Path(__file__).parent / "templates"


def render(folder: Path) -> str:
    """The text of README.md for a release folder (see `cards.facts.card_facts` for what it raises)."""
    facts = card_facts(folder)
    return fill(f"{facts['kind']}.md.jinja", facts)


def fill(template: str, facts: Mapping[str, Any]) -> str:
    """A card from a template of this room; `facts["metadata"]` becomes its front matter."""
    front_matter = f"---\n{escape.yaml_metadata(facts['metadata'])}---\n"
    text = _environment().get_template(template).render(facts)
    return front_matter + "\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache
def _environment() -> Environment:
    # autoescape is for HTML; Markdown needs the filters below, and every text from data passes one of them
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "md": escape.md,
        "code": escape.code,
        "link": escape.link,
        "py": escape.py,
        "bib": escape.bib,
        "number": escape.number,
        "size": escape.size,
    }
    return environment
