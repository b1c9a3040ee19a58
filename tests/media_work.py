"""Pictures and sounds to read, how often they were decoded and encoded, and what came of it."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import kvmerge
from kvmerge.media import part as media
from kvmerge.native import loading

llama_cpp = loading.load()
from llama_cpp import mtmd_cpp  # noqa: E402


class Work:
    """How often media were decoded and encoded, counted where it happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded = self.encoded = 0
        for owner, name, field in (
            (mtmd_cpp, "mtmd_encode_chunk", "encoded"),
            (mtmd_cpp, "mtmd_helper_bitmap_init_from_buf", "decoded"),
            (media, "picture_of", "decoded"),
        ):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), field))

    def _counting(self, function: Any, field: str) -> Any:
        def counting(*arguments: Any) -> Any:
            setattr(self, field, getattr(self, field) + 1)
            return function(*arguments)

        return counting

    def take(self) -> tuple[int, int]:
        """Return how many were decoded and encoded since the last call."""
        counts = self.decoded, self.encoded
        self.decoded = self.encoded = 0
        return counts


def logits(llm: kvmerge.Llama, messages: Any) -> npt.NDArray[np.single]:
    """Return those of the first token of an answer."""
    llm.create_chat_completion(messages, max_tokens=1)
    values = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(values, (llm.n_vocab(),)).copy()


def large(seed: int, width: int = 96, height: int = 64) -> bytes:
    file, rng = io.BytesIO(), np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def sound(seconds: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(16000)
        noise = np.random.default_rng(1).normal(0, 3000, 16000 * seconds)
        stream.writeframes(noise.astype("<i2").tobytes())
    return file.getvalue()
