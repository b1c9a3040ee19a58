"""Facts hidden in prose, for models that read text alone.

After RULER (arXiv 2404.06654): sentences with a key and a number are put into essays, and asked for
at the end.  ``one`` hides one, ``keys`` four of which one is asked for, ``values`` two numbers of
one key, ``chain`` a name that leads to another that has the number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import OptionError
from .samples import Ask, Passage, Sample

TASKS = ("one", "keys", "values", "chain")
ANSWER_TOKENS = 16
"""Where an answer is cut off: two numbers and the words between them."""

_ENTROPY = 0x6E65646C  # "needl"
_WORDS = (
    "river candle garden ladder window marble button forest pocket silver lantern bridge castle "
    "anchor basket feather hammer island jacket kettle"
).split()


@dataclass(frozen=True)
class Needle:
    """One prompt.

    Attributes
    ----------
    task : str
        One of `TASKS`.
    text : str
        The prose with its facts.
    question : str
        What follows it: the question, and how its answer begins.
    numbers : tuple of str
        What is to be told.
    """

    task: str
    text: str
    question: str
    numbers: tuple[str, ...]


def read_texts(folder: Path) -> list[str]:
    """Return the texts of all ``.txt`` files in a folder and below it.

    Raises
    ------
    OptionError
        If there is none, or one is not UTF-8.
    """
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise OptionError(f"there is no .txt file in {folder}")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"{file} cannot be read as a text in UTF-8: {error}") from error
    return texts


def prose(
    texts: Sequence[str], rng: np.random.Generator, n_tokens: int, count: Callable[[str], int]
) -> list[str]:
    """Return sentences in the order of the texts, which are drawn.

    Parameters
    ----------
    texts : sequence of str
        Where they come from.
    rng : numpy.random.Generator
        Draws the order of the texts.
    n_tokens : int
        How many tokens they have together, at most.
    count : callable
        Gives the tokens of a sentence.

    Raises
    ------
    OptionError
        If the texts have fewer.
    """
    taken: list[str] = []
    left = n_tokens
    for place in rng.permutation(len(texts)):
        for sentence in texts[place].split(". "):
            left -= count(sentence) + 1
            if left < 0:
                return taken
            taken.append(sentence.strip() + ".")
    raise OptionError(
        f"the texts have {n_tokens - left} tokens together, and a prompt is to have {n_tokens}"
    )


def hide(rng: np.random.Generator, task: str, sentences: Sequence[str]) -> Needle:
    """Put facts between the sentences of a prose.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws the facts and their places.
    task : str
        One of `TASKS`.
    sentences : sequence of str
        The prose.
    """
    words = rng.choice(_WORDS, 5, replace=False)
    numbers = [str(rng.integers(10000, 100000)) for _ in range(4)]

    def fact(word: str, value: str) -> str:
        return f"The special magic number of the {word} is {value}."

    if task == "chain":
        facts = [fact(words[0], numbers[0]), fact(words[1], numbers[1])]
        facts.append(f"The {words[2]} has the same special magic number as the {words[0]}.")
        asked, wanted = words[2], numbers[:1]
    elif task == "values":
        facts = [fact(words[0], value) for value in numbers[:2]]
        asked, wanted = words[0], numbers[:2]
    else:
        n = 1 if task == "one" else 4
        facts = [fact(words[i], numbers[i]) for i in range(n)]
        which = int(rng.integers(n))
        asked, wanted = words[which], [numbers[which]]
    text = list(sentences)
    for place, sentence in zip(
        sorted(rng.integers(0, len(text) + 1, len(facts)), reverse=True),
        rng.permutation(facts),
        strict=True,
    ):
        text.insert(int(place), str(sentence))
    several = "numbers" if len(wanted) > 1 else "number"
    verb = "are" if len(wanted) > 1 else "is"
    return Needle(
        task=task,
        text=" ".join(text),
        question=(
            f"\n\nQuestion: What {verb} the special magic {several} of the {asked}?\n"
            f"Answer: The special magic {several} of the {asked} {verb}"
        ),
        numbers=tuple(wanted),
    )


def share_told(answer: str, numbers: Sequence[str]) -> float:
    """Return the share of the numbers that an answer tells."""
    return sum(number in answer for number in numbers) / len(numbers)


def samples(
    texts: Sequence[str],
    number: int,
    *,
    seed: int,
    n_tokens: int,
    count: Callable[[str], int],
    tasks: Sequence[str] = TASKS,
) -> Iterator[Sample]:
    """Return samples, each of which asks every task once, about one prose.

    Parameters
    ----------
    texts : sequence of str
        Where the prose comes from.
    number : int
        How many samples, and so how many questions a task.
    seed : int
        Another seed gives other prose, facts and questions.
    n_tokens : int
        How many tokens of prose, at most.
    count : callable
        Gives the tokens of a sentence.
    tasks : sequence of str
        What is asked; which others are does not change a question.

    Raises
    ------
    OptionError
        If the texts have fewer tokens.
    """
    asked = tuple(task for task in TASKS if task in tasks)
    for i in range(number):
        rng = np.random.default_rng([_ENTROPY, seed, n_tokens, i])
        sentences = prose(texts, rng, n_tokens, count)
        needles = {task: hide(rng, task, sentences) for task in TASKS}
        load = partial(_load, tuple(needles[task] for task in asked))
        yield Sample(f"{n_tokens} tokens of text", f"{seed}-{i}", 0, asked, load)


def _load(needles: Sequence[Needle]) -> tuple[Ask, ...]:
    return tuple(
        Ask(
            task=needle.task,
            messages=(passage := Passage(needle.text, needle.question)),
            messages_later=passage,
            expected=" ".join(needle.numbers),
            score=partial(_score, needle.numbers),
            max_tokens=ANSWER_TOKENS,
        )
        for needle in needles
    )


def _score(numbers: tuple[str, ...], answer: str) -> float:
    return share_told(answer, numbers)
