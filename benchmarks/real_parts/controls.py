"""What a method has to be better than."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvmerge.evaluation.methods import Method
from kvmerge.policies.array import ArrayPolicy, Layer


class AtRandom(ArrayPolicy):
    """Keep all text, and tokens of pictures by lot, the same ones in all layers and heads."""

    name: ClassVar[str] = "random"

    def scores(self, layer: Layer) -> npt.NDArray[Any]:
        """Return a number that is drawn for each token; those of text are the highest."""
        drawn = np.random.default_rng(0).random(int(layer.order.max()) + 1)
        return np.where(layer.modality == 0, 1.0, 0.0) + drawn[layer.order.clip(0)]


RANDOM = Method(
    name="random",
    what="all text, and tokens of pictures by lot",
    policy=AtRandom(keep=4),
    kind="reference",
)
