"""mosaic, this package's own method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class Mosaic(Policy):
    """Keep every picture as a mosaic of fewer, larger tiles that cover all of it.

    What the question does not point at is what a later question asks for, so choosing the
    survivors by importance alone is not enough.  Each picture is cut into groups of similar keys
    (farthest-point seeds, each token to its nearest), and every group becomes one cell: the mean
    of the keys and values of the seed and the `members` most like it, with a bias that gives it
    their attention; what is less alike is left out, because it would blur the cell.  No group
    crosses the border of a picture, and every picture keeps at least `floor` cells.  Text stays as
    it is as far as it fits in its share; what does not fit is grouped in the same way, and there a
    group may hold like words from anywhere in the text.  The first quarter of the layers keeps
    twice the mean: words and pictures are found there by what they are, later layers look at a few
    places.

    The defaults are those that kept most answers in the quality table (``docs/quality.md``).

    Parameters
    ----------
    allocate : {"early", "uniform", "pyramid", "cover", "entropy"}
        How many cells each layer gets; see `Policy`.
    floor : int, default 1
        Cells that every picture keeps at least, 0 to 1024.
    text : float, default 0.9
        Share of the budget that text may take, 0 to 1; the pictures' floor and an eighth of their
        proportional share go first.
    text_pivots : float, default 0.0
        Share of the cells of text for its most important tokens, the rest for groups, 0 to 1.
    pivots : float, default 0.0
        Share of the pictures' cells for their most important tokens, the rest for groups, 0 to 1.
    members : int, default 2
        Tokens that a cell takes up beside its own, 0 to 65536; 0 is all of its group.
    window : int, default 16
        Tokens at the end of the prompt whose queries score and, with as many of the text before,
        fit the bias, 1 to 256.
    keep : int, default 4
        Last tokens, always kept, 0 to 256; 0 is as many as `window`.
    neighbours : int, default 3
        Tokens over which scores are pooled, odd, 1 to 63.
    """

    name: ClassVar[str] = "mosaic"

    select: str = field(default="mosaic", init=False)
    match: str = field(default="segment", init=False)
    allocate: str = "early"
    tau: float = field(default=1.0, init=False)
    bias: str = "fit"
    neighbours: int = 3
    value_norm: bool = True
    keep: int = 4
    sinks: int = 1
    floor: int = 1
    pivots: float = 0.0
    text: float = 0.9
    text_pivots: float = 0.0
    members: int = 2
