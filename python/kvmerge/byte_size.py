"""Amounts of memory, read and written."""

from __future__ import annotations

import re

from .errors import OptionError

MIB = 1024 * 1024

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for ending, base in (("iB", 1024), ("B", 1000))
}
_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", re.IGNORECASE)


def parse_bytes(option: str, text: str) -> int:
    """Return the bytes that a text such as ``"8GiB"`` means.

    Parameters
    ----------
    option : str
        Name of the option it is for, as the user wrote it.
    text : str
        A number and a unit: B, KiB, MiB, GiB, TiB, or KB, MB, GB, TB for powers of 1000.

    Raises
    ------
    OptionError
        If it means none.
    """
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    match = _FORM.fullmatch(text.strip())
    size = units.get(match[2].lower()) if match else None
    n_bytes = 0 if match is None or size is None else int(float(match[1]) * size)
    if n_bytes < 1:
        raise OptionError(
            f"{option} {text!r} is not an amount of memory: write a number and one of "
            "B, KiB, MiB, GiB, TiB (or KB, MB, GB, TB), such as 8GiB"
        )
    return n_bytes
