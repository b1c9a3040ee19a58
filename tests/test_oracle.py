"""The engine against the NumPy oracle, on K, V and queries read from a real cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
from random_model import Shape, write_random_model
from session import Session

N_IMAGE = 49
SHAPES = {
    "gqa": Shape(layers=3, heads=4, heads_kv=2, head_size=64),
    "mha": Shape(layers=2, heads=3, heads_kv=3, head_size=64),
}
# tolerance of K and V: one rounding to the type of the cache
ROUNDING = {"f32": 1e-5, "f16": 2e-3, "q8_0": 3e-2}
# tolerance of scores: with a quantized K, ggml rounds the queries of a product as well
SCORING = {"f32": 2e-3, "f16": 5e-3, "q8_0": 6e-2}


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    return write_random_model(path, SHAPES[request.param], seed=7)


def read_prompt(session: Session, seed: int = 0, pictures: int = 3) -> np.ndarray:
    """Text, pictures, text; returns the modality of every token."""
    rng = np.random.default_rng(seed)
    modality: list[int] = []

    def text(n: int) -> None:
        session.decode(rng.integers(0, 512, n).tolist())
        modality.extend([0] * n)

    text(21)
    for _ in range(pictures):
        rows = rng.standard_normal((N_IMAGE, session.n_embd)).astype(np.float32)
        assert session.engine
        with session.engine.media("image"):
            session.decode(embeddings=rows + 2 * rng.standard_normal(session.n_embd))
        modality.extend([1] * N_IMAGE)
        text(9)
    text(30)
    return np.array(modality, np.uint8)


@pytest.mark.parametrize("flash_attention", [True, False], ids=["fa", "no-fa"])
@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("theta", [0.0, 1.0], ids=["across", "within"])
def test_flowmm_equals_oracle(
    model: Path, cache_type: str, flash_attention: bool, theta: float
) -> None:
    if cache_type == "q8_0" and not flash_attention:
        pytest.skip("llama.cpp has no quantized V without flash attention")
    policy = oracle.Policy(theta=theta)
    params = {"theta": theta, "n_flow_rows": 1024}
    with Session(
        model, merge=params, cache_type=cache_type, flash_attention=flash_attention
    ) as session:
        assert session.engine
        modality = read_prompt(session)
        n = len(modality)
        budget = n // 5
        layers = range(session.engine.stats().n_layers)
        before = [session.engine.read_cells(layer) for layer in layers]
        queries = [session.engine.read_queries(layer) for layer in layers]
        session.engine.merge(budget)
        assert session.engine.n_cells() == budget
        flow = session.engine.flow()
        for layer in layers:
            check_layer(
                session, layer, before[layer], queries[layer], modality, budget, policy,
                float(flow.rho[layer]), (flow.text_to_media[layer], flow.media_to_text[layer]),
                ROUNDING[cache_type], SCORING[cache_type],
            )
        logits = session.decode([1])
        assert np.isfinite(logits).all()


def check_layer(session, layer, before, queries, modality, budget, policy, rho, parts, rounding, scoring):
    """Every step of one layer."""
    n, heads_kv = before.order.shape
    order = np.arange(n, dtype=np.int32)
    assert (before.order == order[:, None]).all()
    k, v = before.k.astype(np.float64), before.v.astype(np.float64)
    q = queries.q.astype(np.float64)
    proxy = queries.proxy

    assert queries.order[proxy].tolist() == list(range(n - policy.window, n))
    assert sorted(queries.order[~proxy]) == list(range(n)), "every token is sampled"
    assert (queries.modality == modality[queries.order]).all()

    # flow, exact because every query was sampled
    weights = oracle.attention(q[~proxy], queries.order[~proxy], k, order, queries.scale)
    expected = oracle.flow(weights, queries.modality[~proxy], modality)
    np.testing.assert_allclose([rho, *parts], expected, rtol=scoring, atol=1e-5)

    weights = oracle.attention(q[proxy], queries.order[proxy], k, order, queries.scale)
    scores = oracle.importance(weights, heads_kv)

    after = session.engine.read_cells(layer)
    for head in range(heads_kv):
        plan = session.engine.plan(layer, head)
        np.testing.assert_allclose(plan.score, scores[head], rtol=scoring, atol=1e-5)
        # from here on with the engine's own scores, so that a rounding does not change the order
        kept, open_ = oracle.select(plan.score, budget, policy)
        assert kept.tolist() == np.flatnonzero(plan.fate >= 2).tolist()
        assert open_.tolist() == np.flatnonzero(plan.fate == 2).tolist()
        target, margin = oracle.match(k[:, head], kept, open_, modality, rho >= policy.theta)
        differs = target != plan.target
        assert not (differs & (margin > 1e-5)).any(), "another pivot is clearly nearer"
        assert differs.sum() <= 2
        target = plan.target.astype(np.int64)
        assert (plan.target[kept] == kept).all()
        if rho < policy.theta:
            folded = target >= 0
            assert (modality[folded] == modality[target[folded]]).all()
        mass = before.mass[:, head].astype(np.float64)
        np.testing.assert_allclose(
            after.k[:, head], oracle.fold(k[:, head], target, kept, mass),
            atol=rounding * np.abs(k).max(),
        )
        np.testing.assert_allclose(
            after.v[:, head], oracle.fold(v[:, head], target, kept, mass),
            atol=rounding * np.abs(v).max(),
        )
        counts = np.array([(target == p).sum() for p in kept])
        assert after.mass[:, head].tolist() == counts.tolist()
        assert counts.sum() == (target >= 0).sum()
        np.testing.assert_allclose(after.bias[:, head], np.log(counts), atol=1e-6)
        assert after.order[:, head].tolist() == kept.tolist()
