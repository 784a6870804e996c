"""What every suite is read into: items with their pictures, and what was left out on the way.

Reads pictures when they are opened; writes nothing.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL.Image import Image

from builders.corpus import open_image

KINDS = ("harmful", "harmless", "choice")
"""Harmful requests are to be declined, harmless ones to be helped with, choices to be answered rightly."""


class Picture(NamedTuple):
    """A picture that is opened when it is needed: a file, bytes of a table, or one that is drawn."""

    path: Path | None = None
    """The file, if it is one."""
    data: bytes = b""
    """The encoded bytes, if a table holds them."""
    draw: Callable[[], Image] | None = None
    """Draws it, where the suite says what it shows."""
    drawn: str = ""
    """What `draw` depends on, as text: its key in place of bytes."""

    def open(self) -> Image:
        """The picture in RGB.

        Raises:
            Exception: whatever Pillow's plug-ins raise on a broken file; they agree on no class.
        """
        if self.draw is not None:
            return self.draw()
        return open_image(self.path or self.data)


class Item(NamedTuple):
    """One prompt of a suite, with what its judges must know."""

    suite: str
    """Name of the suite, such as `mm-safetybench`."""
    item_id: str
    """Unique in the suite and stable: what the official files call it, parts joined by `/`."""
    kind: str
    """One of `KINDS`."""
    group: str
    """What the official table is broken down by: scenario, policy, topic, subject; may be empty."""
    variant: str
    """The form of the attack or picture, such as `SD_TYPO`; empty where there is one only."""
    prompt: str
    """Text of the user's turn, exactly as the suite has it."""
    pictures: tuple[Picture, ...]
    """Shown before the text; empty for text alone."""
    question: str
    """What is really asked: the plain request behind a disguise; the prompt where there is none."""
    options: tuple[str, ...] = ()
    """Texts of the options of a choice."""
    gold: str = ""
    """The right answer: a letter of the options, or, without options, the text."""


class Suite(NamedTuple):
    """The items of a suite."""

    name: str
    items: tuple[Item, ...]
    skipped: Counter[str]
    """What was not taken, by reason."""
    notes: tuple[str, ...]
    """What a reader of the table must know, such as `1,680 TYPO pictures were drawn anew`."""
