"""Renders the card of a release folder: facts through escaping filters into a template, metadata as YAML."""

import hashlib
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
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return front_matter + "\n" + with_outputs(text, facts.get("outputs", {}))


FENCED = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
"""A fenced block of a card: its fence, its language, its text. What a wider fence holds is no block."""


def python_blocks(card: str) -> list[str]:
    """The blocks of Python code of a card, in order."""
    return [text for fence, language, text in FENCED.findall(card) if (fence, language) == ("```", "python")]


def with_outputs(text: str, outputs: Mapping[str, str]) -> str:
    """A card with what its blocks of code printed below them, where that is known of this very code.

    Args:
        text: The card.
        outputs: sha256 of a block's code -> what it printed.
    """

    def shown(block: re.Match[str]) -> str:
        digest = hashlib.sha256(block[3].encode()).hexdigest()
        known = (block[1], block[2]) == ("```", "python") and outputs.get(digest)
        return f"{block[0]}\n\n{escape.output(outputs[digest])}" if known else block[0]

    return FENCED.sub(shown, text)


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
