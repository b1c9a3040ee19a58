"""How long a prompt is, before anything of it is encoded or read."""

from __future__ import annotations

from dataclasses import dataclass

from ..prompt import Prompt


@dataclass(frozen=True)
class PromptTokens:
    """What a chat takes; `kvmerge.Llama.count_tokens` returns it.

    Attributes
    ----------
    total : int
        All tokens of the prompt.
    text, image, audio : int
        Those of each kind.
    media : tuple of int
        Tokens of each picture and sound in order; slices of one count each.
    cached : int
        Tokens at the beginning that the cache holds.  They are not read again, unless what follows
        them was merged with them.
    """

    total: int
    text: int
    image: int
    audio: int
    media: tuple[int, ...]
    cached: int

    @classmethod
    def of(cls, prompt: Prompt, cached: int) -> PromptTokens:
        """Count those of a prompt."""
        total = len(prompt.tokens)
        image, audio = (prompt.n_media_tokens(modality) for modality in ("image", "audio"))
        media = tuple(span.end - span.start for span in prompt.spans())
        return cls(total, total - image - audio, image, audio, media, cached)
