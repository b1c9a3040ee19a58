"""auto, what to use where nothing else is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class Auto(Policy):
    """Leave text alone and keep every picture as a mosaic of fewer, larger tiles.

    No token of text is merged or dropped while there is room: ``kv_budget`` says what is kept of
    pictures and sound, and a chat without any is not merged at all.  Pictures are cut into groups
    of similar keys.  The next group always goes to the picture in which a token is farthest from
    its group, so that a white page takes a few cells and a page of print many; each keeps at least
    `floor`.

    Only where ``kv_max_cells`` leaves less room than text and the pictures' share take, both have
    to shrink: pictures first, down to their floor and an eighth of their part of the cells.  Text
    keeps its last tokens, its first ones and those that get most attention, each as it is; words
    are never averaged.

    Parameters
    ----------
    allocate : {"uniform", "early", "pyramid", "cover", "entropy"}
        How many of the pictures' cells each layer gets; see `Policy`.
    floor : int, default 1
        Cells that every picture keeps at least, 0 to 1024.
    members : int, default 0
        Tokens that a cell takes up beside its own, 0 to 65536; 0 is all of its group.
    window : int, default 16
        Tokens at the end of the prompt whose queries score and, with as many of the text before,
        fit the bias, 1 to 256.
    neighbours : int, default 21
        Tokens over which scores are pooled, odd, 1 to 63.  A question looks for words that it
        repeats, and what it is answered with stands some tokens after them: where so many are kept
        together, facts in a text that has to shrink are still found.
    recent : float, default 0.5
        Share of the cells of text that goes to its last tokens where text has to shrink, 0 to 1.
    """

    name: ClassVar[str] = "auto"

    select: str = field(default="media", init=False)
    match: str = field(default="segment", init=False)
    allocate: str = "uniform"
    tau: float = field(default=1.0, init=False)
    bias: str = "fit"
    neighbours: int = 21
    value_norm: bool = True
    keep: int = 4
    sinks: int = 4
    floor: int = 1
    pivots: float = 0.0
    recent: float = 0.5
    members: int = 0
