"""Reads the residual stream at some layers while a model runs; the model is left as it was."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from daco.errors import UnsupportedModelError
from daco.sites import find_trunk, site


class _Stop(Exception):
    """Ends a forward after the last layer that is needed; never leaves `Capture.run`."""


@dataclass
class Capture:
    """What was read in the last forward."""

    model: nn.Module
    """The model that is read."""
    layers: tuple[int, ...]
    """The layers that are read, rising."""
    stop: bool = False
    """Whether `run` ends a forward after the last of them."""
    activations: dict[int, Tensor] = field(default_factory=dict)
    """By layer: the block's output `[batch, tokens, d_model]`, detached, in the model's dtype and device."""
    _running: bool = field(default=False, repr=False)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; with `stop=True` blocks after the last layer are skipped and None comes back."""
        self.activations.clear()
        self._running = True
        try:
            return self.model(*args, **kwargs)
        except _Stop:
            return None
        finally:
            self._running = False

    def _hook(self, layer: int) -> Any:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            self.activations[layer] = block_output(output).detach()
            if self.stop and self._running and layer == self.layers[-1]:
                raise _Stop

        return read


@contextmanager
def capture(model: nn.Module, layers: Sequence[int], stop: bool = False) -> Generator[Capture, None, None]:
    """Read the output of some decoder blocks of the text trunk inside a `with` block.

    Hooks fire in the order they were set: inside `steer` this reads the steered stream. What is read is what
    a block returns: models with DeepStack (Qwen3-VL) add image features behind their first blocks, which the
    next block receives and this does not hold.

    Args:
        model: A transformers model, multimodal or text only.
        layers: 0-based decoder blocks.
        stop: Let `Capture.run(**inputs)` end after the last of them; a call of the model itself never does.

    Yields:
        The `Capture`, whose `activations` are those of the last forward.

    Raises:
        UnknownLayerError: a layer the model does not have.
        UnsupportedModelError: the model's text trunk cannot be found.
        ValueError: no layer.

    Example:
        >>> with capture(model, [15, 16], stop=True) as captured:  # doctest: +SKIP
        ...     captured.run(**inputs)
        >>> captured.activations[16].shape  # doctest: +SKIP
        torch.Size([2, 12, 3584])
    """
    wanted = tuple(sorted(set(layers)))
    if not wanted:
        raise ValueError(f"layers: expected at least one of 0 to {find_trunk(model).n_layers - 1}, got none")
    sites = {layer: site(model, layer) for layer in wanted}
    captured = Capture(model, wanted, stop)
    handles = []
    try:
        for layer, block in sites.items():
            handles.append(block.register_forward_hook(captured._hook(layer)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def block_output(output: Any) -> Tensor:
    """The residual stream of a block's output: a Tensor in transformers 5, first of a tuple before.

    Raises:
        UnsupportedModelError: there is no Tensor, or not one stream `[batch, tokens, d_model]`.
    """
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(
            f"expected a block to return a Tensor or a tuple of it, got {type(found).__name__}; "
            "use another model"
        )
    if found.ndim != 3:
        raise UnsupportedModelError(
            f"expected a block to return one stream [batch, tokens, width], got {list(found.shape)}; "
            "models with several residual streams cannot be read or steered"
        )
    return found
