"""KeyDiff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .array import Array, ArrayPolicy, Layer


@dataclass(frozen=True, kw_only=True)
class KeyDiff(ArrayPolicy):
    """Keep the tokens whose keys are least like the mean key; no attention is needed.

    The score of a token is the negative cosine of its key to the mean of all keys, each of length
    1 (KeyDiff, arXiv 2504.15364, eq. 4 and 5).
    """

    name: ClassVar[str] = "keydiff"

    def scores(self, layer: Layer) -> Array:
        """Return the negative cosine to the anchor, [heads, n]."""
        length = np.linalg.norm(layer.k, axis=-1, keepdims=True)
        unit = layer.k / np.maximum(length, 1e-9) * (layer.mass.T[..., None] > 0)
        anchor = unit.mean(axis=0)
        anchor = anchor / np.maximum(np.linalg.norm(anchor, axis=-1, keepdims=True), 1e-9)
        return -np.einsum("nhd,hd->hn", unit, anchor)
