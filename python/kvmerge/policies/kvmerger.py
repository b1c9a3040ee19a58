"""KVMerger."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class KVMerger(Policy):
    """Join runs of neighbours with similar keys (KVMerger, arXiv 2407.08454).

    Half of the budget keeps the highest scores as they are.  In the rest, the most similar
    neighbours join until the budget is met (the paper fixes the cosine and lets the size follow);
    a run's members are weighted with a Gaussian of their distance to its highest score.

    Parameters
    ----------
    window : int, default 16
        Tokens at the end of the prompt whose queries score and which are kept, 1 to 256.
    """

    name: ClassVar[str] = "kvmerger"

    select: str = field(default="runs", init=False)
    fold: str = field(default="gaussian", init=False)
    match: str = field(default="segment", init=False)
    bias: str = field(default="none", init=False)
    tau: float = field(default=1.0, init=False)
