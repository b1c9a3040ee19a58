"""Make prompts that need their pictures and their text, and score the answers.

A prompt is one user turn that shows numbered pictures with short text between them, and a list of
questions about it.  Everything follows from the ``numpy`` generator that is passed in: equal
generator states give equal prompts, pictures included.

Examples
--------
>>> import numpy as np
>>> prompt = make_prompt(np.random.default_rng(7), 4, n_questions=2)
>>> len(prompt.pictures), len(prompt.questions)
(4, 2)
>>> prompt.messages(0)[-1]["content"] == prompt.questions[0].text
True
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from .render import COLOURS, LETTERS, SHAPES, render_picture

__all__ = [
    "ADJECTIVES",
    "MAX_PICTURES",
    "NOUNS",
    "SCANNING_TASKS",
    "TASKS",
    "Fact",
    "Picture",
    "Prompt",
    "Question",
    "data_uri",
    "make_prompt",
    "score",
]

TASKS: tuple[str, ...] = (
    "letter_of",
    "shape_at",
    "colour_at",
    "picture_of",
    "count",
    "code",
    "list_letters",
    "list_colours",
    "list_shapes",
    "describe",
)
"""Names of the tasks."""

SHORT_TASKS: tuple[str, ...] = TASKS[:6]
"""Tasks with answers of a few tokens."""

LONG_TASKS: tuple[str, ...] = TASKS[6:]
"""Tasks whose answers name every picture."""

SCANNING_TASKS: tuple[str, ...] = ("count",)
"""Tasks that look at the pictures one after the other, aloud; the last number is the answer."""

MAX_PICTURES = len(LETTERS)
"""The most pictures in a prompt: every letter occurs once at most."""

ADJECTIVES: tuple[str, ...] = (
    "long", "new", "big", "small", "wooden", "heavy", "broken", "round", "cheap", "clean",
)  # fmt: skip
NOUNS: tuple[str, ...] = (
    "box", "door", "key", "bag", "car", "cup", "lamp", "chair", "boat", "clock", "safe", "train",
)  # fmt: skip
DIGITS: tuple[str, ...] = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
PLACES: tuple[str, ...] = (
    "kitchen", "garden", "office", "station", "market", "cellar", "school", "harbour",
)  # fmt: skip
PEOPLE: tuple[str, ...] = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Nora", "Paul")
DAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Sunday")
WEATHER: tuple[str, ...] = ("cold", "warm", "wet", "dry", "windy", "quiet")


@dataclass(frozen=True)
class Picture:
    """One picture and what it shows."""

    colour: str
    shape: str
    letter: str
    image: Image.Image = field(repr=False, compare=False)


@dataclass(frozen=True)
class Fact:
    """A code that is told in the text of a prompt."""

    name: str
    code: str

    @property
    def text(self) -> str:
        """The sentence that tells the code."""
        return f"Code for the {self.name} {self.code}."


@dataclass(frozen=True)
class Question:
    """A question with its expected answer.

    Attributes
    ----------
    task : str
        One of `TASKS`.
    text : str
        The user turn.
    answer : str
        The expected assistant turn.
    """

    task: str
    text: str
    answer: str


def data_uri(image: Image.Image) -> str:
    """Return a picture as a ``data:`` URI of its PNG form."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Prompt:
    """Pictures, the text between them, and questions.

    Attributes
    ----------
    parts : tuple of str or int
        The context in order: text, or the index of a picture in `pictures`.
    pictures : tuple of Picture
        The pictures.
    facts : tuple of Fact
        The codes told in the text.
    questions : tuple of Question
        Questions about the context, each independent of the others.
    system : str or None
        System message, if any.
    captions : frozenset of int
        Indices into `parts` of text that tells what the picture before it shows.
    """

    parts: tuple[str | int, ...]
    pictures: tuple[Picture, ...]
    facts: tuple[Fact, ...]
    questions: tuple[Question, ...]
    system: str | None = None
    captions: frozenset[int] = frozenset()

    def content(self, images: str = "data_uri") -> list[dict[str, Any]]:
        """Return the context as content parts of a user message.

        Parameters
        ----------
        images : {"data_uri", "pil"}
            ``"data_uri"`` gives OpenAI ``image_url`` parts; ``"pil"`` gives parts of the form
            ``{"type": "image", "image": PIL.Image.Image}``.

        Returns
        -------
        list of dict
            Text and picture parts in order.
        """
        result: list[dict[str, Any]] = []
        for part in self.parts:
            if isinstance(part, str):
                result.append({"type": "text", "text": part})
            elif images == "pil":
                result.append({"type": "image", "image": self.pictures[part].image})
            elif images == "data_uri":
                url = data_uri(self.pictures[part].image)
                result.append({"type": "image_url", "image_url": {"url": url}})
            else:
                raise ValueError(f"images must be 'data_uri' or 'pil', not {images!r}")
        return result

    def context(self, images: str = "data_uri") -> list[dict[str, Any]]:
        """Return the messages before the first question: pictures and text, no question."""
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*start, {"role": "user", "content": self.content(images)}]

    def messages(
        self,
        question: int,
        answers: Sequence[str] = (),
        images: str = "data_uri",
    ) -> list[dict[str, Any]]:
        """Return the chat that asks one question.

        Parameters
        ----------
        question : int
            Index of the question to ask last.
        answers : sequence of str, optional
            What the assistant answered to the questions ``question - len(answers)`` up to
            ``question - 1``; these turns come between the context and the question.  Empty asks
            the question right after the pictures.
        images : {"data_uri", "pil"}
            See `content`.

        Returns
        -------
        list of dict
            Messages in OpenAI chat format.  The pictures are one user message, every question is
            a user message of its own.
        """
        if len(answers) > question:
            raise ValueError("more answers than questions before this one")
        result = self.context(images)
        first = question - len(answers)
        for offset, answer in enumerate(answers):
            result.append({"role": "user", "content": self.questions[first + offset].text})
            result.append({"role": "assistant", "content": answer})
        result.append({"role": "user", "content": self.questions[question].text})
        return result


def _choose(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _code(rng: np.random.Generator) -> str:
    return " ".join(DIGITS[d] for d in rng.permutation(10)[:3].tolist())


def _distractor(rng: np.random.Generator) -> str:
    kind = int(rng.integers(4))
    if kind == 0:
        thing = f"{_choose(rng, ADJECTIVES)} {_choose(rng, NOUNS)}"
        return f"The {thing} is in the {_choose(rng, PLACES)}."
    if kind == 1:
        return f"{_choose(rng, PEOPLE)} went to the {_choose(rng, PLACES)} on {_choose(rng, DAYS)}."
    if kind == 2:
        return (
            f"It was {_choose(rng, WEATHER)} in the {_choose(rng, PLACES)} on {_choose(rng, DAYS)}."
        )
    return f"{_choose(rng, PEOPLE)} saw a {_choose(rng, ADJECTIVES)} {_choose(rng, NOUNS)}."


def _lines(items: Iterable[str]) -> str:
    return "\n".join(f"{i} {item}" for i, item in enumerate(items, 1))


def _ask(
    task: str,
    rng: np.random.Generator,
    pictures: Sequence[Picture],
    facts: Sequence[Fact],
) -> Question:
    n = len(pictures)
    at = int(rng.integers(n))
    shown = pictures[at]
    if task == "letter_of":
        text = f"Which letter is on the {shown.colour} {shown.shape}?"
        return Question(task, text, f"The {shown.colour} {shown.shape} {shown.letter}")
    if task == "shape_at":
        return Question(task, f"What shape is in picture {at + 1}?", shown.shape)
    if task == "colour_at":
        return Question(task, f"What colour is in picture {at + 1}?", shown.colour)
    if task == "picture_of":
        text = f"Which picture has the letter {shown.letter}?"
        return Question(task, text, f"The letter {shown.letter}{at + 1}")
    if task == "count":
        colour = shown.colour
        if rng.random() < 0.15:
            colour = _choose(rng, tuple(COLOURS))
        # every line: number, colour, what it is compared with, how many so far
        lines, found = [], 0
        for i, picture in enumerate(pictures):
            found += picture.colour == colour
            lines.append(f"{i + 1} {picture.colour} {colour}{found}")
        text = f"How many pictures show {colour}?"
        return Question(task, text, "\n".join(lines) + f" so {found}")
    if task == "code":
        fact = facts[int(rng.integers(len(facts)))]
        text = f"What is the code of the {fact.name}?"
        return Question(task, text, f"The {fact.name} {fact.code}")
    if task == "list_letters":
        return Question(task, "List all letters in order.", _lines(p.letter for p in pictures))
    if task == "list_colours":
        return Question(task, "List all colours in order.", _lines(p.colour for p in pictures))
    if task == "list_shapes":
        return Question(task, "List all shapes in order.", _lines(p.shape for p in pictures))
    if task == "describe":
        text = _lines(f"{p.colour} {p.shape} {p.letter}" for p in pictures)
        return Question(task, "Describe every picture.", text)
    raise ValueError(f"unknown task {task!r}")


def make_prompt(
    rng: np.random.Generator,
    n_pictures: int,
    *,
    n_questions: int = 10,
    tasks: Sequence[str] = TASKS,
    weights: Sequence[float] | None = None,
    n_facts: int = 4,
    distractor_tokens: int = 40,
    captions: bool = False,
    system: str | None = None,
    draw: bool = True,
) -> Prompt:
    """Make a prompt with questions.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all that is random.
    n_pictures : int
        Number of pictures, 1 to `MAX_PICTURES`.  No two show the same colour and shape, and no
        two the same letter.
    n_questions : int, default 10
        Number of questions.
    tasks : sequence of str
        Tasks to ask about, of `TASKS`.  Without `weights` the tasks take turns
        in a random order, so that ten questions cover all ten tasks.
    weights : sequence of float, optional
        Draw the task of each question with these weights instead.
    n_facts : int, default 4
        Codes told in the text between the pictures, 12 at most, each of another noun.  The task
        ``code`` needs at least one; it is left out when there is none.
    distractor_tokens : int, default 40
        About how many tokens of sentences that no question asks about lie between the pictures.
    captions : bool, default False
        Say in text after each picture what it shows.  Meant for training.
    system : str, optional
        System message.
    draw : bool, default True
        Draw the pictures.  Without, `Picture.image` is one blank picture.

    Returns
    -------
    Prompt
        The prompt.
    """
    if not 1 <= n_pictures <= MAX_PICTURES:
        raise ValueError(f"n_pictures must be 1 to {MAX_PICTURES}, not {n_pictures}")
    colours = tuple(COLOURS)
    pairs = rng.permutation(len(colours) * len(SHAPES))[:n_pictures]
    letters = rng.permutation(len(LETTERS))[:n_pictures]
    blank = None if draw else Image.new("RGB", (1, 1))
    pictures = []
    for pair, letter in zip(pairs.tolist(), letters.tolist(), strict=True):
        shown = (colours[pair // len(SHAPES)], SHAPES[pair % len(SHAPES)], LETTERS[letter])
        image = render_picture(*shown, rng) if blank is None else blank
        pictures.append(Picture(*shown, image))
    nouns = rng.permutation(len(NOUNS))[:n_facts].tolist()
    facts = [Fact(f"{_choose(rng, ADJECTIVES)} {NOUNS[i]}", _code(rng)) for i in nouns]
    sentences = [fact.text for fact in facts]
    # A sentence that only distracts is about nine tokens long.
    sentences += [_distractor(rng) for _ in range(round(distractor_tokens / 9))]
    order = rng.permutation(len(sentences)).tolist()
    slots: list[list[str]] = [[] for _ in range(n_pictures + 1)]
    for i in order:
        slots[int(rng.integers(n_pictures + 1))].append(sentences[i])

    parts: list[str | int] = []
    caption_parts = set()
    for i, picture in enumerate(pictures):
        text = "" if i == 0 else "\n"
        if slots[i]:
            text += " ".join(slots[i]) + "\n"
        parts += [f"{text}Picture {i + 1}:", i]
        if captions:
            caption_parts.add(len(parts))
            parts.append(f" {picture.colour} {picture.shape} {picture.letter}")
        # The number stands after the picture too: what comes later can look back at the picture.
        parts.append(str(i + 1))
    if slots[n_pictures]:
        parts.append("\n" + " ".join(slots[n_pictures]))
    parts.append("\n")

    asked = [task for task in tasks if task != "code" or facts]
    if weights is None:
        turns: list[str] = []
        while len(turns) < n_questions:
            turns += [asked[i] for i in rng.permutation(len(asked)).tolist()]
        turns = turns[:n_questions]
    else:
        by_task = dict(zip(tasks, weights, strict=True))
        share = np.array([by_task[task] for task in asked], dtype=float)
        picks = rng.choice(len(asked), n_questions, p=share / share.sum())
        turns = [asked[i] for i in picks.tolist()]
    questions = tuple(_ask(task, rng, pictures, facts) for task in turns)
    return Prompt(
        tuple(parts), tuple(pictures), tuple(facts), questions, system, frozenset(caption_parts)
    )


def score(task: str, answer: str, expected: str) -> float:
    """Score an answer.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    answer : str
        What the model said.
    expected : str
        `Question.answer`.

    Returns
    -------
    float
        For the short tasks 1.0 or 0.0; of those that scan aloud (`SCANNING_TASKS`) only the
        number at the end counts.  For the long tasks the fraction of lines that are right at their
        place, where lines beyond the expected ones count as wrong.
    """
    answer, expected = answer.strip(), expected.strip()
    if task in SCANNING_TASKS:
        said = answer.split()
        return float(bool(said) and said[-1] == expected.split()[-1])
    if task in LONG_TASKS:
        said, wanted = answer.split("\n"), expected.split("\n")
        right = sum(a.strip() == b.strip() for a, b in zip(said, wanted, strict=False))
        return right / max(len(said), len(wanted))
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}")
    return float(answer == expected)
