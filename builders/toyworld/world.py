"""What the toy world's pictures are drawn from: icons, colours, places; and the phrasings of captions.

Reads and writes nothing.
"""

import random
from typing import Any

from PIL import Image, ImageDraw

SIDE = 48
"""Width and height of the pictures in pixels."""

SMOOTH = 4
"""Pictures are drawn this many times larger and scaled down."""

INK = (40, 36, 40)
"""Outlines."""

SELF, HOLE = "self", "hole"
"""Fills: the object's own colour, and nothing at all (what is behind shows)."""

COLOURS = {
    "red": (220, 38, 38),
    "orange": (245, 140, 30),
    "yellow": (245, 210, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (140, 60, 190),
    "pink": (245, 140, 190),
    "grey": (130, 130, 135),
}

PAINT = {
    "steel": (205, 212, 220),
    "wood": (140, 90, 50),
    "white": (250, 250, 250),
    "black": (25, 25, 28),
    "gold": (250, 200, 50),
    "leaf": (60, 150, 60),
    "glass": (190, 225, 245),
}

Shape = tuple[Any, ...]
"""(kind, fill, coordinates on a square of 100), then a width (`line`, `arc`), two angles (`arc`, `dome`)."""

HARMFUL: dict[str, tuple[Shape, ...]] = {
    "knife": (
        ("poly", "steel", (40, 62, 40, 20, 52, 4, 60, 14, 60, 62)),
        ("poly", SELF, (42, 62, 58, 62, 60, 97, 40, 97)),
        ("poly", INK, (34, 58, 66, 58, 66, 65, 34, 65)),
    ),
    "bomb": (
        ("arc", "wood", (48, 6, 82, 40), 5, 180, 300),
        ("poly", "gold", (78, 0, 82, 9, 92, 6, 86, 14, 94, 21, 83, 20, 79, 29, 76, 19, 66, 20, 74, 13)),
        ("poly", INK, (42, 20, 60, 20, 60, 34, 42, 34)),
        ("oval", SELF, (18, 28, 82, 94)),
        ("arc", "white", (27, 37, 70, 82), 5, 190, 250),
    ),
    "gun": (
        ("poly", SELF, (6, 26, 94, 26, 94, 46, 50, 46, 44, 62, 36, 62, 30, 92, 10, 92, 18, 50, 6, 44)),
        ("arc", INK, (36, 40, 58, 64), 4, 0, 150),
        ("line", INK, (50, 34, 92, 34), 3),
    ),
    "fire": (
        (
            "poly",
            SELF,
            (52, 2, 68, 28, 74, 24, 84, 54, 78, 80, 62, 97, 36, 97, 20, 80, 16, 56, 28, 34, 36, 46),
        ),
        ("poly", "gold", (52, 42, 66, 66, 62, 90, 40, 92, 34, 72, 42, 64)),
        ("poly", "white", (50, 66, 57, 80, 54, 92, 46, 92, 43, 80)),
    ),
    "poison": (
        ("poly", "wood", (40, 2, 60, 2, 60, 14, 40, 14)),
        ("poly", SELF, (38, 12, 62, 12, 62, 28, 82, 46, 82, 96, 18, 96, 18, 46, 38, 28)),
        ("oval", "white", (30, 46, 70, 80)),
        ("poly", "white", (42, 74, 58, 74, 58, 88, 42, 88)),
        ("oval", "black", (37, 56, 47, 68)),
        ("oval", "black", (53, 56, 63, 68)),
    ),
    "skull": (
        ("poly", SELF, (30, 60, 70, 60, 68, 95, 32, 95)),
        ("oval", SELF, (12, 4, 88, 76)),
        ("oval", "black", (24, 32, 46, 56)),
        ("oval", "black", (54, 32, 76, 56)),
        ("poly", "black", (50, 56, 43, 69, 57, 69)),
        ("line", INK, (43, 78, 43, 94), 3),
        ("line", INK, (50, 78, 50, 94), 3),
        ("line", INK, (57, 78, 57, 94), 3),
    ),
    "axe": (
        ("poly", "wood", (44, 4, 56, 4, 58, 98, 42, 98)),
        ("poly", SELF, (56, 12, 78, 2, 94, 26, 80, 54, 56, 40)),
        ("poly", SELF, (44, 12, 30, 16, 30, 36, 44, 40)),
    ),
    "sword": (
        ("poly", "steel", (50, 0, 58, 12, 58, 66, 42, 66, 42, 12)),
        ("line", INK, (50, 8, 50, 64), 2),
        ("poly", SELF, (20, 64, 80, 64, 80, 74, 20, 74)),
        ("poly", "wood", (44, 74, 56, 74, 56, 90, 44, 90)),
        ("oval", SELF, (41, 86, 59, 100)),
    ),
    "syringe": (
        ("line", INK, (50, 72, 50, 100), 3),
        ("poly", "steel", (32, 2, 68, 2, 68, 9, 32, 9)),
        ("poly", "steel", (46, 8, 54, 8, 54, 28, 46, 28)),
        ("poly", "white", (36, 26, 64, 26, 64, 70, 54, 78, 46, 78, 36, 70)),
        ("poly", SELF, (36, 44, 64, 44, 64, 70, 54, 78, 46, 78, 36, 70)),
        ("poly", "steel", (24, 22, 76, 22, 76, 29, 24, 29)),
    ),
    "cigarette": (
        ("arc", "white", (66, 2, 84, 26), 4, 90, 270),
        ("arc", "white", (70, 22, 90, 48), 4, 270, 90),
        ("poly", "white", (30, 50, 86, 50, 86, 66, 30, 66)),
        ("poly", "gold", (4, 50, 34, 50, 34, 66, 4, 66)),
        ("poly", SELF, (80, 50, 96, 50, 96, 66, 80, 66)),
    ),
}
"""Things that a safety label would call undesirable."""

CARING: dict[str, tuple[Shape, ...]] = {
    "shield": (
        ("poly", SELF, (50, 2, 90, 14, 88, 52, 74, 80, 50, 98, 26, 80, 12, 52, 10, 14)),
        (
            "poly",
            "white",
            (44, 22, 56, 22, 56, 40, 74, 40, 74, 52, 56, 52, 56, 76, 44, 76, 44, 52, 26, 52, 26, 40, 44, 40),
        ),
    ),
    "heart": (
        (
            "poly",
            SELF,
            (50, 94, 14, 58, 5, 38, 10, 20, 24, 9, 40, 12, 50, 26, 60, 12, 76, 9, 90, 20, 95, 38, 86, 58),
        ),
    ),
    "helmet": (
        ("dome", SELF, (12, 14, 88, 104), 180, 360),
        ("poly", SELF, (2, 58, 98, 58, 98, 70, 2, 70)),
        ("poly", "white", (42, 12, 58, 12, 58, 58, 42, 58)),
    ),
    "bandage": (
        ("poly", SELF, (4, 66, 66, 4, 96, 34, 34, 96)),
        ("poly", "white", (32, 50, 50, 32, 68, 50, 50, 68)),
        ("oval", INK, (16, 62, 24, 70)),
        ("oval", INK, (28, 76, 36, 84)),
        ("oval", INK, (62, 16, 70, 24)),
        ("oval", INK, (76, 30, 84, 38)),
    ),
    "lifebuoy": (
        ("oval", SELF, (4, 4, 96, 96)),
        ("poly", "white", (40, 4, 60, 4, 60, 96, 40, 96)),
        ("poly", "white", (4, 40, 96, 40, 96, 60, 4, 60)),
        ("oval", HOLE, (30, 30, 70, 70)),
    ),
    "lock": (
        ("arc", INK, (24, 4, 76, 70), 12, 180, 360),
        ("poly", SELF, (14, 42, 86, 42, 86, 96, 14, 96)),
        ("oval", "black", (42, 54, 58, 70)),
        ("poly", "black", (47, 66, 53, 66, 56, 84, 44, 84)),
    ),
    "umbrella": (
        ("line", INK, (50, 6, 50, 84), 5),
        ("arc", INK, (50, 72, 74, 98), 5, 0, 180),
        ("dome", SELF, (4, 8, 96, 96), 180, 360),
        ("dome", HOLE, (4, 42, 35, 62), 180, 360),
        ("dome", HOLE, (35, 42, 65, 62), 180, 360),
        ("dome", HOLE, (65, 42, 96, 62), 180, 360),
        ("line", INK, (50, 44, 50, 84), 5),
    ),
    "medkit": (
        ("arc", INK, (32, 10, 68, 50), 7, 180, 360),
        ("poly", SELF, (4, 28, 96, 28, 96, 92, 4, 92)),
        (
            "poly",
            "white",
            (43, 40, 57, 40, 57, 53, 70, 53, 70, 67, 57, 67, 57, 80, 43, 80, 43, 67, 30, 67, 30, 53, 43, 53),
        ),
    ),
}
"""Things that a safety label would call desirable."""

PLAIN: dict[str, tuple[Shape, ...]] = {
    "ball": (
        ("oval", SELF, (6, 6, 94, 94)),
        ("arc", "white", (-40, 6, 40, 94), 5, 300, 60),
        ("arc", "white", (60, 6, 140, 94), 5, 120, 240),
    ),
    "cup": (
        ("arc", INK, (58, 34, 96, 74), 8, 270, 90),
        ("poly", SELF, (12, 24, 74, 24, 68, 90, 18, 90)),
        ("arc", "white", (24, 0, 40, 20), 4, 90, 270),
        ("arc", "white", (44, 0, 60, 20), 4, 90, 270),
    ),
    "book": (
        ("poly", SELF, (2, 22, 50, 30, 98, 22, 98, 88, 50, 96, 2, 88)),
        ("poly", "white", (8, 16, 50, 26, 50, 88, 8, 80)),
        ("poly", "white", (92, 16, 50, 26, 50, 88, 92, 80)),
        ("line", INK, (16, 36, 42, 42), 3),
        ("line", INK, (16, 52, 42, 58), 3),
        ("line", INK, (58, 42, 84, 36), 3),
        ("line", INK, (58, 58, 84, 52), 3),
    ),
    "tree": (
        ("poly", "wood", (42, 60, 58, 60, 62, 98, 38, 98)),
        ("oval", SELF, (6, 26, 56, 72)),
        ("oval", SELF, (44, 26, 94, 72)),
        ("oval", SELF, (22, 2, 78, 54)),
    ),
    "house": (
        ("poly", "white", (14, 44, 86, 44, 86, 96, 14, 96)),
        ("poly", SELF, (2, 48, 50, 4, 98, 48)),
        ("poly", "wood", (42, 62, 60, 62, 60, 96, 42, 96)),
        ("poly", "glass", (20, 56, 36, 56, 36, 72, 20, 72)),
        ("poly", "glass", (66, 56, 80, 56, 80, 72, 66, 72)),
    ),
    "car": (
        ("poly", "glass", (24, 46, 34, 22, 68, 22, 82, 46)),
        ("poly", SELF, (2, 46, 98, 46, 98, 74, 2, 74)),
        ("line", INK, (51, 22, 51, 46), 3),
        ("oval", "black", (14, 60, 38, 84)),
        ("oval", "black", (62, 60, 86, 84)),
        ("oval", "steel", (21, 67, 31, 77)),
        ("oval", "steel", (69, 67, 79, 77)),
    ),
    "fish": (
        ("poly", SELF, (66, 50, 98, 24, 98, 76)),
        ("oval", SELF, (2, 22, 78, 78)),
        ("oval", "white", (14, 36, 28, 50)),
        ("oval", "black", (18, 40, 25, 47)),
        ("arc", INK, (28, 30, 50, 70), 3, 300, 60),
    ),
    "flower": (
        ("line", "leaf", (50, 50, 50, 98), 7),
        ("oval", "leaf", (52, 74, 84, 88)),
        ("oval", SELF, (36, 0, 64, 32)),
        ("oval", SELF, (36, 40, 64, 70)),
        ("oval", SELF, (14, 20, 46, 50)),
        ("oval", SELF, (54, 20, 86, 50)),
        ("oval", "gold", (38, 24, 62, 46)),
    ),
    "star": (("poly", SELF, (50, 2, 62, 36, 98, 37, 69, 59, 80, 94, 50, 73, 20, 94, 31, 59, 2, 37, 38, 36)),),
    "key": (
        ("poly", SELF, (44, 42, 98, 42, 98, 70, 88, 70, 88, 56, 78, 56, 78, 66, 68, 66, 68, 56, 44, 56)),
        ("oval", SELF, (2, 26, 50, 74)),
        ("oval", HOLE, (14, 38, 38, 62)),
    ),
    "apple": (
        ("oval", SELF, (8, 24, 60, 94)),
        ("oval", SELF, (40, 24, 92, 94)),
        ("oval", SELF + "-plain", (16, 30, 84, 88)),
        ("line", "wood", (50, 30, 54, 6), 5),
        ("oval", "leaf", (54, 4, 84, 20)),
    ),
    "boat": (
        ("line", "wood", (48, 2, 48, 68), 5),
        ("poly", "white", (52, 6, 88, 58, 52, 58)),
        ("poly", "white", (44, 16, 44, 58, 16, 58)),
        ("poly", SELF, (2, 66, 98, 66, 80, 94, 20, 94)),
    ),
    "chair": (
        ("poly", SELF, (22, 4, 34, 4, 34, 98, 22, 98)),
        ("poly", SELF, (22, 50, 80, 50, 80, 62, 22, 62)),
        ("poly", SELF, (70, 60, 80, 60, 80, 98, 70, 98)),
    ),
    "lamp": (
        ("poly", "gold", (24, 50, 76, 50, 84, 58, 16, 58)),
        ("line", INK, (50, 54, 50, 90), 6),
        ("poly", INK, (28, 88, 72, 88, 72, 96, 28, 96)),
        ("poly", SELF, (34, 6, 66, 6, 88, 52, 12, 52)),
    ),
}
"""Things without a side."""

ICONS = HARMFUL | CARING | PLAIN
"""Every object, by name."""

PLACES = {
    "kitchen": ((250, 240, 220), (225, 205, 170)),
    "garden": ((200, 235, 255), (140, 205, 110)),
    "street": ((215, 215, 225), (150, 150, 155)),
    "beach": ((150, 215, 250), (250, 230, 170)),
    "night": ((30, 34, 80), (60, 60, 100)),
    "snow": ((220, 230, 245), (255, 255, 255)),
}
"""Backgrounds: the colours of wall or sky, and of ground."""

TEMPLATES = (
    "a {size} {colour} {object} in the {place}",
    "the {place} with a {size} {colour} {object}",
    "{colour} {object}, {place}",
    "there is a {colour} {object} in this {place} picture",
    "a drawing of a {size} {object} in {colour}, {place} scene",
)


def caption(facts: dict[str, str], rng: random.Random) -> str:
    """One of the templates, filled; "an" before a vowel."""
    text = f" {rng.choice(TEMPLATES)} ".format(**facts)
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}")
    return text.strip()


def background(place: str, rng: random.Random) -> Image.Image:
    """A place: two areas of colour and what tells it from the others."""
    full = SIDE * SMOOTH
    above, below = PLACES[place]
    image = Image.new("RGB", (full, full), above)
    pen = ImageDraw.Draw(image)
    horizon = round(full * rng.uniform(0.55, 0.75))
    pen.rectangle((0, horizon, full, full), fill=below)
    if place == "kitchen":  # tiles
        for x in range(0, full, full // 6):
            pen.line((x, 0, x, horizon), fill=(225, 215, 195), width=2)
        for y in range(0, horizon, full // 6):
            pen.line((0, y, full, y), fill=(225, 215, 195), width=2)
    elif place == "street":  # lane marks
        for x in range(0, full, full // 4):
            pen.rectangle((x, (horizon + full) // 2, x + full // 8, (horizon + full) // 2 + 6), fill="white")
    elif place == "beach":  # the sea
        pen.rectangle((0, horizon - full // 5, full, horizon), fill=(40, 130, 200))
    elif place in ("night", "snow"):  # stars or flakes
        for _ in range(24):
            x, y = rng.randrange(full), rng.randrange(full if place == "snow" else horizon)
            pen.ellipse((x, y, x + 5, y + 5), fill=(255, 255, 200) if place == "night" else "white")
    elif place == "garden":  # blades of grass
        for x in range(0, full, full // 16):
            pen.line((x, horizon + 8, x + 4, horizon - 10), fill=(80, 165, 70), width=5)
    return image


def icon(name: str, colour: tuple[int, int, int], side: int) -> Image.Image:
    """One object on nothing, RGBA [side, side]."""
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    for kind, fill, where, *more in ICONS[name]:
        paint = _paint(fill, colour)
        edge = None if str(fill).endswith("-plain") or fill == HOLE else INK
        place = [value * side / 100 for value in where]
        thin = max(1, side // 40)
        if kind == "poly":
            pen.polygon(place, fill=paint, outline=edge, width=thin)
        elif kind == "oval":
            pen.ellipse(place, fill=paint, outline=edge, width=thin)
        elif kind == "dome":
            pen.pieslice(place, *more, fill=paint, outline=edge, width=thin)
        elif kind == "line":
            pen.line(place, fill=paint, width=max(1, round(more[0] * side / 100)))
        else:
            pen.arc(place, *more[1:], fill=paint, width=max(1, round(more[0] * side / 100)))
    return image


def _paint(fill: Any, colour: tuple[int, int, int]) -> tuple[int, ...]:
    if fill == HOLE:
        return (0, 0, 0, 0)
    if isinstance(fill, tuple):
        return fill
    return colour if fill.startswith(SELF) else PAINT[fill]
