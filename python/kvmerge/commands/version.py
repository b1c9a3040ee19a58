"""``kvmerge version``."""

from __future__ import annotations

import argparse

from ..native.library import LLAMA_CPP_PYTHON
from ..version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command: none."""


def run(arguments: argparse.Namespace) -> int:
    """Print the versions."""
    print(f"kvmerge {__version__}")
    print(f"llama-cpp-python {LLAMA_CPP_PYTHON} (and the llama.cpp in it)")
    return 0
