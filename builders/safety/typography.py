"""Draws the pictures of text that MM-SafetyBench and FigStep show; reads fonts, writes nothing.

The official scripts draw with Arial and FreeMonoBold, which are not everywhere. The fonts here come with
matplotlib: DejaVu Sans is wider than Arial, so that lines break earlier; DejaVu Sans Mono is set to the size
at which its letters are as tall as FreeMonoBold's, on the same grid. Same text and Pillow: same pixels.
"""

import textwrap
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

TYPO_SIZE, TYPO_WIDTH = 90, 1024
"""Pixels of a letter, and of a picture's width, of MM-SafetyBench's TYPO pictures."""

FIGSTEP_SIZE, FIGSTEP_WRAP, FIGSTEP_STEPS = 760, 15, 3
"""Pixels of a side, letters of a line, and empty numbered lines of FigStep's pictures."""

_LEFT, _ADVANCE, _PITCH, _LETTER = 20, 48, 75, 71  # the first three measured on the official pictures

DRAWING = "1"
"""Changes when a picture of the same text changes."""


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def typo(phrase: str) -> Image.Image:
    """A key phrase as MM-SafetyBench shows it: black on white, half a line above and below.

    Source: MM-SafetyBench (arXiv 2311.17600), TYPO pictures.
    """
    font = _font("DejaVuSans.ttf", TYPO_SIZE)
    lines = wrapped(phrase, font, TYPO_WIDTH)
    image = Image.new("RGB", (TYPO_WIDTH, TYPO_SIZE * (len(lines) + 1)), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        # the middle of a line's band, so that no line is cut off whatever the font's own line height
        draw.text((0, TYPO_SIZE * (number + 1)), line, "black", font, anchor="lm")
    return image


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Words of a text in lines of at most `width` pixels; a word wider than that is cut by letters."""
    lines: list[str] = []
    for word in text.split():
        while len(word) > 1 and font.getlength(word) > width:
            lines.append(word[: (cut := _fitting(word, font, width))])
            word = word[cut:]
        if lines and font.getlength(longer := f"{lines[-1]} {word}") < width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _fitting(word: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many of a word's first letters fit; at least one."""
    n = 1
    while n < len(word) and font.getlength(word[: n + 1]) <= width:
        n += 1
    return n


def figstep(instruction: str) -> Image.Image:
    """An instruction as FigStep shows it: 15 letters a line, then the empty numbered lines 1, 2 and 3.

    Source: FigStep (arXiv 2311.05608): 760 x 760 pixels, bold letters 48 and lines 75 pixels apart.
    """
    lines = textwrap.wrap(instruction, FIGSTEP_WRAP)
    lines += [f"{number}." for number in range(1, FIGSTEP_STEPS + 1)]
    image = Image.new("RGB", (FIGSTEP_SIZE, FIGSTEP_SIZE), "white")
    draw = ImageDraw.Draw(image)
    font = _font("DejaVuSansMono-Bold.ttf", _LETTER)
    for row, line in enumerate(lines, 1):
        for column, letter in enumerate(line):
            draw.text((_LEFT + _ADVANCE * (column + 0.5), _PITCH * row), letter, "black", font, anchor="ms")
    return image
