"""With a cap cells merge while the prompt is read, and no merge cuts a picture in two."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import Factory, answer
from kvmerge import pocket


@pytest.mark.parametrize("image_merge", [None, 0.95])
def test_merges_fall_between_pictures(llama: Factory, image_merge: float | None) -> None:
    n = 24 if image_merge is None else 60
    options = {"n_ctx": 8192, "kv_merge": "auto", "kv_max_cells": 512, "kv_budget": 1.0}
    llm = llama(**options, image_merge=image_merge)
    prompts = [pocket.make_prompt(np.random.default_rng(i), 12) for i in range(n // 12)]
    messages = [
        {"role": "user", "content": [part for p in prompts for part in p.messages(0)[0]["content"]]}
    ]
    answer(llm, messages, max_tokens=1)
    merges, spans = llm.kv_stats().merges, llm.media_spans
    assert len(spans) == n
    assert merges, "the prompt does not fit without"
    for merge in merges:
        assert merge.cells_after < 512
        assert not any(span.start < merge.tokens < span.end for span in spans)


def test_the_newest_picture_is_whole_until_the_question_is_known(llama: Factory) -> None:
    llm = llama(n_ctx=8192, kv_merge="auto", kv_max_cells=512, keep_last_images=1)
    prompts = [pocket.make_prompt(np.random.default_rng(i), 12) for i in range(2)]
    content = [part for p in prompts for part in p.messages(0)[0]["content"]]
    seen = []
    cache = llm.kv_cache
    note = cache.note_merges

    def noted(*arguments: object) -> None:
        before = len(cache.merges)
        note(*arguments)  # type: ignore[arg-type]
        if len(cache.merges) > before and cache.spans:
            mass = llm.engine.read_cells(0)  # type: ignore[union-attr]
            newest = cache.spans[-1]
            inside = (mass.order[:, 0] >= newest.start) & (mass.order[:, 0] < newest.end)
            seen.append(int((mass.mass[inside, 0] == 1).sum()))

    cache.note_merges = noted  # type: ignore[method-assign]
    answer(llm, [{"role": "user", "content": content}], max_tokens=1)
    assert len(seen) >= 2
    assert all(n == 64 for n in seen)
