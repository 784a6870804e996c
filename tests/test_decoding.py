"""Every way of decoding, steered, gives the logits of a reference that knows no cache, or is refused.

The reference runs the whole sequence anew for every token and edits the activations by DESIGN's equation in
numpy, at positions that it finds by itself. Model and SAE are float64; `test_models.py` does the same for
every architecture in greedy generation.
"""

import copy
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import small_sae
import torch
from families import IMAGE, MULTIMODAL, PAD, TEXT, VIDEO, Family, blocks_of, inputs_of
from test_models import GAMMA, edited, model_of, sae_of
from torch import Tensor

from builders.vision import ensure_torchvision
from daco import PerRow, steer, wrap
from daco.errors import SteeringConflictError
from daco.methods import SAESteering
from daco.sites import ModelFacts

ensure_torchvision()
pytestmark = pytest.mark.filterwarnings("ignore:base model not confirmed")

N_NEW = 5
FEW = [family for family in MULTIMODAL if family.name in ("LLaVA-1.5", "Qwen2.5-VL", "InternVL")]
few = pytest.mark.parametrize("family", FEW, ids=lambda family: family.name)
Inputs = dict[str, Tensor]
Places = Callable[[int], Tensor]


@pytest.fixture(autouse=True)
def without_gradients() -> Generator[None, None, None]:
    with torch.no_grad():
        yield


class Edit(NamedTuple):
    """What the reference does: one SAE, at some rows of the batch or all."""

    sae: Any
    rows: tuple[int, ...] | None = None


class Answer(NamedTuple):
    """What generating gave."""

    tokens: Tensor
    """`[rows, N_NEW]`."""
    logits: Tensor
    """`[rows, N_NEW, vocab]`, as the model returns them: `generate` itself hands out float32."""


def masks(inputs: Inputs, width: int) -> dict[str, Tensor]:
    """`[batch, width]` by scope, of the prompt and what follows it up to `width`."""
    ids, kept = inputs["input_ids"], inputs["attention_mask"].bool()
    more = torch.zeros(len(ids), width - ids.shape[1], dtype=torch.bool)
    last = torch.zeros_like(kept)
    for row, mask in enumerate(kept):
        last[row, int(mask.nonzero().max())] = True
    found = {"image": kept & (ids == IMAGE), "prompt": kept & (ids != IMAGE), "last": last}
    found = {name: torch.cat([mask, more], 1) for name, mask in found.items()}
    return found | {"generated": torch.cat([torch.zeros_like(kept), ~more], 1)}


def places_of(inputs: Inputs, scopes: Iterable[str], off: Iterable[int] = ()) -> Places:
    """Where scopes steer in a sequence of some width; `off`: tokens of the answer that are not steered."""

    def places(width: int) -> Tensor:
        found = masks(inputs, width)
        wanted = ("image", "prompt", "generated") if "all" in scopes else scopes
        steered = torch.stack([found[scope] for scope in wanted]).any(0)
        for token in off:
            steered[:, inputs["input_ids"].shape[1] + token :][:, :1] = False
        return steered

    return places


@contextmanager
def reference(family: Family, edits: list[Edit], places: Places) -> Generator[list[int], None, None]:
    """Blocks edit whole sequences by the equation; yields a list that grows with near-ties at rank k."""
    ties: list[int] = []

    def change(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            z, where = output.clone(), places(output.shape[1])
            times = len(z) // len(where)  # beams, and several answers a prompt, stand side by side
            for sae, rows in edits:
                mine = where.clone()
                if rows is not None:
                    mine[[row for row in range(len(where)) if row not in rows]] = False
                mine = mine.repeat_interleave(times, 0)
                if layer in sae.layers and mine.any():
                    z[mine] = torch.from_numpy(edited(z[mine].numpy(), sae.layers[layer], ties))
            return z

        return hook

    blocks = blocks_of(family, model_of(family))
    layers = sorted({layer for edit in edits for layer in edit.sae.layers})
    handles = [blocks[layer].register_forward_hook(change(layer)) for layer in layers]
    try:
        yield ties
    finally:
        for handle in handles:
            handle.remove()


def answer(family: Family, inputs: Inputs, **options: Any) -> Answer:
    """N_NEW tokens, none of them a placeholder or the end."""
    model, seen = model_of(family), []
    handle = model.register_forward_hook(lambda _m, _a, output: seen.append(output.logits[:, -1]))
    fixed = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "suppress_tokens": [IMAGE, VIDEO]}
    torch.manual_seed(0)
    try:
        tokens = model.generate(**inputs, **({"do_sample": False} | fixed | options))
    finally:
        handle.remove()
    return Answer(tokens[:, -N_NEW:], torch.stack(seen[-N_NEW:], 1))


def without_ties(
    family: Family, images: tuple[int, ...], run: Callable[[Inputs], tuple[Any, list[int]]]
) -> Any:
    """What the reference gives for the first inputs that have no near-tie at rank k, with these inputs."""
    for seed in range(4):
        inputs = inputs_of(family, images, seed)
        found, ties = run(inputs)
        if not ties:
            return inputs, found
        warnings.warn(f"{family.name}: {len(ties)} near-ties at rank k, inputs rejected", stacklevel=2)
    pytest.fail("every comparison had a near-tie at rank k")


def expected_of(
    family: Family,
    edits: list[Edit],
    scopes: Iterable[str],
    images: tuple[int, ...] = (1, 1),
    off: Iterable[int] = (),
    **options: Any,
) -> tuple[Inputs, Answer]:
    """Inputs, and what the reference answers to them."""

    def run(inputs: Inputs) -> tuple[Answer, list[int]]:
        with reference(family, edits, places_of(inputs, scopes, off)) as ties:
            return answer(family, inputs, **options, use_cache=False), ties

    return without_ties(family, images, run)


def assert_same(found: Answer, expected: Answer, plain: Answer) -> None:
    """Steered as the reference is, and not as the model is by itself."""
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-8, rtol=0)
    assert (found.logits - plain.logits).abs().max() > 1e-3


def counts(inputs: Inputs, scopes: Iterable[str], times: int = 1) -> dict[str, int]:
    """Positions steered in a generation of N_NEW tokens; the last of them is never fed back."""
    found = masks(inputs, inputs["input_ids"].shape[1] + N_NEW - 1)
    places = places_of(inputs, scopes)(found["image"].shape[1])
    return {place: times * int((found[place] & places).sum()) for place in ("image", "prompt", "generated")}


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several answers": {"num_beams": 4, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "prefill in chunks": {"prefill_chunk_size": 5},
}


@few
@pytest.mark.parametrize("scopes", [("all",), ("last",), ("image", "generated")], ids="+".join)
@pytest.mark.parametrize("mode", MODES)
def test_decoding(family: Family, mode: str, scopes: tuple[str, ...]) -> None:
    options, sae = MODES[mode], sae_of(family, "topk")
    cached = options
    if mode == "prefill in chunks":
        options = {}
    inputs, expected = expected_of(family, [Edit(sae)], scopes, **options)
    assert not inputs["attention_mask"].all()
    chunks = {"prompt_tokens": inputs["input_ids"].shape[1]} if mode == "prefill in chunks" else {}
    with steer(model_of(family), SAESteering(sae, gamma=GAMMA), scope=scopes, **chunks) as run:
        found = answer(family, inputs, **cached)
    assert_same(found, expected, answer(family, inputs, **options))
    times = options.get("num_beams", options.get("num_return_sequences", 1))
    report = run.report()
    assert [layer.positions for layer in report.layers] == [counts(inputs, scopes, times)] * 2
    by_row = [sum(row.values()) for row in report.layers[0].by_row]
    alone = [int(row.sum()) for row in places_of(inputs, scopes)(inputs["input_ids"].shape[1] + N_NEW - 1)]
    assert by_row == [n for n in alone for _ in range(times)]
    if mode == "prefill in chunks":
        assert report.forwards > N_NEW + 2


@few
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("scopes", [("all",), ("generated",), ("last",)], ids="+".join)
def test_where_counting_would_wait_for_a_device(
    family: Family, scopes: tuple[str, ...], beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daco.steering._counting_waits", lambda device: True, raising=False)
    model, sae = model_of(family), sae_of(family, "topk")
    inputs, expected = expected_of(family, [Edit(sae, (1,))], scopes, num_beams=beams)
    with steer(model, PerRow([None, SAESteering(sae, gamma=GAMMA)]), scope=scopes) as run:
        found = answer(family, inputs, num_beams=beams)
    assert_same(found, expected, answer(family, inputs, num_beams=beams))
    row = {name: tensor[1:] for name, tensor in inputs.items()}
    assert run.report().layers[0].positions == counts(row, scopes, beams)


class Fed(NamedTuple):
    """One forward of a cached generation of one row."""

    tokens: Tensor
    """`[1, width]`: all that was fed up to now, tokens that were taken back left out."""
    logits: Tensor
    """`[1, n, vocab]` of its last `n` tokens."""


@contextmanager
def recorded(model: Any) -> Generator[list[Fed], None, None]:
    """What the model is fed, forward by forward, also tokens that are only tried."""
    found: list[Fed] = []
    fed = torch.zeros(1, 0, dtype=torch.long)

    def before(_model: Any, _args: Any, call: dict[str, Any]) -> None:
        nonlocal fed
        cache = call["past_key_values"]
        fed = torch.cat([fed[:, : cache.get_seq_length()], call["input_ids"]], 1)

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(lambda _m, _a, output: found.append(Fed(fed, output.logits))),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def whole(family: Family, inputs: Inputs, tokens: Tensor) -> Tensor:
    """Logits of a sequence in one forward without cache."""
    more = tokens.shape[1] - inputs["input_ids"].shape[1]
    call = inputs | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if family.marks:
        call[family.marks] = torch.nn.functional.pad(inputs[family.marks], (0, more))
    return model_of(family)(**call, use_cache=False).logits


def drafts_of(family: Family) -> dict[str, dict[str, Any]]:
    """Ways of assisted decoding; the assistant is the model with a little noise, so that it errs at times."""
    assistant = copy.deepcopy(model_of(family))
    draw = torch.Generator().manual_seed(1)
    for weight in assistant.parameters():
        weight += 0.02 * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
    assistant.generation_config.num_assistant_tokens = 3
    return {"assistant": {"assistant_model": assistant}, "lookup": {"prompt_lookup_num_tokens": 3}}


@few
@pytest.mark.parametrize("scopes", [("all",), ("last",), ("prompt",), ("image", "generated")], ids="+".join)
@pytest.mark.parametrize("draft", ["assistant", "lookup"])
def test_assisted_decoding(family: Family, draft: str, scopes: tuple[str, ...]) -> None:
    model, sae = model_of(family), sae_of(family, "topk")
    few_words = [token for token in range(99) if token not in range(3, 9)]  # some guesses come true
    inputs, expected = expected_of(family, [Edit(sae)], scopes, images=(1,), suppress_tokens=few_words)
    inputs["input_ids"][:, -4:] = expected.tokens[:, :1]  # what is looked up is found
    with reference(family, [Edit(sae)], places_of(inputs, scopes)) as ties:
        expected = answer(family, inputs, suppress_tokens=few_words, use_cache=False)
    width, drafts = inputs["input_ids"].shape[1], drafts_of(family)[draft]
    method, options = SAESteering(sae, gamma=GAMMA), {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW}
    with (
        steer(model, method, scope=scopes, prompt_tokens=width) as run,
        recorded(model) as forwards,
    ):
        tokens = model.generate(**inputs, **drafts, **options, do_sample=False, suppress_tokens=few_words)
    assert torch.equal(tokens[:, width:], expected.tokens)
    assert any(len(fed.logits[0]) > 1 for fed in forwards), "no draft was tried"
    with reference(family, [Edit(sae)], places_of(inputs, scopes)) as more_ties:
        for fed in forwards:
            n = fed.logits.shape[1]
            torch.testing.assert_close(
                fed.logits, whole(family, inputs, fed.tokens)[:, -n:], atol=1e-8, rtol=0
            )
    assert not ties + more_ties, "a near-tie at rank k"
    report, first = run.report(), forwards[0].tokens.shape[1] - width
    generated = first + sum(fed.logits.shape[1] for fed in forwards[1:])  # also those that were taken back
    wanted = counts(inputs, scopes) | {"generated": generated if {"all", "generated"} & set(scopes) else 0}
    assert [layer.positions for layer in report.layers] == [wanted] * 2


@few
@pytest.mark.parametrize("scope", ["prompt", "generated", "last"])
@pytest.mark.parametrize("draft", ["assistant", "lookup"])
def test_drafts_need_to_know_where_the_prompt_ends(family: Family, draft: str, scope: str) -> None:
    inputs = inputs_of(family, (1,))
    inputs["input_ids"][:, -5:] = torch.tensor([5, 6, 7, 5, 6])
    drafts = drafts_of(family)[draft]
    with (
        pytest.raises(SteeringConflictError, match="pass prompt_tokens"),
        steer(model_of(family), SAESteering(sae_of(family, "topk")), scope=scope),
    ):
        model_of(family).generate(**inputs, **drafts, max_new_tokens=2, do_sample=False)


def test_an_early_exit_is_refused() -> None:
    family = next(family for family in TEXT if family.name == "Llama")  # transformers has it for text alone
    with (
        pytest.raises(SteeringConflictError, match="skipped"),
        steer(model_of(family), SAESteering(sae_of(family, "topk"))),
    ):
        model_of(family).generate(**inputs_of(family, (0,)), assistant_early_exit=1, max_new_tokens=3)


def compiling() -> tuple[dict[str, Any], list[Any]]:
    """Options of `generate` that compile decoding, as it does by itself on a GPU, and what was compiled."""
    from transformers import CompileConfig

    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any, **_options: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, fullgraph=True)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}, graphs


@few
@pytest.mark.parametrize("compiled", [False, True], ids=["static cache", "compiled"])
def test_static_caches_and_compiled_decoding(family: Family, compiled: bool) -> None:
    torch._dynamo.reset()
    model, sae, (options, graphs) = model_of(family), sae_of(family, "topk"), compiling()
    options = options if compiled else {"cache_implementation": "static"}
    inputs, expected = expected_of(family, [Edit(sae)], ("all",))
    with wrap(model, SAESteering(sae, gamma=GAMMA)):
        found = answer(family, inputs, **options)
    assert bool(graphs) == compiled
    plain = answer(family, inputs, **options)
    assert_same(found, expected, plain)
    torch.testing.assert_close(plain.logits, answer(family, inputs).logits, atol=1e-8, rtol=0)


@few
@pytest.mark.parametrize("compiled", [False, True], ids=["static cache", "compiled"])
def test_hooks_refuse_static_caches_and_compiled_decoding(family: Family, compiled: bool) -> None:
    torch._dynamo.reset()
    options = compiling()[0] if compiled else {"cache_implementation": "static"}
    with (
        pytest.raises(SteeringConflictError, match=r"daco\.wrap"),
        steer(model_of(family), SAESteering(sae_of(family, "topk"))),
    ):
        answer(family, inputs_of(family), **options)


@few
@pytest.mark.parametrize("beams", [1, 2])
def test_each_row_has_its_own_method(family: Family, beams: int) -> None:
    model = model_of(family)
    strict, mild = sae_of(family, "topk"), sae_of(family, "jumprelu")
    methods = [SAESteering(one, gamma=GAMMA) for one in (strict, mild)]
    edits = [Edit(strict, (0, 3)), Edit(mild, (2,))]
    inputs, expected = expected_of(family, edits, ("all",), (1, 1, 1, 1), num_beams=beams)
    with steer(model, PerRow([methods[0], None, methods[1], methods[0]])) as run:
        found = answer(family, inputs, num_beams=beams)
    plain = answer(family, inputs, num_beams=beams)
    assert_same(found, expected, plain)
    own = slice(beams, 2 * beams)
    assert torch.equal(found.logits[own], plain.logits[own])
    moved = (found.logits - plain.logits).abs().amax((1, 2)) > 1e-3
    assert moved.tolist() == [i // beams != 1 for i in range(4 * beams)]
    alone = counts(inputs, ("all",))
    by_method = {layer.method: layer for layer in run.report().layers if layer.layer == 1}
    assert len(by_method) == 1, "methods of one name are told apart by their settings alone"
    ours, theirs = [layer for layer in run.report().layers if layer.layer == 1]
    total = {place: ours.positions[place] + theirs.positions[place] for place in alone}
    rows = masks(inputs, inputs["input_ids"].shape[1] + N_NEW - 1)
    assert total == {place: beams * int(rows[place][[0, 2, 3]].sum()) for place in alone}
    steered_rows = [bool(sum(row.values())) for row in ours.by_row]
    assert steered_rows == [i // beams in (0, 3) for i in range(len(steered_rows))]


def test_a_batch_of_other_rows_than_were_told_is_refused() -> None:
    family = FEW[0]
    method = SAESteering(sae_of(family, "topk"))
    with (
        pytest.raises(SteeringConflictError, match="a batch of 3 rows"),
        steer(model_of(family), PerRow([method, None, method])),
    ):
        model_of(family)(**inputs_of(family, (1, 1)))


@few
def test_several_saes_act_one_after_the_other(family: Family) -> None:
    model = model_of(family)
    first = sae_of(family, "topk")
    second = small_sae.steering_sae(ModelFacts.of(model), (2, 3), "relu")
    inputs, expected = expected_of(family, [Edit(first), Edit(second)], ("all",))
    with steer(model, [SAESteering(one, gamma=GAMMA) for one in (first, second)]) as run:
        found = answer(family, inputs)
    assert_same(found, expected, answer(family, inputs))
    with steer(model, [SAESteering(one, gamma=GAMMA) for one in (second, first)]):
        other = answer(family, inputs)
    assert (other.logits - found.logits).abs().max() > 1e-3, "the order does not matter"
    report = run.report()
    assert [layer.layer for layer in report.layers] == [1, 2, 2, 3]
    assert [layer.positions for layer in report.layers] == [counts(inputs, ("all",))] * 4


@few
def test_steering_is_switched_in_the_middle(family: Family) -> None:
    model, sae = model_of(family), sae_of(family, "topk")
    off = (0, 1)  # tokens of the answer that are fed while it is off
    inputs, expected = expected_of(family, [Edit(sae)], ("all",), off=off)
    with steer(model, SAESteering(sae, gamma=GAMMA)) as run:

        def switch(ids: Tensor, scores: Tensor) -> Tensor:
            answered = ids.shape[1] - inputs["input_ids"].shape[1]  # called before this token is chosen
            run.on = answered not in off
            return scores

        found = answer(family, inputs, logits_processor=[switch])
    assert_same(found, expected, answer(family, inputs))
    report = run.report()
    assert report.layers[0].positions["generated"] == 2 * (N_NEW - 1 - len(off))
    assert f"steering was switched off in {len(off)} of {N_NEW} forwards" in report.notes


@few
def test_steering_that_is_off_from_the_start_changes_nothing(family: Family) -> None:
    inputs = inputs_of(family)
    with steer(model_of(family), SAESteering(sae_of(family, "topk")), on_empty="pass") as run:
        run.on = False
        found = answer(family, inputs)
    assert torch.equal(found.logits, answer(family, inputs).logits)
    assert run.report().positions == 0


@few
def test_where_places_are_a_guess_the_report_says_so(family: Family) -> None:
    inputs, method = inputs_of(family, (1,)), SAESteering(sae_of(family, "topk"))
    told = inputs["input_ids"].shape[1]
    for options, guessed in (
        ({}, False),
        ({"use_cache": False}, True),
        (drafts_of(family)["assistant"], True),
    ):
        for prompt_tokens in (None, told):
            with steer(model_of(family), method, prompt_tokens=prompt_tokens) as run:
                model_of(family).generate(**inputs, max_new_tokens=3, do_sample=False, **options)
            said = [note for note in run.report().notes if "pass prompt_tokens" in note]
            assert bool(said) == (guessed and prompt_tokens is None)


def test_padding_is_what_the_mask_says() -> None:
    inputs = inputs_of(FEW[0])
    assert (inputs["input_ids"] == PAD).sum() == (inputs["attention_mask"] == 0).sum() > 0
