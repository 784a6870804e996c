"""What a stranger types after a release is out: load the dataset, the dictionary and the SAEs, steer, look.

Run by `hub.demo` in a fresh process with an empty cache:
`python -m hub.demo_client DATASET_REPO SAE_REPO TAG MODEL TEXT IMAGE`, MODEL a repo `org/name@tag` or folder.
"""

import sys
from pathlib import Path

import torch
from datasets import get_dataset_config_names, load_dataset
from PIL import Image

import daco
from builders.mllm import chat_inputs, load_mllm

dataset_repo, sae_repo, tag, base_model, text, image = sys.argv[1:]

configs = get_dataset_config_names(dataset_repo, revision=tag)
for config in configs:
    for split, rows in load_dataset(dataset_repo, config, revision=tag).items():
        streamed = load_dataset(dataset_repo, config, split=split, revision=tag, streaming=True)
        equal = all(a == b for a, b in zip(rows, streamed, strict=True))
        print(f"{config}/{split}: {len(rows)} rows, streaming equal row by row: {equal}")

concepts = load_dataset(dataset_repo, "concepts", split="train", revision=tag)
print(f"the first concept: {concepts[0]['concept']!r}, {concepts[0]['polarity']}")

named = any(config.startswith("recognition_") for config in configs)
dictionary = daco.ConceptDictionary.from_pretrained(dataset_repo, revision=tag, recognition=named)
print(f"directions at layers {dictionary.layers}, width {dictionary.model.hidden_size}")

sae = daco.SteeringSAE.from_pretrained(sae_repo, revision=tag)
gamma = sae.defaults["gamma"] or 0.1  # so that something moves even where no atom fires
repo, _, revision = (base_model, "", "") if Path(base_model).is_dir() else base_model.partition("@")
model, processor = load_mllm(repo, revision)
inputs = chat_inputs(processor, [text], [Image.open(image)])

if named:
    stimuli = load_dataset(dataset_repo, "stimuli", split="train", revision=tag, streaming=True)
    # a data set that only links its pictures has none to show
    stimulus = {"caption": text, "image": Image.open(image)} | next(iter(stimuli))
    readings = dictionary.read(model, processor, [stimulus["caption"]], [stimulus["image"]])
    layer = dictionary.layers[len(dictionary.layers) // 2]
    shown = dictionary.recognise({layer: readings[layer]}, n=5)
    names = ", ".join(map(repr, shown["concept"])) or "nothing"
    print(f"of a picture of {stimulus['caption']!r} layer {layer} shows: {names}")


def answer() -> str:
    """What the model says now."""
    said = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


with torch.no_grad():
    before = model(**inputs).logits[0, -1]
    print(f"asked {text!r}, it says {answer()!r}")
    with sae.steer(model, gamma=gamma) as run:
        during = model(**inputs).logits[0, -1]
        print(f"steered, it says {answer()!r}")
    after = model(**inputs).logits[0, -1]

print(f"next-token logits moved by up to {(during - before).abs().max():.3f} while steered")
print(f"exactly as before afterwards: {torch.equal(before, after)}")
print(run.report())
