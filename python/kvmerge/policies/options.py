"""The options of policies: what each accepts, and where it goes in ``struct kvmerge_params``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ..errors import did_you_mean


@dataclass(frozen=True)
class Word:
    """An option that is one of some words."""

    param: str
    default: str
    values: Mapping[str, int]

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
    default: int
    low: int
    high: int

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
    default: float
    low: float = 0.0
    high: float = 1.0

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
    default: bool

    def problem(self, value: Any) -> str | None:
        """Return what is accepted, if `value` is not."""
        return None if isinstance(value, bool) else "True or False"

    def native(self, value: Any) -> bool:
        """Return the value of the C field."""
        return bool(value)


OPTIONS: dict[str, Word | Whole | Number | Flag] = {
    "score": Word("score", "proxy", {"proxy": 0, "position": 1, "all": 2}),
    "allocate": Word(
        "allocate",
        "uniform",
        {"uniform": 0, "pyramid": 1, "cover": 2, "entropy": 3, "early": 4},
    ),
    "select": Word(
        "select",
        "top",
        {"top": 0, "text": 1, "modality": 2, "mosaic": 3, "runs": 4, "media": 5},
    ),
    "match": Word(
        "match",
        "flow",
        {"none": 0, "any": 1, "modality": 2, "flow": 3, "segment": 4},
    ),
    "fold": Word("fold", "mean", {"mean": 0, "pivot": 1, "weighted": 2, "exp": 3, "gaussian": 4}),
    "bias": Word("bias", "count", {"none": 0, "count": 1, "fit": 2}),
    "keys": Word("move_keys", "move", {"keep": 0, "move": 1}),
    "pool": Word("pool_max", "mean", {"mean": 0, "max": 1}),
    "value_norm": Flag("value_norm", False),
    "window": Whole("n_window", 16, 1, 256),
    "keep": Whole("n_keep", 0, 0, 256),
    "sinks": Whole("n_sink", 4, 0, 256),
    "flow_rows": Whole("n_flow_rows", 64, 1, 65536),
    "neighbours": Whole("n_pool", 1, 1, 63),
    "floor": Whole("n_floor", 1, 0, 1024),
    "members": Whole("n_member", 0, 0, 65536),
    "theta": Number("theta", 0.25),
    "tau": Number("tau", 0.8),
    "recent": Number("recent", 0.0),
    "cover": Number("cover", 0.9),
    "similarity": Number("similarity", -1.0, -1.0),
    "pivots": Number("pivots", 0.5),
    "text": Number("text", 0.5),
    "text_pivots": Number("text_pivots", 0.75),
}
"""Every option by name; together they are the fields of ``struct kvmerge_params``."""
