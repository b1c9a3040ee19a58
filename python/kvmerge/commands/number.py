"""Numbers on the command line: each in a range, which is said where a number is not in it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ..cap import Cap

_T = TypeVar("_T")

MOST_TOKENS = 2**31 - 1
"""llama.cpp counts tokens, cells and positions in 32 bits."""
MOST_THREADS = 512
"""``GGML_MAX_N_THREADS``; ggml aborts beyond."""
MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`: the ``type`` of an option.

    Parameters
    ----------
    low, high : int
        The range, both included.
    meaning : str
        What is special about `low`, such as ``"0 is as needed"``.
    """

    low: int
    high: int
    meaning: str = ""

    def __str__(self) -> str:
        meaning = f" ({self.meaning})" if self.meaning else ""
        return f"a whole number from {self.low} to {self.high}{meaning}"

    def __call__(self, text: str) -> int:
        """Return the number that a text means."""
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not self.low <= number <= self.high:
            raise argparse.ArgumentTypeError(f"must be {self}, not {shown(text)}")
        return number


def listed(kind: Callable[[str], _T]) -> Callable[[str], tuple[_T, ...]]:
    """Return the ``type`` of an option that takes several values with commas between them."""

    def parse(text: str) -> tuple[_T, ...]:
        items = [item.strip() for item in text.split(",") if item.strip()]
        if not items:
            raise argparse.ArgumentTypeError("it names nothing")
        return tuple(dict.fromkeys(kind(item) for item in items))

    return parse


def kept(text: str) -> float | int:
    """Return what ``kv_budget`` may be: a whole number of cells, or a fraction."""
    from ..budget import Budget
    from ..errors import BudgetError

    try:
        return Budget(int(text) if text.strip().isdecimal() else float(text)).kept
    except (BudgetError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            "must be what is kept, a fraction of the tokens in (0, 1] such as 0.2 or a whole "
            f"number of cells such as 512, not {shown(text)}"
        ) from None


def kept_or_measured(text: str) -> float | int | str:
    """Return what ``kv_budget`` may be: also ``auto``."""
    from ..budget import MEASURED

    return MEASURED if text == MEASURED else kept(text)


def cap(text: str) -> Cap:
    """Return what ``kv_max_cells`` may be: a whole number of cells, or bytes."""
    from ..cap import Cap
    from ..errors import OptionError

    try:
        return Cap(int(text) if text.strip().isdecimal() else text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:  # of more digits than Python reads
        raise argparse.ArgumentTypeError(f"must be fewer cells than {shown(text)}") from None


def temperature(text: str) -> float:
    """Return a temperature of sampling, 0 to 2."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 2:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 2, not {shown(text)}")
    return number


def fraction(text: str) -> float:
    """Return a fraction between 0 and 1, neither of which it may be."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(
            f"must be a fraction between 0 and 1 such as 0.2, not {shown(text)}"
        )
    return number


def cosine(text: str) -> float:
    """Return a cosine above 0 and at most 1."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(
            f"must be a cosine above 0 and at most 1 such as 0.9, not {shown(text)}"
        )
    return number


def amount(text: str) -> int:
    """Return the bytes that a text such as ``"8GiB"`` means."""
    from ..byte_size import parse_bytes
    from ..errors import OptionError

    try:
        return parse_bytes("", text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from None


def shown(text: str) -> str:
    """Return a text as it was written, cut off where it is long."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
