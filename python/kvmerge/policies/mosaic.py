"""mosaic, this package's own method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class Mosaic(Policy):
    """Keep every picture as a mosaic of fewer, larger tiles that cover all of it.

    What the question does not point at is what a later question asks for, so choosing the
    survivors by importance alone is not enough.  Part of the pictures' cells goes to their most
    important tokens, which stay as they are.  The rest of each picture is cut into groups of
    similar keys (farthest-point seeds, each token to its nearest), and every group becomes one
    cell: the mean of its keys and values, with a bias that gives it the attention of the group.
    No group crosses the border of a picture, and every picture keeps at least `floor` cells.

    Parameters
    ----------
    pivots : float, default 0.5
        Share of the pictures' cells for their most important tokens, 0 to 1.
    floor : int, default 1
        Cells that every picture keeps at least, 0 to 1024.
    text : float, default 0.5
        Share of the budget that text may take when not all of it fits, 0 to 1.
    text_pivots : float, default 0.75
        Share of the cells of text for its most important tokens, 0 to 1.
    window : int, default 16
        Tokens at the end of the prompt whose queries score and which are kept, 1 to 256.
    neighbours : int, default 3
        Tokens over which scores are pooled, odd, 1 to 63.
    """

    name: ClassVar[str] = "mosaic"

    select: str = field(default="mosaic", init=False)
    match: str = field(default="segment", init=False)
    tau: float = field(default=1.0, init=False)
    bias: str = "fit"
    neighbours: int = 3
    value_norm: bool = True
