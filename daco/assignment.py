"""Who is steered by what: one method for all rows of a batch, several one after the other, or one a row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from daco.errors import SteeringConflictError
from daco.methods import Method


class PerRow:
    """A method for each row of a batch; None leaves a row as it is.

    Beams and several answers a prompt multiply the rows of a batch; each is steered as its prompt is.

    Args:
        methods: By row. The same object for several rows is computed once for all of them.

    Raises:
        ValueError: there is no method among them.
        TypeError: one is no method.

    Example:
        >>> with steer(model, PerRow([strict, None, mild])):  # doctest: +SKIP
        ...     model.generate(**batch_of_three)
    """

    def __init__(self, methods: Sequence[Method | None]) -> None:
        self.methods = tuple(methods)
        if not any(method is not None for method in self.methods):
            raise ValueError(f"expected a method for at least one row, got {list(methods)!r}")
        for method in self.methods:
            if method is not None:
                _checked(method)

    def __str__(self) -> str:
        return "per row: " + "; ".join("none" if method is None else str(method) for method in self.methods)


class Part(NamedTuple):
    """One method and the rows of a batch it steers."""

    method: Method
    rows: tuple[int, ...] | None = None
    """None is all of them."""
    n_rows: int = 0
    """Rows of the batch that `rows` counts in; 0 where all are meant."""

    def in_batch(self, batch: int, device: torch.device) -> Tensor:
        """Numbers of the batch's rows that are this part's.

        Raises:
            SteeringConflictError: the batch has no multiple of the rows that were told.
        """
        if self.rows is None:
            return torch.arange(batch, device=device)
        if batch % self.n_rows:
            raise SteeringConflictError(
                f"expected a batch of {self.n_rows} rows, or of as many for each beam, got {batch}; "
                "give PerRow one method (or None) a prompt"
            )
        beams = batch // self.n_rows
        mine = [row * beams + beam for row in self.rows for beam in range(beams)]
        return torch.tensor(mine, device=device)


Steerers = Method | Sequence[Method] | PerRow
"""What `daco.steer` takes: a method, several, or one a row."""


def parts_of(what: Steerers) -> list[Part]:
    """The methods in the order in which they steer, and whom.

    Raises:
        TypeError: something is no method.
        ValueError: there is none.
    """
    if isinstance(what, PerRow):
        rows: dict[int, list[int]] = {}
        by_id = {id(method): method for method in what.methods if method is not None}
        for row, method in enumerate(what.methods):
            if method is not None:
                rows.setdefault(id(method), []).append(row)
        return [Part(by_id[key], tuple(found), len(what.methods)) for key, found in rows.items()]
    methods = list(what) if isinstance(what, list | tuple) else [what]
    if not methods:
        raise ValueError("method: expected at least one, got an empty list")
    return [Part(_checked(method)) for method in methods]


def _checked(method: object) -> Method:
    if not isinstance(method, Method):
        raise TypeError(
            f"method: expected one of daco.methods, got {type(method).__name__}; "
            "SAEs steer by `sae.steer(model)`, a SafetyPrompt is applied to the messages"
        )
    return method
