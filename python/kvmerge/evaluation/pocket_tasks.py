"""The tasks of the pocket model as samples: pictures drawn fresh, from seeds of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from ..errors import OptionError
from ..pocket.tasks import (
    MAX_PICTURES,
    SHORT_TASKS,
    TASKS,
    Prompt,
    make_prompt,
    score,
)
from .samples import Ask, Sample, check_tasks

_ENTROPY = 0x6576616C  # "eval": neither training nor a test uses it.
DISTRACTOR_TOKENS = 40
"""About how many tokens of sentences that nothing asks about lie between the pictures."""


def check(tasks: Sequence[str], pictures: Sequence[int]) -> None:
    """Check names of tasks and numbers of pictures.

    Raises
    ------
    OptionError
        If one is not known.
    """
    check_tasks(tasks, TASKS)
    for number in pictures:
        if not 1 <= number <= MAX_PICTURES:
            raise OptionError(f"pictures must be 1 to {MAX_PICTURES}, not {number}")


def samples(
    pictures: int,
    number: int,
    *,
    seed: int,
    tasks: Sequence[str] = TASKS,
    distractor_tokens: int = DISTRACTOR_TOKENS,
) -> Iterator[Sample]:
    """Return samples of a number of pictures, each of which asks every task once.

    Parameters
    ----------
    pictures : int
        Pictures a sample.
    number : int
        How many samples, and so how many questions a task.
    seed : int
        Another seed gives other pictures and questions.
    tasks : sequence of str
        What is asked; which others are does not change a question.
    distractor_tokens : int
        About how many tokens of text that nothing asks about.
    """
    collection = f"{pictures} pictures"
    if distractor_tokens != DISTRACTOR_TOKENS:
        collection += f", {distractor_tokens} tokens of distracting text"
    asked = tuple(task for task in TASKS if task in tasks)
    for i in range(number):
        entropy = [_ENTROPY, seed, pictures, distractor_tokens, i]
        load = partial(_load, entropy, pictures, distractor_tokens, asked)
        yield Sample(collection, f"{seed}-{i}", pictures, asked, load)


def _load(
    entropy: list[int], pictures: int, distractor_tokens: int, tasks: tuple[str, ...]
) -> tuple[Ask, ...]:
    rng = np.random.default_rng(np.random.SeedSequence(entropy))
    prompt = make_prompt(
        rng,
        pictures,
        tasks=TASKS,
        n_questions=len(TASKS),
        distractor_tokens=distractor_tokens,
    )
    questions = {question.task: question for question in prompt.questions}
    return tuple(
        Ask(
            task=task,
            messages=_chat(prompt, [task]),
            messages_later=_chat(prompt, [_asked_before(task), task]),
            expected=questions[task].answer,
            score=partial(_score, task, questions[task].answer),
            max_tokens=8 * pictures + 16,
        )
        for task in tasks
    )


def _score(task: str, expected: str, answer: str) -> float:
    return score(task, answer, expected)


def _asked_before(task: str) -> str:
    """Return the task that is asked first in a longer chat: a short one, which tells little."""
    at = SHORT_TASKS.index(task) if task in SHORT_TASKS else TASKS.index(task)
    return SHORT_TASKS[(at + 1) % len(SHORT_TASKS)]


def _chat(prompt: Prompt, tasks: Sequence[str]) -> list[dict[str, object]]:
    """Return the chat that asks some tasks one after another; all but the last are answered."""
    questions = {question.task: question for question in prompt.questions}
    messages = prompt.context(images="pil")
    for task in tasks:
        messages.append({"role": "user", "content": questions[task].text})
        messages.append({"role": "assistant", "content": questions[task].answer})
    return messages[:-1]
