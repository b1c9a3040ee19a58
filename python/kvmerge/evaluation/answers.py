"""What a run writes down: one JSON line for every answer, and the settings that it holds for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..errors import OptionError
from .methods import Method

ANSWERS_FILE = "answers.jsonl"
SETTINGS_FILE = "settings.json"

Key = tuple[str, float, str, str, str, str]
"""Which answer: method, budget, mode, collection, sample, task."""


@dataclass(frozen=True)
class Answer:
    """One answer with what the cache held.

    Attributes
    ----------
    method : str
        Name of the method.
    budget : float
        Fraction that was kept; 1.0 without merging.
    mode : str
        When the cache was merged: one of `samples.MODES`.
    collection, sample, task : str
        What was asked.
    pictures : int
        Pictures in the prompt.
    expected, answer : str
        The right answer and what the model said.
    score : float
        Its points, 0 to 1.
    tokens : int
        Tokens of the prompt.
    cells : float
        Cells that held them when the answer began, as the mean over the layers.
    kv_bytes : int
        Bytes of K and V of these cells.
    """

    method: str
    budget: float
    mode: str
    collection: str
    sample: str
    task: str
    pictures: int
    expected: str
    answer: str
    score: float
    tokens: int
    cells: float
    kv_bytes: int

    @property
    def key(self) -> Key:
        """What distinguishes it from all others."""
        return (self.method, self.budget, self.mode, self.collection, self.sample, self.task)


@dataclass(frozen=True)
class Settings:
    """What the answers in a folder depend on.

    Attributes
    ----------
    model, mmproj : str
        Name and SHA-256 of the files.
    data : str
        Name of the folder of questions, or ``"pocket"``.
    seed : int
        Seed of the questions.
    merge_before : int
        How many of the prompt's last tokens were read after the merge.
    methods : dict
        Definition of every method by name.
    image_merge, image_min_tokens : optional
        How many tokens of a picture were read, as in `Llama`.
    """

    model: str
    mmproj: str
    data: str
    seed: int
    merge_before: int
    methods: dict[str, Any]
    image_merge: float | None = None
    image_min_tokens: int | None = None


def identity(file: Path) -> str:
    """Return the name and SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return f"{file.name} {digest.hexdigest()}"


def definitions(methods: Iterable[Method]) -> dict[str, Any]:
    """Return the definition of methods by name, as JSON gives it back."""
    definition: dict[str, Any] = json.loads(
        json.dumps({method.name: method.definition for method in methods})
    )
    return definition


def read_answers(folder: Path) -> list[Answer]:
    """Return the answers of a folder.

    Raises
    ------
    OptionError
        If a line is damaged; an incomplete last one, left by a crash, is passed over.
    """
    file = folder / ANSWERS_FILE
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    answers = {}
    names = {field.name for field in fields(Answer)}
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            answer = Answer(**{name: content[name] for name in names})
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{file}: line {number} is damaged ({error})") from error
        answers[answer.key] = answer
    return list(answers.values())


def read_settings(folder: Path) -> Settings | None:
    """Return the settings of a folder, None if it has none."""
    file = folder / SETTINGS_FILE
    if not file.exists():
        return None
    try:
        return Settings(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(f"{file} cannot be read: {error}") from error


class Record:
    """The folder that a run writes into; continues what an earlier run has begun.

    Parameters
    ----------
    folder : Path
        Is made if it does not exist.
    settings : Settings
        Those of this run.

    Raises
    ------
    OptionError
        If the folder holds answers of other settings.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        before = read_settings(folder)
        if before is not None:
            settings = _joined(folder, before, settings)
        self.answers = read_answers(folder)
        if self.answers and before is None:
            raise OptionError(
                f"{folder} holds answers and no {SETTINGS_FILE} that says what they hold for: "
                "choose another --out"
            )
        self.done = {answer.key for answer in self.answers}
        temporary = folder / f"{SETTINGS_FILE}.new"
        temporary.write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / SETTINGS_FILE)
        self._stream: IO[bytes] = (folder / ANSWERS_FILE).open("ab")
        self._cut_incomplete(folder / ANSWERS_FILE)

    def _cut_incomplete(self, file: Path) -> None:
        """Remove a last line that a crash has left without its end."""
        content = file.read_bytes()
        self._stream.truncate(content.rfind(b"\n") + 1)

    def add(self, answers: Sequence[Answer]) -> None:
        """Write answers down."""
        lines = [json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers]
        self._stream.write("".join(lines).encode())
        self._stream.flush()
        self.answers += answers
        self.done |= {answer.key for answer in answers}

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()


def _joined(folder: Path, before: Settings, now: Settings) -> Settings:
    """Return the settings of a run that continues another."""
    for name in (field.name for field in fields(Settings) if field.name != "methods"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise OptionError(
                f"{folder} holds answers of {name}={old}, and this run has {name}={new}: "
                "choose another --out"
            )
    for name, definition in now.methods.items():
        old = before.methods.get(name, definition)
        if old != definition:
            raise OptionError(
                f"{folder} holds answers of another {name}: {_difference(old, definition)}. "
                "Choose another --out"
            )
    methods = {**before.methods, **now.methods}
    return Settings(**{**asdict(now), "methods": methods})


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    flat = [
        {"cache_type": one["cache_type"], **(one["policy"] or {"policy": None})}
        for one in (old, new)
    ]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return ", ".join(f"{name} was {flat[0].get(name)}, is {flat[1].get(name)}" for name in names)
