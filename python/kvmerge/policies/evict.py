"""The control: the same tokens are kept, and nothing is folded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class Evict(Policy):
    """Keep what `FlowMM` keeps and drop the rest.

    What this answers worse than `FlowMM` at the same budget is what folding is worth.

    Parameters
    ----------
    window : int, default 16
        Tokens at the end of the prompt whose queries score and which are kept, 1 to 256.
    sinks : int, default 4
        First tokens, always kept, 0 to 256.
    flow_rows : int, default 64
        Queries sampled per modality to estimate the flow, which is reported and changes nothing,
        1 to 65536.
    """

    name: ClassVar[str] = "evict"

    score: str = field(default="proxy", init=False)
    select: str = field(default="top", init=False)
    match: str = field(default="none", init=False)
    bias: str = field(default="none", init=False)
    keys: str = field(default="keep", init=False)
    tau: float = field(default=1.0, init=False)
