"""A saved context that was merged is smaller than the full one, and merges on."""

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


def test_before_the_first_merge_nothing_is_left_out(tmp_path: Path) -> None:
    """A first merge after loading is that of the process that has saved."""
    tokens = np.random.default_rng(1).integers(5, 200, 100).tolist()
    options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    logits = []
    with kvmerge.Llama(pocket.model_path(), kv_merge="flowmm", kv_budget=100, **options) as first:
        first.eval(tokens)
        first.save_context(tmp_path / "saved")
        with kvmerge.Llama(
            pocket.model_path(), kv_merge="flowmm", kv_budget=100, **options
        ) as second:
            second.load_context(tmp_path / "saved")
            for llm in (first, second):
                llm.engine.merge(40)
                llm.eval([7])
                logits.append(llm.reader.last_logits().copy())
    np.testing.assert_array_equal(logits[0], logits[1])


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
