"""Every allocation and computation of the engine fails once: the cache is as before, or empty."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvmerge.errors import CacheClearedError, KVMergeError
from kvmerge.policies import PRESETS
from random_model import Shape, write_random_model
from session import Session, llama_cpp

pytestmark = pytest.mark.usefixtures("as_device")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random.gguf"
    return write_random_model(path, Shape(layers=2), seed=4)


@pytest.fixture(autouse=True)
def _nothing_fails_afterwards(model: Path) -> Iterator[None]:
    yield
    with Session(model, merge={}) as session:
        session.engine.fail_at(0)


def words(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 512, n).tolist()


def content(session: Session) -> list[np.ndarray]:
    """Return what the sequence holds: K, V, bias, mass and order of every layer."""
    layers = range(session.engine.stats().n_layers)
    cells = [session.engine.read_cells(layer) for layer in layers]
    return [array for c in cells for array in (c.k, c.v, c.bias, c.mass, c.order)]


def is_same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def answer(session: Session) -> list[np.ndarray]:
    """Return logits of a few more tokens, which the cache then no longer holds."""
    start = session.position
    logits = session.decode([5, 6, 7])
    assert session.remove(start, -1)
    session.position = start
    return [logits]


def forget(session: Session) -> None:
    llama_cpp.llama_memory_clear(session.memory, True)
    session.position = 0


def go_on(session: Session, fill: Callable[[], None]) -> list[np.ndarray]:
    """Merge, save, restore and generate; return the logits.

    A cache that is empty is filled before.
    """
    if session.engine.n_cells() == 0:
        session.position = 0
        fill()
        answer(session)  # the sample of queries is of what was read, removed again or not
    n = session.engine.n_cells()
    session.engine.merge(n // 3)
    assert session.engine.n_cells() < n
    logits, position = session.decode([5]), session.position
    state = session.save()
    forget(session)
    assert session.restore(state)
    session.position = position
    return session.generate(logits, 3)


def fail_each(session: Session, fill: Callable[[], None], run: Callable[[], bool]) -> list[str]:
    """Run with the n-th step failing, for all n; return how each came out.

    ``run`` says whether it reported success.
    """
    engine = session.engine
    fill()
    expected = answer(session)
    expected_later = go_on(session, fill)
    forget(session)
    fill()
    engine.fail_at(0)
    assert run()
    n_steps = engine.fail_count()
    assert n_steps > 0
    results = []
    for n in range(1, n_steps + 1):
        forget(session)
        fill()
        before = content(session)
        engine.fail_at(n)
        ok = run()
        engine.fail_at(0)
        if ok:
            results.append("done")
        elif engine.n_cells() == 0:
            results.append("cleared")
            assert engine.n_tokens() == 0
        else:
            results.append("as before")
            assert is_same(before, content(session)), f"step {n} of {n_steps}"
            np.testing.assert_array_equal(answer(session), expected)
        # and usable, as if nothing had failed
        if ok:
            forget(session)
        later = go_on(session, fill)
        np.testing.assert_array_equal(
            later, expected_later, f"step {n} of {n_steps}: {results[-1]}"
        )
        forget(session)
        fill()
        np.testing.assert_array_equal(answer(session), expected)
    return results


@pytest.mark.parametrize("name", ["flowmm", "mosaic", "h2o", "pyramid"])
@pytest.mark.parametrize("flash_attention", [True, False])
def test_merge(model: Path, name: str, flash_attention: bool) -> None:
    options = {"n_ctx": 1024, "n_batch": 256, "flash_attention": flash_attention}
    merge = PRESETS[name].engine_params()
    with Session(model, merge=merge, first_cells=256, **options) as session:

        def fill() -> None:
            session.decode(words(150))
            session.decode(words(100, 1))

        def run() -> bool:
            try:
                session.engine.merge(120)
            except CacheClearedError:
                assert session.engine.n_cells() == 0
                return False
            except KVMergeError:
                assert session.engine.n_cells() == 250
                return False
            assert session.engine.n_cells() < 250
            return True

        results = fail_each(session, fill, run)
    assert "as before" in results
    assert "cleared" in results


@pytest.mark.parametrize("n_cells_max", [0, 512])
def test_growth(model: Path, n_cells_max: int) -> None:
    """Growth, and where a cap forbids it the merge that makes room."""
    merge = PRESETS["mosaic"].engine_params()
    with Session(model, merge=merge, n_ctx=1024, n_batch=256, first_cells=256) as session:
        session.engine.set_room(n_cells_max)

        def fill() -> None:
            for i in range(2 if n_cells_max else 1):
                session.decode(words(220, i))

        def run() -> bool:
            start = session.position
            try:
                session.decode(words(200, 9))
            except AssertionError:
                session.position = start
                return False
            return True

        results = fail_each(session, fill, run)
        forget(session)
        assert session.engine.size() == 256, "a cap that failed holds on to its cells"
    assert "as before" in results
    assert ("cleared" in results) == (n_cells_max > 0)


def test_save_and_restore(model: Path) -> None:
    merge = PRESETS["mosaic"].engine_params()
    with Session(model, merge=merge, n_ctx=1024, n_batch=256, first_cells=256) as session:

        def fill() -> None:
            session.decode(words(220))
            session.engine.merge(100)

        def save() -> bool:
            size = llama_cpp.llama_state_seq_get_size(session.context, 0)
            return size > 0 and len(session.save()) == size

        fill()
        session.decode(words(200, 3))
        state, position = session.save(), session.position
        forget(session)

        def restore() -> bool:
            start = session.position
            if not session.restore(state):
                session.position = start if session.engine.n_cells() else 0
                return False
            session.position = position
            return True

        def save_or_not() -> bool:
            try:
                return save()
            except AssertionError:
                return False

        assert set(fail_each(session, fill, save_or_not)) == {"as before"}
        forget(session)
        assert set(fail_each(session, fill, restore)) <= {"as before", "cleared", "done"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="its allocator comes first")
def test_small_allocations(model: Path, tmp_path: Path) -> None:
    """Some of the thousands of allocations of a merge, in a process of its own."""
    folder, library = Path(__file__).parent, tmp_path / "failing_new.so"
    source = folder / "failing_new.cpp"
    subprocess.run(["c++", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, folder / "fail_new.py", model, "8"],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'as before'" in done.stdout
    assert "'cleared'" in done.stdout
