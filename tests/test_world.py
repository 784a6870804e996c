"""The drawn world has the same bytes every time, starts alike at every length, and draws what it says."""

import hashlib
import random

import numpy as np
import pytest

from builders.toyworld import world
from builders.toyworld.world import CARING, COLOURS, HARMFUL, ICONS, PLACES, SIDE, SIZES, caption, draw, icon


def digest(n: int, seed: int) -> list[str]:
    return [
        hashlib.sha256(image.tobytes() + f"{text}|{key}".encode()).hexdigest()
        for image, text, key in draw(n, seed)
    ]


def test_same_seed_same_bytes_and_a_longer_corpus_starts_with_a_shorter_one() -> None:
    assert digest(9, 5) == digest(33, 5)[:9]
    assert len(set(digest(33, 5))) == 33
    assert not set(digest(9, 5)) & set(digest(9, 6))


def test_there_are_enough_concepts_of_every_side() -> None:
    assert len(ICONS) >= 24
    assert len(HARMFUL) >= 6
    assert len(CARING) >= 6
    assert not set(HARMFUL) & set(CARING)


def test_every_caption_names_object_and_place_and_the_objects_take_turns() -> None:
    drawn = [(text, key) for _, text, key in draw(2 * len(ICONS), 1)]
    assert len({key for _, key in drawn}) == len(drawn)
    for (text, _), name in zip(drawn, [*ICONS, *ICONS], strict=True):
        assert name in text.split()[-10:] or f"{name}," in text
        assert any(place in text for place in PLACES)
        assert any(colour in text for colour in COLOURS)


def test_articles_fit_their_vowels() -> None:
    facts = {"object": "apple", "colour": "orange", "place": "beach", "size": "small"}
    texts = {caption(facts, random.Random(i)) for i in range(40)}
    assert "there is an orange apple in this beach picture" in texts
    assert not any(" a a" in text or " a o" in text for text in texts)


def test_pictures_are_small_rgb_and_show_the_colour() -> None:
    for image, _, _ in draw(3, 2):
        assert (image.size, image.mode) == ((SIDE, SIDE), "RGB")


@pytest.mark.parametrize("name", sorted(ICONS))
def test_every_icon_is_drawn_in_its_colour_inside_its_square(name: str) -> None:
    pixels = np.array(icon(name, (255, 0, 255), 90))
    opaque = pixels[..., 3] > 0
    assert 0.04 < opaque.mean() < 0.95
    own = (pixels[..., :3] == (255, 0, 255)).all(axis=-1) & opaque
    assert own.mean() > 0.005


def test_sizes_differ_and_the_sheet_shows_every_object() -> None:
    assert SIZES["small"] < SIZES["big"]
    assert world.contact_sheet(columns=8, scale=1).size == (8 * SIDE, -(-len(ICONS) // 8) * SIDE)
