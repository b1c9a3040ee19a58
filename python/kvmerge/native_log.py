"""Catch what llama.cpp says while it loads something, so that an error can give the reason."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ERROR = 4
_PREFIX = re.compile(r"^(?:[A-Za-z_]\w*(?:::\w+)?:\s+)+")


class NativeLog(list[str]):
    """Warnings and errors in the order in which they came."""

    @property
    def reason(self) -> str:
        """Return the errors as one line, or an empty string."""
        lines = [_PREFIX.sub("", line.strip()) for line in self]
        return "; ".join(dict.fromkeys(line for line in lines if line))


@contextmanager
def caught(llama_cpp: Any, mtmd_cpp: Any = None) -> Iterator[NativeLog]:
    """Collect errors of llama.cpp (and of libmtmd) and pass everything on to the usual log.

    Parameters
    ----------
    llama_cpp : module
        The imported ``llama_cpp``.
    mtmd_cpp : module, optional
        ``llama_cpp.mtmd_cpp``, when its errors are wanted as well.
    """
    usual = llama_cpp._logger.llama_log_callback
    log = NativeLog()
    level_of_last = 0

    @llama_cpp.llama_log_callback
    def callback(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        nonlocal level_of_last
        # Level 5 continues the line before.
        level_of_last = level if level != 5 else level_of_last
        if level_of_last == _ERROR and text:
            log.append(text.decode("utf-8", "replace"))
        usual(level, text, user_data)

    none = ctypes.c_void_p(0)
    llama_cpp.llama_log_set(callback, none)
    if mtmd_cpp is not None:
        mtmd_cpp.mtmd_helper_log_set(callback, none)
    try:
        yield log
    finally:
        llama_cpp.llama_log_set(usual, none)
        if mtmd_cpp is not None:
            mtmd_cpp.mtmd_helper_log_set(usual, none)
