"""What the header that ships with the package says: declarations, words, options.

It is read as text, so that nothing here waits for the library, or stands in Python a second time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from ..errors import LibraryError

_TABLE = '#include "kvmerge-options.def"'

_ROW = re.compile(
    r"KVMERGE_OPTION\((\w+), (\w+), ([^,]+), ([^,]+), ([^,]+), "
    r'"([^"]*)",((?:\s*"(?:[^"\\]|\\.)*")+)\)'
)


@dataclass(frozen=True)
class Row:
    """An option of policies, as ``kvmerge-options.def`` has it.

    Attributes
    ----------
    type, field : str
        Type and name of the field of ``struct kvmerge_params``.
    preset, least, most : str
        The default and the range: numbers, or names of an enum.
    option : str
        The name in Python.
    words : tuple of str
        What a choice may be, in the order of its values; empty for what is no choice.
    description : str
        What it is.
    """

    type: str
    field: str
    preset: str
    least: str
    most: str
    option: str
    words: tuple[str, ...]
    description: str


def folder() -> Path:
    """Return the folder of the header: that of the checkout we run from, or the shipped one."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parents[1] / "cpp" / "include"
    return checkout if checkout.exists() else package / "include"


@cache
def _text(name: str) -> str:
    """Return a file of the folder without its comments."""
    file = folder() / name
    try:
        return re.sub(r"//.*", "", file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LibraryError(f"{file} cannot be read ({error}): install the package again") from error


def api_version() -> int:
    """Return ``KVMERGE_API_VERSION``."""
    version = re.search(r"#define\s+KVMERGE_API_VERSION\s+(\d+)", _text("kvmerge.h"))
    if version is None:
        raise LibraryError(
            f"kvmerge.h in {folder()} defines no KVMERGE_API_VERSION: install the package again"
        )
    return int(version.group(1))


def declarations() -> str:
    """Return the header as cffi takes it: no preprocessor lines, nothing that is C++ only."""
    fields = "\n".join(f"{row.type} {row.field};" for row in rows())
    header = _text("kvmerge.h").replace(_TABLE, fields)
    header = re.sub(r"#ifdef __cplusplus.*?#endif", "", header, flags=re.DOTALL)
    header = re.sub(r"#(?:[^\n\\]|\\\n|\\.)*", "", header)
    return header.replace("KVMERGE_API ", "")


@lru_cache(maxsize=1)
def rows() -> tuple[Row, ...]:
    """Return the table of options."""
    table = _text("kvmerge-options.def")
    found = []
    for type_, field, preset, least, most, name, strings in _ROW.findall(table):
        option, _, words = name.partition(": ")
        description = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', strings)).replace('\\"', '"')
        choice = tuple(words.split(", ")) if words else _choices(field)
        found.append(Row(type_, field, preset, least, most, option, choice, description))
    if not found or len(found) != table.count("KVMERGE_OPTION("):
        raise LibraryError(f"kvmerge-options.def in {folder()} has rows that cannot be read")
    return tuple(found)


def _choices(field: str) -> tuple[str, ...]:
    """Return the words of the enum of this field: names without what they have in common."""
    enum = re.search(rf"enum kvmerge_{field} \{{(.*?)\}}", _text("kvmerge.h"), re.DOTALL)
    if enum is None:
        return ()
    names = re.findall(rf"KVMERGE_{field.upper()}_(\w+)\s*=\s*(\d+)", enum.group(1))
    if [int(value) for _, value in names] != list(range(len(names))):
        raise LibraryError(f"enum kvmerge_{field} in {folder()} does not count from 0")
    return tuple(name.lower() for name, _ in names)
