"""H2O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Keep the last tokens and the heavy hitters (H2O, arXiv 2306.14048).

    Scores are the attention from every token of the prompt, added up exactly while it is read.

    Parameters
    ----------
    recent : float, default 0.5
        Share of the budget that goes to the last tokens, 0 to 1.
    """

    name: ClassVar[str] = "h2o"

    score: str = field(default="all", init=False)
    match: str = field(default="none", init=False)
    bias: str = field(default="none", init=False)
    tau: float = field(default=1.0, init=False)
    sinks: int = 0
    recent: float = 0.5
