"""Layers that hold fewer cells than others store fewer, and answer as if they stored them all."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmerge.native.binding import Engine
from kvmerge.policies import PRESETS
from random_model import Shape, write_random_model
from session import Session, llama_cpp

pytestmark = pytest.mark.usefixtures("as_device")

POLICIES = {name: PRESETS[name].engine_params() for name in ("madakv", "pyramid", "meda")}
# random weights make MEDA's layers differ by a few cells only
POLICIES["meda-pyramid"] = {**POLICIES["meda"], "allocate": POLICIES["pyramid"]["allocate"]}
CACHES = [("f16", True), ("f16", False), ("f32", False), ("q8_0", True)]
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
LAYERS, STEP = 4, 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: write_random_model(folder / name, Shape(layers=LAYERS, heads_kv=heads), seed=7)
        for name, heads in HEADS.items()
    }


@pytest.fixture
def model(models: dict[str, Path]) -> Path:
    return models["GQA"]


def words(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 512, n).tolist()


def start(model: Path, name: str, *, elastic: bool = True, **options: Any) -> Session:
    """Open a model; one that is not elastic stores all cells in all layers, whatever they hold."""
    options = {"n_ctx": 2048, "n_batch": 256, "first_cells": 256 if elastic else 0, **options}
    return Session(model, merge=POLICIES[name], **options)


def read(session: Session, turns: int = 5, sequence: int = 0) -> np.ndarray:
    """Read pictures and text; return the logits after it."""
    assert session.engine
    rng = np.random.default_rng(turns)
    for turn in range(turns):
        at = None if sequence == 0 else 180 * turn
        with session.engine.media("image"):
            embeddings = rng.standard_normal((100, session.n_embd))
            session.decode(embeddings=embeddings, sequence=sequence, position=at)
        at = None if at is None else at + 100
        logits = session.decode(words(80, turn), sequence=sequence, position=at)
    return logits


def held(session: Session) -> list[int]:
    assert session.engine
    return [session.engine.layer_cells(layer) for layer in range(LAYERS)]


def sizes(session: Session) -> list[int]:
    assert session.engine
    return [session.engine.layer_bytes(layer) for layer in range(LAYERS)]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("cache_type", "flash_attention"), CACHES)
def test_bytes_follow_the_budgets(
    model: Path, name: str, cache_type: str, flash_attention: bool, as_device: bool
) -> None:
    step = 256 if as_device else STEP
    with start(model, name, cache_type=cache_type, flash_attention=flash_attention) as session:
        engine = session.engine
        read(session)
        per_cell = sizes(session)[0] / engine.size()
        assert sizes(session) == [per_cell * engine.size()] * LAYERS
        for budget in (400, 300):
            engine.merge(budget)
            cells = held(session)
            assert sum(cells) <= budget * LAYERS
            assert max(cells) == engine.n_cells()
            assert len(set(cells)) > 1, "the policy tells layers apart"
            empty = [(max(cells) - n) // step * step for n in cells]
            assert sizes(session) == [per_cell * (engine.size() - n) for n in empty]
            assert engine.bytes() == pytest.approx(sum(sizes(session)), rel=0.01)
            session.decode(words(20))
        llama_cpp.llama_memory_clear(session.memory, True)
        assert sizes(session) == [per_cell * 256] * LAYERS


@pytest.mark.parametrize(
    ("name", "heads", "cache_type", "flash_attention"),
    [(name, "GQA", *cache) for name in POLICIES for cache in CACHES]
    + [
        (name, heads, *cache)
        for name in ("pyramid", "meda-pyramid")
        for heads in ("MHA", "MQA")
        for cache in CACHES[:2]
    ],
)
def test_answers_are_those_of_layers_that_store_all(
    models: dict[str, Path], name: str, heads: str, cache_type: str, flash_attention: bool
) -> None:
    options = {"cache_type": cache_type, "flash_attention": flash_attention}
    results, contents = [], []
    for elastic in (True, False):
        with start(models[heads], name, elastic=elastic, **options) as session:
            engine = session.engine
            read(session)
            results.append([])
            # merge, append one token, a few, many, and more than there is room for; merge again
            for budget in (400, 300):
                engine.merge(budget)
                if name != "meda":
                    assert (len(set(sizes(session))) > 1) == elastic
                for n in (1, 12, 200, 250):
                    results[-1].append(session.decode(words(n, n)))
                results[-1] += session.generate(results[-1][-1], 3)
            cells = [engine.read_cells(layer) for layer in range(LAYERS)]
            contents.append([(c.k[c.mass > 0], c.v[c.mass > 0], c.bias, c.order) for c in cells])
    np.testing.assert_array_equal(results[0], results[1])
    for one, other in zip(*contents, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["pyramid", "meda-pyramid"])
@pytest.mark.parametrize(("cache_type", "flash_attention"), CACHES)
@pytest.mark.parametrize("whole", [True, False], ids=["context", "sequence"])
def test_saved_states_answer_the_same(
    model: Path, name: str, cache_type: str, flash_attention: bool, whole: bool
) -> None:
    options = {"cache_type": cache_type, "flash_attention": flash_attention}
    with (
        start(model, name, **options) as first,
        start(model, name, **options) as second,
        start(model, name, elastic=False, **options) as fixed,
    ):
        read(second, 3)
        second.engine.merge(200)
        for session in (first, fixed):
            read(session)
            session.engine.merge(300)
            session.decode(words(20))
        saved = first.save(whole=whole)
        # What a layer does not hold is left out, whether it is stored or not.
        assert len(saved) == len(fixed.save(whole=whole))
        position = first.position
        for session in (second, fixed):
            assert session.restore(saved, whole=whole)
            session.position = position
        logits = [session.decode([7, 8, 9]) for session in (first, second, fixed)]
        assert sizes(second) == sizes(first)
        assert second.engine.bytes() == first.engine.bytes()
        # The next merge goes by the queries that a state holds, which may be fewer.
        assert first.restore(saved, whole=whole)
        first.position = position
        first.decode([7, 8, 9])
        for session in (first, second, fixed):
            session.engine.merge(200)
        logits += [session.decode([7, 8, 9]) for session in (first, second, fixed)]
        for i in (0, 3):
            np.testing.assert_array_equal(logits[i], logits[i + 1])
            np.testing.assert_array_equal(logits[i], logits[i + 2])


@pytest.mark.parametrize("flash_attention", [True, False])
def test_other_sequences_are_left_alone(
    model: Path, flash_attention: bool, as_device: bool
) -> None:
    """What the first sequence leaves free is stored again before others come into it."""
    results = []
    for elastic in (True, False):
        with start(
            model, "pyramid", elastic=elastic, flash_attention=flash_attention, n_seq_max=3
        ) as session:
            engine = session.engine
            read(session)
            session.decode(words(200), sequence=1, position=0)
            engine.merge(300)
            if elastic:
                assert len(set(sizes(session))) == LAYERS - as_device, "its steps are larger"
            out = [session.decode(words(30), sequence=1, position=200)]
            # a copy holds the cells when the first is gone
            llama_cpp.llama_memory_seq_cp(session.memory, 0, 2, -1, -1)
            assert session.remove(-1, -1)
            out.append(session.decode(words(40), sequence=2, position=session.position))
            assert session.remove(-1, -1, sequence=2)
            session.position = 0
            out += [read(session), session.decode(words(30), sequence=1, position=230)]
            results.append(out)
            engine.merge(150, 1)
            assert np.isfinite(session.decode([3], sequence=1, position=260)).all()
    # the cells lie elsewhere, so sums are added up in another order
    np.testing.assert_allclose(results[0], results[1], atol=2e-2)


def test_a_sequence_behind_another_stores_all(model: Path) -> None:
    with start(model, "pyramid", n_seq_max=2) as session:
        session.decode(words(100), sequence=1, position=0)
        read(session)
        session.engine.merge(300)
        assert max(held(session)) - min(held(session)) > STEP
        assert len(set(sizes(session))) == 1


@pytest.mark.parametrize("flash_attention", [True, False])
def test_positions_are_shifted(model: Path, flash_attention: bool) -> None:
    results = []
    for elastic in (True, False):
        with start(model, "pyramid", elastic=elastic, flash_attention=flash_attention) as session:
            read(session)
            session.engine.merge(300)
            llama_cpp.llama_memory_seq_add(session.memory, 0, -1, -1, 11)
            results.append(session.decode(words(5), position=session.position + 11))
            cells = [session.engine.read_cells(layer) for layer in range(LAYERS)]
            results.append(np.concatenate([c.k[c.mass > 0] for c in cells]))
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[3])


def test_what_was_cleared_is_read_as_new(model: Path) -> None:
    with start(model, "meda-pyramid") as session:
        first = read(session)
        for clear in (
            lambda: llama_cpp.llama_memory_clear(session.memory, True),
            lambda: session.remove(-1, -1),
        ):
            session.engine.merge(300)
            assert len(set(sizes(session))) > 1
            clear()
            session.position = 0
            np.testing.assert_allclose(read(session), first, atol=2e-2)


@pytest.mark.parametrize("flash_attention", [True, False])
def test_another_engine_finds_all_cells(model: Path, flash_attention: bool) -> None:
    with start(model, "pyramid", flash_attention=flash_attention) as session:
        results = []
        for _ in range(2):
            read(session)
            session.engine.merge(300)
            assert len(set(sizes(session))) > 1
            results.append(session.generate(session.decode([3]), 3))
            assert session.remove(0, -1)
            session.position = 0
            session.engine.detach()
            address = ctypes.cast(session.context, ctypes.c_void_p).value or 0
            session.engine = Engine(address, POLICIES["pyramid"])
            assert len(set(sizes(session))) == 1
        np.testing.assert_array_equal(results[0], results[1])
