"""Steering moves the right positions by the right delta, says what it did, and leaves nothing behind."""

import copy
import gc
import threading
import weakref
from typing import Any

import naive
import numpy as np
import pytest
import small_sae
import torch
from conftest import CAPTIONS, drawn_images, in_thread, inputs_of, tiny
from test_capture import hooks
from test_sites import text_model
from torch import Tensor, nn

from daco.assignment import PerRow
from daco.capture import capture
from daco.errors import (
    ModelMismatchError,
    NothingToSteerError,
    SteeringConflictError,
    UnknownLayerError,
    UnsupportedModelError,
)
from daco.methods import MOP, ActAdd, SAESteering, SafetyPrompt
from daco.report import FiredAtom, LayerReport, Report
from daco.sites import ModelFacts, image_token_ids
from daco.steering import attach, steer
from daco.wrapping import wrap

KINDS = ("llava", "qwen2_5_vl", "internvl")
pytestmark = pytest.mark.filterwarnings("ignore:base model not confirmed")


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


class Case:
    """A float64 model with inputs, and methods made for it."""

    def __init__(self, kind: str) -> None:
        self.model, self.processor = tiny(kind)
        self.model.double()
        self.facts = ModelFacts.of(self.model)
        self.inputs = self.batch(2)
        with torch.no_grad():  # transformers sets lazy hooks of its own in a first forward
            self.model(**self.inputs)

    def batch(self, n: int, images: bool = True) -> dict[str, Tensor]:
        made = inputs_of(self.processor, n, images)
        return {name: t.double() if t.is_floating_point() else t for name, t in made.items()}

    def row(self, i: int) -> dict[str, Tensor]:
        from builders.mllm import chat_inputs

        made = chat_inputs(self.processor, CAPTIONS[i : i + 1], drawn_images(2)[i : i + 1])
        return {name: t.double() if t.is_floating_point() else t for name, t in made.items()}

    def sae(self, **options: Any) -> Any:
        return small_sae.steering_sae(self.facts, **options)

    def dictionary(self) -> Any:
        return small_sae.dictionary(self.facts)

    def logits(self, **inputs: Tensor) -> Tensor:
        return self.model(**(inputs or self.inputs)).logits

    def stream(self, layer: int) -> Tensor:
        """The residual stream at a layer, as it is now."""
        with capture(self.model, [layer]) as captured:
            self.model(**self.inputs)
        return captured.activations[layer]

    def masks(self) -> dict[str, Tensor]:
        """Places of the prompt's positions, by the processor's own tokens."""
        kept = self.inputs["attention_mask"].bool()
        image = sum(self.inputs["input_ids"] == i for i in image_token_ids(self.model)).bool()
        return {"all": kept, "image": kept & image, "prompt": kept & ~image}


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def llava() -> Case:
    return Case("llava")


def twin_of(method: Any, case: Case, layer: int, z: np.ndarray) -> np.ndarray:
    """What the twin makes of activations `[n, d_model]`."""
    if isinstance(method, SAESteering):
        return small_sae.naive_steer(z, method._saes[layer], method.gamma)
    D = naive.unit(case.dictionary().raw(layer).double().numpy())
    if isinstance(method, ActAdd):
        return naive.actadd(z, D, small_sae.POLARITY, method.strength, small_sae.R)
    alphas = [naive.mop_alpha(row, D, method.alpha, method.tau) for row in z]
    codes = [naive.mop_code(row, D, alpha, method.tau) for row, alpha in zip(z, alphas, strict=True)]
    return naive.mop_steer(z, np.stack(codes), D, small_sae.POLARITY, method.gamma, small_sae.R)


METHODS = {
    "topk": lambda case: SAESteering(case.sae(activation="topk"), gamma=0.2),
    "relu": lambda case: SAESteering(case.sae(activation="relu"), gamma=0.0),
    "mop": lambda case: MOP(case.dictionary(), 0.05, gamma=0.1, tol=1e-12, dtype=torch.float64),
    "actadd": lambda case: ActAdd(case.dictionary(), 0.3, dtype=torch.float64),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_stream_is_the_twins_and_padding_is_untouched(name: str, case: Case) -> None:
    method = METHODS[name](case)
    before, logits = case.stream(1), case.logits()
    kept = case.masks()["all"]
    assert not kept.all(), "the batch has no padding"
    with steer(case.model, method) as run:
        first, second = case.stream(1), case.stream(2)
        moved = case.logits()
    expected = twin_of(method, case, 1, before[kept].numpy())
    atol = 1e-5 if name in ("mop", "actadd") else 1e-11  # a solver's tolerance, and float32 centroids
    np.testing.assert_allclose(first[kept].numpy(), expected, atol=atol)
    assert torch.equal(first[~kept], before[~kept])
    change = (first - before)[kept].norm(dim=-1) / before[kept].norm(dim=-1)
    assert change.max() > 0.05
    assert (moved - logits)[kept].abs().max() > 1e-3
    # the second SAE sees the stream that the first one left
    method.layers = (1,)
    with steer(case.model, method):
        arriving = case.stream(2)
    expected = twin_of(method, case, 2, arriving[kept].numpy())
    np.testing.assert_allclose(second[kept].numpy(), expected, atol=atol)
    assert run.report().layers[0].positions["prompt"] > 0


@pytest.mark.parametrize("scope", ["all", "image", "prompt"])
def test_a_scope_steers_its_positions_alone(scope: str, case: Case) -> None:
    before, wanted = case.stream(1), case.masks()[scope]
    assert wanted.any()
    assert not wanted.all()
    with steer(case.model, SAESteering(case.sae(), layers=[1]), scope=scope) as run:
        after = case.stream(1)
    assert torch.equal((after != before).any(-1), wanted)
    counted = run.report().layers[0].positions
    assert sum(counted.values()) == int(wanted.sum())
    for place in ("image", "prompt"):
        assert counted[place] == int((case.masks()[place] & wanted).sum())
    assert counted["generated"] == 0


GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def generated_streams(case: Case, layer: int, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Tokens of a greedy answer without image placeholders, and the block's output in each forward."""
    seen: list[Tensor] = []
    block = case.model.model.language_model.layers[layer]
    handle = block.register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    options = {"suppress_tokens": list(image_token_ids(case.model)), **GREEDY, **options}
    try:
        tokens = case.model.generate(**case.inputs, **options)
    finally:
        handle.remove()
    return tokens, seen


@pytest.mark.parametrize("scope", ["all", "image", "prompt", "generated"])
def test_cached_decoding_equals_recomputing_the_whole(scope: str, case: Case) -> None:
    width = case.inputs["input_ids"].shape[1]
    method = SAESteering(case.sae(), gamma=0.5)
    with steer(case.model, method, scope=scope) as run:
        cached, steps = generated_streams(case, 2)
    with steer(case.model, method, scope=scope, prompt_tokens=width) as whole_run:
        whole, wholes = generated_streams(case, 2, use_cache=False)
    plain, _ = generated_streams(case, 2)
    assert torch.equal(cached, whole)
    assert scope == "image" or not torch.equal(cached, plain), "the answer did not change"
    kept = case.masks()["all"]
    parts = torch.cat(steps, 1)
    assert parts.shape[1] == width + 4
    torch.testing.assert_close(parts[:, :width][kept], wholes[-1][:, :width][kept], atol=1e-9, rtol=0)
    torch.testing.assert_close(parts[:, width:], wholes[-1][:, width:], atol=1e-9, rtol=0)
    counted = run.report().layers[0].positions
    expected = {place: int(case.masks()[place].sum()) for place in ("image", "prompt")} | {"generated": 2 * 4}
    assert counted == {place: n if scope in ("all", place) else 0 for place, n in expected.items()}
    assert whole_run.report().positions > run.report().positions


def test_generated_positions_are_steered_one_by_one(case: Case) -> None:
    with steer(case.model, SAESteering(case.sae(), layers=[1], gamma=0.5), scope="generated") as run:
        tokens, steered = generated_streams(case, 1)
    assert run.report().layers[0].positions == {"image": 0, "prompt": 0, "generated": 8}
    assert run.report().forwards == 5
    mask = torch.cat([case.inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    with capture(case.model, [1]) as captured:
        whole = {k: v for k, v in case.inputs.items() if k not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 4))
        case.model(input_ids=tokens[:, :-1], attention_mask=mask, **whole)
    z = captured.activations[1][:, -4]  # the first generated token: nothing before it was steered
    expected = small_sae.naive_steer(z.numpy(), case.sae().layers[1], 0.5)
    np.testing.assert_allclose(steered[1][:, 0].numpy(), expected, atol=1e-5)  # norms are float32


def test_a_padded_batch_equals_single_rows(case: Case) -> None:
    method = SAESteering(case.sae(), gamma=0.5)
    plain = case.logits()
    with steer(case.model, method):
        batch = case.model.generate(**case.inputs, **GREEDY)
        logits = case.logits()
    for i in range(2):
        with steer(case.model, method):
            single = case.model.generate(**case.row(i), **GREEDY)
            alone = case.logits(**case.row(i))[0, -1]
        # positions differ by the padding, and rotary angles are float32
        torch.testing.assert_close(alone, logits[i, -1], atol=1e-5, rtol=0)
        assert (alone - plain[i, -1]).abs().max() > 1e-2
        assert torch.equal(single[0, -5:], batch[i, -5:])


def test_beams_are_steered_alike(llava: Case) -> None:
    method = SAESteering(llava.sae(), gamma=0.5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with steer(llava.model, method) as run:
        cached = llava.model.generate(**llava.inputs, **options)
        whole = llava.model.generate(**llava.inputs, **options, use_cache=False)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, llava.model.generate(**llava.inputs, **options))
    assert run.report().layers[0].positions["generated"] == 2 * 3 * 3


@pytest.mark.parametrize("build", [SAESteering, MOP, ActAdd])
def test_nothing_labelled_is_an_exact_no_op_that_says_so(build: Any, case: Case) -> None:
    found = case.sae() if build is SAESteering else case.dictionary()
    if build is SAESteering:
        method = SAESteering(found, eta=0.999, on_empty="pass")
    else:
        found.concepts["polarity"] = "neutral"
        method = build(found, on_empty="pass")
    logits = case.logits()
    with pytest.raises(NothingToSteerError), steer(case.model, method):
        pass
    with steer(case.model, method, on_empty="pass") as run:
        assert torch.equal(case.logits(), logits)
    assert "exact no-op" in str(run.report())
    assert run.report().positions == 0
    assert run.report().forwards == 1


def raise_after(call: Any) -> None:
    call()
    raise RuntimeError("mine")


def test_afterwards_the_model_is_as_before(case: Case) -> None:
    logits, count = case.logits(), hooks(case.model)
    method = SAESteering(case.sae())
    with steer(case.model, method):
        assert hooks(case.model) == count + 4  # two blocks, and before and after the whole model
        assert not torch.equal(case.logits(), logits)
    assert hooks(case.model) == count
    assert torch.equal(case.logits(), logits)
    with pytest.raises(RuntimeError, match="mine"), steer(case.model, method):
        raise_after(case.logits)
    broken = case.inputs | {"input_ids": case.inputs["input_ids"][:, :5]}
    with pytest.raises((ValueError, RuntimeError, IndexError)), steer(case.model, method):
        case.logits(**broken)
    assert hooks(case.model) == count
    assert torch.equal(case.logits(), logits)


def test_the_model_can_be_called_again_after_a_forward_that_failed(llava: Case) -> None:
    with steer(llava.model, SAESteering(llava.sae())) as run:
        moved = llava.logits()
        with pytest.raises((ValueError, RuntimeError)):
            llava.logits(**(llava.inputs | {"input_ids": llava.inputs["input_ids"][:, :5]}))
        assert torch.equal(llava.logits(), moved)
    assert run.report().forwards == 3


def test_attach_steers_until_removed(case: Case) -> None:
    logits, count = case.logits(), hooks(case.model)
    run = attach(case.model, SAESteering(case.sae()))
    assert not torch.equal(case.logits(), logits)
    run.remove()
    run.remove()
    assert torch.equal(case.logits(), logits)
    assert hooks(case.model) == count
    attach(case.model, SAESteering(case.sae())).remove()


def test_a_long_prefill_in_chunks_is_the_same(llava: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    method = SAESteering(llava.sae())
    with steer(llava.model, method) as whole:
        expected = llava.logits()
    monkeypatch.setattr("daco.steering.CHUNK", 7)
    with steer(llava.model, method) as run:
        torch.testing.assert_close(llava.logits(), expected, atol=1e-9, rtol=0)
    assert run.report().layers[0].positions == whole.report().layers[0].positions
    counts = [{atom.atom: atom.positions for atom in r.report().layers[0].atoms} for r in (run, whole)]
    assert counts[0] == counts[1]


def test_inference_mode_and_plain_forwards_take_turns(llava: Case) -> None:
    run = attach(llava.model, SAESteering(llava.sae()))
    with torch.inference_mode():
        inside = llava.logits()
    assert torch.equal(llava.logits(), inside)
    run.remove()
    assert run.report().layers[0].positions["prompt"] == 2 * int(llava.masks()["prompt"].sum())


def test_a_forgotten_run_does_not_keep_its_model_alive() -> None:
    case = Case("llava")
    attach(case.model, SAESteering(case.sae()))
    case.logits()
    gone = weakref.ref(case.model)
    del case
    gc.collect()
    assert gone() is None


def test_a_release_steers_and_attaches(llava: Case) -> None:
    sae = llava.sae()
    with steer(llava.model, SAESteering(sae)):
        expected = llava.logits()
    with sae.steer(llava.model) as run:
        assert torch.equal(llava.logits(), expected)
    assert run.report().method == "SAE steering, eta 0.5, gamma 0.2"
    run = sae.attach(llava.model, gamma=0.0, layers=[2], scope="image")
    llava.logits()
    run.remove()
    assert run.report().scope == "image"
    assert [layer.layer for layer in run.report().layers] == [2]


def test_the_report_counts_what_fired(case: Case) -> None:
    method = SAESteering(case.sae(), layers=[1], gamma=0.2)
    kept = case.masks()["all"]
    z = case.stream(1)[kept].numpy()
    with steer(case.model, method) as run:
        case.logits()
        case.logits()
    layer = method._saes[1]
    w = {name: p.detach().numpy() for name, p in layer.sae.named_parameters()}
    codes = naive.encode(z, w["W_enc"], w["b_enc"], w["b_dec"], "topk", layer.sae.k)
    report = run.report().layers[0]
    expected = {i: codes[:, i] for i in method.atoms(1) if (codes[:, i] > 0).any()}
    assert expected
    assert {atom.atom for atom in report.atoms} == set(expected)
    for atom in report.atoms:
        fired = expected[atom.atom] > 0
        assert atom.positions == 2 * int(fired.sum())
        assert atom.mean_strength == pytest.approx(expected[atom.atom][fired].mean())
        assert atom.names == [f"c{atom.atom % small_sae.N_CONCEPTS}", "other"]
    totals = [atom.positions * atom.mean_strength for atom in report.atoms]
    assert totals == sorted(totals, reverse=True)
    delta = small_sae.naive_steer(z, layer, 0.2) - z
    relative = np.linalg.norm(delta, axis=1) / np.linalg.norm(z, axis=1)
    assert report.relative_change == pytest.approx(relative.mean())
    assert report.relative_change_max == pytest.approx(relative.max())
    assert (report.labelled, report.shifted) == (len(method.atoms(1)), True)
    text = str(run.report())
    assert f"{report.atoms[0].atom} (c{report.atoms[0].atom % small_sae.N_CONCEPTS}, other)" in text
    assert "note:" not in text  # the model's weights confirm what it is
    assert run.report().as_dict()["layers"][0]["atoms"][0]["names"] == report.atoms[0].names


def test_overrides_are_kept_in_the_report(llava: Case) -> None:
    llava.model.config._name_or_path = "org/tuned"
    facts = ModelFacts("org/base", "", "llava", 32, 4)
    method = SAESteering(small_sae.steering_sae(facts))
    try:
        with pytest.raises(ModelMismatchError, match="expected base model org/base, got org/tuned"):
            attach(llava.model, method)
        with steer(llava.model, method, base_model_ok=True) as run:
            llava.logits()
    finally:
        llava.model.config._name_or_path = ""
    assert run.report().notes == ["base_model_ok: expected base model org/base, got org/tuned"]


@pytest.mark.parametrize(
    ("facts", "layers", "error"),
    [
        (ModelFacts("", "", "qwen2_5_vl", 32, 4), (1,), ModelMismatchError),
        (ModelFacts("", "", "llava", 48, 4), (1,), ModelMismatchError),
        (ModelFacts("", "", "llava", 32, 28), (1,), ModelMismatchError),
        (ModelFacts("", "", "llava", 32, 4), (1, 4), UnknownLayerError),
    ],
)
def test_the_wrong_model_is_refused_before_the_first_hook(
    facts: Any, layers: Any, error: Any, llava: Case
) -> None:
    count = hooks(llava.model)
    for base_model_ok in (False, True):
        with pytest.raises(error, match=r"expected .*got"):
            attach(
                llava.model, SAESteering(small_sae.steering_sae(facts, layers)), base_model_ok=base_model_ok
            )
    assert hooks(llava.model) == count


def test_a_model_is_steered_by_one_run_at_a_time(llava: Case) -> None:
    method = SAESteering(llava.sae())
    with steer(llava.model, method):
        moved, count = llava.logits(), hooks(llava.model)
        for whole_or_part in (llava.model, llava.model.model):
            with pytest.raises(SteeringConflictError, match="not steered, got one steered by SAE steering"):
                attach(whole_or_part, ActAdd(llava.dictionary()))
        assert hooks(llava.model) == count
        assert torch.equal(llava.logits(), moved)
    other = Case("llava")
    with steer(llava.model, method), steer(other.model, method):
        assert torch.equal(other.logits(), llava.logits())


@pytest.mark.parametrize("way", [attach, wrap])
def test_a_steered_model_is_not_copied(way: Any, llava: Case) -> None:
    before = llava.logits()
    handle = way(llava.model, SAESteering(llava.sae()))
    moved = llava.logits()
    with pytest.raises(SteeringConflictError, match=r"not steered, got one to copy .* remove\(\)"):
        copy.deepcopy(llava.model)
    assert torch.equal(llava.logits(), moved)
    handle.remove()
    copied = copy.deepcopy(llava.model)
    handle = way(llava.model, SAESteering(llava.sae()))
    assert torch.equal(copied(**llava.inputs).logits, before)
    handle.remove()


def test_another_thread_gets_an_error_in_a_with_block_and_steering_when_attached(llava: Case) -> None:
    method = SAESteering(llava.sae())
    with steer(llava.model, method):
        moved = llava.logits()
        assert "in the thread that opened" in str(in_thread(llava.logits))
        assert torch.equal(llava.logits(), moved)
    run = attach(llava.model, method)
    assert torch.equal(in_thread(llava.logits), moved)
    threads = [threading.Thread(target=lambda: in_thread(llava.logits)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.remove()
    one = int(llava.masks()["all"].sum())
    assert sum(run.report().layers[0].positions.values()) == 5 * one


def test_an_image_scope_without_an_image_is_refused_at_the_prompt(case: Case) -> None:
    text = case.batch(2, images=False)
    method = SAESteering(case.sae())
    with (
        pytest.raises(NothingToSteerError, match=r"scope 'image': expected image tokens .*got none"),
        steer(case.model, method, scope="image"),
    ):
        case.model.generate(**text, max_new_tokens=2)
    logits = case.logits(**text)
    with steer(case.model, method, scope="image", on_empty="pass") as run:
        assert torch.equal(case.logits(**text), logits)
    assert run.report().notes[-1] == "nothing was steered in 1 forwards"


def test_a_scope_that_matched_nothing_is_an_error_at_the_end(llava: Case) -> None:
    method = SAESteering(llava.sae())
    with (
        pytest.raises(NothingToSteerError, match="scope 'generated' matched no position in 1 forwards"),
        steer(llava.model, method, scope="generated"),
    ):
        llava.logits()
    with (
        pytest.raises(NothingToSteerError, match=r"in 0 forwards.*another model object"),
        steer(llava.model, method),
    ):
        pass
    with pytest.raises(RuntimeError, match="mine"), steer(llava.model, method, scope="generated"):
        raise RuntimeError("mine")
    run = attach(llava.model, method, scope="generated")
    llava.logits()
    run.remove()
    assert "nothing was steered in 1 forwards" in str(run.report())


def test_a_text_model_is_steered_and_has_no_images() -> None:
    model = text_model("LlamaConfig").double().eval()
    method = SAESteering(small_sae.steering_sae(ModelFacts.of(model)))
    with pytest.raises(NothingToSteerError, match="takes no images"):
        attach(model, method, scope="image")
    ids = torch.arange(3, 15).repeat(2, 1)
    with steer(model, method, scope="prompt") as run:
        moved = model(ids).logits
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(moved, embedded)
    assert not torch.equal(moved, model(ids).logits)
    assert run.report().layers[0].positions == {"image": 0, "prompt": 48, "generated": 0}


@pytest.mark.parametrize("waits", [False, True], ids=["counted first", "counted later"])
def test_a_padded_single_token_is_untouched(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daco.steering._counting_waits", lambda device: waits, raising=False)
    model = text_model("LlamaConfig").double().eval()
    ids, mask = torch.tensor([[5], [7]]), torch.tensor([[1], [0]])
    with capture(model, [1]) as captured:
        before = captured.run(ids).logits
        with steer(model, SAESteering(small_sae.steering_sae(ModelFacts.of(model)))) as run:
            after = captured.run(ids, attention_mask=torch.ones_like(mask)).logits
            masked = captured.run(ids, attention_mask=mask).logits
    assert torch.equal(masked[0], after[0])
    assert not torch.equal(masked[0], before[0])
    assert torch.equal(masked[1], model(ids, attention_mask=mask).logits[1])
    assert run.report().layers[0].positions["prompt"] == 3
    with steer(model, SAESteering(small_sae.steering_sae(ModelFacts.of(model)))) as run:
        model(ids, attention_mask=mask)
    layer = run.report().layers[0]
    assert layer.relative_change == layer.relative_change_max > 0  # of the one position
    assert {atom.positions for atom in layer.atoms} == {1}
    methods = [None, SAESteering(small_sae.steering_sae(ModelFacts.of(model)))]
    with steer(model, PerRow(methods), on_empty="pass") as run:
        alone = model(ids, attention_mask=mask).logits
    assert torch.equal(alone, model(ids, attention_mask=mask).logits)
    assert run.report().positions == 0


def test_where_prompt_and_answer_cannot_be_told_apart_is_refused(llava: Case) -> None:
    method = SAESteering(llava.sae())
    for scope in ("prompt", "generated"):
        with (
            pytest.raises(SteeringConflictError, match="pass prompt_tokens"),
            steer(llava.model, method, scope=scope),
        ):
            llava.model.generate(**llava.inputs, use_cache=False, max_new_tokens=2)
    embeds = llava.model.get_input_embeddings()(llava.inputs["input_ids"])
    with (
        pytest.raises(SteeringConflictError, match="expected input_ids, got inputs_embeds"),
        steer(llava.model, method, scope="image"),
    ):
        llava.model(inputs_embeds=embeds, attention_mask=llava.inputs["attention_mask"])


def test_a_given_answer_is_scored_with_prompt_tokens(llava: Case) -> None:
    width = llava.inputs["input_ids"].shape[1]
    before = llava.stream(1)
    with steer(
        llava.model, SAESteering(llava.sae(), layers=[1]), scope="generated", prompt_tokens=width - 3
    ) as run:
        after = llava.stream(1)
    changed = (after != before).any(-1)
    assert changed[:, -3:].all()
    assert not changed[:, :-3].any()
    assert run.report().layers[0].positions == {"image": 0, "prompt": 0, "generated": 6}


def test_placeholders_after_the_prompt_are_no_image(llava: Case) -> None:
    wanted = llava.masks()["image"].clone()
    wanted[:, 15:] = False
    assert 0 < wanted.sum() < llava.masks()["image"].sum()
    with steer(llava.model, SAESteering(llava.sae()), scope="image", prompt_tokens=15) as run:
        llava.logits()
    assert run.report().layers[0].positions == {"image": int(wanted.sum()), "prompt": 0, "generated": 0}


def test_a_static_cache_is_refused(llava: Case) -> None:
    with (
        pytest.raises(SteeringConflictError, match=r"an attention mask \[batch, tokens\], got \[2, 1"),
        steer(llava.model, SAESteering(llava.sae())),
    ):
        llava.model.generate(**llava.inputs, max_new_tokens=2, cache_implementation="static")


def call_whole_then_part(case: Case) -> None:
    case.logits()
    case.model.model(**case.inputs)


def test_a_part_of_the_model_is_not_silently_left_alone(llava: Case) -> None:
    with (
        pytest.raises(SteeringConflictError, match="a call of the whole LlavaForConditionalGeneration"),
        steer(llava.model, SAESteering(llava.sae())),
    ):
        call_whole_then_part(llava)


def with_no_hooks_of(block: nn.Module, call: Any) -> None:
    """A call in which a block's hooks do not fire, as in a replayed graph."""
    kept, block._forward_hooks = block._forward_hooks, {}
    try:
        call()
    finally:
        block._forward_hooks = kept


def test_hooks_that_do_not_fire_are_noticed(llava: Case) -> None:
    block = llava.model.model.language_model.layers[2]
    with (
        pytest.raises(SteeringConflictError, match=r"hooks of layers \[1, 2\] to fire once each, got 1"),
        steer(llava.model, SAESteering(llava.sae())),
    ):
        with_no_hooks_of(block, llava.logits)


def test_compiled_models_are_refused() -> None:
    case = Case("llava")
    method = SAESteering(case.sae())
    for compiled in (torch.compile(case.model, backend="eager"), case.model):
        if compiled is case.model:
            compiled.model.language_model.layers[0].compile(backend="eager")
        with pytest.raises(SteeringConflictError, match="got a compiled one"):
            attach(compiled, method)


@pytest.mark.parametrize("before", [True, False])
def test_a_compiled_forward_is_never_silently_left_alone(before: bool) -> None:
    torch._dynamo.reset()
    model = text_model("LlamaConfig").double().eval()
    ids = torch.arange(3, 15).repeat(2, 1)
    compiled = torch.compile(model.__call__, backend="eager", fullgraph=True)
    if before:
        compiled(ids)
    with (
        pytest.raises(Exception, match=r"blocks compiled|being compiled|in 0 forwards"),
        steer(model, SAESteering(small_sae.steering_sae(ModelFacts.of(model)))),
    ):
        compiled(ids)
    assert torch.equal(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"scope": "images"}, "scope"),
        ({"on_empty": "skip"}, "on_empty"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
    ],
)
def test_options_are_checked(options: dict[str, Any], name: str, llava: Case) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        attach(llava.model, SAESteering(llava.sae()), **options)


class TupleBlock(nn.Module):
    """A block as transformers 4 had them: it returns a tuple."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.block(*args, **kwargs), "rest")


def test_blocks_that_return_tuples_are_steered() -> None:
    case = Case("llava")
    before, method = case.stream(1), SAESteering(case.sae(), layers=[1])
    with steer(case.model, method):
        expected = case.stream(1)
    layers = case.model.model.language_model.layers
    wrapped = layers[1] = TupleBlock(layers[1])
    seen = []

    def unpack(_module: Any, _args: Any, output: Any) -> Tensor:
        seen.append(output)
        return output[0]

    with steer(case.model, method):
        handle = wrapped.register_forward_hook(unpack)  # after steering: the stock trunk wants a Tensor
        case.logits()
    handle.remove()
    assert seen[0][1] == "rest"
    assert torch.equal(seen[0][0], expected)
    assert not torch.equal(expected, before)


def test_half_precision_streams_keep_their_dtype() -> None:
    model, processor = tiny("llava")
    model.bfloat16()
    inputs = inputs_of(processor).to(dtype=torch.bfloat16)
    sae = small_sae.steering_sae(ModelFacts.of(model), dtype=torch.float32)
    with capture(model, [1]) as captured:
        before = captured.run(**inputs).logits
        z = captured.activations[1]
    with sae.steer(model, layers=[1]) as run, capture(model, [1]) as captured:
        after = captured.run(**inputs).logits
    steered = captured.activations[1]
    assert steered.dtype == after.dtype == torch.bfloat16
    kept = inputs["attention_mask"].bool()
    delta = SAESteering(sae, layers=[1]).change(1, z[kept]).delta
    assert torch.equal(steered[kept], (z[kept] + delta).bfloat16())  # rounded once
    assert not torch.equal(before, after)
    assert run.report().layers[0].relative_change > 0.05


def test_a_name_cannot_steer_the_terminal() -> None:
    atom = FiredAtom(3, ["\x1b[2Jknife\r\n"], 1, 1.0)
    layer = LayerReport(1, 1, False, {"prompt": 1}, [atom], 0.1, 0.1, [{"prompt": 1}], "")
    printed = str(Report("method", "all", 1, [layer], []))
    assert "knife" in printed
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert printed.count("\n") == 2


def test_what_is_no_model_or_no_method_is_named(tiny_llava: Any) -> None:
    model, processor = tiny_llava
    with pytest.raises(UnsupportedModelError, match="not its processor"), steer(processor, SafetyPrompt()):
        pass
    with pytest.raises(TypeError, match="applied to the messages"), steer(model, SafetyPrompt()):
        pass
