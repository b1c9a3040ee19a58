"""A copy of what the cache holds, to come back to."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np
import numpy.typing as npt

from .errors import StateError
from .native.log import caught
from .prompt import MediaSpan
from .stats import MergeRecord

if TYPE_CHECKING:
    from .llama import Llama


@dataclass(frozen=True)
class Snapshot:
    """The cells that are held, as llama.cpp writes them, and what they stand for.

    Attributes
    ----------
    tokens : array
        Token ids, negative ones for pictures and sounds, [n].
    positions : array
        Position at which each token begins, and that of the next one, [n + 1].
    spans : tuple of MediaSpan
        Where the pictures and sounds lie among the tokens.
    merges : tuple of MergeRecord
        The merges that led to the cells.
    cells : bytearray
        llama.cpp's state of the sequence: its cells and no more, with the engine's part.
    n_merges : int
        Merges that the engine had counted, of other prompts too.
    """

    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    spans: tuple[MediaSpan, ...]
    merges: tuple[MergeRecord, ...]
    cells: bytearray
    n_merges: int = 0

    @classmethod
    def take(cls, llm: Llama) -> Snapshot:
        """Copy what the cache holds.

        Raises
        ------
        StateError
            If llama.cpp could not write it.
        """
        n = llm.n_tokens
        # An interrupt may have left more in the cache than is noted.
        if not llm._trim(n):
            raise StateError(
                f"the cache holds more than the {n} tokens that are noted, and was merged since: "
                "read a prompt first"
            )
        positions = np.array([llm._position(i) for i in range(n + 1)], np.int32)
        size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
        cells = bytearray(size)
        with caught() as errors:
            data = (ctypes.c_uint8 * size).from_buffer(cells)
            written = llama_cpp.llama_state_seq_get_data(llm.ctx, data, size, 0)
        if written != size:
            reason = errors.reason or f"{written} of {size} bytes were written"
            raise StateError(f"llama.cpp could not copy the cache: {reason}")
        return cls(
            llm.input_ids[:n].astype(np.int32),
            positions,
            tuple(llm._spans),
            tuple(llm._merges),
            cells,
            _n_merges(llm),
        )

    def is_beginning_of(self, llm: Llama) -> bool:
        """Whether the cache holds this, as it was, and perhaps more tokens after it."""
        n = len(self.tokens)
        return (
            llm.n_tokens >= n
            and np.array_equal(llm.input_ids[:n], self.tokens)
            and tuple(llm._merges) == self.merges
            and _n_merges(llm) == self.n_merges
        )

    def put_back(self, llm: Llama) -> None:
        """Make the cache hold this and nothing else.

        Raises
        ------
        StateError
            If llama.cpp refuses it; the cache is empty then.
        """
        # Books that claim less than there is do no harm if an interrupt comes now.
        llm._forget()
        size = len(self.cells)
        with caught() as errors:
            data = (ctypes.c_uint8 * size).from_buffer(self.cells)
            read = llama_cpp.llama_state_seq_set_data(llm.ctx, data, size, 0)
        if read != size:
            llm._clear()
            raise StateError(errors.reason or f"llama.cpp read {read} of {size} bytes")
        self._check(llm)
        llm._spans[:] = self.spans
        llm._merges[:] = self.merges
        llm._n_merges = _n_merges(llm)
        llm._append(self.tokens.tolist(), self.positions)

    def _check(self, llm: Llama) -> None:
        """Check that the cells that were read are those of the tokens."""
        n, end = len(self.tokens), int(self.positions[-1])
        seen = n if llm.engine is None else llm.engine.n_tokens()
        last = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0)
        if seen != n or last >= end:
            llm._clear()
            raise StateError(
                f"the cells are of {seen} tokens and end at position {last}, and {n} tokens that "
                f"end before position {end} are noted"
            )


def _n_merges(llm: Llama) -> int:
    return 0 if llm.engine is None else llm.engine.stats().n_merges
