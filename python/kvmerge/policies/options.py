"""The options of policies: what each accepts, and where it goes in ``struct kvmerge_params``.

All that is said of one stands in one row of ``kvmerge-options.def``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from textwrap import wrap
from typing import Any

from ..errors import did_you_mean
from ..native.header import Row, rows


@dataclass(frozen=True)
class Word:
    """An option that is one of some words."""

    param: str
    description: str
    default: str
    values: Mapping[str, int]

    @property
    def accepted(self) -> str:
        """What it may be, in words."""
        return "{" + ", ".join(map(repr, self.values)) + "}"

    def problem(self, value: Any) -> str | None:
        """Return what is accepted, if `value` is not."""
        if isinstance(value, str) and value in self.values:
            return None
        words = ", ".join(repr(word) for word in self.values)
        return f"one of {words}.{did_you_mean(value, self.values)}"

    def native(self, value: Any) -> int:
        """Return the value of the C field."""
        return self.values[value]


@dataclass(frozen=True)
class Whole:
    """An option that is a whole number in a range."""

    param: str
    description: str
    default: int
    low: int
    high: int

    @property
    def accepted(self) -> str:
        """What it may be, in words."""
        return f"int from {self.low} to {self.high}"

    def problem(self, value: Any) -> str | None:
        """Return what is accepted, if `value` is not."""
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if whole and self.low <= int(value) <= self.high:
            return None
        return f"a whole number from {self.low} to {self.high}"

    def native(self, value: Any) -> int:
        """Return the value of the C field."""
        return int(value)


@dataclass(frozen=True)
class Number:
    """An option that is a number in a range."""

    param: str
    description: str
    default: float
    low: float
    high: float

    @property
    def accepted(self) -> str:
        """What it may be, in words."""
        return f"float from {self.low:g} to {self.high:g}"

    def problem(self, value: Any) -> str | None:
        """Return what is accepted, if `value` is not."""
        number = isinstance(value, Real) and not isinstance(value, bool)
        # A comparison with NaN is false.
        if number and self.low <= float(value) <= self.high:
            return None
        return f"a number from {self.low:g} to {self.high:g}"

    def native(self, value: Any) -> float:
        """Return the value of the C field."""
        return float(value)


@dataclass(frozen=True)
class Flag:
    """An option that is True or False."""

    param: str
    description: str
    default: bool

    @property
    def accepted(self) -> str:
        """What it may be, in words."""
        return "bool"

    def problem(self, value: Any) -> str | None:
        """Return what is accepted, if `value` is not."""
        return None if isinstance(value, bool) else "True or False"

    def native(self, value: Any) -> bool:
        """Return the value of the C field."""
        return bool(value)


Option = Word | Whole | Number | Flag


def _option(row: Row) -> Option:
    """Return the option that a row of the table means."""
    if row.words:
        values = {word: value for value, word in enumerate(row.words)}
        # The default has the name of a word in the enum, or is false or true.
        named = ("false", "true") if row.type == "bool" else row.words
        prefix = f"KVMERGE_{row.field.upper()}_"
        preset = row.words[named.index(row.preset.removeprefix(prefix).lower())]
        return Word(row.field, row.description, preset, values)
    if row.type == "bool":
        return Flag(row.field, row.description, row.preset == "true")
    if row.type == "float":
        least, preset, most = (float(text) for text in (row.least, row.preset, row.most))
        return Number(row.field, row.description, preset, least, most)
    return Whole(row.field, row.description, int(row.preset), int(row.least), int(row.most))


OPTIONS: dict[str, Option] = {row.option: _option(row) for row in rows()}
"""Every option by name; together they are the fields of ``struct kvmerge_params``."""


def default(name: str) -> Any:
    """Return the default of an option."""
    return OPTIONS[name].default


def described() -> str:
    """Return the options as a docstring lists parameters."""
    lines = []
    for name, option in OPTIONS.items():
        lines.append(f"{name} : {option.accepted}, default {option.default!r}")
        lines += wrap(option.description, 96, initial_indent=" " * 4, subsequent_indent=" " * 4)
    return "\n".join(lines)
