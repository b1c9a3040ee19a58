"""Where the native libraries are, and which release of llama-cpp-python they are built from."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..errors import LibraryError

LLAMA_CPP_PYTHON = "0.3.36"
"""The version of llama-cpp-python whose llama.cpp our libraries are built from."""

BUILD_AGAIN = (
    "install the package again (`pip install .`), or set KVMERGE_LIB_PATH to the folder of a "
    "patched build"
)


def library_folder() -> Path:
    """Return the folder of our libraries: ``KVMERGE_LIB_PATH``, or ``lib`` in the package."""
    override = os.environ.get("KVMERGE_LIB_PATH")
    return Path(override).absolute() if override else Path(__file__).resolve().parents[1] / "lib"


def library_file(name: str) -> Path:
    """Return the file of a library, such as ``"llama"``.

    Raises
    ------
    LibraryError
        If there is none.
    """
    folder = library_folder()
    if sys.platform == "win32":
        candidates = [folder / f"{name}.dll", folder / f"lib{name}.dll"]
    elif sys.platform == "darwin":
        candidates = [folder / f"lib{name}.dylib", folder / f"lib{name}.so"]
    else:
        candidates = [folder / f"lib{name}.so"]
    for file in candidates:
        if file.exists():
            return file
    raise LibraryError(f"{candidates[0].name} is not in {folder}: {BUILD_AGAIN}")
