"""The most cells that the cache may have."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from .byte_size import MIB, parse_bytes
from .errors import OptionError

LEAST = 512
"""Cells that a cap must leave: room for a batch and for what is kept of the rest."""

MOST = 2**31 - 1
"""Cells that can be counted."""


@dataclass(frozen=True)
class Cap:
    """A hard limit on the cells of the cache.

    Parameters
    ----------
    limit : int or str
        Cells, or bytes such as ``"512MiB"`` or ``"1.5 GB"``.

    Raises
    ------
    OptionError
        If it is neither, or fewer than `LEAST` cells.
    """

    limit: int | str

    def __post_init__(self) -> None:
        limit = self.limit
        if isinstance(limit, str):
            try:
                parse_bytes("kv_max_cells", limit)
                return
            except OptionError:
                pass
        elif isinstance(limit, Integral) and not isinstance(limit, bool) and LEAST <= limit <= MOST:
            object.__setattr__(self, "limit", int(limit))
            return
        raise OptionError(
            f"kv_max_cells={limit!r}: kv_max_cells must be a whole number of cells of at least "
            f'{LEAST} and at most {MOST}, or a text with bytes such as "512MiB"'
        )

    def cells(self, bytes_per_cell: float) -> int:
        """Return the limit in cells.

        Parameters
        ----------
        bytes_per_cell : float
            What a cell takes, over all layers.

        Raises
        ------
        OptionError
            If the bytes suffice for fewer than `LEAST` cells.
        """
        if isinstance(self.limit, int):
            return self.limit
        cells = int(parse_bytes("kv_max_cells", self.limit) / bytes_per_cell)
        cells = min(cells, MOST)
        if cells < LEAST:
            needed = LEAST * bytes_per_cell / MIB
            raise OptionError(
                f"kv_max_cells={self.limit!r} is {cells} cells of this model and cache type; at "
                f"least {LEAST} are needed, {needed:.1f}MiB"
            )
        return cells
