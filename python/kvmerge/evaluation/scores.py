"""The answers of each method at each budget as an array, in one order for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .answers import Answer
from .methods import METHODS
from .samples import MODES

Row = tuple[str, float]
"""Name of a method, and its budget."""


@dataclass(frozen=True)
class Scores:
    """All answers of one collection in one mode.

    Attributes
    ----------
    collection, mode : str
        Which.
    tasks : tuple of str
        Columns.
    values : dict
        Points of each row, [samples, tasks]; NaN where there is no answer.
    tokens, cells, mib : dict
        Tokens of the prompt, cells, and MiB of K and V of each row, as means over its answers.
    """

    collection: str
    mode: str
    tasks: tuple[str, ...]
    values: dict[Row, npt.NDArray[np.float64]]
    tokens: dict[Row, float]
    cells: dict[Row, float]
    mib: dict[Row, float]

    @cached_property
    def budgets(self) -> tuple[float, ...]:
        """The budgets below 1 that were asked for, the largest first."""
        found = {
            budget
            for name, budget in self.values
            if budget < 1 and name in METHODS and METHODS[name].budgets is None
        }
        return tuple(sorted(found, reverse=True))

    def rows(self, budget: float, kinds: Iterable[str]) -> list[Row]:
        """Return the rows of a budget whose methods are of some kinds, in the table's order."""
        kinds = tuple(kinds)
        return [
            (name, budget)
            for name, method in METHODS.items()
            if method.kind in kinds and (name, budget) in self.values
        ]

    def by_task(self, row: Row) -> npt.NDArray[np.float64]:
        """Return the mean points of every task, [tasks]."""
        values = self.values[row]
        n = (~np.isnan(values)).sum(axis=0)
        return np.where(n > 0, np.nansum(values, axis=0) / np.maximum(n, 1), np.nan)

    def average(self, row: Row) -> float:
        """Return the mean over the tasks."""
        return float(np.nanmean(self.by_task(row)))

    def n_questions(self, row: Row) -> int:
        """Return the number of answers of the task that has fewest."""
        return int((~np.isnan(self.values[row])).sum(axis=0).min())


def collect(answers: Iterable[Answer]) -> list[Scores]:
    """Sort answers into collections and modes."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.mode, answer.collection), []).append(answer)
    order = list(MODES)
    modes_first = sorted(groups, key=lambda key: order.index(key[0]))
    return [_scores(mode, collection, groups[mode, collection]) for mode, collection in modes_first]


def _scores(mode: str, collection: str, answers: list[Answer]) -> Scores:
    tasks = list(dict.fromkeys(answer.task for answer in answers))
    samples = {name: i for i, name in enumerate(dict.fromkeys(a.sample for a in answers))}
    rows: dict[Row, list[Answer]] = {}
    for answer in answers:
        rows.setdefault((answer.method, answer.budget), []).append(answer)
    values = {}
    for row, given in rows.items():
        values[row] = np.full((len(samples), len(tasks)), np.nan)
        for answer in given:
            values[row][samples[answer.sample], tasks.index(answer.task)] = answer.score

    def means(value: Callable[[Answer], float]) -> dict[Row, float]:
        return {row: float(np.mean([value(a) for a in given])) for row, given in rows.items()}

    return Scores(
        collection,
        mode,
        tuple(tasks),
        values,
        tokens=means(lambda answer: answer.tokens),
        cells=means(lambda answer: answer.cells),
        mib=means(lambda answer: answer.kv_bytes / 2**20),
    )
