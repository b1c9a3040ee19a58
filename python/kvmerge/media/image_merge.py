"""Embeddings of one picture that are alike become one, before the language model reads them.

A picture of a wall, a sky or a white page says the same thing in hundreds of tokens, each of which
the language model reads.  Between the vision encoder and the language model tokens are grouped by
the cosine of their embeddings:

1. Two tokens are alike if their cosine is at least the threshold.
2. Of the tokens that are in no group yet, the one that is like most of them (the first such one in
   reading order) takes all of these into its group; and so on, until none is like another.
3. A group becomes one token: the mean of its embeddings, at the place of the one that made it.

Groups are made no further than a floor on the tokens of the picture allows: the last group takes
those that are most like its centre.  Every member is like the centre of its group, so nothing is
merged across a chain of small steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import numpy as np
import numpy.typing as npt

from ..errors import OptionError

DEFAULT_THRESHOLD = 0.9
"""Cosine from which tokens are alike, unless another is given; a guess that was not tuned."""

DEFAULT_FLOOR = 4
"""Tokens that are left of a picture at least, unless ``image_min_tokens`` says otherwise."""

GRIDS = frozenset(
    {"mlp", "ldp", "ldpv2", "idefics3", "internvl", "llama4", "lfm2", "kimivl", "janus_pro"}
    | {"qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger"}
)
"""Projectors (``clip.projector_type``) all of whose tokens are places in the picture.

Others put marks between them, such as the ends of rows, which are alike and must not become one.
"""


@dataclass(frozen=True)
class MergedTokens:
    """What is left of the tokens of a picture.

    Attributes
    ----------
    embeddings : array
        Float32, [m, n_embd].
    kept : array
        Which of the n tokens each of them stands at, ascending, [m].
    weights : array
        How many tokens each stands for, float32, [m]; the sum is n.
    group : array
        Into which of the m each of the n tokens went, [n].
    """

    embeddings: npt.NDArray[np.float32]
    kept: npt.NDArray[np.intp]
    weights: npt.NDArray[np.float32]
    group: npt.NDArray[np.intp]


@dataclass
class ImageMergeCounts:
    """Tokens of pictures, before and after they were merged.

    Attributes
    ----------
    encoded, read : int
        What the encoder made of the pictures that were read, and what the language model has read.
    """

    encoded: int = 0
    read: int = 0

    def add(self, encoded: int, read: int) -> None:
        """Count a picture."""
        self.encoded += encoded
        self.read += read


@dataclass(frozen=True)
class ImageMerge:
    """How the tokens of a picture are merged.

    Parameters
    ----------
    threshold : float
        Cosine from which two tokens are alike, above 0 and at most 1.
    floor : int
        Tokens that are left at least, or all of them where there are fewer.
    """

    threshold: float = DEFAULT_THRESHOLD
    floor: int = DEFAULT_FLOOR

    @classmethod
    def of(cls, value: object, image_min_tokens: int | None = None) -> ImageMerge | None:
        """Return what ``image_merge=`` means; None: nothing is merged.

        Raises
        ------
        OptionError
            If it means nothing.
        """
        if value is None or value is False:
            return None
        floor = DEFAULT_FLOOR if image_min_tokens is None else image_min_tokens
        if value is True:
            return cls(floor=floor)
        if isinstance(value, Real) and 0 < value <= 1:  # also where it is too large for a float
            return cls(float(value), floor)
        raise OptionError(
            f"image_merge={value!r}: image_merge must be a cosine above 0 and at most 1, from "
            f"which tokens are merged, True for {DEFAULT_THRESHOLD}, or None for not at all"
        )

    def __str__(self) -> str:
        return f"{self.threshold:g}/{self.floor}"

    def __call__(self, embeddings: npt.NDArray[np.float32]) -> MergedTokens:
        """Merge the tokens of one picture.

        Parameters
        ----------
        embeddings : array
            Float32, [n, n_embd], in reading order.
        """
        return merged_by(embeddings, groups_of(embeddings, self.threshold, self.floor))


def groups_of(
    embeddings: npt.NDArray[np.float32], threshold: float, floor: int
) -> npt.NDArray[np.intp]:
    """Return for each token which one it is merged into, its own number where it stays, [n]."""
    n = len(embeddings)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    units = embeddings / np.where(lengths > 0, lengths, 1)
    cosines = units @ units.T
    alike = cosines >= threshold
    np.fill_diagonal(alike, True)
    into = np.arange(n)
    is_free = np.ones(n, np.bool_)
    count = alike.sum(1)  # of each token, those free ones that it is like
    left = n
    while left > floor:
        centre = int(np.argmax(np.where(is_free, count, 0)))
        members = np.flatnonzero(alike[centre] & is_free)
        if len(members) < 2:
            break
        members = members[members != centre]
        room = left - floor
        if len(members) > room:
            nearest = np.argsort(-cosines[centre, members], kind="stable")[:room]
            members = members[nearest]
        into[members] = centre
        left -= len(members)
        members = np.append(members, centre)
        is_free[members] = False
        count -= alike[:, members].sum(1)
    return into


def merged_by(embeddings: npt.NDArray[np.float32], into: npt.NDArray[np.intp]) -> MergedTokens:
    """Return the means of groups.

    Parameters
    ----------
    embeddings : array
        Float32, [n, n_embd].
    into : array
        For each token the one whose place its group takes, [n].
    """
    kept, group = np.unique(into, return_inverse=True)
    group = group.reshape(-1)
    weights = np.bincount(group, minlength=len(kept)).astype(np.float32)
    in_groups = embeddings[np.argsort(group, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(weights[:-1])]).astype(np.intp)
    sums = np.add.reduceat(in_groups, starts, axis=0, dtype=np.float64)
    means = (sums / weights[:, None]).astype(np.float32)
    alone = weights == 1
    means[alone] = embeddings[kept[alone]]
    return MergedTokens(means, kept, weights, group)


def reason_to_read_whole(projector: str, is_non_causal: bool) -> str | None:
    """Return why pictures of a model are not merged, or None if they are."""
    if is_non_causal:
        return "the tokens of a picture see each other in both directions"
    if projector not in GRIDS:
        return (
            f"it is not known which tokens of the projector {projector or 'without a name'!r} are "
            "places in the picture"
        )
    return None
