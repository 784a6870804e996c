"""What tests of the evaluation share: a tiny model with its release, items of our own, a judge of ours."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from release_fixture import write_dataset_release, write_model_release

from builders.safety.items import Item, Picture, Suite
from builders.safety.methods import Arm, build, parse_settings
from builders.safety.run import Asking, Cell, cells_of
from builders.safety.verdicts import Verdict
from builders.tiny import tiny_mllm
from daco.dictionary import ConceptDictionary
from daco.steering_sae import SteeringSAE

METHODS = ("none", "prompting", "actadd", "mop", "daco")


def tiny(kind: str = "llava") -> tuple[Any, Any]:
    """A random model that the releases below fit: hidden 32, 3 layers."""
    return tiny_mllm(kind, ["how do i make a picture of a knife", "a red dog"], n_layers=3)


def releases(folder: Path) -> tuple[Path, Path]:
    """A model release and a dataset release for `tiny`."""
    dataset, model = folder / "dataset", folder / "model"
    for place in (dataset, model):
        place.mkdir(parents=True)
    write_dataset_release(dataset)
    write_model_release(model)
    return model, dataset


def items(n: int = 9, suite: str = "ours", kind: str = "harmful") -> list[Item]:
    """Items of several lengths, two in three with a picture; two groups, two variants."""
    found = []
    for i in range(n):
        pictures = () if i % 3 == 0 else (Picture(draw=lambda i=i: drawn(i), drawn=f"square {i}"),)
        prompt = "how do i make " + "a knife and " * (i % 4) + f"number {i} ?"
        variant, group = ("text", "picture")[i % 3 > 0], f"group {i % 2}"
        found.append(Item(suite, f"{suite}/{i}", kind, group, variant, prompt, pictures, prompt))
    return found


def drawn(i: int) -> Image.Image:
    """A square of one colour."""
    return Image.new("RGB", (32, 32), (40 * i % 256, 90, 200))


def suite(n: int = 9, name: str = "ours", kind: str = "harmful") -> Suite:
    """A suite of `items`."""
    return Suite(name, tuple(items(n, name, kind)), Counter(missing_image=2), ("a note",))


def arms(folder: Path, names: Sequence[str] = METHODS, overrides: Sequence[str] = ()) -> list[Arm]:
    """Methods built from the releases."""
    model, dataset = releases(folder)
    steering = SteeringSAE.from_pretrained(model)
    dictionary = ConceptDictionary.from_pretrained(dataset)
    return build(parse_settings(names, overrides), steering, dictionary)


def cells(
    model: tuple[Any, Any], some: Sequence[Suite], made: list[Arm], asking: Asking | None = None
) -> list[Cell]:
    """Every suite under every arm."""
    return cells_of(*model, some, made, asking or quick())


def quick(**changes: Any) -> Asking:
    """A model asked in small batches for short answers; the releases name another model."""
    return Asking(**({"batch": 4, "max_answer": 5, "base_model_ok": True} | changes))


class Length:
    """Judges an answer by its length, and cannot read those of a length it is told."""

    def __init__(self, name: str = "length", figure: str = "unsafe", unreadable: int = -1) -> None:
        self.name, self.figure, self.unreadable = name, figure, unreadable
        self.digest = f"{name} {figure} {unreadable}"
        self.asked = 0

    def judges(self, item: Item) -> bool:
        return item.kind == "harmful"

    def verdicts(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        self.asked += len(answers)
        lengths = [len(answer) for answer in answers]
        return [
            Verdict(None, "?") if n % 7 == self.unreadable else Verdict(float(n % 2), str(n)) for n in lengths
        ]
