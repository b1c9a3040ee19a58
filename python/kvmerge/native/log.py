"""Catch what llama.cpp says while it loads something, so that an error can give the reason."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any

from .binding import log_address, log_from

DEBUG, INFO, ERROR, _CONTINUED = 1, 2, 4, 5
"""Levels of ``enum ggml_log_level``."""

_PREFIX = re.compile(r"^(?:[A-Za-z_]\w*(?:::\w+)?:\s+)+")


class NativeLog(list[str]):
    """Messages in the order in which they came.

    Parameters
    ----------
    lowest : int
        Level from which on they are collected.
    quiet : bool
        Whether the usual log does not get them.
    """

    def __init__(self, lowest: int, quiet: bool) -> None:
        super().__init__()
        self.lowest = lowest
        self.quiet = quiet

    @property
    def reason(self) -> str:
        """Return the messages as one line, or an empty string."""
        lines = [_PREFIX.sub("", line.strip()) for line in self]
        return "; ".join(dict.fromkeys(line for line in lines if line))


_open: list[NativeLog] = []
_usual = ERROR
"""Level from which on messages are wanted while nothing is collected."""


def set_verbose(verbose: bool) -> None:
    """Say whether everything is to be logged, or errors only.

    What is not wanted is dropped before it reaches Python: a callback costs time, and an interrupt
    (Ctrl-C) that arrives inside one is lost.
    """
    global _usual
    _usual = DEBUG if verbose else ERROR
    _filter()


def _filter() -> None:
    _install()
    log_from(min([_usual, *(log.lowest for log in _open)]))


@lru_cache(maxsize=1)
def _install() -> Any:
    """Put a callback in front of that of llama-cpp-python, and return it.

    It stays for the life of the process: a callback that is freed while the library still knows it
    would crash.
    """
    llama_cpp: Any = import_module("llama_cpp")
    mtmd_cpp: Any = import_module("llama_cpp.mtmd_cpp")
    usual = import_module("llama_cpp._logger").llama_log_callback
    level_of_last = 0

    @llama_cpp.llama_log_callback
    def callback(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        nonlocal level_of_last
        if level != _CONTINUED:
            level_of_last = level
        for log in _open:
            if log.lowest <= level_of_last and text:
                log.append(text.decode("utf-8", "replace"))
        if not any(log.quiet for log in _open):
            usual(level, text, user_data)

    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    # libmtmd has a log of its own; it too calls back only for what somebody wants
    mtmd_cpp.mtmd_helper_log_set(llama_cpp.llama_log_callback(log_address()), ctypes.c_void_p(0))
    return callback


@contextmanager
def caught(lowest: int = ERROR, *, quiet: bool = False) -> Iterator[NativeLog]:
    """Collect what llama.cpp and libmtmd log inside.

    Parameters
    ----------
    lowest : int
        Level from which on messages are collected; errors only, unless told.
    quiet : bool
        Whether the usual log gets nothing of what is logged inside.
    """
    log = NativeLog(lowest, quiet)
    _open.append(log)
    _filter()
    try:
        yield log
    finally:
        _open[:] = [other for other in _open if other is not log]
        _filter()
