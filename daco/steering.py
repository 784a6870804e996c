"""Applies steering methods to a model: hooks on decoder blocks that always come off again, and a report.

Reads a transformers model and methods of `daco.methods`; changes what the blocks return, never a weight.
"""

import inspect
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from daco.assignment import Part, PerRow, Steerers, parts_of
from daco.capture import block_output
from daco.claims import claim, no_copy, release
from daco.errors import NothingToSteerError, SteeringConflictError, UnsupportedModelError
from daco.methods.method import check_on_empty
from daco.positions import Positions, named, positions
from daco.report import PLACES, Report, Tally, layer_report
from daco.sites import find_trunk, image_token_ids, site, transformers_model

SCOPES = ("all", *PLACES, "last")
"""All positions but padding; or image placeholders, the prompt's text, or tokens after the prompt alone; or
the prompt's last token, whose logits choose the first token of the answer."""

CHUNK = 1_024
"""Positions steered at a time, which bounds the room codes take in a long prefill."""

_lock = threading.Lock()


class _Step(NamedTuple):
    """Where one part steers one forward."""

    shape: tuple[int, int]
    """Batch and tokens of the forward."""
    rows: Tensor | None
    """Flat positions that are steered, or may be where there is a weight; None is all of them."""
    weight: Tensor | None
    """`[rows]` bool: which of them are; None is all. It spares a forward of one token a wait for a count that
    a device other than the CPU would have to report."""
    places: Tensor
    """`[batch, 3]`: how many of each row's positions are of each of PLACES."""


class Run:
    """A steered model: what it did so far, and the handle that ends it. Made by `steer` and `attach`."""

    on: bool = True
    """Whether forwards that begin now are steered; may be set in the middle of a generation."""

    def __init__(self, model: nn.Module, parts: list[Part], scopes: tuple[str, ...], on_empty: str) -> None:
        self._parts, self._scopes, self._on_empty = parts, scopes, on_empty
        self._base, self._trunk = transformers_model(model), find_trunk(model)
        self._signature = inspect.signature(self._base.forward)
        self._image_ids = image_token_ids(model)
        self._prompt_tokens: int | None = None
        self._thread: int | None = None
        self._layers = _parts_by_layer(parts)
        self._handles: list[Any] = []
        self._tallies: dict[tuple[int, int], Tally] = {}
        self.what = ""
        """The methods and their settings."""
        self._notes: list[str] = []
        self._forwards = self._off = self._guessed = 0
        self._now = threading.local()  # each thread is in a forward of its own

    def __deepcopy__(self, memo: Any) -> NoReturn:
        no_copy(memo)

    def report(self) -> Report:
        """What was steered up to now; may wait for the device."""
        methods = [part.method for part in self._parts]
        notes = [*self._notes, *dict.fromkeys(note for method in methods for note in method.notes())]
        with _lock:  # other threads may be steering now
            layers = [
                layer_report(layer, self._tallies.get((i, layer)), method, str(method) if methods[1:] else "")
                for i, method in enumerate(methods)
                for layer in method.layers
            ]
        layers.sort(key=lambda found: found.layer)  # methods keep their order within a layer
        if self._off:
            notes.append(f"steering was switched off in {self._off} of {self._forwards} forwards")
        if self._guessed:
            notes.append(
                f"in {self._guessed} of {self._forwards} forwards prompt and generated tokens may stand "
                "together: which is which is a guess there; pass prompt_tokens"
            )
        report = Report(self.what, " + ".join(self._scopes), self._forwards, layers, notes)
        if not all(method.nothing for method in methods) and not report.positions:
            notes.append(f"nothing was steered in {self._forwards} forwards")
        return report

    def remove(self) -> None:
        """Take the hooks off; the model is as before. Doing it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        release(self._trunk.layers, self)

    def _put_on(self) -> None:
        """Claim the model, then hook it."""
        claim(self._trunk.layers, self)
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
        call = kwargs
        if args:
            call = self._signature.bind_partial(*args, **kwargs).arguments
            call = {**call, **call.get("kwargs", {})}
        on = self.on
        self._now.steps = self._steps(call) if on else None
        self._now.fired = 0
        self._now.inside = True
        with _lock:
            self._forwards += 1
            self._off += not on

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Make sure that every block was steered; called also where the forward failed, without output."""
        steps, fired = getattr(self._now, "steps", None), getattr(self._now, "fired", 0)
        self._now.inside, self._now.steps = False, None
        if output is not None and steps is not None and fired != len(self._layers):
            raise SteeringConflictError(
                f"expected hooks of layers {list(self._layers)} to fire once each, got {fired} of them: "
                "are blocks compiled, replayed as a graph, or skipped? run the model eagerly"
            )

    def _steps(self, call: dict[str, Any]) -> list[_Step | None] | None:
        """By part, the positions of a forward that the scope matches; None where there are none at all."""
        if not self._layers:
            return None
        found = positions(call, self._image_ids, self._scopes, self._prompt_tokens)
        with _lock:
            self._guessed += found.guessed
        wanted = self._scopes == ("image",) and self._on_empty == "raise"
        if found.first and wanted and not found.image.any():
            raise NothingToSteerError(
                f"scope 'image': expected image tokens {list(self._image_ids)} in the prompt, got none; "
                "pass an image, another scope, or on_empty='pass'"
            )
        if set(self._scopes) <= set(found.absent):
            return None
        select = _selected(found, self._scopes)
        steps = [_step(found, select, part) for part in self._parts]
        return steps if any(step is not None for step in steps) else None

    def _block_hook(self, layer: int) -> Any:
        def change(module: nn.Module, args: Any, output: Any) -> Any:
            if not getattr(self._now, "inside", False):
                raise SteeringConflictError(
                    f"expected a call of the whole {type(self._base).__name__}, got one of a part of it; "
                    "call the model that was steered"
                )
            steps = self._now.steps
            if steps is None:
                return None
            self._now.fired += 1
            z = block_output(output)
            for i in self._layers[layer]:
                if (step := steps[i]) is not None:
                    z = self._steer_block(i, layer, z, step)
            return (z, *output[1:]) if isinstance(output, tuple) else z

        return change

    def _steer_block(self, part: int, layer: int, z: Tensor, step: _Step) -> Tensor:
        if z.shape[:2] != step.shape:
            raise SteeringConflictError(
                f"layer {layer}: expected activations [batch, tokens] {list(step.shape)}, "
                f"got {list(z.shape[:2])}; are tokens packed or dropped?"
            )
        flat = z.reshape(-1, z.shape[-1])
        rows = None if step.rows is None else step.rows.to(z.device)
        picked = flat if rows is None else flat[rows]
        if step.weight is None:
            pieces = torch.split(picked, CHUNK) if len(picked) > CHUNK else (picked,)
            moved = [self._move(part, layer, some, None) for some in pieces]
            new = torch.cat(moved) if moved[1:] else moved[0]
        else:
            weight = step.weight.to(z.device)
            new = self._move(part, layer, picked, weight)
        if rows is not None:
            new = flat.index_copy(0, rows, new)
        with _lock:
            self._tally(part, layer, z.device).add_places(step.places)
        return new.view_as(z)

    def _move(self, part: int, layer: int, z: Tensor, weight: Tensor | None) -> Tensor:
        """`z` plus the method's delta where there is weight, `[n, d_model]`; tallied."""
        delta, strengths = self._parts[part].method.change(layer, z)
        with _lock:
            self._tally(part, layer, z.device).add(z, delta, strengths, weight)
        return _sum(z, delta, weight)

    def _tally(self, part: int, layer: int, device: torch.device) -> Tally:
        if (part, layer) not in self._tallies:
            self._tallies[part, layer] = Tally(len(self._parts[part].method.atoms(layer)), device)
        return self._tallies[part, layer]


def _sum(z: Tensor, delta: Tensor, weight: Tensor | None) -> Tensor:
    """`z + delta` in z's dtype, rounded once; z as it is where a row's weight is False.

    To launch each operation costs a GPU more than to do it: there is one, wherever no gradient is wanted.
    """
    if torch.is_grad_enabled():
        moved = (z + delta).to(z.dtype)
        return moved if weight is None else torch.where(weight[:, None], moved, z)
    if weight is None:
        return z + delta if z.dtype == delta.dtype else torch.add(z, delta, out=torch.empty_like(z))
    out = torch.empty_like(z)
    return torch.addcmul(z, delta, weight[:, None], out=out)


def _parts_by_layer(parts: list[Part]) -> dict[int, list[int]]:
    """Which parts do something at a layer, in the order in which they do it; layers rising."""
    busy = [
        (layer, i)
        for i, part in enumerate(parts)
        for layer in part.method.layers
        if not part.method.is_empty(layer)
    ]
    return {layer: [i for other, i in busy if other == layer] for layer in sorted({one for one, _ in busy})}


def _selected(found: Positions, scopes: tuple[str, ...]) -> Tensor:
    """`[batch, tokens]` bool: positions that are in one of the scopes at least."""
    if scopes == ("all",):
        return found.generated if _only_generated(found) else found.image | found.prompt | found.generated
    masks = [getattr(found, scope) for scope in scopes if scope not in found.absent]
    return masks[0] if not masks[1:] else torch.stack(masks).any(0)


def _step(found: Positions, select: Tensor, part: Part) -> _Step | None:
    """Where a part steers, of the positions that are selected; None where it is nowhere."""
    batch, width = select.shape
    mine = None if part.rows is None else part.in_batch(batch, select.device)
    if mine is not None:
        select = (
            select
            & torch.zeros(batch, dtype=torch.bool, device=select.device).index_fill(0, mine, 1)[:, None]
        )
    if _only_generated(found):
        places = nn.functional.pad(select.sum(1, keepdim=True), (len(PLACES) - 1, 0))
    else:
        places = torch.stack([(getattr(found, place) & select).sum(1) for place in PLACES], 1)
    if width == 1 and _counting_waits(select.device):
        weight = select.flatten()
        return _Step((batch, width), mine, weight if mine is None else weight[mine], places)
    rows = select.flatten().nonzero().squeeze(-1)
    every = len(rows) == select.numel()
    return _Step((batch, width), None if every else rows, None, places) if len(rows) else None


def _counting_waits(device: torch.device) -> bool:
    """Whether to know how many positions there are is to wait for the device."""
    return device.type != "cpu"


def _only_generated(found: Positions) -> bool:
    """Whether no token of a forward is of a prompt, as in most forwards of a generation."""
    return {"image", "prompt"} <= set(found.absent)


@contextmanager
def steer(
    model: nn.Module,
    method: Steerers,
    *,
    scope: str | Sequence[str] = "all",
    on_empty: str = "raise",
    base_model_ok: bool = False,
    prompt_tokens: int | None = None,
) -> Generator[Run, None, None]:
    """Steer a model inside a `with` block, by the thread that opened it; afterwards the model is as before.

    Args:
        model: The transformers model whose `generate` or forward is called.
        method: One of `daco.methods`, or anything with what `daco.methods.Method` lists; several, where each
            sees the stream as those before it left it; or `PerRow`, one for each row of a batch.
        scope: `all` positions that are not padding; or `image`, `prompt` (text), `generated` or `last` (the
            prompt's last token, which chooses the first token of the answer) alone; or several of them.
        on_empty: `raise` where atoms or scope match nothing, or `pass`.
        base_model_ok: Accept another base model id or revision (a fine-tune, a quantised copy).
        prompt_tokens: Columns of the prompt, padding included, where one forward holds more than the prompt
            or less (no KV cache, a given answer, a prefill in chunks, candidates of assisted decoding);
            needed by the scopes `prompt`, `generated` and `last`, and by `image` for pictures behind a cache;
            `all` steers the same positions without it, and the report counts them by a guess.

    Yields:
        The `Run`, whose `report()` says what was steered; its `on` may be set at any time.

    Raises:
        ModelMismatchError: it is not the model the method was made for.
        NothingToSteerError: nothing is labelled, or the scope matched no position (at the first prompt for
            `image`, else at the end).
        SteeringConflictError: the model is steered already, compiled, or called in a way hooks cannot follow;
            or the batch does not have the rows of `PerRow`.
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
            f"scope {named(run._scopes)} matched no position in {run._forwards} forwards of "
            f"{type(run._base).__name__}; was another model object called? pass on_empty='pass' to allow it"
        )


def attach(
    model: nn.Module,
    method: Steerers,
    *,
    scope: str | Sequence[str] = "all",
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
    method: Steerers,
    scope: str | Sequence[str],
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
    parts, scopes = parts_of(method), _scopes(scope)
    check_on_empty(on_empty)
    if prompt_tokens is not None and prompt_tokens < 1:
        raise ValueError(f"prompt_tokens: expected at least 1, got {prompt_tokens}")
    _refuse_compiled(model)
    notes = [part.method.base_model.check(model, base_model_ok) for part in parts]
    for part in parts:
        for layer in part.method.layers:
            site(model, layer)
        if part.method.nothing and on_empty == "raise":
            raise NothingToSteerError(part.method.nothing)
    if scopes == ("image",) and on_empty == "raise" and not image_token_ids(model):
        raise NothingToSteerError(f"scope 'image': {type(model).__name__} takes no images; use another scope")
    run = Run(model, parts, scopes, on_empty)
    run.what = (
        str(method) if isinstance(method, PerRow) else ", then ".join(str(part.method) for part in parts)
    )
    run._prompt_tokens = prompt_tokens
    run._notes = [note for note in dict.fromkeys(notes) if note]
    return run


def _scopes(scope: str | Sequence[str]) -> tuple[str, ...]:
    """The scopes that were asked for, in the order of SCOPES; raises ValueError."""
    asked = {scope} if isinstance(scope, str) else set(scope)
    if not asked or not asked <= set(SCOPES) or ("all" in asked and len(asked) > 1):
        raise ValueError(f"scope: expected one of {SCOPES}, or several of those behind 'all', got {scope!r}")
    return tuple(one for one in SCOPES if one in asked)


def _refuse_compiled(model: nn.Module) -> None:
    """A compiled model may go on without hooks that were set after it was compiled, and say nothing."""
    compiled = hasattr(model, "_orig_mod") or hasattr(model.forward, "_torchdynamo_orig_callable")
    parts = model.modules()
    if compiled or any(getattr(part, "_compiled_call_impl", None) is not None for part in parts):
        raise SteeringConflictError(
            "expected an eager model, got a compiled one, where hooks may not fire; steer the original, or "
            "use daco.wrap on it"
        )


def _refuse_compiling() -> None:
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing:
        raise SteeringConflictError(
            "expected an eager forward, got one that is being compiled or captured as a graph: its "
            "replay would not follow the steering; use daco.wrap, or generate with disable_compile=True"
        )
