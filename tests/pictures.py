"""Small corpora for the tests of the first half of the pipeline: flat-coloured pictures with captions."""

from pathlib import Path

from PIL import Image

from builders.recipe import Recipe, recipe_of

COLOURS = ("red", "green", "blue", "yellow", "purple", "white", "black", "orange")
THINGS = ("knife", "ball", "heart")


def save_picture(path: Path, colour: str, size: tuple[int, int] = (13, 9)) -> Path:
    """A flat picture with one odd pixel, so that no two sizes share bytes."""
    image = Image.new("RGB", size, colour)
    image.putpixel((1, 2), (1, 2, 3))
    image.save(path)
    return path


def make_folder(folder: Path, n: int = 24) -> Path:
    """`n` different pictures `000.png` with captions `000.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        colour, thing = COLOURS[i % 8], THINGS[i // 8 % 3]
        save_picture(folder / f"{i:03d}.png", colour, (13 + i, 9))
        (folder / f"{i:03d}.txt").write_text(f"{thing}, {colour}, thing {i}\n")
    return folder


def tiny_recipe(pictures: Path, **sections: dict) -> Recipe:
    """A recipe for a folder of pictures and the smallest CLIP that still trains."""
    base = {
        "run": {"threads": 1, "seed": 3},
        "corpus": {"kind": "folder", "path": str(pictures), "name": "pics", "shard_rows": 7},
        "concepts": {"min_count": 3},
        "clip": {
            "steps": 7,
            "batch": 5,
            "image_size": 24,
            "patch_size": 12,
            "hidden": 32,
            "n_layers": 1,
            "vocabulary": 560,
            "checkpoint_steps": 3,
        },
        "embeddings": {"batch": 4, "shard_rows": 9},
        "stimuli": {"n_positive": 5, "min_positive": 2, "block": 4, "pool": 17},
        "model": {"tiny": "llava", "name": "toy"},
    }
    return recipe_of({name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}})
