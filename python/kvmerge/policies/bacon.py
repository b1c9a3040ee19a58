"""BACON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .array import Array, ArrayPolicy, Layer


@dataclass(frozen=True, kw_only=True)
class Bacon(ArrayPolicy):
    """Keep what the last queries look at, corrected by what the very last one looks at.

    The mean attention of the window is steady and overlooks what only the last query needs.  What
    that one looks at counts in addition where its neighbours in the prompt (coherence) and the
    layer below (persistence) agree, and not where it is a lone peak (BACON, arXiv 2606.14782).  No
    code and no formula could be read, so that this follows the description: the geometric mean of
    the last query's attention, pooled over neighbours, in a layer and in the one below, added with
    equal weight to the mean of the window, pooled as in SnapKV.
    """

    name: ClassVar[str] = "bacon"

    neighbours: int = 7

    def scores(self, layer: Layer) -> Array:
        """Return the calibrated score, [heads, n]."""
        window, last = self._attention(layer)
        if layer.below is not None and layer.below.mass.shape == layer.mass.shape:
            _, last_below = self._attention(layer.below)
            last = np.sqrt(last * last_below)
        return of_sum_one(window) + of_sum_one(last)

    def _attention(self, layer: Layer) -> tuple[Array, Array]:
        """Return what the window gives to each cell and what the last query gives, pooled."""
        weights = layer.attention().mean(axis=2)
        return pooled(weights.mean(axis=0), self.neighbours), pooled(weights[-1], self.neighbours)


def pooled(score: Array, width: int) -> Array:
    """Return the mean over `width` neighbours along the last axis; the ends are repeated."""
    edge = width // 2
    padded = np.pad(score, [(0, 0), (edge, edge)], mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1)
    return np.asarray(windows.mean(axis=-1), np.float32)


def of_sum_one(score: Array) -> Array:
    """Return a score in proportion, so that two of them can be added."""
    return np.asarray(score / np.maximum(score.sum(axis=-1, keepdims=True), 1e-30), np.float32)
