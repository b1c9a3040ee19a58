"""What is asked: samples, each with pictures or text read once, and questions about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError, did_you_mean

MODES = {
    "known": "merged when all but the last tokens of the question were read",
    "unknown": "merged before the question was read, and where there are pictures after another "
    "question and its answer",
}
"""When the cache is merged, by name."""


@dataclass(frozen=True)
class Passage:
    """Text that a model goes on with as it stands, without a chat.

    Attributes
    ----------
    text : str
        What is asked about.
    question : str
        What follows it.
    """

    text: str
    question: str


Asked = list[dict[str, Any]] | Passage
"""The messages of a chat, or a passage."""


@dataclass(frozen=True)
class Ask:
    """One question about a sample.

    Attributes
    ----------
    task : str
        Name of the task; a sample asks each of its tasks once.
    messages : list of dict or Passage
        The chat that asks it right after the pictures, or the passage.
    messages_later : list of dict, Passage or None
        The chat that asks another question first and has its answer, or the passage; None where
        there is no other question.
    expected : str
        The right answer.
    score : callable
        Gives the points of an answer, 0 to 1.
    max_tokens : int
        Where an answer is cut off.
    """

    task: str
    messages: Asked
    messages_later: Asked | None
    expected: str
    score: Callable[[str], float]
    max_tokens: int


@dataclass(frozen=True)
class Sample:
    """Pictures or a text, with questions about them.

    Attributes
    ----------
    collection : str
        What it is averaged with, such as ``"12 pictures"``: one table each.
    name : str
        Its name in the collection.
    pictures : int
        How many pictures it shows.
    tasks : tuple of str
        What `load` is going to ask.
    load : callable
        Draws or opens the pictures and returns the questions.
    """

    collection: str
    name: str
    pictures: int
    tasks: tuple[str, ...]
    load: Callable[[], tuple[Ask, ...]]


def check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Check names of tasks.

    Raises
    ------
    OptionError
        If one is not among the known ones.
    """
    for task in tasks:
        if task not in known:
            raise OptionError(
                f"there is no task {task!r}: it must be one of {', '.join(known)}."
                f"{did_you_mean(task, known)}"
            )
