"""Every architecture of families.py, steered in cached generation, gives the logits of a slow reference.

The reference runs the whole sequence anew for every token, without cache, and edits the activations by
DESIGN's equation in numpy, at positions that it finds by itself. Model and SAE are float64; inside, most
classes compute their norms and rotary angles in float32, in both runs alike.
`python -m builders.model_table` runs this file to make the table of tested models.
"""

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import small_sae
import torch
from families import IMAGE, MULTIMODAL, TEXT, VIDEO, Family, blocks_of, inputs_of, tiny_model
from torch import Tensor

from builders.vision import ensure_torchvision
from daco.capture import capture
from daco.methods import SAESteering
from daco.sites import ModelFacts, find_trunk, image_token_ids
from daco.steering import steer

ensure_torchvision()
pytestmark = pytest.mark.filterwarnings("ignore:base model not confirmed")

LAYERS, GAMMA, N_NEW = (1, 2), 0.5, 4
NEAR = 1e-9
"""Codes closer than this at rank k: which one is kept is chance, and the comparison is rejected."""
ALL = (*MULTIMODAL, *TEXT)

every = pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
with_images = pytest.mark.parametrize("family", MULTIMODAL, ids=lambda family: family.name)


class Answer(NamedTuple):
    """What greedy decoding gave."""

    tokens: Tensor
    """`[batch, N_NEW]`."""
    logits: Tensor
    """`[batch, N_NEW, vocab]`, as the model returns them: `generate` itself hands out float32."""


@cache
def _model(name: str) -> Any:
    return tiny_model(next(family for family in ALL if family.name == name))


def model_of(family: Family) -> Any:
    """Made once."""
    return _model(family.name)


@pytest.fixture(autouse=True)
def without_gradients() -> Generator[None, None, None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def recorded(request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> None:
    """For builders.model_table, which reads these from pytest's report."""
    family = request.node.callspec.params["family"]
    record_property("name", family.name)
    record_property("model_type", model_of(family).config.model_type)
    record_property("model_class", type(model_of(family)).__name__)


def sae_of(family: Family, activation: str) -> Any:
    return small_sae.steering_sae(ModelFacts.of(model_of(family)), LAYERS, activation)


def answer(family: Family, inputs: dict[str, Tensor], **options: Any) -> Answer:
    """Greedy decoding of N_NEW tokens, none of them a placeholder."""
    model, seen = model_of(family), []
    handle = model.register_forward_hook(lambda _m, _a, output: seen.append(output.logits[:, -1]))
    options |= {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "do_sample": False}
    try:
        tokens = model.generate(**inputs, suppress_tokens=[IMAGE, VIDEO], **options)
    finally:
        handle.remove()
    logits = torch.stack(seen, 1)
    assert logits.dtype == family.dtype
    return Answer(tokens[:, -N_NEW:], logits)


def places_of(inputs: dict[str, Tensor], width: int, scope: str) -> Tensor:
    """`[batch, width]`: where the scope steers, for the prompt and the answer up to `width`."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    image, none = ids == IMAGE, torch.zeros_like(mask)
    prompt = {"all": mask, "image": image, "prompt": mask & ~image, "generated": none}[scope]
    answered = torch.full((len(ids), width - ids.shape[1]), scope in ("all", "generated"))
    return torch.cat([prompt, answered], 1)


@contextmanager
def reference(
    family: Family, sae: Any, inputs: dict[str, Tensor], scope: str
) -> Generator[list[int], None, None]:
    """Blocks edit whole sequences by the equation; yields a list that grows with near-ties at rank k."""
    ties: list[int] = []

    def edit(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            z, *rest = output if isinstance(output, tuple) else (output,)
            z, places = z.clone(), places_of(inputs, z.shape[1], scope)
            if places.any():
                moved = edited(z[places].double().numpy(), sae.layers[layer], ties)
                z[places] = torch.from_numpy(moved).to(z.dtype)
            return (z, *rest) if isinstance(output, tuple) else z

        return hook

    blocks = blocks_of(family, model_of(family))
    handles = [blocks[layer].register_forward_hook(edit(layer)) for layer in LAYERS]
    try:
        yield ties
    finally:
        for handle in handles:
            handle.remove()


def edited(z: np.ndarray, layer: Any, ties: list[int]) -> np.ndarray:
    if layer.sae.k is not None:
        w = {name: p.detach().numpy() for name, p in layer.sae.named_parameters()}
        codes = np.sort(np.maximum((z - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0), 1)[:, ::-1]
        kept, left = codes[:, layer.sae.k - 1], codes[:, layer.sae.k]
        ties += np.flatnonzero((kept > 0) & (kept - left < NEAR)).tolist()
    return small_sae.naive_steer(z, layer, GAMMA)


def compare(
    family: Family, images: tuple[int, ...], scope: str = "all", activation: str = "topk"
) -> tuple[Answer, Answer, Any]:
    """Steered and plain answers to one batch, the first compared with the reference, and the report."""
    sae = sae_of(family, activation)
    for seed in range(3):
        inputs = inputs_of(family, images, seed)
        with reference(family, sae, inputs, scope) as ties:
            expected = answer(family, inputs, use_cache=False)
        if not ties:
            break
        warnings.warn(f"{family.name}: {len(ties)} near-ties at rank k, inputs rejected", stacklevel=2)
    else:
        pytest.fail("every comparison had a near-tie at rank k")
    with steer(model_of(family), SAESteering(sae, gamma=GAMMA), scope=scope) as run:
        steered = answer(family, inputs)
    assert torch.equal(steered.tokens, expected.tokens)
    torch.testing.assert_close(steered.logits, expected.logits, atol=family.tolerance, rtol=0)
    width = inputs["input_ids"].shape[1]
    counted = {place: int(places_of(inputs, width, place).sum()) for place in ("image", "prompt")}
    counted["generated"] = len(images) * (N_NEW - 1)  # the last token is never fed back
    wanted = {place: n if scope in ("all", place) else 0 for place, n in counted.items()}
    for layer in run.report().layers:
        assert layer.positions == wanted
    return steered, answer(family, inputs), run.report()


@every
def test_greedy(family: Family) -> None:
    steered, plain, report = compare(family, (1,) if family.image_tokens else (0,), activation="jumprelu")
    assert (steered.logits - plain.logits).abs().max() > 1e-2
    assert report.forwards == N_NEW


@every
def test_batched_and_left_padded(family: Family) -> None:
    images = (1, 1) if family.image_tokens else (0, 0)
    assert not inputs_of(family, images)["attention_mask"].all()
    steered, plain, _ = compare(family, images)
    assert ((steered.logits - plain.logits).abs().amax((1, 2)) > 1e-2).all()


@with_images
@pytest.mark.parametrize("scope", ["image", "prompt", "generated"])
def test_scopes(family: Family, scope: str) -> None:
    steered, plain, report = compare(family, (1, 1), scope, "jumprelu")
    changed = (steered.logits - plain.logits).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [scope != "generated", True, True, True]
    if scope == "image":
        assert report.layers[0].positions["image"] == 2 * family.image_tokens


@with_images
def test_several_images(family: Family) -> None:
    steered, plain, report = compare(family, (2, 1), activation="jumprelu")
    assert report.layers[0].positions["image"] == 3 * family.image_tokens
    assert not torch.equal(steered.logits, plain.logits)


@with_images
def test_the_image_is_seen(family: Family) -> None:
    inputs = inputs_of(family)
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [family.image_tokens] * 2
    assert IMAGE in image_token_ids(model_of(family))
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    difference = model_of(family)(**inputs).logits - model_of(family)(**other).logits
    assert difference[:, -1].abs().max() > 1e-4


@every
def test_the_site_is_what_the_source_says(family: Family) -> None:
    model = model_of(family)
    trunk = find_trunk(model)
    assert trunk.layers is blocks_of(family, model)
    assert (trunk.hidden_size, trunk.n_layers, trunk.path) == (32, 4, family.layers)
    towers = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4]
    assert len(towers) > 1 or not family.image_tokens, "no vision tower as deep as the trunk"


def received(family: Family, layer: int, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What is captured at a layer, and what the block after it is given."""
    given: list[Tensor] = []
    block = blocks_of(family, model_of(family))[layer + 1]
    handle = block.register_forward_pre_hook(
        lambda _m, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        with capture(model_of(family), [layer]) as captured:
            model_of(family)(**inputs)
    finally:
        handle.remove()
    return captured.activations[layer], given[0]


@every
def test_the_next_block_receives_what_is_captured(family: Family) -> None:
    inputs = inputs_of(family, (1, 1) if family.image_tokens else (0, 0))
    deepstack = family.vision.get("deepstack_visual_indexes", ())
    for layer in range(3):
        captured, given = received(family, layer, inputs)
        added = (captured != given).any(-1)
        # DeepStack adds image features between the first blocks, behind the site
        expected = inputs["input_ids"] == IMAGE if layer < len(deepstack) else torch.zeros_like(added)
        assert torch.equal(added, expected)


@every
def test_a_delta_reaches_the_next_block_whole(family: Family) -> None:
    inputs = inputs_of(family, (1, 1) if family.image_tokens else (0, 0))
    before, arriving = received(family, 1, inputs)
    with steer(model_of(family), SAESteering(sae_of(family, "topk"), layers=[1], gamma=GAMMA)):
        after, moved = received(family, 1, inputs)
    assert (after - before).abs().max() > 1e-2
    atol = 1e-12 if family.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(moved - arriving, after - before, atol=atol, rtol=0)


class Int8Linear(torch.nn.Module):
    """What quantising libraries put in a Linear's place: int8 weights and a scale a row."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), False)
        self.bias = linear.bias

    def forward(self, z: Tensor) -> Tensor:
        return torch.nn.functional.linear(z, self.weight * self.scale, self.bias)


@contextmanager
def in_int8(blocks: torch.nn.ModuleList) -> Generator[int, None, None]:
    """Blocks whose Linears hold int8; yields how many there are."""
    found = [(holder, name, child) for holder in blocks.modules() for name, child in holder.named_children()]
    replaced = [entry for entry in found if isinstance(entry[2], torch.nn.Linear)]
    try:
        for holder, name, linear in replaced:
            setattr(holder, name, Int8Linear(linear))
        yield len(replaced)
    finally:
        for holder, name, linear in replaced:
            setattr(holder, name, linear)


@pytest.mark.parametrize("family", [f for f in ALL if f.name != "GPT-2"], ids=lambda family: family.name)
def test_int8_weights(family: Family) -> None:
    images = (1, 1) if family.image_tokens else (0, 0)
    whole = answer(family, inputs_of(family, images))
    with in_int8(blocks_of(family, model_of(family))) as n:
        assert n >= 4 * 4
        steered, plain, _ = compare(family, images)
    assert (plain.logits - whole.logits).abs().max() > 0
    assert (steered.logits - plain.logits).abs().max() > 1e-2
