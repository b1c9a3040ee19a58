"""SnapKV and PyramidKV."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keep what the last tokens attend to, pooled over neighbours (SnapKV, arXiv 2404.14469).

    Parameters
    ----------
    window : int, default 16
        Tokens at the end of the prompt whose queries score and which are kept, 1 to 256.
    neighbours : int, default 5
        Tokens over which scores are pooled, odd, 1 to 63.
    pool : {"max", "mean"}
        How they are pooled.
    """

    name: ClassVar[str] = "snapkv"

    match: str = field(default="none", init=False)
    bias: str = field(default="none", init=False)
    tau: float = field(default=1.0, init=False)
    sinks: int = 0
    neighbours: int = 5
    pool: str = "max"


@dataclass(frozen=True, kw_only=True)
class Pyramid(SnapKV):
    """`SnapKV` with more cells for early layers than for late ones (PyramidKV, arXiv 2406.02069).

    The number falls linearly with depth; its mean over the layers is the budget.
    """

    name: ClassVar[str] = "pyramid"

    allocate: str = field(default="pyramid", init=False)
