"""Who steers a model: one at a time, and known by name to the next who tries; no files."""

import threading
from typing import Any, NoReturn, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from daco.errors import SteeringConflictError


class Claimant(Protocol):
    """Who may claim a model."""

    what: str
    """What steers the model, for messages."""


_steered: WeakKeyDictionary[nn.ModuleList, "ReferenceType[Claimant]"] = WeakKeyDictionary()
"""By the list of a model's blocks; weak on both sides, so that a forgotten claim keeps no model alive."""

_lock = threading.Lock()


def claim(layers: nn.ModuleList, who: Claimant) -> None:
    """Take a model's blocks.

    Raises:
        SteeringConflictError: somebody else has them.
    """
    with _lock:
        held = _steered.get(layers)
        if held is not None and (other := held()) is not None:
            raise SteeringConflictError(
                f"expected a model that is not steered, got one steered by {other.what}; end that `with` "
                "block or call remove() on its handle first; steer() takes several methods, and PerRow one "
                "for each row of a batch"
            )
        _steered[layers] = ref(who)


def release(layers: nn.ModuleList, who: Claimant) -> None:
    """Give a model's blocks back; harmless where they are not held."""
    with _lock:
        held = _steered.get(layers)
        if held is not None and held() is who:
            del _steered[layers]


def no_copy(memo: Any) -> NoReturn:
    """What `copy.deepcopy` meets in a steered model, whose copy would go on with blocks of the original.

    Raises:
        SteeringConflictError: always.
    """
    raise SteeringConflictError(
        "expected a model that is not steered, got one to copy while it is; end the `with` block or call "
        "remove() on its handle first, and steer the copy anew"
    )
