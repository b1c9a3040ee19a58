"""StreamingLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """Keep the first and the last tokens (StreamingLLM, arXiv 2309.17453).

    Parameters
    ----------
    sinks : int, default 4
        First tokens, always kept, 0 to 256.
    """

    name: ClassVar[str] = "streaming"

    score: str = field(default="position", init=False)
    match: str = field(default="none", init=False)
    bias: str = field(default="none", init=False)
    tau: float = field(default=1.0, init=False)
