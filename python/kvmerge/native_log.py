"""Catch what llama.cpp says while it loads something, so that an error can give the reason."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any

_ERROR, _CONTINUED = 4, 5  # enum ggml_log_level
_PREFIX = re.compile(r"^(?:[A-Za-z_]\w*(?:::\w+)?:\s+)+")


class NativeLog(list[str]):
    """Errors in the order in which they came."""

    @property
    def reason(self) -> str:
        """Return the errors as one line, or an empty string."""
        lines = [_PREFIX.sub("", line.strip()) for line in self]
        return "; ".join(dict.fromkeys(line for line in lines if line))


_open: list[NativeLog] = []


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
        if level_of_last == _ERROR and text:
            for log in _open:
                log.append(text.decode("utf-8", "replace"))
        usual(level, text, user_data)

    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(callback, ctypes.c_void_p(0))
    return callback


@contextmanager
def caught() -> Iterator[NativeLog]:
    """Collect the errors that llama.cpp and libmtmd log inside; they go to the usual log too."""
    _install()
    log = NativeLog()
    _open.append(log)
    try:
        yield log
    finally:
        _open[:] = [other for other in _open if other is not log]
