"""A prompt as the cache sees it: text tokens, and media that stand for runs of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class Media(Protocol):
    """One encoded picture (or slice of one) or sound in a prompt."""

    digest: str
    """SHA-256 of the file's bytes and of the place of the slice in it, in hex."""
    modality: str
    """``"image"`` or ``"audio"``."""
    n_tokens: int
    """Tokens that it takes."""
    number: int
    """Which slice of its picture it is, from 0."""

    def decode(self, position: int) -> int:
        """Encode it, read it into the cache at `position`, and return the position after it."""


def placeholder_ids(digest: str, n_tokens: int) -> list[int]:
    """Return the negative token ids that stand for a medium.

    They follow from its digest, so that prompts can be compared token by token: the same picture
    gives the same ids, and no real token is negative.
    """
    stream = hashlib.shake_256(bytes.fromhex(digest)).digest(4 * n_tokens)
    words = np.frombuffer(stream, "<u4") & 0x7FFFFFFF
    return (-1 - words.astype(np.int64)).tolist()


@dataclass(frozen=True)
class Segment:
    """A run of text tokens, or one medium."""

    ids: list[int]
    media: Media | None = None


@dataclass(frozen=True)
class MediaSpan:
    """Where a medium lies in the cache, in tokens."""

    start: int
    end: int
    digest: str
    modality: str


@dataclass
class Prompt:
    """Segments in order.

    Parameters
    ----------
    segments : list of Segment
        Text and media.
    """

    segments: list[Segment] = field(default_factory=list)

    @classmethod
    def from_tokens(cls, tokens: Sequence[int]) -> Prompt:
        """Make a prompt of tokens; negative ones stand for media that are in the cache."""
        return cls([Segment(list(tokens))])

    @property
    def tokens(self) -> list[int]:
        """All token ids."""
        return [token for segment in self.segments for token in segment.ids]

    def beginning(self, n_tokens: int) -> Prompt:
        """Return the first tokens as a prompt; media are in it as a whole or not at all."""
        segments, left = [], n_tokens
        for segment in self.segments:
            if left < len(segment.ids) and segment.media is not None:
                break
            segments.append(Segment(segment.ids[:left], segment.media))
            left -= len(segments[-1].ids)
            if not left:
                break
        return Prompt(segments)

    def rest(self, n_tokens: int) -> list[Segment]:
        """Return the segments after the first tokens; a medium that begins there is one of them."""
        segments, at = [], 0
        for segment in self.segments:
            at += len(segment.ids)
            if at > n_tokens:
                segments.append(segment)
        return segments

    def n_media_tokens(self, modality: str) -> int:
        """Return how many tokens are of a modality."""
        return sum(
            len(segment.ids)
            for segment in self.segments
            if segment.media is not None and segment.media.modality == modality
        )

    def spans(self) -> list[MediaSpan]:
        """Return where the media lie."""
        spans, at = [], 0
        for segment in self.segments:
            end = at + len(segment.ids)
            if segment.media is not None:
                spans.append(MediaSpan(at, end, segment.media.digest, segment.media.modality))
            at = end
        return spans
