"""Find ``llama_cpp``, the Python layer over the libraries.

The package carries a copy of the release that its libraries are built from.  Where
llama-cpp-python itself is installed in that version, ``import llama_cpp`` gives the installed one;
else it gives the copy, also where another version is installed: that one would disagree with the
libraries about the layout of structs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

NAME = "llama_cpp"
CARRIED = Path(__file__).resolve().parents[1] / "_vendor" / NAME
"""Folder of the copy."""


def stated_version(package: Path) -> str | None:
    """Return what ``__init__.py`` of a package says its version is, without running it."""
    try:
        text = (package / "__init__.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^__version__ = [\"'](.+)[\"']", text, re.MULTILINE)
    return found.group(1) if found else None


def installed() -> Path | None:
    """Return the folder of the ``llama_cpp`` that Python finds without us, of whatever version."""
    for finder in sys.meta_path:
        if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec(NAME, None)
        # A folder of that name that is no package has no origin.
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent
    return None


class _Loader(SourceFileLoader):
    """Runs the package inside what makes the libraries ready."""

    loading: Callable[[], AbstractContextManager[None]]

    def exec_module(self, module: ModuleType) -> None:
        with self.loading():
            super().exec_module(module)


class _Finder:
    """An entry of ``sys.meta_path`` that answers for ``llama_cpp`` alone."""

    def __init__(self, version: str, loading: Callable[[], AbstractContextManager[None]]) -> None:
        self.version = version
        self.loading = loading

    def choose(self) -> Path | None:
        """Return the folder of the package to import."""
        package = installed()
        if package is not None and stated_version(package) == self.version:
            return package
        return CARRIED if CARRIED.is_dir() else package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = self.choose() if name == NAME else None
        if package is None:
            return None
        file = str(package / "__init__.py")
        loader = _Loader(NAME, file)
        loader.loading = self.loading
        return spec_from_file_location(
            NAME, file, loader=loader, submodule_search_locations=[str(package)]
        )


def install(version: str, loading: Callable[[], AbstractContextManager[None]]) -> None:
    """Make ``import llama_cpp`` find the layer of `version`, and run it inside `loading()`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    sys.meta_path.insert(0, _Finder(version, loading))
