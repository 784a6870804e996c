"""The parts of the toy world's pictures are drawn as they say, and its captions read well."""

import random

import numpy as np
import pytest

from builders.toyworld.world import CARING, HARMFUL, ICONS, caption, icon


def test_there_are_enough_concepts_of_every_side() -> None:
    assert len(ICONS) >= 24
    assert len(HARMFUL) >= 6
    assert len(CARING) >= 6
    assert not set(HARMFUL) & set(CARING)


def test_articles_fit_their_vowels() -> None:
    facts = {"object": "apple", "colour": "orange", "place": "beach", "size": "small"}
    texts = {caption(facts, random.Random(i)) for i in range(40)}
    assert "there is an orange apple in this beach picture" in texts
    assert not any(" a a" in text or " a o" in text for text in texts)


@pytest.mark.parametrize("name", sorted(ICONS))
def test_every_icon_is_drawn_in_its_colour_inside_its_square(name: str) -> None:
    pixels = np.array(icon(name, (255, 0, 255), 90))
    opaque = pixels[..., 3] > 0
    assert 0.04 < opaque.mean() < 0.95
    own = (pixels[..., :3] == (255, 0, 255)).all(axis=-1) & opaque
    assert own.mean() > 0.005
