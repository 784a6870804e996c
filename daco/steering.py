"""Applies a steering method to a model: hooks on decoder blocks that always come off again, and a report.

Reads a transformers model and a method of `daco.methods`; changes what the blocks return, never a weight.
"""

import inspect
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from daco.capture import block_output
from daco.errors import NothingToSteerError, SteeringConflictError, UnsupportedModelError
from daco.methods import Method
from daco.methods.method import check_on_empty
from daco.positions import positions
from daco.report import PLACES, Report, Tally, layer_report
from daco.sites import find_trunk, image_token_ids, site, transformers_model

SCOPES = ("all", *PLACES)
"""All positions but padding; or image placeholders, the prompt's text, or tokens after the prompt alone."""

CHUNK = 1_024
"""Positions steered at a time, which bounds the room codes take in a long prefill."""

_steered: WeakKeyDictionary[nn.ModuleList, "ReferenceType[Run]"] = WeakKeyDictionary()
"""Which run steers a trunk; weak on both sides, so that a forgotten run does not keep a model alive."""

_lock = threading.Lock()


class _Step(NamedTuple):
    """Where one forward is steered."""

    select: Tensor
    """`[batch, tokens]` bool."""
    rows: Tensor | None
    """Flat positions where `select` holds; None for one token a row, which `select` masks without waiting."""
    places: Tensor
    """`[3]`: how many of the positions are of each of PLACES."""


class Run:
    """A steered model: what it did so far, and the handle that ends it. Made by `steer` and `attach`."""

    def __init__(self, model: nn.Module, method: Method, scope: str, on_empty: str) -> None:
        self._method, self._scope, self._on_empty = method, scope, on_empty
        self._base, self._trunk = transformers_model(model), find_trunk(model)
        self._signature = inspect.signature(self._base.forward)
        self._image_ids = image_token_ids(model)
        self._prompt_tokens: int | None = None
        self._thread: int | None = None
        self._layers = [layer for layer in method.layers if not method.is_empty(layer)]
        self._handles: list[Any] = []
        self._tallies: dict[int, Tally] = {}
        self._notes: list[str] = []
        self._claim = ref(self)
        self._forwards = 0
        self._now = threading.local()  # each thread is in a forward of its own

    def report(self) -> Report:
        """What was steered up to now; may wait for the device."""
        method, notes = self._method, [*self._notes, *self._method.notes()]
        layers = [
            layer_report(
                layer,
                self._tallies.get(layer),
                method.atoms(layer),
                lambda atom, layer=layer: method.names(layer, atom),  # type: ignore[misc]
                method.shifted(layer),
            )
            for layer in method.layers
        ]
        report = Report(str(method), self._scope, self._forwards, layers, notes)
        if not method.nothing and not report.positions:
            notes.append(f"nothing was steered in {self._forwards} forwards")
        return report

    def remove(self) -> None:
        """Take the hooks off; the model is as before. Doing it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with _lock:
            if _steered.get(self._trunk.layers) is self._claim:
                del _steered[self._trunk.layers]

    def _put_on(self) -> None:
        """Claim the model, then hook it."""
        with _lock:
            claim = _steered.get(self._trunk.layers)
            if claim is not None and (other := claim()) is not None:
                raise SteeringConflictError(
                    f"expected a model that is not steered, got one steered by {other._method}; "
                    "end that `with` block or call remove() on its handle first"
                )
            _steered[self._trunk.layers] = self._claim
        try:
            before = self._base.register_forward_pre_hook(self._before, with_kwargs=True)
            after = self._base.register_forward_hook(self._after, always_call=True)
            self._handles += [before, after]
            for layer in self._layers:
                block = self._trunk.layers[layer]
                self._handles.append(block.register_forward_hook(self._block_hook(layer)))
        except BaseException:
            self.remove()
            raise

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Find out, from what the model is called with, which positions this forward steers."""
        _refuse_compiling()
        if self._thread not in (None, threading.get_ident()):
            raise SteeringConflictError(
                "expected forwards in the thread that opened the `with` block, got another thread; "
                "use attach() for a model that several threads call"
            )
        call = self._signature.bind_partial(*args, **kwargs).arguments
        call = {**call, **call.get("kwargs", {})}
        self._now.step = self._step(call)
        self._now.fired = 0
        self._now.inside = True
        self._forwards += 1

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Make sure that every block was steered; called also where the forward failed, without output."""
        step, fired = getattr(self._now, "step", None), getattr(self._now, "fired", 0)
        self._now.inside, self._now.step = False, None
        if output is not None and step is not None and fired != len(self._layers):
            raise SteeringConflictError(
                f"expected hooks of layers {self._layers} to fire once each, got {fired} of them: "
                "are blocks compiled, replayed as a graph, or skipped? run the model eagerly"
            )

    def _step(self, call: dict[str, Any]) -> _Step | None:
        """Positions of a forward that the scope matches; None where there are none."""
        if not self._layers:
            return None
        found = positions(call, self._image_ids, self._scope, self._prompt_tokens)
        picked = [PLACES.index(self._scope)] if self._scope != "all" else range(len(PLACES))
        if found.first and self._scope == "image" and self._on_empty == "raise" and not found.image.any():
            raise NothingToSteerError(
                f"scope 'image': expected image tokens {list(self._image_ids)} in the prompt, got none; "
                "pass an image, another scope, or on_empty='pass'"
            )
        masks = [found.image, found.prompt, found.generated]
        select = torch.stack([masks[i] for i in picked]).any(0)
        places = torch.stack([mask.sum() if i in picked else mask.sum() * 0 for i, mask in enumerate(masks)])
        if select.shape[1] == 1:
            return None if self._scope in found.absent else _Step(select, None, places)
        rows = select.flatten().nonzero().squeeze(-1)
        return _Step(select, rows, places) if len(rows) else None

    def _block_hook(self, layer: int) -> Any:
        def change(module: nn.Module, args: Any, output: Any) -> Any:
            if not getattr(self._now, "inside", False):
                raise SteeringConflictError(
                    f"expected a call of the whole {type(self._base).__name__}, got one of a part of it; "
                    "call the model that was steered"
                )
            step = self._now.step
            if step is None:
                return None
            self._now.fired += 1
            z = self._steer_block(layer, block_output(output), step)
            return (z, *output[1:]) if isinstance(output, tuple) else z

        return change

    def _steer_block(self, layer: int, z: Tensor, step: _Step) -> Tensor:
        if z.shape[:2] != step.select.shape:
            raise SteeringConflictError(
                f"layer {layer}: expected activations [batch, tokens] {list(step.select.shape)}, "
                f"got {list(z.shape[:2])}; are tokens packed or dropped?"
            )
        flat = z.reshape(-1, z.shape[-1])
        if step.rows is None:
            select = step.select.flatten().to(z.device)
            moved = self._move(layer, flat, select)
            new = torch.where(select[:, None], moved, flat)
        else:
            rows = step.rows.to(z.device)
            parts = [self._move(layer, part, None) for part in torch.split(flat[rows], CHUNK)]
            new = flat.index_copy(0, rows, torch.cat(parts))
        with _lock:
            self._tally(layer, z.device).places += step.places.to(z.device)
        return new.view_as(z)

    def _move(self, layer: int, z: Tensor, weight: Tensor | None) -> Tensor:
        """`z` plus the method's delta, `[n, d_model]`; tallied."""
        delta, strengths = self._method.change(layer, z)
        with _lock:
            self._tally(layer, z.device).add(z, delta, strengths, weight)
        return z + delta.to(z.dtype)

    def _tally(self, layer: int, device: torch.device) -> Tally:
        if layer not in self._tallies:
            self._tallies[layer] = Tally(len(self._method.atoms(layer)), device)
        return self._tallies[layer]


@contextmanager
def steer(
    model: nn.Module,
    method: Method,
    *,
    scope: str = "all",
    on_empty: str = "raise",
    base_model_ok: bool = False,
    prompt_tokens: int | None = None,
) -> Generator[Run, None, None]:
    """Steer a model inside a `with` block, by the thread that opened it; afterwards the model is as before.

    Args:
        model: The transformers model whose `generate` or forward is called.
        method: One of `daco.methods`, or anything with what `daco.methods.Method` lists.
        scope: `all` positions that are not padding, or `image`, `prompt` (text) or `generated` ones alone.
        on_empty: `raise` where atoms or scope match nothing, or `pass`.
        base_model_ok: Accept another base model id or revision (a fine-tune, a quantised copy).
        prompt_tokens: Columns of the prompt, padding included, where one forward holds more than the prompt
            (no KV cache, or a given answer); needed by the scopes `prompt` and `generated` alone.

    Yields:
        The `Run`, whose `report()` says what was steered.

    Raises:
        ModelMismatchError: it is not the model the method was made for.
        NothingToSteerError: nothing is labelled, or the scope matched no position (at the first prompt for
            `image`, else at the end).
        SteeringConflictError: the model is steered already, compiled, or called in a way hooks cannot follow.
        UnknownLayerError: a layer the model does not have.

    Example:
        >>> with steer(model, SAESteering(sae, gamma=0.1)) as run:  # doctest: +SKIP
        ...     answer = model.generate(**inputs)
        >>> print(run.report())  # doctest: +SKIP
    """
    run = _prepare(model, method, scope, on_empty, base_model_ok, prompt_tokens)
    run._thread = threading.get_ident()
    run._put_on()
    try:
        yield run
    finally:
        run.remove()
    if on_empty == "raise" and not run.report().positions:
        raise NothingToSteerError(
            f"scope {scope!r} matched no position in {run._forwards} forwards of {type(run._base).__name__}; "
            "was another model object called? pass on_empty='pass' to allow it"
        )


def attach(
    model: nn.Module,
    method: Method,
    *,
    scope: str = "all",
    on_empty: str = "raise",
    base_model_ok: bool = False,
    prompt_tokens: int | None = None,
) -> Run:
    """Steer a model, for all threads, until `remove()` is called on the returned handle; see `steer`.

    A scope that never matches is not an error here; the report says so.
    """
    run = _prepare(model, method, scope, on_empty, base_model_ok, prompt_tokens)
    run._put_on()
    return run


def _prepare(
    model: nn.Module,
    method: Method,
    scope: str,
    on_empty: str,
    base_model_ok: bool,
    prompt_tokens: int | None,
) -> Run:
    """All checks, before the first hook."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise UnsupportedModelError(
            f"expected a transformers model, got {got}; pass the model, not its processor"
        )
    if not isinstance(method, Method):
        raise TypeError(
            f"method: expected one of daco.methods, got {type(method).__name__}; "
            "SAEs steer by `sae.steer(model)`, a SafetyPrompt is applied to the messages"
        )
    check_on_empty(on_empty)
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {SCOPES}, got {scope!r}")
    if prompt_tokens is not None and prompt_tokens < 1:
        raise ValueError(f"prompt_tokens: expected at least 1, got {prompt_tokens}")
    _refuse_compiled(model)
    note = method.base_model.check(model, base_model_ok)
    for layer in method.layers:
        site(model, layer)
    if method.nothing and on_empty == "raise":
        raise NothingToSteerError(method.nothing)
    if scope == "image" and on_empty == "raise" and not image_token_ids(model):
        raise NothingToSteerError(f"scope 'image': {type(model).__name__} takes no images; use another scope")
    run = Run(model, method, scope, on_empty)
    run._prompt_tokens = prompt_tokens
    run._notes = [note] if note else []
    return run


def _refuse_compiled(model: nn.Module) -> None:
    """A compiled model may go on without hooks that were set after it was compiled, and say nothing."""
    compiled = hasattr(model, "_orig_mod") or hasattr(model.forward, "_torchdynamo_orig_callable")
    parts = model.modules()
    if compiled or any(getattr(part, "_compiled_call_impl", None) is not None for part in parts):
        raise SteeringConflictError(
            "expected an eager model, got a compiled one, where hooks may not fire; steer the original"
        )


def _refuse_compiling() -> None:
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing:
        raise SteeringConflictError(
            "expected an eager forward, got one that is being compiled or captured as a graph: its "
            "replay would not follow the steering; generate with disable_compile=True and the default cache"
        )
