"""Steers without hooks, for models that are compiled or replayed as graphs; what fires is not reported.

Reads a transformers model and methods of `daco.methods`; replaces `forward` of blocks, never a weight.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from daco.assignment import PerRow, Steerers, parts_of
from daco.capture import block_output
from daco.claims import claim, no_copy, release
from daco.errors import NothingToSteerError
from daco.methods.method import Method, Placed, check_on_empty
from daco.sites import find_trunk, site


class Wrapped:
    """A model whose blocks steer by themselves, until `remove()` or the end of a `with` block; see `wrap`."""

    def __init__(self, model: nn.Module, methods: list[Method]) -> None:
        self.what = ", then ".join(map(str, methods))
        """The methods and their settings."""
        self.notes: list[str] = []
        """Overrides, and whatever makes it do less than asked."""
        self._layers = find_trunk(model).layers
        self._before: dict[nn.Module, Any] = {}
        claim(self._layers, self)
        try:
            for layer in sorted({layer for method in methods for layer in method.layers}):
                busy = [method for method in methods if layer in method.layers and not method.is_empty(layer)]
                if busy:
                    self._wrap(self._layers[layer], layer, busy)
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the blocks their own `forward` back. Doing it twice is harmless."""
        for block, before in self._before.items():
            vars(block).pop("__deepcopy__", None)
            if before is None:
                del block.forward
            else:  # accelerate's, for one
                block.forward = before
        self._before.clear()
        release(self._layers, self)

    def _wrap(self, block: nn.Module, layer: int, methods: list[Method]) -> None:
        _place(block, layer, methods)
        forward = _steered(block.forward, layer, methods)
        self._before[block] = vars(block).get("forward")
        block.forward = forward
        vars(block)["__deepcopy__"] = no_copy


def wrap(
    model: nn.Module, method: Steerers, *, on_empty: str = "raise", base_model_ok: bool = False
) -> Wrapped:
    """Steer a model where hooks cannot follow: `torch.compile`, static caches that are compiled, CUDA graphs.

    All positions are steered, padding among them, which no other position attends to. Nothing is counted:
    `daco.steer` tells what fires. `torch.compile` sees this and `remove()`, whether it came before or after;
    methods that solve (MOP, OMP) break its graph.

    Args:
        model: The transformers model, itself not yet wrapped by `torch.compile`.
        method: One of `daco.methods`, or several, where each sees the stream as those before it left it.
        on_empty: `raise` where nothing can be steered, or `pass`.
        base_model_ok: Accept another base model id or revision (a fine-tune, a quantised copy).

    Returns:
        The handle, to be used in a `with` block or by its `remove()`.

    Raises:
        ModelMismatchError: it is not the model the method was made for.
        NothingToSteerError: nothing is labelled.
        SteeringConflictError: the model is steered already.
        TypeError: something is no method, or is one for each row.
        UnknownLayerError: a layer the model does not have.

    Example:
        >>> with wrap(model, SAESteering(sae)):  # doctest: +SKIP
        ...     model.generate(**inputs, cache_implementation="static")
    """
    if isinstance(method, PerRow):
        raise TypeError("method: expected methods for all rows, got PerRow; use daco.steer")
    methods = [part.method for part in parts_of(method)]
    check_on_empty(on_empty)
    notes = [one.base_model.check(model, base_model_ok) for one in methods]
    for one in methods:
        for layer in one.layers:
            site(model, layer)
        if one.nothing and on_empty == "raise":
            raise NothingToSteerError(one.nothing)
    wrapped = Wrapped(model, methods)
    wrapped.notes = [note for note in [*notes, *(note for one in methods for note in one.notes())] if note]
    return wrapped


def _steered(forward: Callable[..., Any], layer: int, methods: list[Method]) -> Callable[..., Any]:
    """A block's `forward` with the methods' deltas behind it; nothing that a compiler cannot trace."""

    def steered(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        z = block_output(output)
        flat = z.reshape(-1, z.shape[-1])
        for method in methods:
            flat = (flat + method.change(layer, flat).delta).to(flat.dtype)
        z = flat.view_as(z)
        return (z, *output[1:]) if isinstance(output, tuple) else z

    return steered


@torch.no_grad()
def _place(block: nn.Module, layer: int, methods: list[Method]) -> None:
    """Put the methods' weights on the block's device now: a compiled forward only reads them.

    There they stay, so a CUDA graph may read them where they are; what may move it copies at each replay.
    """
    weight: Tensor | None = next(block.parameters(), None)
    if weight is None or weight.device.type == "meta":  # offloaded: wherever it runs
        return
    for method in methods:
        method.change(layer, torch.zeros(1, method.base_model.hidden_size, device=weight.device))
        if weight.is_cuda:
            _keep_in_place(method, layer, weight.device)


def _keep_in_place(method: Method, layer: int, device: torch.device) -> None:
    """Tell the compiler of weights that never move."""
    placed = getattr(method, "_weights", {}).get(layer)
    for tensor in vars(placed.on(device)).values() if isinstance(placed, Placed) else ():
        if tensor is not None:
            torch._dynamo.mark_static_address(tensor)
