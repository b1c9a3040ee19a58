"""A prompt as libmtmd cuts it: runs of text, and media that are encoded when they are needed."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from llama_cpp import mtmd_cpp

from ..errors import MediaError
from ..media.image_merge import MergedTokens
from ..media.part import MediaPart
from ..native.log import caught
from .bitmaps import Bitmaps


@dataclass
class Chunk:
    """A medium in a prompt: `kvmerge.prompt.Media` over a chunk of libmtmd."""

    prompt: Chunks
    index: int
    digest: str
    modality: str
    n_tokens: int
    n_encoded: int
    """Tokens that the encoder makes of it, of which fewer may be read."""
    file_digest: str
    """SHA-256 of the file's bytes, in hex."""
    number: int
    """Which of the slices of the picture it is."""
    n_slices: int
    """How many slices the picture has."""
    merged: MergedTokens | None = None
    """What is read, where it was merged already."""

    @property
    def pointer(self) -> Any:
        """The chunk of libmtmd, which may lack its content."""
        return self.prompt.chunk(self.index)

    @property
    def filled(self) -> Any:
        """The chunk of libmtmd, with what is needed to encode it."""
        return self.prompt.filled(self.index)

    def decode(self, position: int) -> int:
        """Encode it, read it into the cache, and return the position after it."""
        return self.prompt.decode(self, position)


class Changed(MediaError):
    """What a name leads to is not what it did before, and is needed again."""


class Chunks:
    """libmtmd's chunks of a prompt.

    Media that are in the cache, or that were encoded and kept, are given to libmtmd as nothing but
    their size: it counts their tokens, and they are neither had nor decoded. Should one have to be
    encoded after all, the prompt is prepared once more with it.

    Parameters
    ----------
    bitmaps : Bitmaps
        What makes libmtmd's bitmaps.
    text : bytes
        The prompt, with a marker at the place of each medium.
    parts : list of MediaPart
        The media.
    digests : list of str
        Their digests.
    empty : set of str
        Digests of those of which the size will do.
    digest_of_slice : callable
        Returns the digest of a slice from that of its picture and its number.
    decode : callable
        Encodes a chunk, reads it into the cache at a position, and returns the position after it.
    """

    def __init__(
        self,
        bitmaps: Bitmaps,
        text: bytes,
        parts: list[MediaPart],
        digests: list[str],
        empty: set[str],
        digest_of_slice: Callable[[str, int], str],
        decode: Callable[[Chunk, int], int],
    ) -> None:
        self.decode = decode
        self._digest_of_slice = digest_of_slice
        self._bitmaps = bitmaps
        self._text = text
        self._parts = parts
        self._digests = digests
        self._is_empty = [digest in empty for digest in digests]
        self._chunks: Any = None
        self._prepare()

    def close(self) -> None:
        """Free them."""
        chunks, self._chunks = self._chunks, None
        if chunks is not None:
            mtmd_cpp.mtmd_input_chunks_free(chunks)

    def _prepare(self) -> None:
        known = self._bitmaps
        with ExitStack() as pixels:
            bitmaps = []
            for part, digest, is_empty in zip(
                self._parts, self._digests, self._is_empty, strict=True
            ):
                bitmap = known.empty(digest) if is_empty else known.of(part)
                pixels.callback(mtmd_cpp.mtmd_bitmap_free, bitmap)
                mtmd_cpp.mtmd_bitmap_set_id(bitmap, digest.encode())
                bitmaps.append(bitmap)
                if not is_empty:
                    known.note(digest, bitmap)
            chunks = mtmd_cpp.mtmd_input_chunks_init()
            if chunks is None:
                raise MemoryError("libmtmd could not allocate a prompt")
            self.close()
            self._chunks = chunks
            source = mtmd_cpp.mtmd_input_text()
            source.text = self._text
            source.text_len = len(self._text)
            source.add_special = True
            source.parse_special = True
            array = (mtmd_cpp.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
            with caught() as errors:
                status = mtmd_cpp.mtmd_tokenize(
                    known.context, chunks, ctypes.byref(source), array, len(bitmaps)
                )
            if status != 0:
                raise MediaError(
                    f"libmtmd could not prepare the prompt: {errors.reason or f'status {status}'}"
                )

    def chunk(self, index: int) -> Any:
        """Return a chunk, as it is."""
        return mtmd_cpp.mtmd_input_chunks_get(self._chunks, index)

    def filled(self, index: int) -> Any:
        """Return a chunk with its content, and prepare what comes after it too."""
        chunk = self.chunk(index)
        digest = mtmd_cpp.mtmd_input_chunk_get_id(chunk).decode()
        first = self._digests.index(digest)
        needed = [
            i
            for i, is_empty in enumerate(self._is_empty)
            if is_empty and i >= first and not (self._is_kept(i) and self._digests[i] != digest)
        ]
        if not needed:
            return chunk
        for i in needed:
            if self._parts[i].digest != self._digests[i]:
                raise Changed(f"{self._parts[i].label} is not what it was when it was last read")
            self._is_empty[i] = False
        self._prepare()
        return self.chunk(index)

    def _is_kept(self, i: int) -> bool:
        return self._bitmaps.kept(self._digests[i], self._parts[i]) is not None

    def pieces(self) -> list[list[int] | Chunk]:
        """Return runs of text tokens, and media, in order."""
        n = int(mtmd_cpp.mtmd_input_chunks_size(self._chunks))
        ids = [mtmd_cpp.mtmd_input_chunk_get_id(self.chunk(i)) for i in range(n)]
        # Some models cut a picture into slices, as many each time that it is shown.
        shown = Counter(digest.encode() for digest in self._digests)
        n_slices = {bitmap_id: ids.count(bitmap_id) // n for bitmap_id, n in shown.items()}
        slices: dict[bytes, int] = {}
        return [self._piece(i, slices, n_slices) for i in range(n)]

    def _piece(
        self, index: int, slices: dict[bytes, int], n_slices: Mapping[bytes, int]
    ) -> list[int] | Chunk:
        chunk = self.chunk(index)
        kind = mtmd_cpp.mtmd_input_chunk_get_type(chunk)
        if kind == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
            count = ctypes.c_size_t()
            tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            return [tokens[i] for i in range(count.value)]
        n_tokens = int(mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk))
        bitmap_id = mtmd_cpp.mtmd_input_chunk_get_id(chunk) or b""
        # All slices have the id of the picture, each is another input.
        number = slices.get(bitmap_id, 0)
        slices[bitmap_id] = number + 1
        file_digest = bitmap_id.decode()
        digest = self._digest_of_slice(file_digest, number)
        modality = "image" if kind == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE else "audio"
        n = n_slices[bitmap_id]
        return Chunk(self, index, digest, modality, n_tokens, n_tokens, file_digest, number % n, n)
