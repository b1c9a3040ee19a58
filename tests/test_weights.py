"""A token that stands for many weighs as much as they do, from the first layer on."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvmerge.errors import KVMergeError
from kvmerge.policies import H2O, Auto, FlowMM
from mrope_model import write_mrope_model
from random_model import Shape, write_random_model
from session import Session, llama_cpp


@pytest.fixture(scope="module")
def mrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mrope_model(tmp_path_factory.mktemp("models"))[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random.gguf"
    return write_random_model(path, Shape(layers=3), seed=4)


def read_grid(
    session: Session,
    rows: npt.NDArray[np.float32],
    y: npt.NDArray[np.int_],
    x: npt.NDArray[np.int_],
) -> None:
    """Read embeddings as tokens of one picture at chosen rows and columns."""
    n, start = len(rows), session.position
    batch = llama_cpp.llama_batch_init(n, session.n_embd, 1)
    plain = ctypes.cast(batch.pos, ctypes.c_void_p).value
    try:
        batch.n_tokens = n
        rows = np.ascontiguousarray(rows, np.float32)
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        for i in range(n):
            batch.n_seq_id[i], batch.logits[i] = 1, i == n - 1
            batch.seq_id[i][0] = 0
        zero = np.zeros(n, np.int_)
        positions = np.concatenate([zero + start, y + start, x + start, zero]).astype(np.int32)
        batch.pos = positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        assert llama_cpp.llama_decode(session.context, batch) == 0
        batch.pos = ctypes.cast(plain, ctypes.POINTER(ctypes.c_int32))
    finally:
        llama_cpp.llama_batch_free(batch)
    session.position += int(max(y.max(), x.max())) + 1


TEXT, END = list(range(5, 25)), [7, 9, 11]
WEIGHTS = np.array([1, 3, 1, 8, 2, 1, 5, 1, 1], np.float32)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("n_batch", [512, 4])
def test_one_that_stands_for_copies(mrope: Path, flash: bool, n_batch: int) -> None:
    """Copies at the same row and column see each other, so that the sum is exact."""
    rows = np.random.default_rng(1).standard_normal((9, 128)).astype(np.float32)
    y, x = np.divmod(np.arange(9), 3)
    options = {"flash_attention": flash, "cache_type": "f32" if not flash else "f16"}
    with Session(mrope, **options) as plain, Session(mrope, merge={}, **options) as weighted:
        for session in (plain, weighted):
            session.decode(TEXT)
        copies = np.repeat(np.arange(9), WEIGHTS.astype(int))
        read_grid(plain, rows[copies], y[copies], x[copies])
        assert weighted.engine is not None
        with weighted.engine.media("image"):
            weighted.engine.media_weights(WEIGHTS)
            if n_batch == 4:  # in pieces: what is left of the weights is for the next one
                start = weighted.position
                for i in range(0, 9, 3):
                    weighted.position = start
                    read_grid(weighted, rows[i : i + 3], y[i : i + 3], x[i : i + 3])
                weighted.position = start + 3
            else:
                read_grid(weighted, rows, y, x)
        expected = plain.decode(END)
        found = weighted.decode(END)
        assert np.allclose(found, expected, atol=2e-2 if flash else 1e-4)
        unweighted = np.abs(found - expected).max()
        cells = weighted.engine.read_cells(0)
        assert cells.mass[20:29, 0].tolist() == WEIGHTS.tolist()
        assert np.allclose(cells.bias[20:29], np.log(WEIGHTS)[:, None])
        assert not cells.bias[:20].any() and not cells.bias[29:].any()
    with Session(mrope, merge={}, **options) as other:
        other.decode(TEXT)
        read_grid(other, rows, y, x)
        assert np.abs(other.decode(END) - expected).max() > 20 * unweighted, "weights matter"


def read(session: Session, weights: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    """Text, a picture of 64 tokens, text; returns the logits after it."""
    rng = np.random.default_rng(2)
    session.decode(rng.integers(0, 512, 20).tolist())
    assert session.engine is not None
    with session.engine.media("image"):
        if weights is not None:
            session.engine.media_weights(weights)
        session.decode(embeddings=rng.standard_normal((64, session.n_embd)))
    return session.decode(rng.integers(0, 512, 30).tolist())


def some_weights() -> npt.NDArray[np.float32]:
    return np.random.default_rng(3).integers(1, 30, 64).astype(np.float32)


def test_weights_of_one_change_nothing(model: Path) -> None:
    with Session(model, merge={}) as plain, Session(model, merge={}) as weighted:
        assert (read(weighted, np.ones(64, np.float32)) == read(plain, None)).all()
        assert (weighted.decode([4]) == plain.decode([4])).all()


@pytest.mark.parametrize("policy", [FlowMM(), Auto(), H2O()])
def test_a_merge_adds_them_up(model: Path, policy: FlowMM) -> None:
    with Session(model, merge=policy.engine_params()) as session:
        read(session, some_weights())
        assert session.engine is not None
        session.engine.merge(60)
        masses = [session.engine.read_cells(layer).mass.sum(0) for layer in range(3)]
        total = 50 + some_weights().sum()
        if isinstance(policy, H2O):  # what is not kept is dropped
            assert all((mass <= total).all() for mass in masses)
        else:
            assert np.allclose(masses, total)
        session.generate(session.decode([3]), 8)


def test_they_go_with_their_cells(model: Path) -> None:
    with Session(model, merge={}) as session, Session(model, merge={}) as plain:
        read(session, some_weights())
        assert session.engine is not None and session.remove(20, -1)
        session.position = 20
        rng = np.random.default_rng(9)
        text = rng.integers(0, 512, 90).tolist()
        found = session.decode(text)
        assert not session.engine.read_cells(0).bias.any()
        plain.decode(np.random.default_rng(2).integers(0, 512, 20).tolist())
        assert np.allclose(found, plain.decode(text), atol=1e-3)


def test_they_are_saved(model: Path) -> None:
    with Session(model, merge={}) as first, Session(model, merge={}) as second:
        logits = read(first, some_weights())
        state, token = first.save(), [int(logits.argmax())]
        assert second.restore(state)
        second.position = first.position
        assert second.engine is not None
        bias = second.engine.read_cells(1).bias[20:84, 0]
        assert np.allclose(bias, np.log(some_weights()))
        assert np.allclose(second.decode(token), first.decode(token), atol=1e-3)


def test_bad_weights(model: Path) -> None:
    with Session(model, merge={}) as session:
        assert session.engine is not None
        with pytest.raises(KVMergeError, match="no medium was begun"):
            session.engine.media_weights(np.ones(3, np.float32))
        with session.engine.media("image"):
            for bad in (0, 0.5, -1, np.inf, np.nan, 1e6):
                with pytest.raises(KVMergeError, match=r"weights\[1\] is .*1 to 65536"):
                    session.engine.media_weights(np.array([1, bad], np.float32))
