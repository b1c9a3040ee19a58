"""Albums: photographs and pages of print that are read once, and questions about them.

A photograph is one of a folder of pictures, each named by what it shows.  A page has lines of two
words, an item and what is written beside it, so that it needs many tokens: what is left out cannot
be told from the rest.  Between the pictures facts are told in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kvmerge.evaluation.samples import Ask, Sample

TASKS = {
    "show": "what a photograph shows",
    "which": "which picture shows something",
    "line": "what is written beside an item on a page",
    "find": "which page has an item",
    "fact": "what was told in words between the pictures",
}

_ITEMS = (
    "apples bread butter cheese coffee eggs fish flour fruit garlic honey juice lemons lettuce "
    "meat milk mushrooms nuts oil onions oranges paper peas pepper potatoes pumpkin rice salad "
    "salt sauce soap soup spinach strawberries sugar tea tomatoes towels vinegar water wine wood "
    "yogurt candles pencils flowers gloves shoes"
).split()
_VALUES = (
    "one two three four five six seven eight nine ten eleven twelve red green blue black white "
    "yellow Monday Tuesday Friday north south east west gold silver"
).split()
_COLOURS = "red green blue black white yellow brown grey".split()
_THINGS = "door box gate boat house garden car bridge".split()

_SIDE, _ROWS = 224, 8
_TOKEN = _SIDE // _ROWS
"""Pixels of a side of what becomes one token."""
_FONTS, _FONT_SIZES = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"), (19, 21, 23)


@dataclass(frozen=True)
class Picture:
    """A picture of an album: a photograph with its name, or a page with its lines.

    Attributes
    ----------
    image : Image
        What it looks like.
    name : str
        What the photograph shows; empty for a page.
    lines : tuple of pairs of str
        The two words of each line of the page.
    printed : tuple of str
        The word that is printed in each token of the page, in reading order; empty where none is.
    """

    image: Image.Image
    name: str = ""
    lines: tuple[tuple[str, str], ...] = ()
    printed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Album:
    """Pictures, and what is told before some of them."""

    pictures: tuple[Picture, ...]
    facts: dict[int, tuple[str, str, str]]

    def content(self) -> list[dict[str, Any]]:
        """Return the parts of the message that shows it."""
        parts: list[dict[str, Any]] = []
        text = ""
        for i, picture in enumerate(self.pictures):
            if i in self.facts:
                colour, thing, word = self.facts[i]
                text += f"The word of the {colour} {thing} is {word}.\n"
            parts.append({"type": "text", "text": f"{text}Picture {i + 1}:"})
            parts.append({"type": "image_url", "image_url": {"url": picture.image}})
            text = "\n"
        parts.append({"type": "text", "text": text})
        return parts

    def questions(self, rng: np.random.Generator, n_lines: int = 1) -> list[tuple[str, str, str]]:
        """Return what can be asked, in a random order: task, question and answer.

        Parameters
        ----------
        rng : Generator
            Chooses.
        n_lines : int
            Of how many lines of each page, at most.
        """
        asked = []
        items = [item for picture in self.pictures for item, _ in picture.lines]
        for i, picture in enumerate(self.pictures, 1):
            if picture.name:
                shown = f"It shows a {picture.name}."
                asked.append(("show", f"What does picture {i} show?", shown))
                asked.append(("which", f"Which picture shows a {picture.name}?", f"Picture {i}."))
                continue
            for line in rng.permutation(len(picture.lines))[:n_lines]:
                item, word = picture.lines[line]
                question = f"What is written beside {item} in picture {i}?"
                asked.append(("line", question, f"Beside {item} is {word}."))
            if items.count(item) == 1:
                question = f"Which picture has a line with {item}?"
                asked.append(("find", question, f"Picture {i}."))
        for colour, thing, word in self.facts.values():
            question = f"What is the word of the {colour} {thing}?"
            asked.append(("fact", question, f"The word is {word}."))
        return [asked[i] for i in rng.permutation(len(asked))]


@cache
def vocabulary(model: Path) -> frozenset[str]:
    """Return the words that are one token of a model when a space is before them."""
    tokens = gguf.GGUFReader(model).fields["tokenizer.ggml.tokens"].contents()
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # as byte-level vocabularies write it
    return frozenset(token[1:] for token in tokens if token.startswith(space))


def photographs(folder: Path, model: Path) -> dict[str, Path]:
    """Return the photographs of a folder whose names are one token of the model.

    Raises
    ------
    SystemExit
        If there are fewer than 20.
    """
    words = vocabulary(model)
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.jpg")):
        name = file.name.split(".")[0]
        if name in words:
            found.setdefault(name, file)
    if len(found) < 20:
        raise SystemExit(
            f"{folder}: {len(found)} photographs (.jpg) are named by a word that the model knows "
            "as one token, such as camel.jpg; 20 are needed"
        )
    return found


@cache
def _fonts() -> tuple[ImageFont.FreeTypeFont, ...]:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return tuple(
        ImageFont.truetype(str(folder / name), size) for name in _FONTS for size in _FONT_SIZES
    )


def page(rng: np.random.Generator, words: frozenset[str]) -> Picture:
    """Draw a page of four to seven lines."""
    n = int(rng.integers(4, 8))
    rows = np.sort(rng.choice(_ROWS, n, replace=False))
    items = rng.choice([item for item in _ITEMS if item in words], n, replace=False)
    beside = rng.choice([value for value in _VALUES if value in words], n)
    paper = tuple(int(x) for x in rng.integers(225, 256, 3))
    ink = tuple(int(x) for x in rng.integers(0, 60, 3))
    image = Image.new("RGB", (_SIDE, _SIDE), paper)
    draw = ImageDraw.Draw(image)
    lines = list(zip(map(str, items), map(str, beside), strict=True))
    font = _font_that_fits(rng, lines)
    printed = np.full((_ROWS, _ROWS), "", dtype=object)

    def write(row: int, left: int, y: int, word: str) -> None:
        draw.text((left, y), word, font=font, fill=ink, anchor="lm")
        for column in range(_ROWS):
            start, end = column * _TOKEN, (column + 1) * _TOKEN
            if min(left + font.getlength(word), end) - max(left, start) >= _TOKEN / 3:
                printed[row, column] = word

    for row, (item, word) in zip(rows, lines, strict=True):
        y = int(row * _TOKEN + _TOKEN // 2 + rng.integers(-2, 3))
        left = int(4 + rng.integers(0, 3))
        write(row, left, y, item)
        write(row, _beside(left, font.getlength(item)) + int(rng.integers(0, 3)), y, word)
    return Picture(image, lines=tuple(lines), printed=tuple(printed.ravel()))


def _beside(left: float, length: float) -> int:
    """Return where the second word of a line begins: where the next token of the picture does."""
    return (int(left + length + 4) // _TOKEN + 1) * _TOKEN + 2


def _font_that_fits(
    rng: np.random.Generator, lines: list[tuple[str, str]]
) -> ImageFont.FreeTypeFont:
    for i in rng.permutation(len(_fonts())):
        font = _fonts()[int(i)]
        ends = [_beside(6, font.getlength(a)) + 2 + font.getlength(b) for a, b in lines]
        if max(ends) < _SIDE:
            return font
    return _fonts()[0]


def make_album(
    rng: np.random.Generator, n: int, photos: dict[str, Path], words: frozenset[str]
) -> Album:
    """Draw an album of `n` pictures, about half of them pages."""
    names = rng.choice(list(photos), n, replace=False)
    pictures = [
        page(rng, words)
        if rng.random() < 0.5
        else Picture(Image.open(photos[name]).convert("RGB"), name=str(name))
        for name in names
    ]
    return Album(tuple(pictures), facts(rng, n))


def facts(rng: np.random.Generator, n: int) -> dict[int, tuple[str, str, str]]:
    """Return what is told before about a quarter of `n` pictures: colour, thing, word."""
    found: dict[int, tuple[str, str, str]] = {}
    for i in np.flatnonzero(rng.random(n) < 0.25):
        thing = (str(rng.choice(_COLOURS)), str(rng.choice(_THINGS)))
        if thing not in [fact[:2] for fact in found.values()]:
            found[int(i)] = (*thing, str(rng.choice(_VALUES)))
    return found


def samples(
    n_albums: int, n_pictures: int, photos: dict[str, Path], words: frozenset[str], seed: int = 0
) -> list[Sample]:
    """Return albums with one question of each task that an album has."""
    found = []
    for i in range(n_albums):
        rng = np.random.default_rng([seed, n_pictures, i])
        album = make_album(rng, n_pictures, photos, words)
        questions: dict[str, tuple[str, str]] = {}
        for task, question, answer in album.questions(rng):
            questions.setdefault(task, (question, answer))
        asks = tuple(_ask(album, task, questions) for task in TASKS if task in questions)
        tasks = tuple(ask.task for ask in asks)
        name, collection = f"{seed}-{i}", f"{n_pictures} pictures"
        found.append(Sample(collection, name, n_pictures, tasks, partial(tuple, asks)))
    return found


def _ask(album: Album, task: str, questions: dict[str, tuple[str, str]]) -> Ask:
    content = album.content()
    question, answer = questions[task]
    other = next((each for name, each in questions.items() if name != task), None)

    def asked(text: str) -> dict[str, Any]:
        last = content[-1]["text"] + text
        return {"role": "user", "content": [*content[:-1], {"type": "text", "text": last}]}

    later = None
    if other is not None:
        later = [
            asked(other[0]),
            {"role": "assistant", "content": other[1]},
            {"role": "user", "content": question},
        ]
    word = answer.rstrip(".").split()[-1]
    return Ask(
        task=task,
        messages=[asked(question)],
        messages_later=later,
        expected=answer,
        score=partial(_score, word),
        max_tokens=12,
    )


def _score(word: str, said: str) -> float:
    """Return 1 if the first sentence ends with the word, else 0."""
    words: Sequence[str] = said.split(".")[0].split()
    return float(bool(words) and words[-1] == word)
