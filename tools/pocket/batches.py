"""Turn prompts of :mod:`pocket.tasks` into tokens for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import vocabulary as v
from pocket.render import COLOURS, LETTERS, SHAPES
from pocket.tasks import (
    LONG_TASKS,
    SCANNING_TASKS,
    TASKS,
    Picture,
    Prompt,
    Question,
    make_prompt,
)
from torch import Tensor

__all__ = ["Batch", "Mix", "Sequencer", "context_tokens", "make_batch", "picture_index"]

PICTURE = -1
"""Stands for one token of a picture."""

FOUND = {"code": 3}
"""Tokens at the end of a short answer that have to be looked up, where it is not one."""


@dataclass
class Mix:
    """How the prompts of a batch are drawn."""

    n_pictures: int
    rows: int
    weights: Sequence[float]
    caption_share: float = 0.0
    questions: tuple[int, int] = (18, 26)
    clutter: float = 1.0


@dataclass
class Sequencer:
    """Collects the tokens of one chat with the weight of the loss on each.

    ``numbers`` says where the number after each picture stands.
    """

    patches: int
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], weight: float = 0.0) -> None:
        """Append tokens."""
        self.ids += ids
        self.weights += [weight] * len(ids)

    def add_context(self, prompt: Prompt, caption_weight: float) -> None:
        """Append the system message and the pictures turn, without its end marker."""
        self.add([v.BEGIN])
        if prompt.system is not None:
            self.add([v.SYSTEM, *v.encode(prompt.system), v.END])
        self.add([v.USER])
        for i, part in enumerate(prompt.parts):
            if isinstance(part, int):
                self.add([PICTURE] * self.patches)
            else:
                captioned = i in prompt.captions
                if part.isdigit():
                    self.numbers.append(len(self.ids))
                self.add(v.encode(part), caption_weight if captioned else 0.0)


def context_tokens(prompt: Prompt, patches: int) -> list[int]:
    """Return the tokens of the pictures turn with its end marker."""
    sequence = Sequencer(patches)
    sequence.add_context(prompt, 0.0)
    return [*sequence.ids, v.END]


def picture_index(picture: Picture, repeats: int, rng: np.random.Generator) -> int:
    """Return the index in the pool of a drawing of this picture."""
    colour = list(COLOURS).index(picture.colour)
    shape, letter = SHAPES.index(picture.shape), LETTERS.index(picture.letter)
    combo = (colour * len(SHAPES) + shape) * len(LETTERS) + letter
    return combo * repeats + int(rng.integers(repeats))


def _in_turn(rng: np.random.Generator, questions: Sequence[Question]) -> list[Question]:
    """Drop repeated questions; order the rest so that long answers rarely give short ones away."""
    questions = list({q.text: q for q in questions}.values())
    revealing = LONG_TASKS + SCANNING_TASKS
    short = [q for q in questions if q.task not in revealing]
    # what was said aloud once could be copied from there: few such answers a chat
    long = [q for q in questions if q.task in revealing][:3]
    # first of all, a scanning question has no earlier answer that shows the same colour
    long.sort(key=lambda q: q.task not in SCANNING_TASKS)
    if long and long[0].task in SCANNING_TASKS and rng.random() < 0.6:
        return [long[0], *short, *long[1:]]
    return short + long


def _weights(task: str, answer: Sequence[int]) -> list[float]:
    """Return the weight of the loss on every token of an answer, end marker included."""
    length = len(answer)
    if task in SCANNING_TASKS:
        # what is hard is the count so far, above all where it goes up
        result, counts = [], [0]
        for i, token in enumerate(answer):
            after = v.TOKENS[answer[i - 1]] if i else ""
            if after.startswith("\u0120") and v.TOKENS[token].isdigit():
                result.append(1.2 if int(v.TOKENS[token]) > counts[-1] else 0.5)
                counts.append(int(v.TOKENS[token]))
            else:
                result.append(0.12)
        return result
    if task in LONG_TASKS:
        # long answers would else drown the short ones
        return [length**-0.5] * length
    # what is repeated of the question is easy
    found = min(FOUND.get(task, 1), length - 1)
    return [0.1] * (length - 1 - found) + [0.7] * found + [0.3]


@dataclass
class Batch:
    """Tokens of several chats, padded on the right.

    Attributes
    ----------
    ids : Tensor
        (rows, length), `PICTURE` where a picture token goes.
    weights : Tensor
        (rows, length), weight of the loss on predicting this token.
    pictures : list of int
        Pool index of every picture, in reading order over the rows.
    spans : list of (task, row, first, last)
        Where each answer lies, end marker included.
    numbers : list of (row, position, colour, shape, letter)
        Where the number after each picture stands, and what the picture shows, by index.
    patches : int
        Tokens of one picture.
    """

    ids: Tensor
    weights: Tensor
    pictures: list[int]
    spans: list[tuple[str, int, int, int]]
    numbers: list[tuple[int, int, int, int, int]]
    patches: int


def make_batch(
    rng: np.random.Generator,
    mix: Mix,
    patches: int,
    pick: Callable[[Picture, np.random.Generator], int],
) -> Batch:
    """Draw the prompts of one batch."""
    rows: list[Sequencer] = []
    pictures: list[int] = []
    spans = []
    numbers = []
    for row in range(mix.rows):
        crowded = rng.random() < 0.15
        prompt = make_prompt(
            rng,
            mix.n_pictures,
            n_questions=int(rng.integers(mix.questions[0], mix.questions[1] + 1)),
            weights=mix.weights,
            tasks=TASKS,
            n_facts=1 + int(rng.integers(1 + round(5 * mix.clutter))),
            distractor_tokens=int(
                mix.clutter * rng.integers(0, 30 * mix.n_pictures if crowded else 80)
            ),
            captions=bool(rng.random() < mix.caption_share),
            system=v.SYSTEM_TEXTS[int(rng.integers(3))] if rng.random() < 0.1 else None,
            draw=False,
        )
        sequence = Sequencer(patches)
        sequence.add_context(prompt, 0.3)
        for at, p in zip(sequence.numbers, prompt.pictures, strict=True):
            shown = list(COLOURS).index(p.colour), SHAPES.index(p.shape), LETTERS.index(p.letter)
            numbers.append((row, at, *shown))
        pictures += [pick(p, rng) for p in prompt.pictures]
        joined = rng.random() < 0.2
        if not joined:
            sequence.add([v.END])
        for i, question in enumerate(_in_turn(rng, prompt.questions)):
            if i > 0 or not joined:
                sequence.add([v.USER])
            sequence.add([*v.encode(question.text), v.END, v.ASSISTANT])
            answer = [*v.encode(question.answer), v.END]
            spans.append((question.task, row, len(sequence.ids), len(sequence.ids) + len(answer)))
            sequence.ids += answer
            sequence.weights += _weights(question.task, answer)
        rows.append(sequence)
    length = max(len(r.ids) for r in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for i, r in enumerate(rows):
        ids[i, : len(r.ids)] = torch.tensor(r.ids)
        weights[i, : len(r.ids)] = torch.tensor(r.weights)
    return Batch(ids, weights, pictures, spans, numbers, patches)
