"""Proves that steering on a GPU is that on a CPU, waits for nothing, and follows CUDA graphs; needs a GPU."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import small_sae
import torch
from conftest import inputs_of, tiny
from test_sites import text_model
from test_steering_only import with_threshold
from torch import Tensor, nn
from torch.nn.functional import normalize

from daco import steer, steering, wrap
from daco.methods import MOP, ActAdd, ObliqueProjection, Projection, SAESteering
from daco.sites import ModelFacts, image_token_ids
from daco.sparse_coding import duality_gap, elastic_net, kernels_for

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:base model not confirmed"),
]

TOKENS = 3
WIDE = torch.float64


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def built(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A float64 model and inputs with padding."""
    if kind == "text":
        ids = torch.arange(3, 17).view(2, 7)
        return text_model("LlamaConfig").double().eval(), {
            "input_ids": ids,
            "attention_mask": (torch.arange(7) >= torch.tensor([[0], [2]])).long(),
        }
    model, processor = tiny(kind)
    made = inputs_of(processor, 2)
    return model.double(), {n: t.double() if t.is_floating_point() else t for n, t in made.items()}


METHODS: dict[str, Callable[[ModelFacts, torch.dtype], Any]] = {
    "rows": lambda facts, dtype: SAESteering(
        with_threshold(small_sae.steering_sae(facts, dtype=dtype)), gamma=0.2, form="threshold"
    ),
    "exact": lambda facts, dtype: SAESteering(small_sae.steering_sae(facts, dtype=dtype), gamma=0.2),
    "actadd": lambda facts, dtype: ActAdd(small_sae.dictionary(facts), 0.3, dtype=dtype),
    "mop": lambda facts, dtype: MOP(small_sae.dictionary(facts), 0.05, gamma=0.1, tol=1e-7, dtype=dtype),
    "projection": lambda facts, dtype: Projection(small_sae.dictionary(facts), rank=2, dtype=dtype),
    "oblique": lambda facts, dtype: ObliqueProjection(small_sae.dictionary(facts), rank=2, dtype=dtype),
}


def logits_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of the prompt's last position, and of each token behind it, chosen greedily."""
    options = {"max_new_tokens": TOKENS + 1, "min_new_tokens": TOKENS + 1, "do_sample": False}
    suppressed = list(image_token_ids(model)) or None
    return model.generate(
        **inputs, **options, suppress_tokens=suppressed, output_logits=True, return_dict_in_generate=True
    ).logits


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cuda() for name, t in inputs.items()}


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "text"])
def world(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A model, its copy on the GPU, and inputs."""
    model, inputs = built(request.param)
    return model, copy.deepcopy(model).cuda(), inputs


@pytest.mark.parametrize("name", METHODS)
def test_logits_are_those_of_a_cpu(name: str, world: Any) -> None:
    model, twin, inputs = world
    method, plain = METHODS[name](ModelFacts.of(model), WIDE), logits_of(model, inputs)
    with steer(model, method) as run:
        expected = logits_of(model, inputs)
    with steer(twin, METHODS[name](ModelFacts.of(model), WIDE)) as twin_run:
        found = logits_of(twin, on_gpu(inputs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-5)  # norms and softmax are in float32
    assert (expected[0] - plain[0]).abs().max() > 1e-4
    for own, theirs in zip(twin_run.report().layers, run.report().layers, strict=True):
        assert own.positions == theirs.positions
        assert own.by_row == theirs.by_row
        assert [(a.atom, a.positions) for a in own.atoms] == [(a.atom, a.positions) for a in theirs.atoms]
        assert own.relative_change == pytest.approx(theirs.relative_change, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_models_are_steered(name: str) -> None:
    model, inputs = built("llava")
    twin, inputs = model.bfloat16().cuda(), on_gpu(inputs)
    inputs = {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs.items()}
    before = logits_of(twin, inputs)
    with steer(twin, METHODS[name](ModelFacts.of(model), torch.float32)) as run:
        after = logits_of(twin, inputs)
    with wrap(twin, METHODS[name](ModelFacts.of(model), torch.float32)):
        wrapped = logits_of(twin, inputs)
    assert all(logits.isfinite().all() for logits in after)
    assert not torch.equal(after[0], before[0])
    torch.testing.assert_close(wrapped[0], after[0], rtol=0.05, atol=0.05)
    assert run.report().layers[0].positions["generated"] == 2 * TOKENS


def unwaiting(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, which fails where the host waits for the GPU."""

    def inner(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return inner


@pytest.mark.parametrize("name", ["rows", "exact", "actadd", "projection"])
def test_a_token_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = built("text")
    twin, inputs = model.float().cuda(), on_gpu(inputs)
    with steer(twin, METHODS[name](ModelFacts.of(model), torch.float32)) as run:
        out = twin(**inputs, use_cache=True)
        for part in ("_steps", "_steer_block"):  # the model itself may wait, for its mask
            monkeypatch.setattr(steering.Run, part, unwaiting(getattr(steering.Run, part)))
        mask = inputs["attention_mask"]
        for i in range(70):  # more than are counted at once
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            ids = torch.full((2, 1), 3 + i, device=mask.device)
            out = twin(
                input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True
            )
        monkeypatch.undo()
    assert run.report().layers[0].positions["generated"] == 140


def dictionary_of(n: int) -> tuple[Tensor, Tensor]:
    """Targets and unit rows with a part that all have in common."""
    draw = torch.Generator().manual_seed(4)
    common, size = normalize(torch.randn(397, generator=draw), dim=-1), (n, 1_531)
    own = (normalize(torch.randn(m, 397, generator=draw), dim=-1) for m in size)
    z, D = (normalize(0.3**0.5 * common + 0.7**0.5 * one, dim=-1) for one in own)
    return 60 * z.cuda(), D.cuda()


@pytest.mark.parametrize("n", [1, 16, 80])
@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("keep_gram", [False, True])
def test_codes_are_certified_and_those_of_a_cpu(n: int, fraction: float, keep_gram: bool) -> None:
    z, D = dictionary_of(n)
    assert kernels_for(D), "Triton does not work here"
    alpha, gram = z.new_full((n,), fraction), D @ D.T if keep_gram else None
    for other in (z.flip(1), 3 * z, z):  # step by step, recorded, replayed
        found = elastic_net(other, D, alpha, 0.95, gram=gram, relative=True)
    wide = (t.double().cpu() for t in (z, D, alpha))
    expected = elastic_net(*wide, 0.95, tol=1e-8, relative=True)
    assert found.certified.all()
    largest = fraction * (z @ D.T).abs().amax(-1).double() / 0.95
    gap = duality_gap(z.double(), D.double(), found.code.double(), largest, 0.95)
    assert (gap <= 1e-4 * 0.5 * z.double().square().sum(-1)).all()
    # the objective is strongly convex: ||c - c*||^2 <= 2 gap / l2
    away = (found.code.cpu() - expected.code).square().sum(-1)
    assert (away <= 8 * (found.gap.cpu() + expected.gap) / (largest.cpu() * 0.05)).all()


def test_codes_of_a_few_rows_wait_once() -> None:
    z, D = dictionary_of(16)
    alpha = z.new_full((16,), 0.9)
    for _ in range(2):  # compiled and recorded
        elastic_net(z, D, alpha, 0.95, relative=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = elastic_net(z, D, alpha, 0.95, relative=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert found.certified.all()
    assert (found.code != 0).any(-1).all()
    assert sum("called a synchronizing" in str(one.message) for one in caught) == 1


@pytest.mark.parametrize("name", ["rows", "exact"])
def test_a_graph_that_is_replayed_is_steered(name: str) -> None:
    model, _ = built("text")
    twin = model.float().cuda()
    inputs = {"input_ids": torch.arange(3, 11, device="cuda")[None], "use_cache": False}
    method, before = METHODS[name](ModelFacts.of(model), torch.float32), twin(**inputs).logits
    with steer(twin, method):
        expected = twin(**inputs).logits
    torch._dynamo.reset()
    compiled = torch.compile(twin.forward, mode="reduce-overhead", fullgraph=True)
    with wrap(twin, method):
        for _ in range(4):  # compiled, recorded, replayed
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(**inputs).logits.clone()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - before).abs().max() > 1e-2


def test_compiled_generation_gives_the_eager_answer() -> None:
    model, inputs = built("text")
    twin, inputs = model.float().cuda(), on_gpu(inputs)
    method = METHODS["exact"](ModelFacts.of(model), torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with steer(twin, method):
        expected = twin.generate(**inputs, **options)
    torch._dynamo.reset()
    with wrap(twin, method):
        found = twin.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(found, expected)
