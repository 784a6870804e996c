"""Filters through which every text from data enters a card: it comes out as text, never as Markdown or HTML.

Pure functions from strings to strings; `cards.render` offers them to the templates.
"""

import json
import re
import unicodedata
from typing import Any

import yaml

_ACTIVE = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])")
"""What can start or end Markdown, HTML or maths anywhere in a line; `_` only at the edge of a word."""
_LINE_START = re.compile(r"^(?:[-#+=:]|\d+(?=[.)](?:\s|$)))")
_ADDRESS = re.compile(r"(?:https?|ftp)://|www(?=\.)|(?<=\S)@(?=\w)", re.IGNORECASE)
"""Where GitHub's Markdown sees a web or e-mail address, which it links."""
_PLAIN_CODE = re.compile(r"[^\s`|\\](?:[^`|\\]*[^\s`|\\])?")
_URL = re.compile(
    r"https?://[A-Za-z0-9._~:/?#@!$&*+,;=%-]+|[A-Za-z0-9._+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"
)
_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def one_line(text: object) -> str:
    """`text` on one line: control characters and line ends become spaces, direction marks go."""
    kept = (c for c in str(text) if c not in _BIDI)
    return " ".join(
        "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in kept).split()
    )


def md(text: object) -> str:
    """`text` for Markdown prose or a table cell.

    What Markdown would act on is written as an HTML entity: an entity stands for a character, never for
    structure, and unlike a backslash it means the same in a table, a heading or HTML. Addresses stay text,
    too: an empty comment parts them, since renderers look for addresses behind entities.
    """
    escaped = _ACTIVE.sub(lambda found: _entity(found[0]), one_line(text))
    return _ADDRESS.sub(r"\g<0><!-- -->", _LINE_START.sub(_line_start, escaped))


def code(text: object) -> str:
    """`text` as inline code, also in a table cell."""
    line = one_line(text)
    return f"`{line}`" if _PLAIN_CODE.fullmatch(line) else f"<code>{md(line)}</code>"


def link(url: object) -> str:
    """A web or e-mail address as a link; anything else as text."""
    return f"<{url}>" if _URL.fullmatch(str(url)) else md(url)


def py(value: object) -> str:
    """A text as a Python string literal on one line, for a fenced code block."""
    return json.dumps(one_line(value), ensure_ascii=False)


def output(text: str) -> str:
    """What a program printed, as a block of text that nothing in it can end."""
    lines = [
        "".join(
            c for c in line if c not in _BIDI and (c == "\t" or unicodedata.category(c) not in ("Cc", "Cs"))
        )
        for line in text.splitlines()
    ]
    longest = max(map(len, re.findall("`+", "\n".join(lines))), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"Prints:\n\n{fence}text", *(line.rstrip() for line in lines), fence])


def bib(text: object) -> str:
    """`text` inside the braces of a BibTeX field."""
    return re.sub(r"[{}\\]", "", one_line(text)).replace("`", "'")


def yaml_metadata(metadata: dict[str, Any]) -> str:
    """The front matter of a card between its `---` lines."""
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=100)


def number(value: object) -> str:
    """Whole numbers with thousands separators, fractions to four digits; other scalars as Markdown text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return md(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def size(n_bytes: int) -> str:
    """A size in bytes for people, in powers of 1,000."""
    value, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{n_bytes}\u00a0B" if unit == "B" else f"{value:.1f}\u00a0{unit}"  # unbroken in a narrow cell


def _entity(characters: str) -> str:
    return "".join(f"&#{ord(c)};" for c in characters)


def _line_start(found: re.Match[str]) -> str:
    return _entity(found[0])
