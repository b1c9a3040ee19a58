"""How many tokens of a picture a model has to read at once."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import KVMergeError
from ..estimate.dry_load import DryModel
from ..estimate.projector_size import DryProjector, ImageBounds

_NON_CAUSAL = frozenset({"gemma3", "gemma4v", "gemma4uv", "deepseek4v"})
"""Projectors of models that read the tokens of a picture in both directions.

libmtmd says so only of a loaded model (``mtmd_decode_use_non_causal``), when the sizes of batches
are settled; one that is missing here is noticed when its first picture is read.
"""

_SIZES = [(4096, 4096), (4096, 1024), (1024, 4096)]


def picture_batch(
    model: Path, mmproj: str | os.PathLike[str], bounds: ImageBounds | None = None
) -> int:
    """Return the tokens of the largest picture of a model that reads pictures at once, else 0.

    Parameters
    ----------
    model : Path
        The model (GGUF), of which only the metadata is read, and only if it is such a model.
    mmproj : path
        Its vision part (GGUF).
    bounds : ImageBounds
        Bounds on the tokens of a picture.
    """
    try:
        projector = DryProjector(mmproj, bounds)
        if projector.kind not in _NON_CAUSAL:
            return 0
        with DryModel(model) as outline:
            counts = projector.image_tokens(outline, _SIZES)
    except KVMergeError:  # Loading it says what is wrong.
        return 0
    return max(count.piece for count in counts)
