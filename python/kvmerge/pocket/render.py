"""Draw the pictures that the pocket model looks at.

Every picture shows one coloured shape with one letter on it, at a random place and size, on a
random background with noise.  The drawing is a pure function of its arguments and of the state
of the ``numpy`` generator, and it uses no font of the system.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["COLOURS", "LETTERS", "PICTURE_SIZE", "SHAPES", "render_picture"]

PICTURE_SIZE = 64
"""Width and height of a picture in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 32),
    "orange": (250, 140, 20),
    "yellow": (246, 226, 40),
    "green": (34, 150, 52),
    "blue": (36, 72, 220),
    "purple": (132, 40, 170),
    "pink": (250, 140, 190),
    "white": (246, 246, 246),
}
"""The colours that a shape may have, with their mean RGB values."""

SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "star",
    "diamond",
    "heart",
    "cross",
    "ring",
)
"""The shapes."""

LETTERS: tuple[str, ...] = tuple("ABCDEFGHJKLMNPQRSTUVWXYZ")
"""The letters: the alphabet without I and O, which look like strokes and rings."""

_SCALE = 4


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corner points of a shape that fits the unit circle."""
    if shape == "square":
        side = 0.80
        return [(-side, -side), (side, -side), (side, side), (-side, side)]
    if shape == "triangle":
        return [(0.0, -1.15), (1.1, 0.75), (-1.1, 0.75)]
    if shape == "diamond":
        return [(0.0, -1.15), (0.85, 0.0), (0.0, 1.15), (-0.85, 0.0)]
    if shape == "star":
        points = []
        for i in range(10):
            radius = 1.15 if i % 2 == 0 else 0.52
            angle = -math.pi / 2 + i * math.pi / 5
            points.append((radius * math.cos(angle), radius * math.sin(angle)))
        return points
    if shape == "cross":
        a, b = 0.38, 1.02
        return [
            (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
            (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
        ]  # fmt: skip
    if shape == "heart":
        points = []
        for i in range(48):
            t = 2 * math.pi * i / 48
            x = 16 * math.sin(t) ** 3
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((x / 15.5, -(y + 2.5) / 14.0))
        return points
    # Circle and ring.
    return [(math.cos(2 * math.pi * i / 48), math.sin(2 * math.pi * i / 48)) for i in range(48)]


_OUTLINES = {shape: np.array(_outline(shape)) for shape in SHAPES}


def render_picture(colour: str, shape: str, letter: str, rng: np.random.Generator) -> Image.Image:
    """Draw one picture.

    Parameters
    ----------
    colour : str
        A key of `COLOURS`.
    shape : str
        A member of `SHAPES`.
    letter : str
        A member of `LETTERS`.
    rng : numpy.random.Generator
        Source of place, size, background and noise.  Equal states give equal pictures.

    Returns
    -------
    PIL.Image.Image
        An RGB picture of `PICTURE_SIZE` x `PICTURE_SIZE` pixels.
    """
    size = PICTURE_SIZE * _SCALE
    level = float(rng.uniform(70, 150))
    background = np.clip(level + rng.normal(0, 10, 3), 40, 180)
    ink = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 7, 3), 0, 255)
    radius = float(rng.uniform(17, 23)) * _SCALE
    margin = radius * 1.12
    centre = rng.uniform(margin, size - margin, 2)
    turn = float(rng.uniform(-0.22, 0.22))
    letter_size = int(rng.integers(18, 23)) * _SCALE
    offset = rng.uniform(-1.5, 1.5, 2) * _SCALE
    tilt = rng.normal(0, 12, 2)
    noise_level = float(rng.uniform(2, 9))

    image = Image.new("RGB", (size, size), tuple(int(v) for v in background))
    draw = ImageDraw.Draw(image)
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = np.array([[cos, sin], [-sin, cos]])
    points = _OUTLINES[shape] @ rotation * radius + centre
    fill = tuple(int(v) for v in ink)
    dark, light = (12, 12, 12), (250, 250, 250)
    if shape == "ring":
        draw.polygon([tuple(p) for p in points], fill=fill)
        hole = _OUTLINES[shape] * radius * 0.68 + centre
        draw.polygon([tuple(p) for p in hole], fill=tuple(int(v) for v in background))
        shown = background
    else:
        draw.polygon([tuple(p) for p in points], fill=fill)
        shown = ink
    bright = float(np.dot(shown, (0.3, 0.59, 0.11))) > 118
    pen, rim = (dark, fill) if bright else (light, fill)
    if shape == "ring":
        rim = tuple(int(v) for v in background)
    at = centre + offset
    if shape == "triangle":
        at = at + np.array([-sin, cos]) * radius * 0.15
    draw.text(
        (float(at[0]), float(at[1])),
        letter,
        fill=pen,
        font=_font(letter_size),
        anchor="mm",
        stroke_width=_SCALE,
        stroke_fill=rim,
    )
    draw.text(
        (float(at[0]), float(at[1])),
        letter,
        fill=pen,
        font=_font(letter_size),
        anchor="mm",
        stroke_width=_SCALE // 2,
        stroke_fill=pen,
    )
    small = image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    pixels = np.asarray(small, dtype=np.float32)
    ramp = np.linspace(-1, 1, PICTURE_SIZE, dtype=np.float32)
    pixels = pixels + (ramp[None, :, None] * tilt[0] + ramp[:, None, None] * tilt[1])
    pixels = pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * noise_level
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
