"""A saved context is no larger than the full one, smaller when it was merged, and merges on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmerge
from kvmerge import pocket
from random_model import Shape, write_random_model

SMOLLM2 = Shape(layers=30, heads=9, heads_kv=3, ffn=256, vocab=512)
"""Its cache: nine heads of queries for three of keys and values, in 30 layers."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "model.gguf", SMOLLM2)


def size(file: Path, model: Any, tokens: list[int], **options: Any) -> int:
    options = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **options}
    with kvmerge.Llama(model, **options) as llm:
        next(llm.generate(tokens, temp=0))
        llm.save_context(file)
        if llm.engine is not None and llm.kv_stats().merges:
            # What was saved goes on, and merges again.
            again = kvmerge.Llama(model, **options)
            again.load_context(file)
            assert again.kv_stats().cells == llm.kv_stats().cells
            next(again.generate([*tokens, *range(5, 200)], temp=0))
            assert len(again.kv_stats().merges) == 2
            assert np.isfinite(again.reader.last_logits()).all()
            again.close()
    return file.stat().st_size


@pytest.mark.parametrize("n", [60, 150])
@pytest.mark.parametrize("kept", [0.2, 0.9])
@pytest.mark.parametrize("name", ["flowmm", "mosaic", "h2o", "pyramid"])
@pytest.mark.parametrize("which", ["smollm2", "pocket"])
def test_merged_is_smaller(
    which: str, name: str, kept: float, n: int, smollm2: Path, tmp_path: Path
) -> None:
    model = smollm2 if which == "smollm2" else pocket.model_path()
    tokens = np.random.default_rng(n).integers(5, 200, n).tolist()
    full = size(tmp_path / "full", model, tokens)
    merged = size(tmp_path / "merged", model, tokens, kv_merge=name, kv_budget=kept)
    assert merged < full
    if kept == 0.2 and n > 60:
        assert merged < 0.75 * full


@pytest.mark.parametrize("n", [20, 100, 300])
@pytest.mark.parametrize("name", ["auto", "flowmm", "mosaic", "h2o"])
@pytest.mark.parametrize("which", ["smollm2", "pocket"])
def test_not_merged_is_as_large_as_full(
    which: str, name: str, n: int, smollm2: Path, tmp_path: Path
) -> None:
    """Beside keys and values there is what is noted of cells, and few queries."""
    model = smollm2 if which == "smollm2" else pocket.model_path()
    tokens = np.random.default_rng(n).integers(5, 200, n).tolist()
    full = size(tmp_path / "full", model, tokens)
    saved = size(tmp_path / "saved", model, tokens, kv_merge=name, kv_budget=1000)
    assert full < saved < 1.04 * full + 1000
    if name != "h2o":  # It keeps four bytes more of each head's cell.
        assert saved < 1.02 * full + 1000


def kept(llm: kvmerge.Llama) -> list[set[int]]:
    """Return the tokens that a merge has kept, for each head."""
    engine, found = llm.engine, []
    for layer in range(engine.stats().n_layers):
        for head in range(engine.layer(layer).n_head_kv):
            plan = engine.plan(layer, head)
            found.append({int(i) for i in np.asarray(plan.order)[np.asarray(plan.fate) >= 2]})
    return found


@pytest.mark.parametrize("pictures", [0, 4])
@pytest.mark.parametrize("name", ["flowmm", "mosaic", "snapkv"])
def test_a_first_merge_after_loading(name: str, pictures: int, tmp_path: Path) -> None:
    """It keeps what that of the process keeps that has saved; the last text is read again."""
    prompt = pocket.make_prompt(np.random.default_rng(4), max(pictures, 1))
    messages = prompt.messages(1)
    if not pictures:
        messages = [{"role": "user", "content": "The code of the old box is five six. " * 12}]
    options = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    options |= {"mmproj": pocket.mmproj_path(), "kv_merge": name, "kv_trace": True}
    plans, tokens = [], []
    with kvmerge.Llama(pocket.model_path(), kv_budget=1000, **options) as first:
        first.create_chat_completion(messages, temperature=0, max_tokens=1)
        first.kv_cache.trim(first.n_tokens)
        first.save_context(tmp_path / "saved")
    for file in (None, tmp_path / "saved"):
        with kvmerge.Llama(pocket.model_path(), kv_budget=0.3, **options) as llm:
            if file is not None:
                llm.load_context(file)
            llm.create_chat_completion(messages, temperature=0, max_tokens=1)
            assert len(llm.kv_stats().merges) == 1
            plans.append(kept(llm))
            tokens.append(llm.n_tokens)
            if file is not None:
                assert llm.reader.cached_tokens == llm.n_tokens - llm.policy.window
    assert tokens[0] == tokens[1]
    alike = [len(a & b) / len(a | b) for a, b in zip(*plans, strict=True)]
    assert np.mean(alike) > 0.95


@pytest.mark.parametrize("name", ["auto", "flowmm", "snapkv"])
def test_a_copy_in_the_process_leaves_nothing_out(name: str) -> None:
    """A merge of it is that of the cache that was copied, to the bit."""
    tokens = np.random.default_rng(1).integers(5, 200, 100).tolist()
    options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with kvmerge.Llama(pocket.model_path(), kv_merge=name, kv_budget=100, **options) as llm:
        llm.eval(tokens)
        state, found = llm.save_state(), []
        for _ in range(2):
            llm.engine.merge(40)
            llm.eval([7])
            found.append(llm.reader.last_logits().copy())
            llm.load_state(state)
        np.testing.assert_array_equal(*found)
        assert llm.engine.read_queries(0).proxy.sum() == llm.policy.window


def test_text_that_is_shorter_than_the_window(tmp_path: Path) -> None:
    with kvmerge.Llama(
        pocket.model_path(), n_ctx=512, n_threads=1, verbose=False, kv_merge="auto"
    ) as llm:
        right = llm.create_completion("Hello", max_tokens=4, temperature=0)["choices"]
        llm.reset()
        llm.eval(llm.tokenize(b"Hello"))
        llm.save_context(tmp_path / "saved")
        llm.load_context(tmp_path / "saved")
        assert llm.create_completion("Hello", max_tokens=4, temperature=0)["choices"] == right


def test_pictures(tmp_path: Path) -> None:
    messages = pocket.make_prompt(np.random.default_rng(4), 4).messages(0)
    sizes = []
    for merge in (None, "auto"):
        with kvmerge.Llama(
            pocket.model_path(),
            mmproj=pocket.mmproj_path(),
            n_ctx=2048,
            n_threads=1,
            n_threads_batch=1,
            verbose=False,
            kv_merge=merge,
        ) as llm:
            llm.create_chat_completion(messages, temperature=0, max_tokens=4)
            llm.save_context(tmp_path / "saved")
            sizes.append((tmp_path / "saved").stat().st_size)
    assert sizes[1] < 0.9 * sizes[0]
