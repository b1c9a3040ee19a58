"""FlashCache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .array import Array, ArrayPolicy, Layer

LOW = 0.1
"""Share of the frequencies that pass."""


@dataclass(frozen=True, kw_only=True)
class FlashCache(ArrayPolicy):
    """Keep the tokens whose keys and values leave the smooth course of the sequence.

    A discrete cosine transform along the tokens, of which only the lowest frequencies are kept,
    gives a smooth course of K and of V; the score is how far a token is from it.  Layers with more
    of their energy outside of it get more cells; no attention is needed (FlashCache, arXiv
    2511.16786).  Which frequencies pass and how K and V are added could not be read; here it is a
    tenth, and both relative to their own mean.
    """

    name: ClassVar[str] = "flashcache"

    def scores(self, layer: Layer) -> Array:
        """Return the distance from the smooth course, [heads, n]."""
        distances = [np.linalg.norm(x - _smooth(x), axis=-1) for x in (layer.k, layer.v)]
        return np.asarray(sum(d / np.maximum(d.mean(axis=0), 1e-9) for d in distances).T)

    def shares(self, layers: Sequence[Layer]) -> npt.NDArray[Any]:
        """Return the energy outside the smooth course as a part of all, [layers]."""
        return np.array(
            [
                sum(
                    np.square(x - _smooth(x)).sum() / max(float(np.square(x).sum()), 1e-9)
                    for x in (layer.k, layer.v)
                )
                for layer in layers
            ]
        )


def _smooth(x: Array) -> Array:
    """Return the lowest frequencies of x along its first axis.

    The cosine transform of x is the Fourier transform of x followed by its mirror image.
    """
    n = len(x)
    spectrum = np.fft.rfft(np.concatenate([x, x[::-1]]), axis=0)
    spectrum[max(1, round(LOW * n)) :] = 0
    return np.asarray(np.fft.irfft(spectrum, 2 * n, axis=0)[:n], np.float32)
