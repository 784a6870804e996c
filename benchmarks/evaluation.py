"""How fast the evaluation asks a model: items a second beside a plain loop over `generate`, and peak memory.

    python -m benchmarks.evaluation --shape toy --shape tiny               # the toy LLaVA, a tiny Qwen2.5-VL
    python -m benchmarks.evaluation --shape 7b --device cuda --items 64    # Qwen2.5-VL-7B's shape, on a GPU
    python -m benchmarks.evaluation --suites figstep:tiny=FOLDER,mm-safetybench:variant=TYPO=FOLDER

Models of a released shape have random weights, built from config. The plain loop asks the same items in their
order, in batches of the same size, and keeps nothing; the evaluation sorts by length, writes every answer
with its setting, and can go on after a kill. Rounds alternate. Under every method, `who` names it. Writes
`results/evaluation.json`, a list of {work, who, value, first, unit, ratio}: `ratio` is how many times faster
the evaluation is than `who`, `first` the value of the first round, in which a GPU may still have to plan.
"""

import argparse
import json
import resource
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.sae_end_to_end import SHAPES as RELEASED
from benchmarks.sae_end_to_end import seconds
from benchmarks.sae_training import machine
from benchmarks.steering_world import Shape, build_saes
from builders.mllm import load_mllm
from builders.safety.asking import conversation
from builders.safety.items import Item, Picture, Suite
from builders.safety.methods import Arm, build, parse_settings
from builders.safety.run import Asking, answer_all, cells_of, jobs_of, thinned
from builders.safety.suites import read_suite
from builders.tiny import tiny_mllm, train_tokenizer
from builders.vision import ensure_torchvision
from daco.dictionary import ConceptDictionary
from daco.sites import find_trunk
from daco.steering_sae import SteeringSAE

RESULTS = Path(__file__).parent / "results" / "evaluation.json"
TOY = Path(__file__).parents[1] / "builders" / "toyworld" / "weights" / "llava"
SENTENCE = "what does this picture of a red knife beside a small green box on a table show to people who look"
WORDS = SENTENCE.split()


def toy() -> tuple[Any, Any]:
    """The toy world's LLaVA."""
    return load_mllm(str(TOY))


def tiny() -> tuple[Any, Any]:
    """A random Qwen2.5-VL of 4 blocks."""
    return tiny_mllm("qwen2_5_vl", [SENTENCE])


def shape_7b() -> tuple[Any, Any]:
    """Qwen2.5-VL-7B's shape with random weights; its sizes are those of the released config.json."""
    ensure_torchvision()
    from transformers import (
        AutoModelForImageTextToText,
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = train_tokenizer([SENTENCE], "qwen2_5_vl", 389)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"))
    }
    config = Qwen2_5_VLConfig(
        text_config=RELEASED["7b"]["text"], vision_config=RELEASED["7b"]["vision"], **ids
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    _say_words(model, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    pixels = {"shortest_edge": 256 * 28 * 28, "longest_edge": 1280 * 28 * 28}
    readers = Qwen2VLImageProcessor(size=dict(pixels)), Qwen2VLVideoProcessor(size=dict(pixels))
    return model, Qwen2_5_VLProcessor(
        readers[0], tokenizer, readers[1], chat_template=tokenizer.chat_template
    )


@torch.no_grad()
def _say_words(model: Any, tokenizer: Any) -> None:
    """Of a random model, no logits but those of the tokenizer's words: so that answers are texts."""
    words = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    head = model.get_output_embeddings().weight
    kept = head[words]
    head.zero_()[words] = kept


N_ATOMS = 15_000, 1_000
"""A layer's atoms, and how many of them are labelled."""

SHAPES: dict[str, Callable[[], tuple[Any, Any]]] = {"toy": toy, "tiny": tiny, "7b": shape_7b}


def made_up(n: int) -> Suite:
    """Items of very different lengths, each with a picture: what suites are like."""
    items = []
    for i in range(n):
        prompt = " ".join((WORDS * 8)[: 4 + 29 * i % 97])
        side = 128 + 32 * (i % 5)
        picture = Picture(
            draw=lambda i=i, side=side: Image.new("RGB", (side, 160), (9 * i % 256, 80, 160)), drawn=f"{i}"
        )
        items.append(Item("made up", str(i), "harmful", "", "", prompt, (picture,), prompt))
    return Suite("made up", tuple(items), Counter(), ())


@torch.no_grad()
def plain_loop(model: Any, processor: Any, items: Sequence[Item], batch: int, max_answer: int) -> int:
    """Ask items in their order with `generate`, as a script would; how many were answered."""
    texts = []
    for start in range(0, len(items), batch):
        some = items[start : start + batch]
        prompts = [
            processor.apply_chat_template(
                conversation(processor, item, None), add_generation_prompt=True, tokenize=False
            )
            for item in some
        ]
        images = [[picture.open() for picture in item.pictures] for item in some]
        inputs = processor(
            images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt"
        )
        inputs = inputs.to(model.device)
        whole = model.generate(**inputs, max_new_tokens=max_answer, do_sample=False)
        texts += processor.batch_decode(whole[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return len(texts)


def measured(
    model: Any, processor: Any, suite: Suite, arms: Sequence[Arm], asking: Asking, rounds: int
) -> dict[str, list[float]]:
    """Seconds of every round, of the plain loop and of the evaluation under each method."""
    device = model.device.type
    taken: dict[str, list[float]] = {"plain loop": []} | {arm.name: [] for arm in arms}
    plain_loop(model, processor, suite.items[: asking.batch], asking.batch, asking.max_answer)  # warms up
    for _ in range(rounds):
        loop = (model, processor, suite.items, asking.batch, asking.max_answer)
        taken["plain loop"].append(seconds(lambda loop=loop: plain_loop(*loop), device))
        for arm in arms:
            with tempfile.TemporaryDirectory() as folder:
                jobs = jobs_of(cells_of(model, processor, [suite], [arm], asking), (1, 1))
                given = (Path(folder), model, processor, jobs, asking)
                taken[arm.name].append(seconds(lambda given=given: answer_all(*given), device))
    return taken


def peak_mib(device: str) -> int:
    """Peak memory of this process: the GPU's where there is one."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


def rows(
    name: str, suite: Suite, taken: dict[str, list[float]], asking: Asking, device: str
) -> list[dict[str, Any]]:
    """The table of one model."""
    n = len(suite.items)
    where = f"{name}, {n} items of {suite.name}, batch {asking.batch}, {asking.max_answer} tokens"
    own = taken["none"]
    found = [
        {
            "work": where,
            "who": f"DACO, {who}" if who in taken and who != "plain loop" else who,
            "value": round(n / statistics.median(spent), 3),
            "first": round(n / spent[0], 3),
            "unit": "items / s",
            "ratio": round(statistics.median(s / o for s, o in zip(spent, own, strict=True)), 3),
        }
        for who, spent in taken.items()
    ]
    memory = {"work": f"{where}, peak memory", "who": "DACO", "value": peak_mib(device), "unit": "MiB"}
    return [*found, memory | {"ratio": 1.0}]


def saes_for(model: Any) -> tuple[SteeringSAE, ConceptDictionary, float]:
    """SAEs of five layers in the middle, of random atoms; directions; MOP's alpha."""
    trunk = find_trunk(model)
    middle = trunk.n_layers // 2
    layers = tuple(sorted({max(0, min(trunk.n_layers - 1, middle + i)) for i in (-2, -1, 0, 1, 2)}))
    ids = torch.randint(5, 250, (4, 64), generator=torch.Generator().manual_seed(0)).to(model.device)
    return build_saes(model, Shape("", "", {}, layers), ids, *N_ATOMS, 0)


def arms_for(model: Any, methods: Sequence[str]) -> list[Arm]:
    """The methods; what steers is made of `saes_for`."""
    if set(methods) <= {"none", "prompting"}:
        return build(parse_settings(methods, ()), None, None)
    steering, dictionary, alpha = saes_for(model)
    return build(
        parse_settings(methods, [f"mop.alpha={alpha}"] if "mop" in methods else []), steering, dictionary
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--suites", default="", help="specs of read_suite, comma separated; default: made up")
    parser.add_argument("--methods", default="none", help="comma separated; none must be among them")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-answer", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    asking = Asking(batch=given.batch, max_answer=given.max_answer, base_model_ok=True)
    specs = [spec for spec in given.suites.split(",") if spec]
    suites = [thinned(read_suite(spec), given.items) for spec in specs] or [made_up(given.items)]
    table = []
    for name in given.shape or ["toy", "tiny"]:
        model, processor = SHAPES[name]()
        model.to(given.device)
        arms = arms_for(model, given.methods.split(","))
        for suite in suites:
            taken = measured(model, processor, suite, arms, asking, given.rounds)
            table += rows(name, suite, taken, asking, given.device)
    write(table, given.results)


def write(table: list[dict[str, Any]], results: Path) -> None:
    """Show rows, and put them into the file in place of those of the same work."""
    for row in table:
        row["machine"] = machine(torch.get_num_threads())
        first = f", {row['first']:,} at first" if "first" in row else ""
        what = f"{row['value']:>10,} {row['unit']}{first}"
        print(f"{row['work']:<70} {row['who']:<16} {what}  x {row['ratio']}")
    old = json.loads(results.read_text()) if results.is_file() else []
    kept = [row for row in old if row["work"] not in {r["work"] for r in table}]
    results.write_text(json.dumps(kept + table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
