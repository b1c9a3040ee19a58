"""Slices of one picture that look the same, such as empty paper, which are encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


class EqualSlices:
    """Embeddings of the slices of the picture that is being read, by what the encoder gets."""

    def __init__(self) -> None:
        self._picture = ""
        self._embeddings: dict[bytes, Array] = {}

    def encoded(self, picture: str, pixels: Array, encode: Callable[[], Array]) -> Array:
        """Return the embeddings of a slice, which are made where no slice before is equal.

        Parameters
        ----------
        picture : str
            Digest of the picture; what is known of another one goes.
        pixels : array
            What the encoder gets.
        encode : callable
            Makes the embeddings.
        """
        if picture != self._picture:
            self._embeddings.clear()
            self._picture = picture
        seen_as = hashlib.sha256(pixels.data).digest()
        if seen_as not in self._embeddings:
            self._embeddings[seen_as] = encode()
        return self._embeddings[seen_as]

    def clear(self) -> None:
        """Forget the picture."""
        self._embeddings.clear()
