"""Makes the table of models that `daco.models.supported()` reads: `python -m builders.model_table`.

Builds every image-text and causal model class of transformers from its default config on the meta device
(shapes alone, no memory), looks for its decoder blocks and sends shapes through the first two; runs
tests/test_models.py for the rows that say "tested". Writes daco/models.json.
"""

import json
import logging
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from builders.vision import ensure_torchvision
from daco.capture import capture
from daco.errors import UnsupportedModelError
from daco.models import STATUSES
from daco.sites import IMAGE_TOKENS, find_trunk

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "daco" / "models.json"
TESTS = ROOT / "tests" / "test_models.py"

EVIDENCE = {
    "test_the_image_is_seen": "image",
    "test_greedy": "greedy logits",
    "test_batched_and_left_padded": "batched logits",
    "test_scopes": "scopes",
    "test_several_images": "several images",
    "test_int8_weights": "int8 weights",
}
"""What a test that passes for an architecture shows of it."""

REQUIRED = {
    "images and text": {"image", "greedy logits", "batched logits", "scopes"},
    "text": {"greedy logits", "batched logits"},
}
"""What has to be shown of a model for "tested"."""

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
NEEDS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
    },
    "deepseek_ocr2": {
        "text_config": {"num_hidden_layers": 12, "mlp_layer_types": ["dense", *["sparse"] * 11]}
    },
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "emu3": {"vocabulary_map": {"<image>": 8711}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "4/8"},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 1024},
        }
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        }
    },
}
"""By model type: what its default config lacks, or has wrong, for the model to be built at all."""


class Listed(NamedTuple):
    """A model class of transformers."""

    model_type: str
    """`config.model_type`."""
    model_class: str
    """Its class."""
    takes: str
    """`images and text` or `text`."""


def listed() -> Iterator[Listed]:
    """All classes behind AutoModelForImageTextToText and AutoModelForCausalLM, those with images first."""
    from transformers.models.auto import modeling_auto as auto

    multimodal = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    for model_type, name in multimodal.items():
        yield Listed(model_type, _one(name), "images and text")
    for model_type, name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if model_type not in multimodal:
            yield Listed(model_type, _one(name), "text")


def resolve(model: Listed) -> dict[str, Any]:
    """A row of the table: whether the decoder blocks of a class are found, at its default config's shape."""
    import transformers

    auto = "AutoModelForImageTextToText" if model.takes == "images and text" else "AutoModelForCausalLM"
    row = {**model._asdict(), "name": "", "shown": "", "because": "", "image_scope": False, "forward": False}
    try:
        config = transformers.AutoConfig.for_model(model.model_type, **NEEDS.get(model.model_type, {}))
        kind = getattr(transformers, auto)
        if type(config) not in kind._model_mapping:  # named for the task, but not to be had by it
            kind = getattr(transformers, model.model_class)
        make = getattr(kind, "from_config", None) or kind._from_config
        with torch.device("meta"):
            built = make(config, dtype=torch.bfloat16).eval()
    except Exception as error:  # whatever a class of transformers may raise is the answer
        because = f"not built from its default config: {type(error).__name__}: {_short(error)}"
        return row | {"status": "does not", "because": because}
    try:
        forward = first_blocks_run(built)
    except UnsupportedModelError as error:
        because = _short(error).removeprefix(f"{type(built).__name__}: ")
        return row | {"status": "does not", "because": because}
    named = any(hasattr(config, name) for name in IMAGE_TOKENS)  # a default may be None where releases set it
    return row | {"status": "resolves", "image_scope": named, "forward": forward}


def first_blocks_run(model: Any) -> bool:
    """Whether a forward of shapes alone reaches the third block; text only, through the trunk.

    Raises:
        UnsupportedModelError: there is no trunk, or its blocks do not return `[batch, tokens, width]`.
    """
    trunk = find_trunk(model)
    layers, shape = range(min(2, trunk.n_layers)), (2, 5, trunk.hidden_size)
    with (
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
        capture(model, layers, stop=True) as seen,
    ):
        seen.model = model.get_submodule(trunk.path.rpartition(".")[0])
        try:
            seen.run(inputs_embeds=torch.zeros(shape, dtype=torch.bfloat16, device="meta"), use_cache=False)
        except UnsupportedModelError:
            raise
        except Exception:  # a default config that is not whole, or a choice that hangs on numbers
            return False
    for layer, z in seen.activations.items():
        if tuple(z.shape) != shape:
            raise UnsupportedModelError(
                f"expected block {layer} to return {list(shape)}, got {list(z.shape)}"
            )
    return len(seen.activations) == len(layers)


def evidence(report: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By model type and class: name and what was shown, from the JUnit report of test_models.py."""
    outcomes: dict[tuple[str, str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for case in ElementTree.parse(report).iter("testcase"):
        facts = {p.get("name"): str(p.get("value")) for p in case.iter("property")}
        bad = any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
        word = EVIDENCE.get(str(case.get("name")).partition("[")[0])
        if word and "name" in facts:
            key = (facts["name"], facts["model_type"], facts["model_class"])
            outcomes[key][word].append(not bad)
    return {
        (model_type, model_class): {"name": name, "shown": [w for w, ok in words.items() if all(ok)]}
        for (name, model_type, model_class), words in outcomes.items()
    }


def make_table() -> dict[str, Any]:
    """Run the tests, resolve every class, and put the two together; what is written to models.json."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        options = ["-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        subprocess.run([sys.executable, "-m", "pytest", *options, TESTS], cwd=ROOT)
        shown = evidence(report)
    rows = [_with_evidence(resolve(model), shown) for model in listed()]
    rows.sort(key=lambda r: (r["takes"], STATUSES.index(r["status"]), r["name"].lower(), r["model_type"]))
    return {"transformers": transformers.__version__, "models": rows}


def _with_evidence(row: dict[str, Any], shown: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    found = shown.get((row["model_type"], row["model_class"]))
    if found is None or row["status"] == "does not":
        return row
    enough = set(found["shown"]) >= REQUIRED[row["takes"]]
    words = ", ".join(word for word in EVIDENCE.values() if word in found["shown"])
    return row | {"name": found["name"], "shown": words, "status": "tested" if enough else "resolves"}


def write_table(table: dict[str, Any], path: Path = TABLE) -> None:
    """One line a model."""
    lines = ",\n".join(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in table["models"])
    path.write_text(
        f'{{"transformers": {json.dumps(table["transformers"])}, "models": [\n{lines}\n]}}\n', "utf-8"
    )


def _one(name: str | tuple[str, ...]) -> str:
    return name if isinstance(name, str) else name[0]


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:160]}..."


if __name__ == "__main__":
    ensure_torchvision()
    logging.disable(logging.CRITICAL)  # hundreds of remarks on default configs
    made = make_table()
    write_table(made)
    counts = {status: sum(row["status"] == status for row in made["models"]) for status in STATUSES}
    print(f"{TABLE.relative_to(ROOT)}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
