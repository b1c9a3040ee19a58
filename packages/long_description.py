"""The README as an index of packages shows it, where its links to files would lead nowhere.

The build asks for it (``tool.scikit-build.metadata.readme`` in pyproject.toml).  No address of the
project is known to the build: a link to a file becomes the file's name, which is to be found in the
source distribution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"

_TO_A_FILE = re.compile(r"\[([^]]+)\]\((?![a-z]+:)([^)#]*)[^)]*\)")
_NOTE = "\nThe files that are named here come with the source distribution.\n"


def without_links_to_files(text: str) -> str:
    """Return a text in which files are named where it had links to them."""

    def name(link: re.Match[str]) -> str:
        shown, file = link.groups()
        return f"`{file}`" if shown in (file, f"`{file}`") else f"{shown}: `{file}`"

    return _TO_A_FILE.sub(name, text)


def dynamic_metadata(
    field: str, settings: Mapping[str, Any], project: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return the field ``readme``, as scikit-build-core asks for it."""
    text = without_links_to_files(README.read_text(encoding="utf-8")) + _NOTE
    return {"content-type": "text/markdown", "text": text}
