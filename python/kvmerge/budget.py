"""How much of the cache is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real

from .errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """What a merge keeps: a fraction of the tokens, or a number of cells.

    Parameters
    ----------
    kept : float or int
        A float in (0, 1] is the fraction of the tokens that is **kept**; a whole number of at
        least 1 is the number of cells that are kept.  What it is of is for the policy to say: all
        tokens, or those of pictures and sound.

    Raises
    ------
    BudgetError
        If it is neither.
    """

    kept: float | int

    def __post_init__(self) -> None:
        kept = self.kept
        if not isinstance(kept, bool):
            if isinstance(kept, Integral) and kept >= 1:
                object.__setattr__(self, "kept", int(kept))
                return
            if isinstance(kept, Real) and not isinstance(kept, Integral) and 0 < kept <= 1:
                object.__setattr__(self, "kept", float(kept))
                return
        raise BudgetError(
            f"kv_budget={kept!r}: kv_budget is what is kept, either a float in (0, 1], the "
            "fraction of the tokens (0.2 keeps a fifth), or an int of at least 1, the number of "
            "cells (512 keeps 512)"
        )

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever merged."""
        return isinstance(self.kept, float) and self.kept == 1.0

    def cells(self, n_tokens: int, at_least: int = 0) -> int:
        """Return the cells that `n_tokens` tokens are merged down to.

        Parameters
        ----------
        n_tokens : int
            Tokens seen.
        at_least : int
            A fraction never gives fewer cells than this: a short chat is not worth merging.
        """
        if isinstance(self.kept, int):
            return min(self.kept, n_tokens)
        # As a decimal, not as a binary fraction: 0.2 of 10 tokens is 2 cells, not 3.
        share = math.ceil(Fraction(repr(self.kept)) * n_tokens)
        return min(max(share, at_least), n_tokens)

    def __str__(self) -> str:
        if isinstance(self.kept, int):
            return f"{self.kept} cells kept"
        return f"{self.kept:.4g} of the tokens kept"
