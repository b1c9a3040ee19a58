"""LOOK-M."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class LookM(Policy):
    """Keep text before everything else, fold the rest into it (LOOK-M, arXiv 2406.18139).

    Scores are the attention from every token of the prompt, added up exactly while it is read.
    Text outranks media; a token that is not kept is folded into the kept one whose key is nearest
    by cosine.

    Parameters
    ----------
    fold : {"pivot", "mean", "weighted"}
        Weights of the members: half each and the rest for the kept one (the authors' best), equal,
        or by similarity.
    recent : float, default 0.1
        Share of the budget that goes to the last tokens, 0 to 1.
    """

    name: ClassVar[str] = "look-m"

    score: str = field(default="all", init=False)
    select: str = field(default="text", init=False)
    match: str = field(default="any", init=False)
    bias: str = field(default="none", init=False)
    tau: float = field(default=1.0, init=False)
    sinks: int = 0
    fold: str = "pivot"
    recent: float = 0.1
