"""Every preset against the NumPy oracle, on K, V and queries read from a real cache.

Steps are compared one by one; each step of the oracle starts from the engine's result of the one
before, so that a rounding in a score does not change what is compared later.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracle
from kvmerge.policies import PRESETS, ArrayPolicy, FlowMM, LookM, Mosaic, Policy
from mrope_model import write_mrope_model
from random_model import Shape, write_random_model
from session import Session

N_IMAGE = 49
SHAPES = {
    "gqa": Shape(layers=3, heads=4, heads_kv=2, head_size=64),
    "mha": Shape(layers=2, heads=3, heads_kv=3, head_size=64),
    "deep": Shape(layers=5, heads=4, heads_kv=2, head_size=64),
}
# tolerance of K and V: one rounding to the type of the cache
ROUNDING = {"f32": 1e-5, "f16": 2e-3, "q8_0": 3e-2, "q4_0": 0.3}
# tolerance of scores: with a quantized K, ggml rounds the queries of a product as well
SCORING = {"f32": 2e-3, "f16": 5e-3, "q8_0": 6e-2, "q4_0": 6e-2}

SHARED_OUT = {"FlashCache", "TgvKv"}
"""Policies that say themselves what a layer gets; see tests/test_array_policy.py."""

POLICIES: dict[str, Policy] = {name: policy for name, policy in PRESETS.items() if policy}
POLICIES |= {
    "flowmm-literal": FlowMM(bias="none"),
    "flowmm-across": FlowMM(theta=0.0),
    "flowmm-within": FlowMM(theta=1.0),
    "flowmm-keep-count": FlowMM(keys="keep", bias="count"),
    "flowmm-count": FlowMM(bias="count"),
    "look-m-mean": LookM(fold="mean"),
    "look-m-weighted": LookM(fold="weighted"),
    "mosaic-keep": Mosaic(keep=5, text=0.2),
    "mosaic-all": Mosaic(members=0),
    "mosaic-groups": Mosaic(allocate="uniform", neighbours=1, value_norm=False),
    "mosaic-pivots": Mosaic(pivots=0.5, text=0.3, text_pivots=0.75, floor=2),
}
CACHES = [("f32", True), ("f32", False), ("f16", True), ("f16", False), ("q8_0", True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    written = {
        name: write_random_model(folder / f"{name}.gguf", shape, seed=7)
        for name, shape in SHAPES.items()
    }
    return written | {"mrope": write_mrope_model(folder)[0]}


def read_prompt(
    session: Session, seed: int = 0, among_others: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Text, pictures, text; returns modality and segment of every token.

    With `among_others`, tokens of another sequence lie between the cells of this one.
    """
    rng = np.random.default_rng(seed)
    modality: list[int] = []
    segment: list[int] = []

    def mark(kind: int, n: int) -> None:
        number = segment[-1] + 1 if segment else 0
        modality.extend([kind] * n)
        segment.extend([number] * n)

    def text(n: int) -> None:
        session.decode(rng.integers(0, 512, n).tolist())
        mark(0, n)

    text(21)
    for i, gap in enumerate((9, 0, 30)):  # the second and third picture touch
        if among_others:
            session.decode([5], sequence=1, position=i)
        rows = rng.standard_normal((N_IMAGE, session.n_embd)).astype(np.float32)
        assert session.engine
        with session.engine.media("image"):
            session.decode(embeddings=rows + 2 * rng.standard_normal(session.n_embd))
        mark(1, N_IMAGE)
        if gap:
            text(gap)
    return np.array(modality), np.array(segment)


@pytest.mark.parametrize(("cache_type", "flash_attention"), CACHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_flowmm(
    models: dict[str, Path], shape: str, cache_type: str, flash_attention: bool
) -> None:
    for policy in (FlowMM(theta=0.0, bias="none"), FlowMM(theta=1.0)):
        check(models[shape], policy, cache_type, flash_attention)


@pytest.mark.parametrize("flash_attention", [True, False], ids=["fa", "no-fa"])
@pytest.mark.parametrize("name", POLICIES)
def test_preset(models: dict[str, Path], name: str, flash_attention: bool) -> None:
    check(models["gqa"], POLICIES[name], "f16" if flash_attention else "f32", flash_attention)


@pytest.mark.parametrize("name", POLICIES)
def test_preset_in_plain_graphs(
    models: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without operations that only the CPU has: what is computed on other backends."""
    monkeypatch.setenv("KVMERGE_AS_DEVICE", "1")
    check(models["gqa"], POLICIES[name], "f16", True)


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("name", ["flowmm", "mosaic", "h2o"])
def test_cells_that_do_not_follow_each_other(models: dict[str, Path], name: str) -> None:
    check(models["gqa"], POLICIES[name], "f16", True, among_others=True)


@pytest.mark.parametrize("name", ["flowmm", "mosaic"])
def test_second_merge_in_plain_graphs(
    models: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that stand for many, with a bias, score the same in both ways."""
    policy = replace(POLICIES[name], bias="fit")
    with Session(models["gqa"], merge=policy.engine_params(), cache_type="f32") as session:
        engine = session.engine
        assert engine
        read_prompt(session)
        engine.merge(60)
        read_prompt(session, seed=1)
        state = session.save()
        # the same queries for both: of a sequence that was merged a state holds only some of them
        assert session.restore(state)
        heads = [(i, h) for i in range(3) for h in range(2)]
        engine.merge(70)
        flow, scores = engine.flow(), [engine.plan(i, h).score for i, h in heads]
        assert session.restore(state)
        monkeypatch.setenv("KVMERGE_AS_DEVICE", "1")
        engine.merge(70)
        for (i, h), score in zip(heads, scores, strict=True):
            np.testing.assert_allclose(engine.plan(i, h).score, score, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(engine.flow().rho, flow.rho, rtol=1e-3)


def test_more_tokens_than_a_thread_matches_at_a_time(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = FlowMM(theta=0.0).engine_params()
    with Session(models["gqa"], merge=merge, cache_type="f32", n_ctx=2048) as session:
        engine = session.engine
        assert engine
        for i in range(10):
            session.decode(np.random.default_rng(i).integers(0, 512, 150).tolist())
        state = session.save()
        # the same queries for both: a state may hold fewer than were observed
        assert session.restore(state)
        engine.merge(100)
        targets = [engine.plan(i, h).target for i in range(3) for h in range(2)]
        assert session.restore(state)
        monkeypatch.setenv("KVMERGE_AS_DEVICE", "1")
        engine.merge(100)
        expected = [engine.plan(i, h).target for i in range(3) for h in range(2)]
    # rounding may decide between two pivots that are equally near
    assert np.mean(np.array(targets) == np.array(expected)) > 0.99


@pytest.mark.parametrize("name", ["mosaic", "pyramid", "madakv", "meda"])
def test_sizes_of_more_layers(models: dict[str, Path], name: str) -> None:
    """With fewer than four layers none of them is an early one."""
    check(models["deep"], POLICIES[name], "f16", True)


@pytest.mark.parametrize("name", ["mosaic", "look-m", "kvmerger"])
def test_preset_quantized(models: dict[str, Path], name: str) -> None:
    check(models["gqa"], POLICIES[name], "q4_0", True)


@pytest.mark.parametrize("name", ["flowmm", "mosaic", "h2o", "pyramid"])
def test_preset_with_mrope(models: dict[str, Path], name: str) -> None:
    """Positions of a picture repeat and run in three directions: order is that of the tokens."""
    check(models["mrope"], POLICIES[name], "f16", True)


def check(
    model: Path, policy: Policy, cache_type: str, flash_attention: bool, among_others: bool = False
) -> None:
    """Merge a prompt and compare every step of every layer."""
    policy = replace(policy, flow_rows=1024)  # every query is sampled: the flow is exact
    with Session(
        model, merge=policy, cache_type=cache_type,
        flash_attention=flash_attention, n_seq_max=1 + among_others,
    ) as session:  # fmt: skip
        assert session.engine
        modality, segment = read_prompt(session, among_others=among_others)
        n = len(modality)
        n_text = int((modality == 0).sum()) if policy.budget_of == "media" else 0
        budget = n_text + (n - n_text) // 5
        layers = range(session.engine.stats().n_layers)
        before = [session.engine.read_cells(layer) for layer in layers]
        queries = [session.engine.read_queries(layer) for layer in layers]
        session.engine.merge(budget)
        sizes = check_sizes(session, policy, budget, modality, segment, n_text)
        assert session.engine.n_cells() == max(sizes)
        for layer in layers:
            check_layer(
                session, layer, before[layer], queries[layer], modality, segment, sizes[layer],
                policy, cache_type,
            )  # fmt: skip
        assert np.isfinite(session.decode([1])).all()


def kept_of(plan: Any) -> np.ndarray:
    return np.flatnonzero(plan.fate >= 2)


def check_sizes(
    session: Session, policy: Policy, budget: int, modality: np.ndarray, segment: np.ndarray,
    n_text: int,
) -> list[int]:  # fmt: skip
    """Every layer has the cells that the policy gives it; their mean is the budget."""
    assert session.engine
    engine = session.engine
    layers = engine.stats().n_layers
    heads = engine.layer(0).n_head_kv
    flows = engine.flow()
    sizes = [len(kept_of(engine.plan(layer, 0))) for layer in range(layers)]
    need = np.array(
        [
            np.mean(
                [
                    oracle.cover(engine.plan(i, h).score, modality, policy.cover)
                    for h in range(heads)
                ]
            )
            for i in range(layers)
        ]
    )
    parts = np.stack([flows.text_to_media, flows.media_to_text], axis=1).astype(np.float64)
    p = {"sinks": policy.sinks, "keep": policy.keep, "window": policy.window}
    if policy.budget_of == "media":
        # text takes its cells in every layer, and every picture its floor
        pictures = len(np.unique(segment[modality > 0]))
        p = {"sinks": policy.floor * pictures, "keep": 0, "window": 0}
    rest = len(modality) - n_text
    expected = n_text + oracle.allocate(policy.allocate, budget - n_text, rest, p, need, parts)
    if type(policy).__name__ not in SHARED_OUT:
        assert np.abs(np.array(sizes) - expected).max() <= 1
    assert sum(sizes) == budget * layers
    total = sum(size * engine.stats().bytes_per_cell // layers for size in sizes)
    assert engine.stats().bytes_after == total
    return sizes


def check_targets(
    target: np.ndarray, kept: np.ndarray, key: np.ndarray, score: np.ndarray, modality: np.ndarray,
    segment: np.ndarray, budget: int, policy: Policy, rho: float,
) -> None:  # fmt: skip
    p = {f.name: getattr(policy, f.name) for f in fields(policy)}
    if policy.select in ("mosaic", "media"):
        grouped = oracle.mosaic if policy.select == "mosaic" else oracle.media
        expected = grouped(key, score, modality, segment, budget, p)
        differs = target != oracle.cap(expected, key, policy.members)
        assert differs.mean() < 0.02, "only near ties of distances may differ"
        folded = target >= 0
        assert (modality[target[folded]] == modality[folded]).all()
        folded &= modality > 0
        assert (segment[target[folded]] == segment[folded]).all(), "pictures stay apart"
    elif policy.select == "runs":
        differs = target != oracle.runs(key, score, segment, budget, p)
        assert differs.mean() < 0.02
    elif isinstance(policy, ArrayPolicy):
        pass  # the plan is the method's own: what is checked is that it is carried out
    else:
        expected_kept, open_ = oracle.select(score, modality, budget, p)
        assert kept.tolist() == expected_kept.tolist()
        across = {"any": True, "flow": rho >= policy.theta}
        if policy.match == "none":
            open_ = open_[:0]
        groups = None if across.get(policy.match, False) else modality
        expected_target, margin = oracle.match(key, kept, open_, groups)
        similarity = oracle.cosine(key, expected_target)
        expected_target = oracle.limit(expected_target, kept, similarity, p)
        differs = target != expected_target
        threshold = policy.fold == "exp"  # a cosine at the threshold may fall on either side
        assert not (differs & (margin > 1e-5)).any() or (threshold and differs.sum() <= 2)
        assert differs.sum() <= 2


def check_layer(
    session: Session, layer: int, before: Any, queries: Any, modality: np.ndarray,
    segment: np.ndarray, budget: int, policy: Policy, cache_type: str,
) -> None:  # fmt: skip
    assert session.engine
    n, heads_kv = before.order.shape
    order = np.arange(n)
    scoring, rounding = SCORING[cache_type], ROUNDING[cache_type]
    assert (before.order == order[:, None]).all()
    assert (before.mass == 1).all()
    k, v = before.k.astype(np.float64), before.v.astype(np.float64)
    q = queries.q.astype(np.float64)
    proxy = queries.proxy
    window = min(policy.window, n)

    assert queries.order[proxy].tolist() == list(range(n - window, n))
    assert sorted(queries.order[~proxy]) == list(range(n)), "every token is sampled"
    assert (queries.modality == modality[queries.order]).all()

    rho = float(session.engine.flow().rho[layer])
    everything = oracle.attention(
        oracle.logits(q[~proxy], k, queries.scale), queries.order[~proxy], order
    )
    if policy.score != "position":
        flow = session.engine.flow()
        found = [rho, flow.text_to_media[layer], flow.media_to_text[layer]]
        expected = oracle.flow(everything, queries.modality[~proxy], modality)
        np.testing.assert_allclose(found, expected, rtol=scoring, atol=1e-5)

    values = oracle.logits(q[proxy], k, queries.scale)
    asked = oracle.spread(np.flatnonzero(~proxy & (queries.modality == 0)), queries.order, window)
    fitted = oracle.logits(np.concatenate([q[proxy], q[asked]]), k, queries.scale)
    if policy.score == "proxy":
        proxies = oracle.attention(values, queries.order[proxy], order)
        scores = oracle.importance(proxies, heads_kv)
    elif policy.score == "all":
        scores = oracle.importance(everything, heads_kv)
    else:
        scores = np.tile(order.astype(float), (heads_kv, 1))
    if policy.value_norm:
        scores = scores * np.linalg.norm(v, axis=-1).T

    after = session.engine.read_cells(layer)
    group = values.shape[1] // heads_kv
    unused = session.engine.n_cells() - budget
    for head in range(heads_kv):
        plan = session.engine.plan(layer, head)
        assert (plan.segment == segment).all()
        assert (plan.modality == modality).all()
        score = oracle.pool(scores[head], segment, policy.neighbours, policy.pool == "max")
        np.testing.assert_allclose(plan.score, score, rtol=scoring, atol=1e-5)

        kept, target = kept_of(plan), plan.target.astype(np.int64)
        assert len(kept) == budget
        score = plan.score.astype(np.float64)
        key = k[:, head]
        check_targets(target, kept, key, score, modality, segment, budget, policy, rho)

        mass = before.mass[:, head].astype(np.float64)
        weight = oracle.weights(target, kept, mass, oracle.cosine(key, target), policy.fold)
        np.testing.assert_allclose(
            after.v[unused:, head], oracle.fold(v[:, head], target, kept, weight),
            atol=rounding * np.abs(v).max(),
        )  # fmt: skip
        moved = oracle.fold(key, target, kept, weight) if policy.keys == "move" else key[kept]
        np.testing.assert_allclose(after.k[unused:, head], moved, atol=rounding * np.abs(k).max())
        counts = np.array([(target == pivot).sum() for pivot in kept])
        assert after.mass[unused:, head].tolist() == counts.tolist()
        assert counts.sum() == (target >= 0).sum()
        of_head = fitted[:, head * group : (head + 1) * group].reshape(-1, n)
        bias = oracle.biases(target, kept, mass, weight, of_head, policy.bias, policy.keys)
        np.testing.assert_allclose(after.bias[unused:, head], bias, atol=scoring * 3, rtol=scoring)
        assert after.order[unused:, head].tolist() == kept.tolist()
        # what the layer does not use is not seen
        assert (after.mass[:unused, head] == 0).all()
        assert np.isneginf(after.bias[:unused, head]).all()
