"""How much of the cache is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real

from .errors import BudgetError

MEASURED = "auto"
"""The budget that is found by what a merge does: `SHARES` and `TOLERANCE`."""

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
"""What ``kv_budget="auto"`` tries to keep, in this order."""

TOLERANCE = 0.05
"""How far a merge of ``kv_budget="auto"`` may move what attention returns, as a share of it."""


@dataclass(frozen=True)
class Budget:
    """What a merge keeps: a fraction of the tokens, a number of cells, or as few as do no harm.

    Parameters
    ----------
    kept : float, int or "auto"
        A float in (0, 1] is the fraction of the tokens that is **kept**; a whole number of at
        least 1 is the number of cells that are kept; ``"auto"`` the smallest of `SHARES` with which
        the measured error is at most `TOLERANCE`, or everything where it is with none.  What it is
        of is for the policy to say: all tokens, or those of pictures and sound.

    Raises
    ------
    BudgetError
        If it is none of them.
    """

    kept: float | int | str

    def __post_init__(self) -> None:
        kept = self.kept
        if isinstance(kept, str) and kept == MEASURED:
            return
        if not isinstance(kept, bool):
            if isinstance(kept, Integral) and kept >= 1:
                object.__setattr__(self, "kept", int(kept))
                return
            if isinstance(kept, Real) and not isinstance(kept, Integral) and 0 < kept <= 1:
                object.__setattr__(self, "kept", float(kept))
                return
        raise BudgetError(
            f"kv_budget={kept!r}: kv_budget is what is kept, either a float in (0, 1], the "
            "fraction of the tokens (0.2 keeps a fifth), an int of at least 1, the number of "
            "cells (512 keeps 512), or 'auto', as few as the measured error allows"
        )

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever merged."""
        return isinstance(self.kept, float) and self.kept == 1.0

    @property
    def is_measured(self) -> bool:
        """Whether it is found by what a merge does."""
        return self.kept == MEASURED

    @property
    def is_cells(self) -> bool:
        """Whether it is a number of cells."""
        return isinstance(self.kept, int)

    def cells(self, n_tokens: int, at_least: int = 0) -> int:
        """Return the cells that `n_tokens` tokens are merged down to.

        Parameters
        ----------
        n_tokens : int
            Tokens seen.
        at_least : int
            A fraction never gives fewer cells than this: a short chat is not worth merging.

        Raises
        ------
        BudgetError
            If that is not known before it is measured.
        """
        if isinstance(self.kept, int):
            return min(self.kept, n_tokens)
        if isinstance(self.kept, str):
            raise BudgetError(
                f"kv_budget={self.kept!r}: how many cells that keeps depends on what is read, "
                "and is not known before: it must be a fraction or a number of cells here"
            )
        # As a decimal, not as a binary fraction: 0.2 of 10 tokens is 2 cells, not 3.
        share = math.ceil(Fraction(repr(self.kept)) * n_tokens)
        return min(max(share, at_least), n_tokens)

    def __str__(self) -> str:
        if isinstance(self.kept, str):
            return f"as few kept as an error of {TOLERANCE:g} allows"
        if isinstance(self.kept, int):
            return f"{self.kept} cells kept"
        return f"{self.kept:.4g} of the tokens kept"


def shares_from(at_least: float) -> tuple[Budget, ...]:
    """Return what ``kv_budget="auto"`` tries, the smallest first, of at least a share."""
    return tuple(Budget(share) for share in SHARES if share >= at_least)
