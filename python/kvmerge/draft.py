"""Speculative decoding beside pictures: proposals are text that can be taken back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from .cache import KVCache


class TextDraft(LlamaDraftModel):
    """A draft model whose proposals are text.

    The tokens that it is shown contain those that stand for pictures, which are no tokens of the
    vocabulary: a proposal ends before the first of them.  Where pictures take fewer positions than
    tokens nothing is proposed, because llama-cpp-python takes a wrong proposal back by counting
    tokens.

    Parameters
    ----------
    draft : callable
        The draft model.
    cache : KVCache
        What was read.
    n_vocab : int
        Tokens of the vocabulary.
    """

    def __init__(self, draft: Any, cache: KVCache, n_vocab: int) -> None:
        self.draft = draft
        self._cache = cache
        self._n_vocab = n_vocab

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **options: Any) -> npt.NDArray[np.intc]:
        """Return tokens that may come next."""
        if not self._cache.counts_positions_by_token:
            return np.zeros(0, np.intc)
        proposed = np.asarray(self.draft(input_ids, **options), np.intc)
        unknown = np.flatnonzero((proposed < 0) | (proposed >= self._n_vocab))
        return proposed[: unknown[0]] if len(unknown) else proposed
