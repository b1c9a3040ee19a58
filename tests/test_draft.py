"""Draft models (speculative decoding) beside pictures and merging."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from conftest import Factory, answer
from kvmerge import pocket
from kvmerge.errors import UnsupportedError


@pytest.mark.parametrize("merging", [False, True])
def test_the_same_answers_with_pictures(merging: bool, llama: Factory) -> None:
    """Proposals never name what stands for a picture, and wrong ones are taken back."""
    draft = LlamaPromptLookupDecoding(num_pred_tokens=10)
    merge = {"kv_merge": "auto"} if merging else {}
    plain, drafted = llama(**merge), llama(**merge, draft_model=draft)
    for seed in range(3):
        prompt = pocket.make_prompt(np.random.default_rng(seed), 4)
        for i in range(3):
            messages = prompt.messages(i)
            found = answer(drafted, messages, max_tokens=32)
            assert found == answer(plain, messages, max_tokens=32)


def test_a_proposal_ends_before_a_picture(llama: Factory) -> None:
    llm = llama(draft_model=lambda ids, **_: np.array([5, 6, -7, 8], np.intc))
    assert llm.draft_model(np.zeros(3, np.intc)).tolist() == [5, 6]


def test_not_beside_a_cap(llama: Factory) -> None:
    with pytest.raises(UnsupportedError, match="draft_model="):
        llama(draft_model=LlamaPromptLookupDecoding(), kv_merge="auto", kv_max_cells=512)


def test_pickled_with_its_draft_model(llama: Factory) -> None:
    llm = llama(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=3))
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.draft_model.draft.num_pred_tokens == 3
    copy.close()
