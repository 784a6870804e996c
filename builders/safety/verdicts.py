"""What a judge says of an answer; reads and writes nothing."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from builders.safety.items import Item

FIGURES = ("unsafe", "refused", "right", "fluency")
"""What can be judged: rates of zeros and ones, and fluency, between 0 and 1 or in nats as the judge says."""


class Verdict(NamedTuple):
    """One figure of one answer."""

    value: float | None
    """0 or 1, for fluency any number; None: the judge could not be read, which is counted, not guessed."""
    reason: str
    """The judge's own words, or the rule that spoke; may be empty."""


class Judge(Protocol):
    """Judges answers by one figure."""

    name: str
    """Stands in tables: `rule`, `guard:org/model`, `endpoint:org/model`."""
    figure: str
    """One of `FIGURES`."""
    digest: str
    """sha256 of all that its verdicts depend on beside item and answer: model, revision, prompt, rules."""

    def judges(self, item: Item) -> bool:
        """Whether this figure means something for an item."""
        ...

    def verdicts(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer, in order; may be asked again and says the same."""
        ...
