"""``kvmerge demo``: the same questions with the full cache and with a merged one."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .number import MOST_SEED, MOST_THREADS, Whole, kept
from .picture_options import add_picture_options, picture_options

if TYPE_CHECKING:
    from ..llama import Llama
    from ..pocket import Prompt
    from ..stats import KVStats

_WIDTH = 100
_TASKS = (
    "code",
    "letter_of",
    "shape_at",
    "colour_at",
    "picture_of",
    "list_letters",
    "code",
    "list_shapes",
)
_QUICK_TASKS = ("code", "letter_of", "colour_at")
_QUICK_PICTURES = 4
_LARGE_PICTURE = 384
_LONGEST = 2**24
"""Longer contexts than any model has; the full cache is allocated for all of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--model", help="model (GGUF); default: the pocket model in the package")
    parser.add_argument("--mmproj", help="vision part of --model (GGUF)")
    parser.add_argument(
        "--budget",
        type=kept,
        default=0.2,
        help="what is kept: a fraction such as 0.2, or a number of cells",
    )
    add_picture_options(parser)
    parser.add_argument("--policy", default="auto", help="how the cache is merged")
    parser.add_argument(
        "--pictures", type=_pictures, default=12, help="how many pictures are shown"
    )
    parser.add_argument(
        "--seed", type=Whole(0, MOST_SEED), default=1, help="other pictures and questions"
    )
    parser.add_argument(
        "--threads", type=Whole(1, MOST_THREADS), default=1, help="threads to compute with"
    )
    parser.add_argument(
        "--n-ctx",
        type=Whole(0, _LONGEST, "0 is as needed"),
        default=0,
        help="context length; default: as needed",
    )
    parser.add_argument(
        "--report", type=Path, default=Path("kvmerge-demo.html"), help="where the report goes"
    )
    parser.add_argument("--quick", action="store_true", help="few pictures and questions")


@dataclass
class Turn:
    """One question and its answer."""

    task: str
    question: str
    expected: str
    answer: str
    score: float


@dataclass
class Run:
    """All questions with one cache."""

    name: str
    turns: list[Turn] = field(default_factory=list)
    stats: KVStats | None = None
    ms_per_token: float = 0.0
    seconds: float = 0.0
    view: dict[str, Any] | None = None

    @property
    def n_right(self) -> int:
        """Answers that are right as a whole."""
        return sum(turn.score == 1.0 for turn in self.turns)

    @property
    def mean_score(self) -> float:
        """Mean score; a list counts by the share of its items that are right."""
        return sum(turn.score for turn in self.turns) / len(self.turns)


def _pictures(text: str) -> int:
    from ..pocket import LETTERS

    return Whole(1, len(LETTERS))(text)


def _messages(prompt: Prompt, question: int, answers: Sequence[str], large: bool) -> Any:
    messages = prompt.messages(question, answers, images="pil")
    if large:
        for part in messages[0]["content"]:
            if part["type"] == "image":
                part["image"] = part["image"].resize((_LARGE_PICTURE, _LARGE_PICTURE))
    return messages


def _converse(llm: Llama, prompt: Prompt, name: str, own_model: bool) -> Run:
    """Ask all questions one after another in one conversation."""
    import llama_cpp

    from ..pocket import score
    from ..report import merge_view

    run = Run(name)
    answers: list[str] = []
    llama_cpp.llama_perf_context_reset(llm.ctx)
    start = time.perf_counter()
    for i, question in enumerate(prompt.questions):
        response = llm.create_chat_completion(
            _messages(prompt, i, answers, own_model),
            temperature=0.0,
            repeat_penalty=1.0,
            max_tokens=160,
        )
        answer = (response["choices"][0]["message"]["content"] or "").strip()
        answers.append(answer)
        points = score(question.task, answer, question.answer)
        if own_model and question.answer.lower() in answer.lower():
            points = 1.0
        run.turns.append(Turn(question.task, question.text, question.answer, answer, points))
        if i == 0 and llm.engine is not None:
            run.view = merge_view(llm)
    run.seconds = time.perf_counter() - start
    perf = llama_cpp.llama_perf_context(llm.ctx)
    run.ms_per_token = perf.t_eval_ms / max(perf.n_eval, 1)
    run.stats = llm.kv_stats()
    return run


def _mark(turn: Turn) -> str:
    if turn.score == 1.0:
        return "✓"
    return f"✗ ({turn.score:.0%} right)" if turn.score else "✗"


def _columns(left: str, right: str) -> str:
    """Return two texts side by side."""
    width = (_WIDTH - 6) // 2

    def wrap(text: str) -> list[str]:
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, width) or [""]]
        return lines or [""]

    left_lines, right_lines = wrap(left), wrap(right)
    rows = max(len(left_lines), len(right_lines))
    left_lines += [""] * (rows - len(left_lines))
    right_lines += [""] * (rows - len(right_lines))
    return "\n".join(
        f"  {a:<{width}}  {b}".rstrip() for a, b in zip(left_lines, right_lines, strict=True)
    )


def _print_answers(full: Run, merged: Run) -> None:
    print(_columns(full.name.upper(), merged.name.upper()))
    for number, (a, b) in enumerate(zip(full.turns, merged.turns, strict=True), 1):
        print(f"\n{number}. {a.question}")
        right = "right: " + " / ".join(a.expected.splitlines())
        print(textwrap.fill(right, _WIDTH, initial_indent="   ", subsequent_indent="   "))
        print(_columns(f"{a.answer} {_mark(a)}", f"{b.answer} {_mark(b)}"))


def _row(cells: Sequence[str]) -> str:
    first, *rest = cells
    return f"  {first:<22}" + "".join(f"{cell:>12}" for cell in rest)


def _table_row(run: Run) -> list[str]:
    assert run.stats is not None
    merges = run.stats.merges
    return [
        run.name,
        f"{run.stats.tokens}",
        f"{run.stats.cells}",
        f"{run.stats.mib:.2f}",
        f"{run.ms_per_token:.2f}",
        f"{sum(merge.ms for merge in merges):.0f} ({len(merges)}x)" if merges else "-",
        f"{run.n_right}/{len(run.turns)}",
    ]


_HEADER = ("", "tokens seen", "cells held", "KV MiB", "ms/token", "merge ms", "right")
_MEANINGS = (
    ("tokens seen", "text and picture tokens read and generated, after the last answer"),
    ("cells held", "slots of the KV cache that attention goes through at that moment"),
    ("KV MiB", "K and V of these cells over all layers"),
    ("ms/token", "mean time of one generated token, reading and merging not counted"),
    ("merge ms", "time of all merges together, and how many there were"),
    ("right", "answers that are right as a whole; a list with one wrong item is wrong"),
    ("merging", "runs when a question was read: only the first answer's first token saw all cells"),
)


def _sized(n_pictures: int, own_model: bool) -> int:
    """Return a context length that the conversation fits into."""
    return 4096 + 1536 * n_pictures if own_model else 1024 + 96 * n_pictures


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from ..errors import OptionError

    if (arguments.model is None) != (arguments.mmproj is None):
        raise OptionError("--model and --mmproj go together")
    n_pictures = min(arguments.pictures, _QUICK_PICTURES) if arguments.quick else arguments.pictures

    import numpy as np

    from .. import pocket
    from ..llama import Llama
    from ..policies import resolve
    from ..report import check_place, write_report

    check_place(arguments.report)
    budget = arguments.budget
    if resolve(arguments.policy) is None:
        raise OptionError("--policy must merge: the demo compares it with the full cache")
    own_model = arguments.model is not None
    model = arguments.model or pocket.model_path()
    mmproj = arguments.mmproj or pocket.mmproj_path()
    tasks = _QUICK_TASKS if arguments.quick else _TASKS
    rng = np.random.default_rng(arguments.seed)
    prompt = _prompt(rng, n_pictures, tasks)

    print(f"{n_pictures} pictures with text between them, {len(tasks)} questions one after another")
    print(f"model {Path(model).name}, kv_merge={arguments.policy!r}, kv_budget={budget} (kept)\n")
    runs = []
    for name, policy in (("full cache", None), (f"merged ({arguments.policy})", arguments.policy)):
        with Llama(
            model,
            mmproj=mmproj,
            kv_merge=policy,
            kv_trace=True,
            kv_budget=budget,
            n_ctx=arguments.n_ctx or _sized(n_pictures, own_model),
            n_threads=arguments.threads,
            n_threads_batch=arguments.threads,
            verbose=False,
            progress=sys.stderr is not None and sys.stderr.isatty(),
            **picture_options(arguments),
        ) as llm:
            runs.append(_converse(llm, prompt, name, own_model))
    full, merged = runs

    _print_answers(full, merged)
    print("\n" + _row(_HEADER))
    for one in runs:
        print(_row(_table_row(one)))
    print()
    for name, meaning in _MEANINGS:
        print(f"  {name:<12} {meaning}")
    if merged.view is None or not merged.stats or not merged.stats.merges:
        print("\nThe prompt is not larger than the budget, so nothing was merged.")
    write_report(
        arguments.report,
        title=f"{n_pictures} pictures, {Path(model).name}, {arguments.policy}, budget {budget}",
        header=_HEADER,
        rows=[_table_row(one) for one in runs],
        meanings=_MEANINGS,
        turns=[
            {
                "question": a.question,
                "expected": a.expected,
                "answers": [
                    {"text": turn.answer, "score": turn.score, "mark": _mark(turn)}
                    for turn in (a, b)
                ],
            }
            for a, b in zip(full.turns, merged.turns, strict=True)
        ],
        pictures=[
            (picture.image, _caption(i, picture)) for i, picture in enumerate(prompt.pictures)
        ],
        view=merged.view,
    )
    print(f"\nWhat became of every patch of every picture: {arguments.report}")
    return 0


def _caption(index: int, picture: Any) -> str:
    return f"{index + 1}: {picture.colour} {picture.shape} {picture.letter}"


def _prompt(rng: Any, n_pictures: int, tasks: Sequence[str]) -> Prompt:
    """Return pictures, facts between them, and one question for each task in order."""
    from dataclasses import replace

    from ..pocket import make_prompt

    drawn = make_prompt(rng, n_pictures, n_questions=10 * len(tasks))
    left = list(dict.fromkeys(drawn.questions))
    chosen = []
    for task in tasks:
        question = next((q for q in left if q.task == task), None)
        if question is not None:
            left.remove(question)
            chosen.append(question)
    return replace(drawn, questions=tuple(chosen))
