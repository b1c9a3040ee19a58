"""MEDA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class MEDA(Policy):
    """Give layers cells by the entropy of their cross-modal attention (MEDA, arXiv 2502.17599).

    Inside a layer it selects as H2O and folds what is dropped into its nearest kept token.

    Parameters
    ----------
    recent : float, default 0.5
        Share of the budget that goes to the last tokens, 0 to 1.
    """

    name: ClassVar[str] = "meda"

    score: str = field(default="all", init=False)
    allocate: str = field(default="entropy", init=False)
    match: str = field(default="any", init=False)
    bias: str = field(default="none", init=False)
    tau: float = field(default=1.0, init=False)
    sinks: int = 0
    recent: float = 0.5
