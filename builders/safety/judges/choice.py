"""Multiple choice and short answers by MMMU's rule; reads and writes nothing."""

from collections.abc import Sequence

from builders.safety.items import Item
from builders.safety.judges.words import digest_of, judges_figure, kept
from builders.safety.scoring import chosen_option, right_open
from builders.safety.verdicts import Verdict

FIGURES = ("right",)

VERSION = 1
"""Raised when the rule changes, so that scores of another rule are not taken for its own."""


class ChoiceJudge:
    """Judges whether an answer names the right option, or, where there are none, says the right thing.

    An answer that names no option is wrong: the official script draws one by chance instead.
    """

    name = "choice"
    figure = "right"
    digest = digest_of("choice", VERSION)

    def judges(self, item: Item) -> bool:
        """Whether this figure means something for an item."""
        return judges_figure(self.figure, item) and bool(item.gold)

    def verdicts(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer."""
        return [self._verdict(item, answer) for item, answer in zip(items, answers, strict=True)]

    def _verdict(self, item: Item, answer: str) -> Verdict:
        if not item.options:
            right = right_open(answer, item.gold)
            return Verdict(float(right), "says it" if right else f"does not say {kept(item.gold)}")
        letter = chosen_option(answer, item.options)
        if not letter:
            return Verdict(0.0, "names no option")
        return Verdict(float(letter == item.gold), f"chose {letter}, right is {item.gold}")
