"""Threads that a forked process does not have.

OpenMP keeps the threads of a loop for the next one.  A process that is forked gets the notes of
them and not the threads, and its first loop with more than one waits for ever.
"""

from __future__ import annotations

import multiprocessing
import os

from .errors import ForkedError

_has_threads = False
_misses_threads = False


def check_threads(n_threads: int | None, n_threads_batch: int | None) -> None:
    """Raise if a model with these options would wait for threads of the process before a fork.

    Parameters
    ----------
    n_threads, n_threads_batch : int or None
        As in `llama_cpp.Llama`; 0 and None are what it takes by itself.
    """
    global _has_threads
    cores = multiprocessing.cpu_count()
    if max(n_threads or max(cores // 2, 1), n_threads_batch or cores) == 1:
        return
    if _misses_threads:
        raise ForkedError(
            "this process was forked from one that had computed with several threads, which are "
            'not here: start processes with multiprocessing.set_start_method("spawn"), load the '
            "first model after the fork, or pass n_threads=1 and n_threads_batch=1"
        )
    _has_threads = True


def _in_child() -> None:
    global _misses_threads
    _misses_threads = _has_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
