"""Sequences with merged cells, in every kind of memory that has a cache to merge.

Sliding windows (two caches, of which one is merged), short convolutions (a recurrent part beside
cache), M-RoPE, and quantized cells: with a cache of one size and with one that begins small.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvmerge.errors import KVMergeError, UnsupportedError
from kvmerge.policies import Auto, FlowMM
from mrope_model import write_mrope_model
from random_model import Shape, write_random_model
from session import Session, llama_cpp

pytestmark = pytest.mark.usefixtures("as_device")

KINDS = ["llama", "gemma3", "lfm2", "mrope"]
CACHES = [("f16", True), ("f32", False), ("q8_0", True)]
Make = Callable[..., Session]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    shapes = {kind: Shape(arch=kind, layers=4) for kind in KINDS if kind != "mrope"}
    return {
        "mrope": write_mrope_model(folder)[0],
        **{
            kind: write_random_model(folder / f"{kind}.gguf", shape, seed=2)
            for kind, shape in shapes.items()
        },
    }


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[0, 256], ids=["one-size", "begins-small"])
def make(kind: str, models: dict[str, Path], request: pytest.FixtureRequest) -> Make:
    def session(**options: Any) -> Session:
        options = {
            "merge": FlowMM(window=8).engine_params(),
            "n_ctx": 2048,
            "n_batch": 128,
            "swa_full": False,
            "first_cells": request.param,
            **options,
        }
        return Session(models[kind], **options)

    return session


def words(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 500, n).tolist()


def read(session: Session, n: int = 5, seed: int = 0) -> npt.NDArray[np.float32]:
    """Read text with a picture in it into sequence 0; return the logits after it."""
    assert session.engine
    session.decode(words(100, seed))
    with session.engine.media("image"):
        pixels = np.random.default_rng(seed).standard_normal((64, session.n_embd))
        session.decode(embeddings=pixels)
    for i in range(1, n):
        logits = session.decode(words(100, seed + i))
    return logits


def copy(session: Session, start: int, end: int, to: int) -> None:
    llama_cpp.llama_memory_seq_cp(session.memory, start, to, 0, end)


@pytest.mark.parametrize(("cache_type", "flash_attention"), CACHES)
def test_a_size_that_follows_need_changes_no_logit(
    models: dict[str, Path], kind: str, cache_type: str, flash_attention: bool
) -> None:
    results = []
    for first_cells in (0, 256):
        with Session(
            models[kind],
            merge=FlowMM().engine_params(),
            n_ctx=2048,
            n_batch=128,
            swa_full=False,
            cache_type=cache_type,
            flash_attention=flash_attention,
            first_cells=first_cells,
        ) as session:
            logits = [read(session)]
            assert session.engine.size() == (768 if first_cells else 2048)
            session.engine.merge(150)
            assert session.engine.size() == (256 if first_cells else 2048)
            assert session.engine.n_cells() == 150
            # over the merged cells and beyond, and merge what was merged
            logits += [session.decode(words(100, i)) for i in range(20, 24)]
            session.engine.merge(200)
            results.append(logits + session.generate(logits[-1], 3))
    np.testing.assert_array_equal(results[0], results[1])


def test_a_cap_holds(make: Make) -> None:
    with make(n_ctx=4096, first_cells=256) as session:
        session.engine.set_room(512)
        logits = read(session, 20)
        assert session.engine.size() <= 512
        assert session.engine.n_tokens() == 2064
        assert session.engine.stats().n_merges > 2
        assert np.isfinite(session.generate(logits, 3)).all()


def test_everything_goes_and_all_is_as_new(make: Make) -> None:
    def by_position(session: Session) -> None:
        assert session.remove(0, session.position)

    def by_sequence(session: Session) -> None:
        assert session.remove(-1, -1)

    def by_clear(session: Session) -> None:
        llama_cpp.llama_memory_clear(session.memory, False)

    with make() as session:
        first = read(session)
        for remove in (by_position, by_sequence, by_clear):
            session.engine.merge(100)
            session.decode([3, 4, 5])
            remove(session)
            assert session.engine.n_cells() == 0
            assert session.engine.n_tokens() == 0
            session.position = 0
            np.testing.assert_array_equal(read(session), first)


def test_a_refused_removal_changes_nothing(make: Make) -> None:
    """In no part of the memory: a recurrent part that can go back a few tokens must not."""
    merge = FlowMM(window=8).engine_params() | {"n_keep": 1}
    logits = []
    for tries in (False, True):
        with make(merge=merge, n_rs_seq=8) as session:
            read(session)
            session.engine.merge(100)
            for start, end in [(session.position - 4, -1), (50, 60), (0, 40)] if tries else []:
                cells = session.engine.n_cells()
                assert not session.remove(start, end)
                assert session.engine.n_cells() == cells
            logits.append(session.generate(session.decode([7]), 2))
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("whole", [False, True], ids=["sequence", "context"])
@pytest.mark.parametrize(("cache_type", "flash_attention"), CACHES)
def test_a_saved_state_goes_on(
    make: Make, kind: str, whole: bool, cache_type: str, flash_attention: bool
) -> None:
    # A merged state leaves out samples for the flow and for a fitted bias: neither is used here.
    merge = FlowMM(window=8, theta=0.0, bias="count").engine_params()
    options = {"cache_type": cache_type, "flash_attention": flash_attention, "merge": merge}
    with make(**options) as first, make(**options) as second:
        read(first)
        first.engine.merge(120)
        read(second, 3, seed=9)
        second.engine.merge(60)
        assert second.restore(first.save(whole=whole), whole=whole)
        second.position = first.position
        results = []
        for session in (first, second):
            logits = [session.decode(words(80, 5)), session.decode(words(80, 6))]
            session.engine.merge(90)
            results.append([*logits, *session.generate(logits[-1], 2)])
        # llama.cpp restores what a window still shows to other cells: sums are in another order
        moved = kind == "gemma3" and not whole
        np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-2 if moved else 0)


def test_a_merge_leaves_other_sequences_alone(make: Make) -> None:
    results = []
    for merges in (False, True):
        with make(n_seq_max=3) as session:
            for start in range(0, 300, 100):
                session.decode(words(100, start), sequence=1, position=start)
            read(session)
            if merges:
                session.engine.merge(80)
                assert session.engine.n_cells(0) == 80
                assert session.engine.n_tokens(0) == 564
            assert session.engine.n_cells(1) == 300
            results.append(session.decode([4, 5], sequence=1, position=300))
            assert session.remove(-1, -1)
            assert session.engine.n_cells(1) == 302
            results.append(session.decode([6], sequence=1, position=302))
    # the cells of the other sequence are masked, but how many there are decides how sums are split
    np.testing.assert_allclose(results[:2], results[2:], atol=2e-2)


def test_copies_share_merged_cells(make: Make) -> None:
    # llama.cpp does not reuse what has left the window while two sequences share it
    with make(n_seq_max=3, swa_full=True) as session:
        read(session)
        session.engine.merge(100)
        at = session.position
        copy(session, 0, -1, 2)
        assert session.engine.n_cells(2) == 100
        assert session.engine.n_tokens(2) == session.engine.n_tokens(0) == 564
        with pytest.raises(KVMergeError, match="shares cells"):
            session.engine.merge(50)
        assert not session.remove(50, -1, sequence=2)
        logits = [session.decode(words(60, 8), sequence=s, position=at) for s in (0, 2)]
        np.testing.assert_allclose(logits[0], logits[1], atol=2e-2)
        # the copy outlives what it was made of, and can be merged once it has the cells alone
        assert session.remove(-1, -1)
        assert session.engine.n_cells(0) == 0
        assert session.engine.n_cells(2) == 160
        session.engine.merge(90, 2)
        assert session.engine.n_cells(2) == 90
        assert np.isfinite(session.decode([1], sequence=2, position=at + 60)).all()


def test_one_of_several_is_kept(make: Make) -> None:
    with make(n_seq_max=2) as session:
        expected = session.decode(words(100, 1), sequence=1, position=0)
        read(session)
        session.engine.merge(100)
        llama_cpp.llama_memory_seq_keep(session.memory, 1)
        assert session.engine.n_cells(0) == session.engine.n_tokens(0) == 0
        assert session.engine.n_cells(1) == 100
        again = session.decode(words(100, 1), sequence=0, position=0)
        # no bias is left in cells that were merged
        np.testing.assert_allclose(again, expected, atol=2e-2)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mrope"], indirect=True)
def test_a_copied_beginning_has_seen_no_more_than_that(make: Make) -> None:
    """A recurrent part has no copy of a beginning."""
    with make(n_seq_max=2) as session:
        session.decode(words(100, 0))
        copy(session, 0, 50, 1)
        assert session.engine.n_tokens(1) == session.engine.n_cells(1) == 50
        session.decode(words(60, 3), sequence=1, position=50)
        assert session.engine.n_tokens(1) == 110
        assert session.remove(-1, -1)
        session.engine.merge(40, 1)
        order = session.engine.read_cells(0, 1).order
        assert order.max() == 109


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mrope"], indirect=True)
@pytest.mark.parametrize("start", [60, 100])
def test_it_can_be_cut_where_nothing_was_merged(make: Make, start: int) -> None:
    """A recurrent part cannot; the text in front of the first picture stays with `auto`."""
    options = {"merge": Auto(window=8).engine_params(), "swa_full": True}
    with make(**options) as session, make(**options) as fresh:
        read(session)
        session.engine.merge(513)  # of 500 words and a picture
        assert session.engine.n_cells() == 513
        assert not session.remove(101, -1)  # in the picture
        assert not session.remove(20, start)  # what comes behind was merged
        assert session.remove(start, -1)
        assert session.engine.n_tokens() == session.engine.n_cells() == start
        fresh.decode(words(100, 0)[:start], position=0)
        for position in (start, start + 50):
            logits = [s.decode(words(50, 7), position=position) for s in (session, fresh)]
            np.testing.assert_allclose(*logits, atol=2e-2)
        session.position = start + 100
        with session.engine.media("image"):
            session.decode(
                embeddings=np.random.default_rng(1).standard_normal((64, session.n_embd))
            )
        session.decode(words(20, 9))
        session.engine.merge(start + 130)
        assert session.engine.n_cells() == start + 130
        assert session.engine.n_tokens() == start + 184
        assert np.isfinite(session.decode([1])).all()


@pytest.mark.parametrize("kind", ["llama", "gemma3"], indirect=True)
@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_picture_at_the_end_can_be_gone_on_from(make: Make, after: int) -> None:
    """Its tokens are merged although they are among the last: none of them can be removed."""
    with make(merge=Auto(window=8).engine_params(), swa_full=True) as session:
        session.decode(words(100, 0))
        with session.engine.media("image"):
            session.decode(
                embeddings=np.random.default_rng(0).standard_normal((64, session.n_embd))
            )
        if after:
            session.decode(words(after, 1))
        session.engine.merge(113 + after)
        assert session.engine.n_cells() == 113 + after
        last = session.position - 1
        assert session.remove(last, -1) == (after > 0)
        if after:
            assert np.isfinite(session.decode([1], position=last)).all()
        assert not session.remove(session.position - after - 1, -1)
        assert np.isfinite(session.decode([1])).all()


@pytest.mark.parametrize("n_seq_max", [1, 2])
def test_a_cache_for_each_sequence(make: Make, n_seq_max: int) -> None:
    if n_seq_max > 1:
        with pytest.raises(UnsupportedError, match="2 sequences with a cache each: use a unified"):
            make(unified=False, n_seq_max=n_seq_max)
        return
    with make(unified=False) as session:
        read(session)
        session.engine.merge(100)
        assert np.isfinite(session.decode([1])).all()


def test_a_cache_with_nothing_to_merge(tmp_path: Path) -> None:
    shape = Shape(arch="gemma3", layers=1)  # its only layer has a sliding window
    model = write_random_model(tmp_path / "model.gguf", shape)
    with pytest.raises(UnsupportedError, match="there is nothing to merge"):
        Session(model, merge={}, swa_full=False)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
@pytest.mark.parametrize("whole", [False, True], ids=["sequence", "context"])
def test_a_state_without_an_engine_goes_on(make: Make, unified: bool, whole: bool) -> None:
    options = {"merge": None, "first_cells": 0, "n_seq_max": 2, "unified": unified}
    with make(**options) as first, make(**options) as second:
        first.decode(words(70, 0))
        if unified:
            copy(first, 0, -1, 1)  # cells of both
            first.decode(words(20, 1), sequence=1, position=70)
        else:
            first.decode(words(90, 1), sequence=1, position=0)
        assert second.restore(first.save(whole=whole), whole=whole)
        for sequence, position in ((0, 70), (1, 90)) if whole else ((0, 70),):
            logits = [
                session.decode([5, 6], sequence=sequence, position=position)
                for session in (first, second)
            ]
            np.testing.assert_allclose(logits[0], logits[1], atol=1e-2)
