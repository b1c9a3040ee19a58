"""Several sequences in one cache: whose cells are merged when they do not suffice for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvmerge.policies import PRESETS, FlowMM
from random_model import Shape, write_random_model
from session import Session, llama_cpp

CAP = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random.gguf"
    return write_random_model(path, Shape(layers=2), seed=4)


@pytest.fixture
def session(model: Path) -> Iterator[Session]:
    merge = FlowMM().engine_params()
    with Session(model, merge=merge, n_ctx=1024, n_batch=512, n_seq_max=3, first_cells=256) as s:
        s.engine.set_room(CAP)
        yield s
        s.engine.fail_at(0)


def words(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 512, n).tolist()


def read(session: Session, **tokens: int) -> None:
    """Read the first tokens of sequences: `s0=100` is a hundred of sequence 0."""
    for name, n in tokens.items():
        session.decode(words(n), sequence=int(name[1:]), position=0)


def sizes(session: Session) -> list[int]:
    return [session.engine.n_cells(s) for s in range(3)]


def test_an_idle_sequence_gives_first(session: Session) -> None:
    read(session, s0=200, s1=100, s2=180)
    session.engine.set_idle(1, True)
    session.decode(words(60, 1), sequence=0, position=200)
    first = sizes(session)
    assert first[0] == 260 and first[2] == 180
    assert first[1] < 100
    # It keeps enough to be asked about, and then the largest gives.
    session.decode(words(100, 2), sequence=2, position=180)
    second = sizes(session)
    assert second[1] >= (CAP - 100) // 12 - 1
    assert second[0] < 260
    assert second[0] == second[2] - 100 > second[1]
    assert sum(second) <= CAP


def test_nobody_gives_who_is_no_longer_idle(session: Session) -> None:
    read(session, s0=280, s1=100)
    session.engine.set_idle(1, True)
    session.engine.set_idle(1, False)
    session.decode(words(160, 1), sequence=2, position=0)
    assert sizes(session)[0] < 280
    assert sizes(session)[1:] == [100, 160]


def test_the_largest_gives_until_it_is_as_large_as_the_next(session: Session) -> None:
    read(session, s0=300, s1=100, s2=30)
    session.decode(words(90, 1), sequence=2, position=30)
    assert sizes(session) == [100, 100, 120]
    session.decode(words(200, 2), sequence=2, position=120)
    a, b, c = sizes(session)
    assert a == b == c - 200 < 100
    assert a + b + c <= CAP


def test_who_waits_goes_on_where_its_last_token_stood(model: Path) -> None:
    """Also where that token was of a picture, and went into another cell."""
    rng = np.random.default_rng(3)  # of the first 24, the one that has it so
    options = {"n_ctx": 1024, "n_batch": 512, "n_seq_max": 2, "first_cells": 256}
    policy = replace(PRESETS["auto"], neighbours=3)
    with Session(model, merge=policy, **options) as session:
        session.engine.set_room(CAP)
        session.decode(rng.integers(0, 512, 60).tolist(), position=0)
        with session.engine.media("image"):  # too large to be left as it is
            session.decode(embeddings=rng.standard_normal((240, session.n_embd)), position=60)
        session.decode(rng.integers(0, 512, 240).tolist(), sequence=1, position=0)
        assert session.engine.n_cells(0) < 300
        fates = [session.engine.plan(layer, head).fate[-1] for layer in (0, 1) for head in (0, 1)]
        assert max(fates) < 2, "the last token is to have no cell of its own, in no layer"
        assert llama_cpp.llama_memory_seq_pos_max(session.memory, 0) == 299
        assert np.isfinite(session.decode(words(5, 2), position=300)).all()


def test_a_sequence_that_a_merge_has_cleared_is_told_of(session: Session) -> None:
    """A batch of another sequence needed the merge, and only asking tells."""
    engine = session.engine

    def fill() -> None:
        llama_cpp.llama_memory_clear(session.memory, True)
        read(session, s0=280, s1=100)

    fill()
    engine.fail_at(0)
    session.decode(words(160, 1), sequence=1, position=100)
    n_steps = engine.fail_count()
    told = []
    for n in range(1, n_steps + 1):
        fill()
        engine.fail_at(n)
        with suppress(AssertionError):
            session.decode(words(160, 1), sequence=1, position=100)
        engine.fail_at(0)
        cleared = engine.n_cells(0) == 0
        assert [engine.was_cleared(s) for s in range(3)] == [cleared, False, False]
        assert not engine.was_cleared(0), "it is told once"
        told.append(cleared)
        # The other one lost nothing, and goes on.
        session.decode(words(5, 3), sequence=1, position=engine.n_tokens(1))
    assert any(told) and not all(told)


@pytest.mark.parametrize("sequence", [-1, 3])
def test_there_is_no_such_sequence(session: Session, sequence: int) -> None:
    from kvmerge.errors import KVMergeError

    with pytest.raises(KVMergeError, match="seq_id"):
        session.engine.set_idle(sequence, True)
    assert not session.engine.was_cleared(sequence)
