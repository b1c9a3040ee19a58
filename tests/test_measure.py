"""The measured error of a merge, and budgets that follow from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmerge import Llama, pocket
from kvmerge.budget import SHARES, TOLERANCE, Budget, shares_from
from kvmerge.errors import BudgetError, OptionError
from kvmerge.native.binding import Cells, Engine, Queries
from kvmerge.policies import Auto, Evict, FlowMM, KVMerger, Mosaic, Policy
from random_model import Shape, write_random_model
from session import Session
from test_oracle import read_prompt

HELD_OUT = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(layers=3, heads=4, heads_kv=2, head_size=64)
    return write_random_model(tmp_path_factory.mktemp("models") / "m.gguf", shape, seed=7)


def held_out(queries: Queries, policy: Policy) -> list[int]:
    """Return the rows of sampled text that no bias was fitted to, the last ones."""
    text = np.flatnonzero(~queries.proxy & (queries.modality == 0))
    text = text[np.argsort(queries.order[text], kind="stable")]
    n = min(policy.window, len(text)) if policy.bias == "fit" else 0
    fitted = {int(text[i * len(text) // n]) for i in range(n)}
    return [int(row) for row in text if int(row) not in fitted][-HELD_OUT:]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def layer_error(before: Cells, after: Cells, engine: Engine, layer: int, policy: Policy) -> float:
    """Return it from the cells as they were, and as the merge has left them."""
    queries = engine.read_queries(layer)
    whole = moved = 0.0
    n, heads, _ = before.k.shape
    group = queries.q.shape[1] // heads
    for head in range(heads):
        target = engine.plan(layer, head).target.astype(int)
        pivots = np.flatnonzero(target == np.arange(n))
        first = len(after.k) - len(pivots)
        for row in held_out(queries, policy):
            seen = before.order[:, head] <= queries.order[row]
            for q in queries.q[row, head * group : (head + 1) * group].astype(float):
                logits = before.k[:, head] @ q * queries.scale + before.bias[:, head]
                expected = softmax(np.where(seen, logits, -np.inf)) @ before.v[:, head]
                keys, values, biases = [], [], []
                for i, pivot in enumerate(pivots):
                    members = np.flatnonzero(target == pivot)
                    if seen[members].all():
                        keys.append(after.k[first + i, head])
                        values.append(after.v[first + i, head])
                        biases.append(after.bias[first + i, head])
                    else:  # it was asked before all of the group was there
                        for member in members[seen[members]]:
                            keys.append(before.k[member, head])
                            values.append(before.v[member, head])
                            biases.append(before.bias[member, head])
                logits = np.array(keys) @ q * queries.scale + np.array(biases)
                found = softmax(logits) @ np.array(values)
                whole += (expected**2).sum()
                moved += ((found - expected) ** 2).sum()
    return float(np.sqrt(moved / whole))


POLICIES = [
    Auto(),
    Evict(),
    FlowMM(theta=0.0),
    FlowMM(keys="keep", bias="count"),
    KVMerger(),
    Mosaic(members=0),
]


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_error_is_that_of_attention(
    model: Path, policy: Policy, device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device:
        monkeypatch.setenv("KVMERGE_AS_DEVICE", "1")
    with Session(model, merge=replace(policy, flow_rows=1024), cache_type="f32") as session:
        engine = session.engine
        read_prompt(session)
        for cells in (150, 120):  # the second time with cells that stand for many
            before = [engine.read_cells(layer) for layer in range(3)]
            engine.merge(cells)
            errors = [
                layer_error(before[layer], engine.read_cells(layer), engine, layer, policy)
                for layer in range(3)
            ]
            assert engine.stats().error == pytest.approx(np.mean(errors), rel=2e-3)
            assert engine.stats().error > 0.01
            session.decode(np.random.default_rng(1).integers(0, 512, 40).tolist())


def test_eight_of_many_layers_are_measured(tmp_path: Path) -> None:
    policy = replace(FlowMM(theta=0.0), flow_rows=1024)
    shape = Shape(layers=19, heads=2, heads_kv=2, head_size=32)
    model = write_random_model(tmp_path / "m.gguf", shape, seed=7)
    with Session(model, merge=policy, cache_type="f32") as session:
        engine = session.engine
        read_prompt(session)
        before = [engine.read_cells(layer) for layer in range(19)]
        engine.merge(150)
        errors = [
            layer_error(before[layer], engine.read_cells(layer), engine, layer, policy)
            for layer in (0, 3, 5, 8, 10, 12, 15, 17)
        ]
        assert engine.stats().error == pytest.approx(np.mean(errors), rel=2e-3)


def test_a_merge_that_changes_nothing_has_no_error(model: Path) -> None:
    with Session(model, merge=Auto(), cache_type="f32") as session:
        read_prompt(session)
        session.engine.merge(session.engine.n_cells() - 1)
        assert 0 <= session.engine.stats().error < 0.2


def test_too_little_text_is_not_measured(model: Path) -> None:
    with Session(model, merge=Auto(), cache_type="f32") as session:
        engine = session.engine
        session.decode([1, 2, 3])
        with engine.media("image"):
            session.decode(embeddings=np.random.default_rng(0).standard_normal((60, 256)) * 1.0)
        session.decode([4, 5])
        before = engine.n_cells()
        engine.merge_within([20, 30], 10.0)
        assert engine.n_cells() == before, "what cannot be measured is kept"
        engine.merge(30)
        assert engine.stats().error == -1


@pytest.mark.parametrize("policy", [Auto(), FlowMM()], ids=str)
def test_the_first_within_the_tolerance_is_taken(model: Path, policy: Policy) -> None:
    numbers = [130, 150, 170, 190]

    def merged(cells: list[int], tolerance: float) -> tuple[int, int, float]:
        """Return the cells that are left, the merges, and the error of the last."""
        with Session(model, merge=policy, cache_type="f32") as session:
            read_prompt(session)
            session.engine.merge_within(cells, tolerance)
            assert np.isfinite(session.decode([1])).all()
            stats = session.engine.stats()
            return session.engine.n_cells() - 1, stats.n_merges, stats.error

    errors = [merged([cells], 10.0)[2] for cells in numbers]
    assert errors == sorted(errors, reverse=True)
    for cells, error in zip(numbers, errors, strict=True):
        assert merged(numbers, error * 1.0001) == (cells, 1, pytest.approx(error, rel=1e-4))
    assert merged(numbers, errors[-1] * 0.99) == (merged([300], 10.0)[0], 0, -1)


def test_numbers_that_are_none(model: Path) -> None:
    with Session(model, merge=Auto()) as session:
        read_prompt(session)
        for numbers, tolerance, reason in (
            ([], 0.1, "one and more"),
            ([0, 20], 0.1, "n_cells is 0"),
            ([50, 40], 0.1, "40 after 50"),
            ([40, 50], -1.0, "tolerance is -1"),
            ([40, 50], float("nan"), "tolerance is nan"),
        ):
            with pytest.raises(OptionError, match=reason):
                session.engine.merge_within(numbers, tolerance)
        before = session.engine.n_cells()
        session.engine.merge_within([before, before + 10], 0.0)
        assert session.engine.n_cells() == before


# kv_budget="auto"


def album(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    content: list[dict[str, Any]] = []
    for i in range(n):
        colour, shape = list(pocket.COLOURS)[i % 4], list(pocket.SHAPES)[i % 3]
        picture = pocket.render_picture(colour, shape, "ABCD"[i % 4], rng)
        content += [
            {"type": "text", "text": f"Picture {i + 1}:"},
            {"type": "image", "image": picture},
        ]
    question = {"type": "text", "text": "\nWhat shape is in picture 1?"}
    return [{"role": "user", "content": [*content, question]}]


def ask(llm: Llama, messages: list[dict[str, Any]]) -> str:
    answer: Any = llm.create_chat_completion(messages, temperature=0, max_tokens=8)
    return str(answer["choices"][0]["message"]["content"])


def make(**options: Any) -> Llama:
    defaults = {"n_ctx": 4096, "n_threads": 1, "verbose": False, "kv_merge": "auto"}
    return Llama(pocket.model_path(), mmproj=pocket.mmproj_path(), **(defaults | options))


@pytest.mark.parametrize("merge", ["auto", "flowmm"])
def test_budget_follows_from_the_error(merge: str) -> None:
    with make(kv_merge=None) as full:
        expected = ask(full, album(6))
    with make(kv_budget="auto", kv_merge=merge) as llm:
        assert ask(llm, album(6)) == expected
        stats = llm.kv_stats()
        assert stats.budget == "auto"
        assert "auto" in str(stats)
        assert all(record.error <= TOLERANCE for record in stats.merges)
        for share in SHARES:  # a smaller share than the one that was taken would have moved more
            with make(kv_budget=share, kv_merge=merge) as other:
                ask(other, album(6))
                record = other.kv_stats().merges[0]
            if record.error <= TOLERANCE:
                assert stats.merges[0].cells_after == record.cells_after
                break
        else:
            assert stats.merges == ()


def test_a_conversation_is_not_worn_away() -> None:
    with make(kv_budget="auto") as llm:
        messages = album(6)
        said = ask(llm, messages)
        merged = llm.kv_stats().merges
        assert len(merged) == 1
        messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": "What colour is in picture 2?"},
        ]
        ask(llm, messages)
        assert llm.kv_stats().merges == merged, "no picture has come"
        share = llm.kv_cache.merged_share(of_media=True)
        messages[-1]["content"] = album(3, seed=1)[0]["content"]
        ask(llm, messages)
        last = llm.kv_stats().merges[-1]
        assert len(llm.kv_stats().merges) == 2
        assert (last.cells_after - last.text_after) / (last.tokens - last.text_after) >= share


def test_nothing_fits_and_is_not_tried_with_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmerge.reading.TOLERANCE", 0.0)
    tried = []
    merge_within = Engine.merge_within
    monkeypatch.setattr(
        Engine, "merge_within", lambda *args: (tried.append(1), merge_within(*args))[1]
    )
    with make(kv_budget="auto") as llm:
        messages = album(2)
        messages += [{"role": "assistant", "content": ask(llm, messages)}]
        messages += [{"role": "user", "content": "What colour is in picture 2?"}]
        ask(llm, messages)
        assert llm.kv_stats().merges == ()
        assert llm.kv_stats().cells == llm.kv_stats().tokens
        assert len(tried) == 1
        ask(llm, album(2, seed=5))
        assert len(tried) == 2, "other pictures"


def test_words_that_are_no_budget() -> None:
    for wrong in ("Auto", "all", "0.2"):
        with pytest.raises(BudgetError, match="'auto', as few as"):
            Budget(wrong)
    with pytest.raises(BudgetError, match="not known before"):
        Budget("auto").cells(100)
    assert [choice.kept for choice in shares_from(0.15)] == [0.2, 0.35, 0.5, 0.75]
