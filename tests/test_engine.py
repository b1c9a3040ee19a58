"""What the engine promises, seen through the C API and the model's logits."""

from __future__ import annotations

import ctypes
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from kvmerge.errors import KVMergeError, OptionError, PolicyError
from kvmerge.policies import PRESETS, ArrayPolicy, FlowMM, Mosaic, Policy
from kvmerge.policies.options import OPTIONS, Flag, Number, Option, Word
from random_model import Shape, write_random_model
from session import Session, llama_cpp


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random.gguf"
    return write_random_model(path, Shape(layers=2), seed=3)


def read(session: Session, seed: int = 0, n_text: int = 60) -> np.ndarray:
    """Text, a picture, text; returns the logits after it."""
    rng = np.random.default_rng(seed)
    session.decode(rng.integers(0, 512, 20).tolist())
    assert session.engine
    with session.engine.media("image"):
        session.decode(embeddings=rng.standard_normal((64, session.n_embd)))
    return session.decode(rng.integers(0, 512, n_text).tolist())


def merging(policy: Policy) -> dict[str, object]:
    return policy.engine_params()


def test_cells_fall_and_are_packed_low(model: Path) -> None:
    with Session(model, merge={}) as session:
        read(session)
        session.engine.merge(30)
        assert session.engine.n_cells() == 30
        assert session.engine.n_tokens() == 144
        # the next token takes the first free cell, so 31 are held and no more are looked at
        session.decode([5])
        assert session.engine.n_cells() == 31
        assert session.engine.n_tokens() == 145


def test_budget_of_everything_changes_nothing(model: Path) -> None:
    with Session(model, merge={}) as merged, Session(model) as plain:
        read(merged)
        merged.engine.merge(144)
        rng = np.random.default_rng(0)
        plain.decode(rng.integers(0, 512, 20).tolist())
        plain.decode(embeddings=rng.standard_normal((64, plain.n_embd)))
        plain.decode(rng.integers(0, 512, 60).tolist())
        assert (merged.decode([7]) == plain.decode([7])).all()


@pytest.mark.parametrize("flash_attention", [True, False])
def test_merged_attention_is_that_of_its_cells(model: Path, flash_attention: bool) -> None:
    """Few tokens at once take a mask per head, many take one head at a time: the same result."""
    rng = np.random.default_rng(1)
    more = rng.integers(0, 512, 40).tolist()
    results = []
    for batches in ([more[:8], more[8:16], more[16:24], more[24:32], more[32:]], [more]):
        with Session(
            model, merge=merging(FlowMM()), flash_attention=flash_attention, cache_type="f32"
        ) as session:
            read(session)
            session.engine.merge(40)
            results.append([session.decode(batch) for batch in batches][-1])
    np.testing.assert_allclose(results[0], results[1], atol=2e-2)


@pytest.mark.parametrize("name", ["flowmm", "mosaic", "evict", "h2o", "pyramid"])
def test_merging_again_conserves_mass(model: Path, name: str) -> None:
    policy = PRESETS[name]
    with Session(model, merge=merging(policy)) as session:
        read(session)
        session.engine.merge(60)
        first = session.engine.read_cells(0)
        session.decode(list(range(30)))
        session.engine.merge(50)
        second = session.engine.read_cells(0)
        for head in range(2):
            plan = session.engine.plan(0, head)
            dropped = (plan.target < 0) & (plan.order >= 0)
            held = first.mass[:, head].sum() + 30
            lost = np.concatenate([first.mass[:, head], np.ones(30)])[dropped].sum()
            assert second.mass[:, head].sum() == pytest.approx(held - lost)
        kept = second.order[second.mass > 0]
        assert kept.min() >= 0
        assert kept.max() == session.engine.n_tokens() - 1
        for head in range(2):
            order = second.order[second.mass[:, head] > 0, head]
            assert (np.diff(order) > 0).all(), "unique and in order"
        assert np.isfinite(session.decode([3])).all()


def test_folding_twice_with_one_partition_is_folding_once(model: Path) -> None:
    """A cell that was merged before counts with its mass: the mean is that of all its tokens."""
    with Session(model, merge=merging(FlowMM(bias="count", tau=1.0)), cache_type="f32") as session:
        read(session)
        original = session.engine.read_cells(0)
        session.engine.merge(60)
        plans = [session.engine.plan(0, head) for head in range(2)]
        session.engine.merge(25)
        after = session.engine.read_cells(0)
        for head in range(2):
            first, second = plans[head], session.engine.plan(0, head)
            kept = np.flatnonzero(first.fate >= 2)
            place = {cell: i for i, cell in enumerate(kept)}
            twice = np.array([second.target[place[t]] if t >= 0 else -1 for t in first.target])
            for i, pivot in enumerate(np.flatnonzero(second.fate >= 2)):
                members = twice == pivot
                value = original.v[members, head].mean(axis=0)
                np.testing.assert_allclose(after.v[i, head], value, atol=1e-4)
                assert after.mass[i, head] == members.sum()
                assert after.bias[i, head] == pytest.approx(np.log(members.sum()), abs=1e-5)


def values(option: Option) -> st.SearchStrategy[Any]:
    """Any value of an option; of numbers that go far beyond the prompt, the smaller ones."""
    if isinstance(option, Word):
        return st.sampled_from(sorted(option.values))
    if isinstance(option, Flag):
        return st.booleans()
    if isinstance(option, Number):
        return st.floats(option.low, option.high, width=32)
    return st.integers(option.low, min(option.high, 200))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any method, or any steps combined, with any options that it takes."""
    method = PRESETS[draw(st.sampled_from(sorted(PRESETS)))] or Policy()
    free = [field.name for field in fields(method) if field.init]
    # A few at a time: where all are drawn at once, no method is what it is.
    names = draw(st.lists(st.sampled_from(free), max_size=8, unique=True))
    chosen = {name: draw(values(OPTIONS[name])) for name in names}
    if "neighbours" in chosen:
        chosen["neighbours"] |= 1
    if chosen.get("select") in ("mosaic", "runs", "media") and {"match", "tau"} <= set(free):
        chosen |= {"match": draw(st.sampled_from(["segment", "none"])), "tau": 1.0}
    try:
        return replace(method, **chosen)
    except PolicyError:  # steps that do not go together
        reject()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    policy=policies(),
    budgets=st.lists(st.integers(1, 144), min_size=1, max_size=3),
    seed=st.integers(0, 3),
)
def test_any_policy_and_budget(model: Path, policy: Policy, budgets: list[int], seed: int) -> None:
    """Whatever is merged to whatever, time and again: pivots are unique, nothing is made up."""
    with Session(model, merge=policy) as session:
        read(session, seed)
        for turn, budget in enumerate(budgets):
            cells, merges = session.engine.n_cells(), session.engine.stats().n_merges
            held = [session.engine.read_cells(layer).mass.sum(axis=0) for layer in range(2)]
            session.engine.merge(budget)
            if budget >= cells:
                assert session.engine.stats().n_merges == merges
                continue
            kept = [
                max((session.engine.plan(layer, head).fate >= 2).sum() for head in range(2))
                for layer in range(2)
            ]
            assert sum(kept) <= 2 * budget, "the mean over the layers is what was asked for"
            if policy.allocate == "uniform" and not isinstance(policy, ArrayPolicy):
                assert max(kept) <= budget
            assert kept == [session.engine.layer_cells(layer) for layer in range(2)]
            for layer in range(2):
                after = session.engine.read_cells(layer)
                for head in range(2):
                    plan = session.engine.plan(layer, head)
                    kept = np.flatnonzero(plan.fate >= 2)
                    targets = plan.target[plan.target >= 0]
                    assert set(targets) == set(kept)
                    assert (plan.target[kept] == kept).all()
                    assert ((plan.fate == 0) == (plan.target < 0)).all()
                    live = after.mass[:, head] > 0
                    assert live.sum() == len(kept)
                    order = after.order[live, head]
                    assert (np.diff(order) > 0).all()
                    assert order[-1] == session.engine.n_tokens() - 1, "the last token is kept"
                    assert after.mass[:, head].sum() <= held[layer][head] + 1e-3
                    if not (plan.fate == 0)[plan.order >= 0].any():
                        assert after.mass[:, head].sum() == pytest.approx(held[layer][head])
                    assert np.isfinite(after.k[live]).all()
                    assert np.isfinite(after.bias[live, head]).all()
            assert np.isfinite(session.decode([turn])).all()


@pytest.mark.parametrize(
    ("choices", "params", "said"),
    [
        ({"score": "position", "value_norm": True}, {"score": 1, "value_norm": True}, "value_norm"),
        (
            {"select": "media", "match": "any", "tau": 1.0},
            {"select": 5, "match": 1, "tau": 1},
            "match",
        ),
        ({"select": "runs", "match": "segment"}, {"select": 4, "match": 4}, "tau"),
        ({"neighbours": 2}, {"n_pool": 2}, "odd"),
    ],
    ids=["norm", "match", "tau", "pool"],
)
def test_choices_that_do_not_go_together(
    model: Path, choices: dict[str, Any], params: dict[str, Any], said: str
) -> None:
    """Refused in both languages; what had no norm to be multiplied with was read where none is."""
    with pytest.raises(PolicyError, match=said):
        Policy(**choices)
    with Session(model, merge={}) as session:
        with pytest.raises(OptionError, match=said):
            session.engine.set_params(params)
        read(session)
        session.engine.merge(30)
        assert session.engine.n_cells() == 30


def test_permuting_heads_permutes_the_result(tmp_path: Path) -> None:
    shape = Shape(layers=1, heads=6, heads_kv=3)
    plans = []
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        path = write_random_model(tmp_path / f"{name}.gguf", shape, seed=5, head_order=order)
        with Session(path, merge=merging(PRESETS["mosaic"]), cache_type="f32") as session:
            read(session)
            session.engine.merge(40)
            heads = [session.engine.plan(0, head) for head in range(3)]
            values = session.engine.read_cells(0).v
            plans.append({order[h]: (heads[h].target, values[:, h]) for h in range(3)})
    for head in range(3):
        assert (plans[0][head][0] == plans[1][head][0]).all()
        np.testing.assert_allclose(plans[0][head][1], plans[1][head][1], atol=1e-4)


def test_a_removal_that_cuts_into_merged_cells_is_refused(model: Path) -> None:
    with Session(model, merge=merging(FlowMM(window=8))) as session:
        logits = read(session)
        session.engine.merge(30)
        cells = session.engine.n_cells()
        assert not session.remove(100, -1)
        assert not session.remove(0, 10)
        assert session.engine.n_cells() == cells
        # the window is whole: a tail inside it goes, and what is read again is as before
        expected = session.decode([9], position=144)
        assert session.remove(144, -1)
        assert (session.decode([9], position=144) == expected).all()
        assert session.remove(140, -1)
        assert session.engine.n_cells() == cells - 4
        assert session.engine.n_tokens() == 140
        assert session.remove(-1, -1)
        assert session.engine.n_cells() == 0
        session.position = 0
        # after everything was removed the cache is as new: no bias is left behind
        assert (read(session) == logits).all()


def test_what_may_be_removed_moves_with_its_positions(model: Path) -> None:
    def first_removable(*moves: tuple[str, int, int, int]) -> int:
        with Session(model, merge=merging(FlowMM(window=8))) as session:
            read(session)
            session.engine.merge(30)
            for move, start, end, by in moves:
                getattr(llama_cpp, f"llama_memory_seq_{move}")(session.memory, 0, start, end, by)
            start = llama_cpp.llama_memory_seq_pos_min(session.memory, 0) + 1
            return next(at for at in range(start, 999) if session.remove(at, -1))

    end = first_removable()
    assert 100 < end < 144
    assert first_removable(("add", -1, -1, 300)) == end + 300
    assert first_removable(("add", 50, -1, 300), ("add", -1, -1, -20)) == end + 280
    assert first_removable(("add", end, -1, 300)) == end
    assert first_removable(("div", -1, -1, 2)) == (end - 1) // 2 + 1


@pytest.mark.parametrize("name", ["flowmm", "mosaic", "h2o"])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_saved_states_answer_the_same(model: Path, name: str, cache_type: str) -> None:
    # Long enough for all of the observed queries to fit into what merging saves.
    params = {**merging(PRESETS[name]), "n_flow_rows": 16}
    with (
        Session(model, merge=params, cache_type=cache_type) as first,
        Session(model, merge=params, cache_type=cache_type) as second,
    ):
        read(first, n_text=500)
        first.engine.merge(40)
        first.decode(list(range(30)))
        read(second, seed=5)
        assert second.restore(first.save())
        second.position = first.position
        assert second.engine.n_cells() == first.engine.n_cells()
        assert second.engine.n_tokens() == first.engine.n_tokens()
        # merging goes on as if nothing had happened, with the queries that were observed
        for session in (first, second):
            session.engine.merge(35)
        logits = [session.decode([11, 12, 13]) for session in (first, second)]
        assert (logits[0] == logits[1]).all()


def test_a_restored_state_merges_before_anything_is_decoded(tmp_path: Path) -> None:
    """With a bias the graphs of a model with many heads are larger than what it reserved alone."""
    shape = Shape(layers=16, heads=16, heads_kv=16, head_size=8, ffn=32, vocab=64)
    model = write_random_model(tmp_path / "heads.gguf", shape)
    with Session(model, merge={}) as first, Session(model, merge={}) as second:
        first.decode(list(range(60)))
        assert second.restore(first.save())
        second.engine.merge(30)
        assert second.engine.n_cells() == 30
        assert np.isfinite(second.decode([1], position=60)).all()


def test_a_state_of_plain_cells_is_refused(model: Path) -> None:
    with Session(model) as plain, Session(model, merge={}) as merged:
        plain.decode(list(range(50)))
        size = llama_cpp.llama_state_seq_get_size(plain.context, 0)
        buffer = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(plain.context, buffer, size, 0)
        assert llama_cpp.llama_state_seq_set_data(merged.context, buffer, size, 0) == 0
        assert merged.engine.n_cells() == 0


def test_several_sequences(model: Path) -> None:
    """A merge of one sequence leaves another alone; shared cells are refused."""
    with Session(model, merge={}, n_seq_max=3) as session:
        rng = np.random.default_rng(2)
        one, two = rng.integers(0, 512, 80).tolist(), rng.integers(0, 512, 70).tolist()
        session.decode(one[:40], sequence=0, position=0)
        session.decode(two[:70], sequence=1, position=0)
        session.decode(one[40:], sequence=0, position=40)
        before = session.engine.read_cells(0, 1)
        session.engine.merge(30, 0)
        assert session.engine.n_cells(0) == 30
        after = session.engine.read_cells(0, 1)
        assert (before.k == after.k).all()
        assert (before.v == after.v).all()
        session.engine.merge(25, 1)
        assert session.engine.n_cells(1) == 25
        llama_cpp.llama_memory_seq_cp(session.memory, 1, 2, -1, -1)
        with pytest.raises(KVMergeError, match="shares cells"):
            session.engine.merge(20, 1)
        assert np.isfinite(session.decode([1], sequence=2, position=70)).all()
        assert session.remove(-1, -1, sequence=0)
        assert session.engine.n_cells(0) == 0


def test_cells_of_a_dropped_sequence_are_wiped(model: Path) -> None:
    """llama_memory_seq_keep frees merged cells: no bias may stay for the tokens that come there."""
    prompt = np.random.default_rng(6).integers(0, 512, 60).tolist()
    with Session(model, merge={}, n_seq_max=2) as session, Session(model) as plain:
        read(session)
        session.engine.merge(40)
        assert session.engine.read_cells(0).bias.max() > 0
        session.decode([1, 2, 3], sequence=1, position=0)
        llama_cpp.llama_memory_seq_keep(session.memory, 1)
        assert session.engine.n_cells(0) == 0
        again = session.decode(prompt, sequence=0, position=0)
        assert session.engine.n_tokens(0) == len(prompt)
        assert (session.engine.read_cells(0).bias == 0).all()
        np.testing.assert_allclose(again, plain.decode(prompt), atol=2e-2)


@pytest.mark.parametrize("batch", [1, 40], ids=["mask-per-head", "head-by-head"])
def test_flash_attention_uses_the_same_bias(model: Path, batch: int) -> None:
    results = []
    for bias, flash_attention in (("count", True), ("count", False), ("none", False)):
        with Session(
            model, merge=merging(FlowMM(bias=bias)), flash_attention=flash_attention
        ) as session:
            read(session)
            session.engine.merge(40)
            results.append(session.decode(list(range(batch))))
    difference = np.abs(results[0] - results[1]).max()
    assert np.abs(results[2] - results[1]).max() > 10 * difference


@pytest.mark.parametrize(("policy", "traced", "measured"), [
    (FlowMM(), False, True), (Mosaic(), False, False), (Mosaic(), True, True),
])  # fmt: skip
def test_flow_is_measured_where_it_is_used_or_shown(
    model: Path, policy: Policy, traced: bool, measured: bool
) -> None:
    with Session(model, merge=merging(policy)) as session:
        session.engine.keep_plans(traced)
        read(session)
        session.engine.merge(60)
        assert (session.engine.flow().rho >= 0).all() == measured


def test_no_picture_vanishes_from_a_mosaic(model: Path) -> None:
    with Session(model, merge=merging(Mosaic(floor=2)), n_ctx=2048) as session:
        rng = np.random.default_rng(4)
        for _ in range(8):
            session.decode(rng.integers(0, 512, 5).tolist())
            # pictures of the same size one after the other, without text between two of them
            for _ in range(2):
                with session.engine.media("image"):
                    session.decode(embeddings=rng.standard_normal((64, session.n_embd)))
        session.decode(rng.integers(0, 512, 20).tolist())
        session.engine.merge(60)
        for layer in range(2):
            for head in range(2):
                plan = session.engine.plan(layer, head)
                kept = plan.segment[(plan.fate >= 2) & (plan.modality == 1)]
                pictures, counts = np.unique(kept, return_counts=True)
                assert len(pictures) == 16
                assert counts.min() >= 2
                folded = (plan.target >= 0) & (plan.modality == 1)
                assert (plan.segment[plan.target[folded]] == plan.segment[folded]).all()


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"n_window": 0}, "n_window is 0, accepted is 1 to 256"),
        ({"theta": 1.5}, "theta is 1.5, accepted is 0 to 1"),
        ({"tau": float("nan")}, "tau is"),
        ({"match": 9}, "match is 9"),
    ],
)
def test_bad_parameters(model: Path, params: dict[str, float], match: str) -> None:
    with pytest.raises(KVMergeError, match=match):
        Session(model, merge=params)


def test_bad_calls(model: Path) -> None:
    with Session(model, merge={}) as session:
        read(session)
        with pytest.raises(KVMergeError, match="n_cells is 0, accepted is 1 and more"):
            session.engine.merge(0)
        with pytest.raises(KVMergeError, match="seq_id is 7"):
            session.engine.merge(10, 7)
        with pytest.raises(KVMergeError, match="nothing was merged yet"):
            session.engine.plan(0, 0)
        with pytest.raises(KVMergeError, match="layer is 5"):
            session.engine.read_cells(5)
