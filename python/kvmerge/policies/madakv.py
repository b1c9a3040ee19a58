"""MadaKV."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class MadaKV(Policy):
    """Split each head's budget by the attention its modalities get (MadaKV, arXiv 2506.15724).

    Per layer and KV head the budget is shared between text and media in proportion to the
    attention that the last tokens give to each; the rest is dropped.  Layers pass on what they
    need more or less than their share to cover `cover` of the attention ("hierarchical
    compensation"); at the end all shares are scaled so that their mean is the budget.

    Parameters
    ----------
    cover : float, default 0.9
        Share of a modality's attention that counts as covered, 0 to 1.
    window : int, default 16
        Tokens at the end of the prompt whose queries score and which are kept, 1 to 256.
    """

    name: ClassVar[str] = "madakv"

    allocate: str = field(default="cover", init=False)
    select: str = field(default="modality", init=False)
    match: str = field(default="none", init=False)
    bias: str = field(default="none", init=False)
    tau: float = field(default=1.0, init=False)
