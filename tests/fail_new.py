"""Fail small allocations of merges, one at a time: ``python tests/fail_new.py model.gguf 50``.

Needs ``failing_new.cpp``, compiled and loaded before the libraries; ``test_failures.py`` does that.
After each failure the cache has to be as before or empty, and has to answer as if there had been
none.  Prints how often which of them was the case.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from kvmerge.errors import CacheClearedError, KVMergeError
from kvmerge.policies import PRESETS
from session import Session
from test_failures import answer, content, forget, go_on, is_same, words


def merge_failing(session: Session, n: int) -> tuple[str, int]:
    """Merge with the n-th allocation failing; return how it came out, and how many there were."""
    new = ctypes.CDLL(None)
    # nothing of Python is between the two but the call
    new.failing_new_begin(ctypes.c_long(n))
    try:
        session.engine.merge(120)
    except CacheClearedError:
        return "cleared", new.failing_new_end()
    except KVMergeError:
        return "as before", new.failing_new_end()
    return "done", new.failing_new_end()


def main(model: Path, n_tries: int) -> None:
    """Try ``n_tries`` of the allocations of a merge for each of some policies."""
    found: Counter[str] = Counter()
    for name in ("flowmm", "mosaic", "h2o", "pyramid"):
        merge = PRESETS[name].engine_params()
        with Session(model, merge=merge, n_ctx=1024, n_batch=256, first_cells=256) as session:

            def fill(session: Session = session) -> None:
                session.decode(words(150))
                session.decode(words(100, 1))

            fill()
            before, expected = content(session), answer(session)
            later = go_on(session, fill)
            forget(session)
            fill()
            _, n_steps = merge_failing(session, 0)
            for i in range(n_tries):
                n = 1 + i * n_steps // n_tries
                forget(session)
                fill()
                result, _ = merge_failing(session, n)
                if result == "as before":
                    assert is_same(before, content(session)), f"{name}: {n} of {n_steps}"
                    np.testing.assert_array_equal(answer(session), expected)
                elif result == "cleared":
                    assert session.engine.n_cells() == session.engine.n_tokens() == 0
                else:
                    assert session.engine.n_cells() < 250, f"{name}: {n} of {n_steps}"
                    forget(session)
                np.testing.assert_array_equal(go_on(session, fill), later)
                found[result] += 1
            print(f"{name}: {n_steps} allocations", file=sys.stderr)
    print(dict(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
