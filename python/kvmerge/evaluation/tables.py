"""The quality table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import OptionError
from .answers import Answer, Settings
from .bootstrap import Interval, difference
from .methods import FULL, METHODS
from .samples import MODES
from .scores import Row, Scores, collect

_BLOCKS = ("table", "summary")


def document(answers: Sequence[Answer], settings: Settings, plot: str) -> str:
    """Return the whole page."""
    return f"# Quality\n\n{table(answers, settings, plot)}"


def table(answers: Sequence[Answer], settings: Settings, plot: str) -> str:
    """Return what is measured, the plot, and all tables.

    Parameters
    ----------
    answers : sequence of Answer
        What was written down.
    settings : Settings
        What it holds for.
    plot : str
        Path of the plot, as seen from the page.
    """
    model, data = settings.model.split()[0], settings.data
    what = "the tasks of the pocket model" if data == "pocket" else data
    parts = [
        f"Model `{model}`, {what}, seed {settings.seed}. Figures are per cent of the points. The "
        f"last {settings.merge_before} tokens of a known question are read after the merge, so "
        "that the first token of the answer comes from the merged cache. Brackets: 95 % confidence "
        "interval of the paired difference (bootstrap over prompts). KV MiB: K and V of the cells "
        f"that are held when the answer begins.{_pictures(settings)}",
        f"![Points over budget]({plot})",
    ]
    for scores in collect(answers):
        parts += _section(scores)
    return "\n\n".join(parts) + "\n"


def _pictures(settings: Settings) -> str:
    """Return what is to be known of the pictures, in every row."""
    if settings.image_merge is None:
        return ""
    return (
        f" In every row, also of the full cache, the tokens of a picture with a cosine of at least "
        f"{settings.image_merge:g} are one token before they are read."
    )


def summary(answers: Sequence[Answer]) -> str:
    """Return a short table for each collection: averages only."""
    parts = []
    for scores in collect(answers):
        budgets = scores.budgets or (1.0,)
        header = ["method", *(f"{budget:.0%} kept" for budget in budgets)]
        lines = [
            [_label(row), *[f"{100 * scores.average(row):.1f}"] * len(budgets)]
            for row in scores.rows(1.0, ["reference"])
        ]
        for name, method in METHODS.items():
            rows = [(name, budget) for budget in budgets]
            if method.kind == "preset" and any(row in scores.values for row in rows):
                figures = [
                    f"{100 * scores.average(row):.1f}" if row in scores.values else ""
                    for row in rows
                ]
                lines.append([f"`{name}`", *figures])
        parts.append(f"{_title(scores)}:\n\n{_markdown(header, lines)}")
    return "\n\n".join(parts) + "\n"


def check_page(file: Path) -> None:
    """Check that tables can be put into a file.

    Raises
    ------
    OptionError
        If it cannot be read, or has no marks for them.
    """
    _with_blocks(file, dict.fromkeys(_BLOCKS, ""))


def update(file: Path, blocks: dict[str, str]) -> None:
    """Put tables between the marks ``<!-- quality:NAME -->`` and ``<!-- /quality -->`` of a file.

    Raises
    ------
    OptionError
        If it cannot be read, or has no such marks.
    """
    file.write_text(_with_blocks(file, blocks), encoding="utf-8")


def _with_blocks(file: Path, blocks: dict[str, str]) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file} cannot be read: {error}") from error
    found = False
    for name, block in blocks.items():
        begin, end = f"<!-- quality:{name} -->", "<!-- /quality -->"
        head, mark, rest = text.partition(begin)
        _, closing, tail = rest.partition(end)
        if mark and closing:
            text, found = f"{head}{begin}\n\n{block.strip()}\n\n{end}{tail}", True
    if not found:
        raise OptionError(
            f"{file} has no place for a table: it needs the lines <!-- quality:NAME --> and "
            f"<!-- /quality -->, where NAME is one of {', '.join(_BLOCKS)}"
        )
    return text


def _title(scores: Scores) -> str:
    return f"{scores.collection}, question {scores.mode}"


def _section(scores: Scores) -> list[str]:
    full: Row = (FULL, 1.0)
    tokens = np.mean(list(scores.tokens.values()))
    parts = [
        f"## {_title(scores)}",
        f"The cache is {MODES[scores.mode]}. {_questions(scores)}, {tokens:.0f} tokens a prompt.",
        _main_table(scores, scores.rows(1.0, ["reference"]), full, compare=False),
    ]
    quantized = [row for row in scores.values if _is_quantized(row)]
    if quantized:
        quantized.sort(key=lambda row: scores.mib[row], reverse=True)
        parts += [
            "With as many bytes as a quantized cache, and on top of one:",
            _main_table(scores, quantized, full, compare=False),
        ]
    for budget in scores.budgets:
        rows = scores.rows(budget, ["preset"])
        if rows:
            rows.sort(key=scores.average, reverse=True)
            parts += [f"### {budget:.0%} kept", _main_table(scores, rows, full, compare=True)]
    ablations = [row for budget in scores.budgets for row in scores.rows(budget, ["ablation"])]
    if ablations:
        parts += ["### Ablations", _ablation_table(scores, ablations)]
    return parts


def _questions(scores: Scores) -> str:
    numbers = {scores.n_questions(row) for row in scores.values}
    low, high = min(numbers), max(numbers)
    return f"{low} questions a task" if low == high else f"{low} to {high} questions a task"


def _main_table(scores: Scores, rows: Sequence[Row], full: Row, compare: bool) -> str:
    header = ["method", *(f"`{task}`" for task in scores.tasks), "**average**", "− full cache"]
    header += ["− best other"] if compare else []
    header += ["cells", "KV MiB"]
    best = max(map(scores.average, rows), default=0.0)
    lines = []
    for row in rows:
        average = f"{100 * scores.average(row):.1f}"
        line = [_label(row), *_figures(scores, row)]
        line.append(f"**{average}**" if compare and scores.average(row) == best else average)
        line.append("" if row == full else _difference(scores, row, full))
        if compare:
            line.append(_against_best(scores, row, rows))
        line += [f"{scores.cells[row]:.0f}", f"{scores.mib[row]:.2f}"]
        lines.append(line)
    return _markdown(header, lines)


def _ablation_table(scores: Scores, rows: Sequence[Row]) -> str:
    """One line a method, with its average and the difference to what it changes, per budget."""
    header = ["method", "what is changed"]
    for budget in scores.budgets:
        header += [f"{budget:.0%} kept", "− unchanged"]
    lines = []
    for name in dict.fromkeys(name for name, _ in rows):
        method = METHODS[name]
        line = [f"`{name}`", method.what]
        for budget in scores.budgets:
            row = (name, budget)
            if row not in scores.values:
                line += ["", ""]
                continue
            line += [
                f"{100 * scores.average(row):.1f}",
                _difference(scores, row, (method.base or FULL, budget)),
            ]
        lines.append(line)
    return _markdown(header, lines)


def _label(row: Row) -> str:
    name, budget = row
    method = METHODS.get(name)
    if method is None or method.what == name:
        return f"`{name}`"
    shown = f"`{name}`: {method.what}" if method.kind != "reference" else method.what
    return f"{shown} ({budget:.0%} kept)" if method.kind == "quantized" else shown


def _figures(scores: Scores, row: Row) -> list[str]:
    return ["" if np.isnan(value) else f"{100 * value:.1f}" for value in scores.by_task(row)]


def _difference(scores: Scores, row: Row, other: Row) -> str:
    if other not in scores.values:
        return ""
    return _shown(difference(scores.values[row], scores.values[other]))


def _against_best(scores: Scores, row: Row, rows: Sequence[Row]) -> str:
    others = [other for other in rows if other != row]
    return _difference(scores, row, max(others, key=scores.average)) if others else ""


def _is_quantized(row: Row) -> bool:
    return row[0] in METHODS and METHODS[row[0]].kind == "quantized"


def _shown(interval: Interval | None) -> str:
    if interval is None:
        return ""
    value, low, high = (
        f"{100 * number:+.1f}".replace("-", "−")
        for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    words = ("method", "what is changed")
    aligned = ["---" if title in words else "---:" for title in header]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, aligned, *lines))
