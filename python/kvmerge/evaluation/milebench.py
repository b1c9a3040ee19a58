"""Folders in MileBench's layout (arXiv 2404.18532), and its metrics.

A data set ``NAME`` is a folder with ``NAME.json`` and ``images/``.  The JSON holds ``meta_data``
(with ``question_type`` and ``task_instruction``) and ``data``, a list of samples with a
``task_instance`` (``context`` with ``{image#1}`` at the place of a picture, ``images_path``, and
``choice_list`` where it is multiple choice) and a ``response``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError, UnsupportedError
from .samples import Ask, Sample

_PLACE = re.compile(r"\{(?:image|table)#(\d+)\}")
_MAX_TOKENS = 512
_NO_LETTERS = "GPR1200"  # It has more choices than there are letters.


def data_sets(folder: Path) -> dict[str, Path]:
    """Return the JSON files of the data sets in a folder, by name.

    Raises
    ------
    OptionError
        If there is none.
    """
    candidates = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    found = {
        candidate.resolve().name: file
        for candidate in candidates
        if (file := candidate / f"{candidate.resolve().name}.json").is_file()
    }
    if not found:
        raise OptionError(
            f"{folder} is not in MileBench's layout: it must be, or hold, folders NAME with "
            "NAME.json and images/"
        )
    return found


def samples(file: Path, number: int, *, seed: int) -> Iterator[Sample]:
    """Return samples of one data set, in an order that follows from the seed."""
    content = _content(file)
    name, meta, data = file.stem, content["meta_data"], content["data"]
    order = np.random.default_rng(seed).permutation(len(data))[:number].tolist()
    for i in order:
        one = data[i]
        try:
            pictures = len(one["task_instance"]["images_path"])
            identity = str(one["sample_id"])
        except (KeyError, TypeError) as error:
            raise OptionError(f"{file}: entry {i} of data has no {error}") from error
        load = partial(_load, file, meta, one)
        yield Sample("MileBench", f"{name}-{identity}", pictures, (name,), load)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{file} cannot be read: {error}") from error
    for key, kind in (("meta_data", dict), ("data", list)):
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise OptionError(f"{file} has no {key!r}: it is not in MileBench's layout")
    return content


def _load(file: Path, meta: Mapping[str, Any], sample: Mapping[str, Any]) -> tuple[Ask, ...]:
    name, instance = file.stem, sample["task_instance"]
    choices = instance.get("choice_list")
    text = f"{_instruction(file, meta, sample)}\n{instance['context']}"
    if choices is not None:
        lines = [
            item if name == _NO_LETTERS else f"{_letter(i)}. {item}"
            for i, item in enumerate(choices)
        ]
        text += "\n".join(["\nChoice list: ", *lines, "Your answer is: "])
    expected = str(sample["response"])
    messages = [{"role": "user", "content": _content_parts(file, text, instance["images_path"])}]
    return (
        Ask(
            task=name,
            messages=messages,
            messages_later=None,
            expected=expected,
            score=partial(score, name, str(meta.get("question_type")), expected, choices),
            max_tokens=_MAX_TOKENS,
        ),
    )


def _instruction(file: Path, meta: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    instructions, at = meta.get("task_instruction", [""]), sample.get("task_instruction_id", 0)
    try:
        if isinstance(instructions, Mapping):
            return str(instructions[at] if at in instructions else instructions[str(at)])
        return str(instructions[int(at)])
    except (LookupError, TypeError, ValueError) as error:
        raise OptionError(f"{file}: there is no task_instruction {at!r}") from error


def _content_parts(file: Path, text: str, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return text and pictures in order."""
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(_PLACE.split(text)):
        if i % 2 == 0:
            if piece:
                parts.append({"type": "text", "text": piece})
            continue
        if not 1 <= int(piece) <= len(paths):
            raise OptionError(f"{file}: picture {piece} of a sample that has {len(paths)}")
        path = file.parent / "images" / paths[int(piece) - 1]
        parts.append({"type": "image_url", "image_url": {"url": str(path)}})
    return parts


def _letter(index: int) -> str:
    return chr(ord("A") + index)


# Metrics.

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")


def normalized(text: str) -> str:
    """Return a text in lower case without punctuation, by the rules of visual question answering.

    A mark next to a space goes, one inside a word becomes a space, and a full stop goes unless a
    digit follows.
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    keeps_together = _THOUSANDS.search(text) is not None
    result = text
    for mark in _MARKS:
        at_border = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_border or keeps_together else " ")
    return _FULL_STOP.sub("", result).strip("'").strip('"').strip().lower()


def score(
    name: str, question_type: str, expected: str, choices: Sequence[str] | None, answer: str
) -> float:
    """Score an answer as MileBench does for the data set `name`.

    Parameters
    ----------
    name : str
        Name of the data set.  The needles and MMCoQA look for the expected words in the answer.
    question_type : {"open-ended", "multi-choice"}
        ROUGE-L, or whether the right choice was named.
    expected : str
        ``response`` of the sample.
    choices : sequence of str or None
        ``choice_list`` of the sample.
    answer : str
        What the model said.
    """
    said, wanted = normalized(answer), normalized(expected)
    if "NeedleInAHaystack" in name:
        return float(wanted in said.split())
    if "MMCoQA" in name:
        return float(wanted in said)
    if question_type == "multi-choice":
        return float(_chosen(said, [normalized(choice) for choice in choices or ()]) == wanted)
    if question_type == "open-ended":
        return rouge_l(said, wanted)
    raise UnsupportedError(
        f"{name} has questions of the type {question_type!r}: 'open-ended' and 'multi-choice' are "
        "known"
    )


def _chosen(said: str, choices: Sequence[str]) -> str | None:
    """Return the choice that an answer names: letter and words, else words, else the letter."""
    with_letters = [f"{_letter(i).lower()} {choice}" for i, choice in enumerate(choices)]
    dense = said.replace(" ", "")
    for text, patterns in (
        (said, with_letters),
        (dense, [choice.replace(" ", "") for choice in choices]),
    ):
        places = [(text.find(pattern), i) for i, pattern in enumerate(patterns) if pattern in text]
        if places:
            return choices[min(places)[1]]
    letters = [_letter(i).lower() for i in range(len(choices))]
    named = [letter for letter in said if letter in letters]
    return choices[letters.index(named[0])] if len(named) == 1 else None


def rouge_l(answer: str, expected: str) -> float:
    """Return the F measure of ROUGE-L, from the package that MileBench uses."""
    if not answer or not expected:
        return 0.0
    try:
        from rouge import Rouge
    except ImportError as error:
        raise UnsupportedError("ROUGE-L needs the package rouge: install kvmerge[eval]") from error
    return float(Rouge(metrics=["rouge-l"]).get_scores(answer, expected)[0]["rouge-l"]["f"])
