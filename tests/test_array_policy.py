"""Methods that are one file of Python: found, run, and carried out as they plan."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import kvmerge
import oracle
from kvmerge import pocket
from kvmerge.errors import MergeError, OptionError
from kvmerge.policies import PRESETS, ArrayPolicy, Layer, Policy, resolve
from kvmerge.policies.array import share_out
from random_model import Shape, write_random_model
from session import Session

N = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(layers=3, heads=4, heads_kv=2, head_size=64)
    return write_random_model(tmp_path_factory.mktemp("models") / "m.gguf", shape, seed=3)


def words(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 512, n).tolist()


@dataclass(frozen=True, kw_only=True)
class Drawn(ArrayPolicy):
    """Anything that is allowed, drawn by lot; heads keep different numbers of cells."""

    bias: str = "count"

    def targets(self, layer: Layer, cells: int) -> Any:
        rng = np.random.default_rng(layer.index)
        heads, n = layer.mass.shape
        targets = np.full((heads, n), -1)
        for head in range(heads):
            held = np.flatnonzero(layer.held[head])
            free = np.flatnonzero(~layer.held[head] & ~layer.empty[head])
            pivots = rng.choice(free, cells - len(held) - head, replace=False)
            targets[head, held] = held
            targets[head, pivots] = pivots
            rest = np.setdiff1d(free, pivots)
            targets[head, rest] = rng.choice([-1, *pivots], len(rest))
        return targets


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize(("cache_type", "flash_attention"), [("f32", True), ("f32", False)])
def test_any_plan_is_carried_out(
    model: Path, cache_type: str, flash_attention: bool, device: bool, monkeypatch: Any
) -> None:
    if device:
        monkeypatch.setenv("KVMERGE_AS_DEVICE", "1")
    with Session(
        model, merge=Drawn(), cache_type=cache_type, flash_attention=flash_attention
    ) as session:
        engine = session.engine
        session.decode(words(N))
        before = [engine.read_cells(i) for i in range(3)]
        engine.merge(40)
        for i in range(3):
            after = engine.read_cells(i)
            for head in range(2):
                target = engine.plan(i, head).target.astype(int)
                kept = np.flatnonzero(target == np.arange(N))
                assert len(kept) == 40 - head
                mass = before[i].mass[:, head].astype(float)
                weight = oracle.weights(target, kept, mass, np.ones(N), "mean")
                for found, x in ((after.k, before[i].k), (after.v, before[i].v)):
                    expected = oracle.fold(x[:, head].astype(float), target, kept, weight)
                    np.testing.assert_allclose(found[head:, head], expected, atol=1e-5)
                counts = [(target == pivot).sum() for pivot in kept]
                assert after.mass[head:, head].tolist() == counts
                np.testing.assert_allclose(after.bias[head:, head], np.log(counts), atol=1e-3)
        assert np.isfinite(session.decode(words(1))).all()
        # and again, with cells that stand for many and heads of different lengths
        session.decode(words(30, 1))
        engine.merge(35)
        assert engine.n_cells() == 35
        assert np.isfinite(session.decode(words(1))).all()


@dataclass(frozen=True, kw_only=True)
class Twins(ArrayPolicy):
    """Folds each cell of a picture into the first one of it."""

    bias: str = "count"

    def targets(self, layer: Layer, cells: int) -> Any:
        targets = np.tile(np.arange(layer.mass.shape[1]), (layer.mass.shape[0], 1))
        for head, modality in enumerate(layer.modality):
            targets[head, modality > 0] = np.flatnonzero(modality > 0)[0]
        return targets


@pytest.mark.parametrize("flash_attention", [True, False])
def test_cells_that_are_equal_fold_without_a_trace(tmp_path: Path, flash_attention: bool) -> None:
    """Equal keys and values as one cell with the logarithm of their number give equal logits.

    In a model of one layer, where positions turn no key, that is exact.
    """
    shape = Shape(layers=1, heads=4, heads_kv=2, head_size=64)
    file = write_random_model(tmp_path / "m.gguf", shape, seed=5)
    row = np.random.default_rng(1).standard_normal((1, shape.embedding)).astype(np.float32)
    logits = {}
    for policy in (None, Twins(), Twins(bias="none")):
        with Session(
            file, merge=policy, cache_type="f32", flash_attention=flash_attention, rope_scale=1e-9
        ) as session:
            session.decode(words(20))
            if session.engine:
                with session.engine.media("image"):
                    session.decode(embeddings=np.repeat(row, 24, axis=0))
            else:
                session.decode(embeddings=np.repeat(row, 24, axis=0))
            session.decode(words(20, 1))
            if session.engine:
                session.engine.merge(41)
                assert session.engine.n_cells() == 41
            logits[str(policy)] = np.array([session.decode([word]) for word in words(5, 2)])
    full, merged, unbiased = logits.values()
    # a bias of type f16 is right to a thousandth
    np.testing.assert_allclose(merged, full, atol=1e-2)
    assert np.abs(unbiased - full).max() > 0.05, "the bias matters here"


def spoil(targets: np.ndarray, how: str) -> np.ndarray:
    targets = targets.copy()
    free = np.flatnonzero(targets[0] < 0)
    if how == "out of range":
        targets[0, free[0]] = N
    elif how == "below":
        targets[0, free[0]] = -2
    elif how == "not kept":
        targets[0, free[0]] = free[1]
    elif how == "last one dropped":
        targets[0, -1] = -1
    elif how == "last one takes up":
        targets[0, free[0]] = N - 1
    elif how == "too many":
        targets[0, free[:9]] = free[:9]
    return targets


ACCEPTED = {
    "out of range": "accepted is -1",
    "below": "accepted is -1",
    "not kept": "which is not kept",
    "last one dropped": "always kept",
    "last one takes up": "take up nothing",
    "too many": "were asked for|there is room for",
    "shape": "shapes",
    "raised": "division by zero",
}


@pytest.mark.parametrize("how", ACCEPTED)
def test_a_plan_that_cannot_be_is_refused_and_nothing_is_lost(model: Path, how: str) -> None:
    policy = PRESETS["keydiff"]
    assert policy is not None
    kinds = {"shape": MergeError, "raised": ZeroDivisionError}
    with Session(model, merge=policy) as session:
        session.decode(words(N))
        state = session.save()

        def plan(question: Any) -> Any:
            layers = list(policy.planner(session.engine)(question))
            if how == "raised":
                raise ZeroDivisionError("division by zero")
            return layers[:-1] if how == "shape" else [spoil(layers[0], how), *layers[1:]]

        session.engine.set_planner(plan)
        with pytest.raises(kinds.get(how, OptionError), match=ACCEPTED[how]):
            session.engine.merge(40)
        assert session.engine.n_cells() == N
        assert session.save() == state
        session.engine.set_planner(None)
        session.engine.merge(40)
        assert session.engine.n_cells() == 40


@pytest.mark.parametrize("cells", [1, 5, 20])
def test_room_for_less_than_what_is_always_kept(model: Path, cells: int) -> None:
    with Session(model, merge=PRESETS["keydiff"]) as session:
        session.decode(words(N))
        session.engine.merge(cells)
        assert session.engine.n_cells() == cells
        last = session.engine.plan(0, 0).fate[-min(cells, 16) :]
        assert (last >= 2).all()


def test_keydiff_keeps_what_is_least_like_the_mean(model: Path) -> None:
    with Session(model, merge=PRESETS["keydiff"], cache_type="f32") as session:
        engine = session.engine
        session.decode(words(N))
        for i in range(3):
            cells = engine.read_cells(i)
            key = cells.k.astype(float)
            key /= np.linalg.norm(key, axis=-1, keepdims=True)
            mean = key.mean(axis=0)
            like = np.einsum("nhd,hd->hn", key, mean / np.linalg.norm(mean, axis=-1)[:, None])
            like[:, :4] = like[:, -16:] = -2
            expected = np.sort(np.argsort(like, axis=1)[:, :40], axis=1)
            if i == 0:
                engine.merge(40)
            found = [np.flatnonzero(engine.plan(i, h).fate >= 2) for h in range(2)]
            if i == 0:
                np.testing.assert_array_equal(found, expected)


def attention(engine: Any, layer: int) -> np.ndarray:
    """What the queries of the window give to each token, [16, heads, query heads a group, n]."""
    queries, cells = engine.read_queries(layer), engine.read_cells(layer)
    rows = np.flatnonzero(queries.proxy)
    rows = rows[np.argsort(queries.order[rows])]
    assert queries.order[rows].tolist() == list(range(N - 16, N))
    q = queries.q[rows].reshape(16, 2, 2, -1).astype(float)
    logits = np.einsum("rhgd,nhd->rhgn", q, cells.k.astype(float)) * queries.scale
    unseen = np.arange(logits.shape[-1]) > queries.order[rows][:, None]
    logits += np.where(unseen, -np.inf, 0)[:, None, None]
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def bacon_scores(engine: Any, layer: int) -> np.ndarray:
    def pooled(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((0, 0), (3, 3)), mode="edge")
        return sum(padded[:, i : i + x.shape[1]] for i in range(7)) / 7

    found = [attention(engine, i).mean(axis=2) for i in range(layer + 1)]
    window, last = pooled(found[layer].mean(axis=0)), pooled(found[layer][-1])
    if layer:
        last = np.sqrt(last * pooled(found[layer - 1][-1]))
    return window / window.sum(axis=1, keepdims=True) + last / last.sum(axis=1, keepdims=True)


def tgv_scores(engine: Any, layer: int) -> np.ndarray:
    weights = attention(engine, layer).mean(axis=(1, 2))
    n = weights.shape[1]
    score = np.zeros(n)
    for i in range(16):
        got = np.mean([weights[j, n - 16 + i] for j in range(i, 16)])
        score += got * weights[i]
    text = np.arange(n) >= PICTURE.stop
    text |= np.arange(n) < PICTURE.start
    return np.tile(np.where(text, 1e3 + weights.sum(axis=0), score), (2, 1))


def flashcache_scores(engine: Any, layer: int) -> np.ndarray:
    cells = engine.read_cells(layer)
    total = 0
    for x in (cells.k.astype(float), cells.v.astype(float)):
        n = len(x)
        k, i = np.arange(n)[:, None], np.arange(n)
        basis = np.cos(np.pi * (i + 0.5) * k / n) * np.where(k == 0, np.sqrt(1 / n), np.sqrt(2 / n))
        low = basis[: round(n / 10)]
        distance = np.linalg.norm(x - np.einsum("ka,kb,bhd->ahd", low, low, x), axis=-1)
        total = total + distance / distance.mean(axis=0)
    return np.asarray(total).T


PICTURE = range(20, 80)
RIVALS = {"bacon": bacon_scores, "tgv-kv": tgv_scores, "flashcache": flashcache_scores}


@pytest.mark.parametrize("name", RIVALS)
def test_published_selectors_keep_what_their_formulas_say(model: Path, name: str) -> None:
    with Session(model, merge=PRESETS[name], cache_type="f32") as session:
        engine = session.engine
        session.decode(words(PICTURE.start))
        rng = np.random.default_rng(1)
        with engine.media("image"):
            size = Shape(layers=3, heads=4, heads_kv=2, head_size=64).embedding
            rows = rng.standard_normal((len(PICTURE), size)).astype(np.float32)
            session.decode(embeddings=rows)
        session.decode(words(N - PICTURE.stop, 1))
        expected = [RIVALS[name](engine, layer) for layer in range(3)]
        engine.merge(70)
        counts = []
        for layer in range(3):
            for head in range(2):
                kept = engine.plan(layer, head).fate >= 2
                assert kept[:4].all()
                assert kept[-16:].all()
                score = expected[layer][head]
                free = np.arange(N)[4:-16]
                chosen = score[free][kept[4:-16]]
                dropped = score[free][~kept[4:-16]]
                # in 32 bits two that are nearly equal may change places
                assert chosen.min() >= dropped.max() - 1e-4 * abs(dropped.max())
                if name == "tgv-kv":
                    assert kept[: PICTURE.start].all()
            counts.append(int(kept.sum()))
        if name == "bacon":
            assert counts == [70, 70, 70]
        else:
            assert len(set(counts)) > 1, "layers get what they need"
            assert sum(counts) == 3 * 70


def test_cells_are_shared_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 40))
        shares, least = rng.random(n) * (rng.random(n) > 0.2), rng.integers(0, 20, n)
        most, total = int(rng.integers(1, 200)), int(rng.integers(n, 4000))
        cells = share_out(shares, total, least=least, most=most)
        assert cells.sum() <= total
        assert (cells <= most).all()
        assert (cells >= 1).all() or least.min() == 0
        if np.minimum(least, most).sum() < total:
            assert (cells >= np.minimum(least, min(most, total))).all()
    assert share_out(np.array([1, 2, 1]), 40, least=np.zeros(3), most=30).tolist() == [10, 20, 10]
    assert share_out(np.array([1, 8, 1]), 40, least=np.zeros(3), most=20).tolist() == [10, 20, 10]


def test_every_file_is_found() -> None:
    folder = Path(kvmerge.__file__).parent / "policies"
    for file in folder.glob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip().startswith("name: ClassVar[str] = ") and "custom" not in line:
                assert line.split('"')[1] in kvmerge.presets()
    assert {"auto", "keydiff", "flowmm"} <= set(PRESETS)


NEW_FILE = '''
"""A method of one's own."""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from kvmerge.policies import ArrayPolicy


@dataclass(frozen=True, kw_only=True)
class Longest(ArrayPolicy):
    """Keep the tokens with the longest keys."""

    name: ClassVar[str] = "longest-keys"

    def scores(self, layer):
        return np.linalg.norm(layer.k, axis=-1).T
'''


def chat(**options: Any) -> kvmerge.KVStats:
    """Ask about a few pictures and then about one more, so that a cap has to make room."""
    rng = np.random.default_rng(0)
    with kvmerge.Llama(
        pocket.model_path(), mmproj=pocket.mmproj_path(), n_ctx=8192, verbose=False, **options
    ) as llm:
        prompt = pocket.make_prompt(rng, 12)
        llm.create_chat_completion(prompt.messages(0), max_tokens=4)
        return llm.kv_stats()


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("cap", [None, 512])
def test_a_new_file_runs_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cap: int | None
) -> None:
    (tmp_path / "longest_keys.py").write_text(NEW_FILE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "longest_keys", raising=False)
    importlib.import_module("longest_keys")
    stats = chat(kv_merge="longest-keys", kv_budget=0.2, kv_max_cells=cap)
    assert stats.policy.startswith("longest-keys")
    assert stats.cells < stats.tokens / 2


@dataclass(frozen=True, kw_only=True)
class Failing(ArrayPolicy):
    """Raises when it is asked."""

    def scores(self, layer: Layer) -> Any:
        raise LookupError("the method has no answer")


@pytest.fixture
def names() -> Iterator[None]:
    known = dict(Policy.named)
    yield
    Policy.named.clear()
    Policy.named.update(known)


@pytest.mark.usefixtures("names")
def test_a_name_that_was_not_there_before() -> None:
    with pytest.raises(kvmerge.KVMergeError, match="'keydiff'"):
        resolve("never heard of")

    @dataclass(frozen=True, kw_only=True)
    class New(ArrayPolicy):
        name: ClassVar[str] = "never heard of"

    assert resolve("never heard of") == New()
    assert "never heard of" in kvmerge.presets()


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("cap", [None, 512])
def test_what_a_method_raises_is_raised(cap: int | None) -> None:
    """Whether a merge was asked for, or reading needed room."""
    with pytest.raises(LookupError, match="the method has no answer"):
        chat(kv_merge=Failing(), kv_budget=0.2 if cap is None else 1.0, kv_max_cells=cap)
