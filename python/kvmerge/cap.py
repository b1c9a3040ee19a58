"""The most cells that the cache may have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral

from .errors import OptionError

LEAST = 512
"""Cells that a cap must leave: room for a batch and for what is kept of the rest."""

_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "ki": 1024,
    "mi": 1024**2,
    "gi": 1024**3,
}


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
            if self._bytes(limit) is not None:
                return
        elif isinstance(limit, Integral) and not isinstance(limit, bool) and limit >= LEAST:
            object.__setattr__(self, "limit", int(limit))
            return
        raise OptionError(
            f"kv_max_cells={limit!r}: kv_max_cells must be a whole number of cells of at least "
            f'{LEAST}, or a text with bytes such as "512MiB"'
        )

    @staticmethod
    def _bytes(text: str) -> int | None:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text, re.IGNORECASE)
        if found is None:
            return None
        return int(float(found[1]) * _UNITS[(found[2] or "").lower()])

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
        cells = int((self._bytes(self.limit) or 0) / bytes_per_cell)
        if cells < LEAST:
            needed = LEAST * bytes_per_cell / 1024**2
            raise OptionError(
                f"kv_max_cells={self.limit!r} is {cells} cells of this model and cache type; at "
                f"least {LEAST} are needed, {needed:.1f}MiB"
            )
        return cells
