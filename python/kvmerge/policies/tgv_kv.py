"""TGV-KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .array import Array, ArrayPolicy, Layer


@dataclass(frozen=True, kw_only=True)
class TgvKv(ArrayPolicy):
    """Keep text first, and of pictures what the text looks at that other text looks at.

    The attention that text gives to a picture's token is added up, every query weighted by the
    attention that it gets from later text; heads choose together.  Layers in which text looks at
    pictures more get more cells (TGV-KV, arXiv 2606.03075).  The paper takes all text after the
    picture as queries; here they are those of the last `window` tokens.
    """

    name: ClassVar[str] = "tgv-kv"

    def scores(self, layer: Layer) -> Array:
        """Return the text-weighted attention, [heads, n]; text above all pictures."""
        weights = _weights(layer)
        heads, n = layer.mass.shape
        # What each query of text gets from those after it, and how many these are.
        own = np.searchsorted(layer.order[0], layer.q_order).clip(0, n - 1)
        got = weights[:, own]
        later = np.arange(len(own))[:, None] >= np.arange(len(own))
        importance = (got * later).sum(axis=0) / later.sum(axis=0)
        score = importance @ weights
        text = layer.modality == 0
        # Of text that has to be dropped, what is looked at least.
        return np.asarray(np.where(text, 1e3 + weights.sum(axis=0), score), np.float32)

    def shares(self, layers: Sequence[Layer]) -> npt.NDArray[Any]:
        """Return the part of each layer's attention that goes to pictures, [layers]."""
        return np.array(
            [(_weights(layer) * (layer.modality[0] > 0)).sum() + 1e-6 for layer in layers]
        )


def _weights(layer: Layer) -> Array:
    """Return the attention of each query as the mean over all heads, [rows, n]."""
    return np.asarray(layer.attention().mean(axis=(1, 2)), np.float32)
