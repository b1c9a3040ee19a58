"""D2O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class D2O(Policy):
    """Select as H2O, fold what is similar enough and drop the rest (D2O, arXiv 2406.13035).

    A token is folded into its nearest kept one when their keys are at least as similar as the mean
    of all such pairs, with weights that grow with the exponential of the similarity.

    Parameters
    ----------
    recent : float, default 0.5
        Share of the budget that goes to the last tokens, 0 to 1.
    """

    name: ClassVar[str] = "d2o"

    score: str = field(default="all", init=False)
    match: str = field(default="any", init=False)
    fold: str = field(default="exp", init=False)
    bias: str = field(default="none", init=False)
    tau: float = field(default=1.0, init=False)
    sinks: int = 0
    recent: float = 0.5
