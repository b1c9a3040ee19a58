"""The ledger of a cache: what its cells stand for, and how that is copied and put back."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama import LlamaState

from .byte_size import MIB
from .errors import CacheClearedError, StateError
from .native.binding import Engine, EngineStats
from .native.log import caught
from .prompt import MediaSpan, Prompt
from .stats import MergeRecord

log = logging.getLogger("kvmerge")


@dataclass(frozen=True)
class Snapshot:
    """A copy of the cells that are held, as llama.cpp writes them, and of what they stand for.

    Attributes
    ----------
    tokens : array
        Token ids, negative ones for pictures and sounds, [n].
    positions : array
        Position at which each token begins, and that of the next one, [n + 1]; or fewer, where
        something else has read the tokens after them.
    spans : tuple of MediaSpan
        Where the pictures and sounds lie among the tokens.
    merges : tuple of MergeRecord
        The merges that led to the cells.
    cells : bytes or bytearray
        llama.cpp's state of the sequence: its cells and no more, with the engine's part.
    n_merges : int
        Merges that the engine had counted, of other prompts too.
    is_whole : bool
        Whether `cells` are llama.cpp's state of the whole context instead, with its logits.
    is_small : bool
        Whether few of the observed queries go along: what comes back is merged a little otherwise.
    """

    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    spans: tuple[MediaSpan, ...]
    merges: tuple[MergeRecord, ...]
    cells: bytes | bytearray
    n_merges: int = 0
    is_whole: bool = False
    is_small: bool = False


class SavedState(LlamaState):
    """What `llama_cpp.Llama.save_state` returns, with the snapshot that it is of.

    Parameters
    ----------
    snapshot : Snapshot
        A whole one.
    ids : array
        Token ids and room for more, [n_ctx].
    scores : array
        Logits, of as many tokens as are kept, [n, n_vocab].
    seed : int
        Where random numbers begin.
    is_merging : bool
        Whether the cache is one that merges.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        ids: npt.NDArray[np.intc],
        scores: npt.NDArray[np.single],
        seed: int,
        is_merging: bool,
    ) -> None:
        cells, n = bytes(snapshot.cells), len(snapshot.tokens)
        super().__init__(ids.copy(), scores.copy(), n, cells, len(cells), seed)
        self.snapshot = replace(snapshot, cells=cells)
        self.is_merging = is_merging

    @staticmethod
    def snapshot_of(state: LlamaState) -> Snapshot:
        """Return the snapshot in a state, also in one of llama-cpp-python's own."""
        if isinstance(state, SavedState):
            return state.snapshot
        tokens = state.input_ids[: state.n_tokens].astype(np.int32)
        return Snapshot(tokens, np.zeros(1, np.int32), (), (), state.llama_state, is_whole=True)


class KVCache:
    """What the cache of one model holds, in tokens, positions, media, merges and cells.

    llama.cpp has the cells, and the engine knows the weights of what was merged into them; which
    prompt they are of stands here and nowhere else.  `Llama` makes one before its model is loaded,
    and calls `open` when there is a context.

    Attributes
    ----------
    ids : array
        Token ids, negative ones for pictures and sounds, [n_ctx].
    n_tokens : int
        How many of them, from the first, were read.
    has_logits : bool
        Whether llama.cpp has the logits of the last of them.
    engine : Engine or None
        What merges; None when merging is off.
    bytes_per_cell : int
        Bytes of K and V of one cell over all layers; 0 where it is not known.
    n_restored : int
        How many tokens, from the first, were put back from a copy that holds few of the queries
        that a merge looks at.

    Notes
    -----
    An interrupt may come between any two lines here.  The books may then claim less than the cache
    holds, which the next `trim` puts right, but never more: hence the order of the lines.
    """

    def __init__(self) -> None:
        self.ids: npt.NDArray[np.intc] = np.zeros(0, np.intc)
        self.n_tokens = 0
        self.has_logits = False
        self.engine: Engine | None = None
        self.bytes_per_cell = 0
        self.n_restored = 0
        self._context: Any = None
        # Index i is the position at which token i begins; the last known one is the next.
        self._positions: npt.NDArray[np.int32] = np.zeros(1, np.int32)
        self._known = 0
        self._spans: list[MediaSpan] = []
        self._merges: list[MergeRecord] = []
        self._n_merges = 0

    def open(self, context: Any, bytes_per_cell: int) -> None:
        """Take the context whose cache this is.

        Parameters
        ----------
        context : llama_cpp._internals.LlamaContext
            The context, of as many tokens as there is room for in `ids`.
        bytes_per_cell : int
            See the attribute; of no interest where there is an engine, which knows it.
        """
        self._context = context
        self._positions = np.zeros(len(self.ids) + 1, np.int32)
        self.bytes_per_cell = bytes_per_cell

    def attach(self, engine: Engine) -> None:
        """Let an engine merge from now on."""
        self.engine = engine
        self.bytes_per_cell = engine.stats().bytes_per_cell

    def close(self) -> Engine | None:
        """Let go of the context; return the engine, which is no longer used here."""
        engine, self.engine, self._context = self.engine, None, None
        return engine

    # Tokens and positions.

    @property
    def tokens(self) -> npt.NDArray[np.intc]:
        """Ids of the tokens that were read, [n_tokens]."""
        return self.ids[: self.n_tokens]

    @property
    def spans(self) -> tuple[MediaSpan, ...]:
        """Where the pictures and sounds lie among the tokens."""
        return tuple(self._spans)

    @property
    def merges(self) -> tuple[MergeRecord, ...]:
        """The merges since the cache was last empty."""
        return tuple(self._merges)

    def position(self, n_tokens: int) -> int:
        """Return the position at which the token after the first `n_tokens` begins."""
        if n_tokens <= self._known:
            return int(self._positions[n_tokens])
        return int(self._positions[self._known]) + n_tokens - self._known

    @property
    def next_position(self) -> int:
        """The position at which the next token begins."""
        return self.position(self.n_tokens)

    @property
    def counts_positions_by_token(self) -> bool:
        """Whether every token took one position, which pictures need not."""
        return self.next_position == self.n_tokens

    def n_media_tokens(self, modality: str | None = None) -> int:
        """Return how many of the tokens are of a modality, or of any but text."""
        return sum(
            span.end - span.start
            for span in self._spans
            if modality is None or span.modality == modality
        )

    def append(self, ids: Sequence[int], positions: npt.NDArray[np.integer[Any]]) -> None:
        """Note tokens that are now in the cache; `positions` has one more entry, the next."""
        n, end = self.n_tokens, self.n_tokens + len(ids)
        self.ids[n:end] = ids
        self._positions[n : end + 1] = positions
        self._known = self.n_tokens = end

    def append_media(
        self, ids: Sequence[int], positions: npt.NDArray[np.int32], digest: str, modality: str
    ) -> None:
        """Note a picture or sound that is now in the cache, with the ids that stand for it."""
        n = self.n_tokens
        self._spans.append(MediaSpan(n, n + len(ids), digest, modality))
        self.append(ids, positions)

    def note_foreign(self) -> None:
        """Note the positions of tokens that something else, such as a chat handler, has read."""
        known, n_tokens = self._known, self.n_tokens
        if n_tokens <= known:
            return
        self._positions[known : n_tokens + 1] = self.position(known) + np.arange(
            n_tokens + 1 - known
        )
        self._known = n_tokens

    def read_elsewhere(self) -> int:
        """Return the tokens that are in the cache and are not noted: something else has read them.

        Below 0 where something else has removed some.
        """
        if self.engine is not None:
            return self.engine.n_tokens() - self.n_tokens
        if self._context.memory is None:
            return 0
        return self._last_position() + 1 - self.next_position

    def _last_position(self) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(self._context.memory, 0))

    def trim(self, n_tokens: int) -> bool:
        """Keep the first `n_tokens` tokens; False if that would cut into merged cells."""
        position, seen = self.position(n_tokens), self.n_tokens
        self.n_tokens = n_tokens
        if not self._context.kv_cache_seq_rm(0, position, -1):
            self.n_tokens = seen
            return False
        if n_tokens == 0:
            self._merges.clear()
        self._known = min(self._known, n_tokens)
        self.n_restored = min(self.n_restored, n_tokens)
        self._spans = [span for span in self._spans if span.end <= n_tokens]
        return True

    def forget(self) -> None:
        """Claim nothing of what the cache holds."""
        self.n_tokens = self.n_restored = self._known = 0
        self._spans.clear()
        self._merges.clear()
        self.has_logits = False

    def clear(self) -> None:
        """Remove everything."""
        self.forget()
        self._context.kv_cache_clear()

    def check_not_cleared(self, error: Exception) -> None:
        """Raise if reading failed because a merge for want of room left nothing of the cache."""
        if self.engine is not None and self._known > 0 and self.engine.n_tokens() == 0:
            self.clear()
            raise CacheClearedError(
                "a merge that was to make room failed while the cache changed, which is empty now: "
                "read everything again"
            ) from error

    # A prompt against what is held.

    def common_prefix(self, prompt: Prompt, tokens: list[int]) -> int:
        """Return how many tokens at the beginning of a prompt are held, in whole media."""
        n = min(self.n_tokens, len(tokens))
        differ = np.flatnonzero(self.ids[:n] != np.asarray(tokens[:n], np.int64))
        keep = int(differ[0]) if differ.size else n
        spans = {span.start: span for span in self._spans}
        for span in [*self._spans, *prompt.spans()]:
            if span.start < keep and (span.end > keep or spans.get(span.start) != span):
                keep = span.start
        return keep

    def difference(self, prompt: Prompt, n_tokens: int, shared: int) -> str:
        """Return in words where a prompt leaves what is held."""
        if shared == n_tokens:
            return f"it ends after {shared} of the {self.n_tokens} tokens in the cache"
        names = {"image": "picture", "audio": "sound"}
        counts = dict.fromkeys(names, 0)
        for span in prompt.spans():
            counts[span.modality] += 1
            if span.start == shared:
                place = f"{names[span.modality]} {counts[span.modality]}"
                return f"{place} is not what is in the cache there"
        return f"it differs from the cache after {shared} of {self.n_tokens} tokens"

    # Cells and merges.

    def held(self) -> tuple[int, int]:
        """Return the cells that are held, as the mean over the layers, and their bytes."""
        if self.engine is None:
            return self.n_tokens, self.n_tokens * self.bytes_per_cell
        cells, last = self.engine.n_cells(), self.engine.stats()
        if not self._merges:
            return cells, cells * last.bytes_per_cell
        # Layers may hold different numbers of cells; each new token takes one in all of them.
        held = last.bytes_after + (cells - last.n_cells_after) * last.bytes_per_cell
        return round(held / last.bytes_per_cell), held

    def merge(self, cells: int, before: tuple[int, int]) -> None:
        """Merge what is held down to as many cells.

        Parameters
        ----------
        cells : int
            Cells to keep, as the mean over the layers.
        before : tuple of int
            What `held` returns now.

        Raises
        ------
        CacheClearedError
            If the merge failed when the cache had changed: nothing is held any more.
        """
        self.merge_within([cells], math.inf, before)

    def merge_within(self, cells: Sequence[int], tolerance: float, before: tuple[int, int]) -> bool:
        """Merge to the first of some numbers of cells whose error is within a tolerance.

        Parameters
        ----------
        cells : sequence of int
            Cells to keep, as the mean over the layers, ascending.
        tolerance : float
            The largest error; see `MergeRecord`.
        before : tuple of int
            What `held` returns now.

        Returns
        -------
        bool
            Whether there is one; else nothing was merged.

        Raises
        ------
        CacheClearedError
            If the merge failed when the cache had changed: nothing is held any more.
        """
        assert self.engine is not None
        n = len(self._merges)
        try:
            self.engine.merge_within(cells, tolerance)
        except CacheClearedError:
            self.clear()
            raise
        self.note_merges(before)
        return len(self._merges) > n

    def merged_share(self, *, of_media: bool) -> float:
        """Return the share of the tokens that the last merge kept, of pictures and sound or of all.

        A little less, so that a rounded number of cells does not look like more; 0 where nothing
        was merged.
        """
        if not self._merges:
            return 0.0
        last = self._merges[-1]
        others = last.text_after if of_media else 0
        return max(0.0, (last.cells_after - others) / max(1, last.tokens - others) - 0.01)

    def note_merges(self, before: tuple[int, int] | None = None) -> None:
        """Note every merge since the last one noted: one was asked for, or batches needed room."""
        if self.engine is None:
            return
        count = self.engine.stats().n_merges - self._n_merges
        self._n_merges += count
        try:
            merges = self.engine.merges(count)
        except StateError:
            return  # A state was restored past this class: those merges were of another past.
        for merge in merges:
            cells = merge.n_cells_before
            self._note(merge, *(before or (cells, cells * merge.bytes_per_cell)))

    def _note(self, merge: EngineStats, before: int, bytes_before: int) -> None:
        ms, after = merge.t_total_us / 1000, round(merge.bytes_after / merge.bytes_per_cell)
        text, text_after = merge.n_text_before, merge.n_text_after
        error = merge.error if merge.error >= 0 else None
        self._merges.append(MergeRecord(merge.n_tokens, before, after, ms, text, text_after, error))
        log.info(
            "merged %d cells into %d (%s; %d tokens, %d positions), %.2f MiB into %.2f MiB, "
            "%.1f ms, %s",
            before,
            after,
            f"text: {text} into {text_after}" if text_after < text else "all text kept",
            merge.n_tokens,
            self.position(merge.n_tokens),
            bytes_before / MIB,
            merge.bytes_after / MIB,
            ms,
            "error not measured" if error is None else f"error {error:.3f}",
        )

    # Copies.

    def snapshot(self, *, whole: bool = False, small: bool = False) -> Snapshot:
        """Copy what is held.

        Parameters
        ----------
        whole : bool
            Copy all that the context has, the logits too, and what something else has read.
        small : bool
            Leave out observed queries, so that it is no larger than a cache that does not merge.

        Raises
        ------
        StateError
            If llama.cpp could not write it.
        """
        n = self.n_tokens
        # An interrupt may have left more in the cache than is noted.
        if not whole and not self.trim(n):
            raise StateError(
                f"the cache holds more than the {n} tokens that are noted, and was merged since: "
                "read a prompt first"
            )
        if whole:
            positions = self._positions[: min(self._known, n) + 1].copy()
        else:
            positions = np.array([self.position(i) for i in range(n + 1)], np.int32)
        return Snapshot(
            self.tokens.astype(np.int32),
            positions,
            self.spans,
            self.merges,
            self._cells(whole, small),
            self._counted_merges(),
            whole,
            small,
        )

    def _cells(self, whole: bool, small: bool) -> bytearray:
        if small or self.engine is None:
            return self._state(whole)
        with self.engine.saving_all_queries():
            return self._state(whole)

    def _state(self, whole: bool) -> bytearray:
        context = self._context.ctx
        if whole:
            size = llama_cpp.llama_state_get_size(context)
        else:
            size = llama_cpp.llama_state_seq_get_size(context, 0)
        cells = bytearray(size)
        with caught() as errors:
            data = (ctypes.c_uint8 * size).from_buffer(cells)
            if whole:
                written = llama_cpp.llama_state_get_data(context, data, size)
            else:
                written = llama_cpp.llama_state_seq_get_data(context, data, size, 0)
        if written != size:
            reason = errors.reason or f"{written} of {size} bytes were written"
            raise StateError(f"llama.cpp could not copy the cache: {reason}")
        return cells

    def _counted_merges(self) -> int:
        return 0 if self.engine is None else self.engine.stats().n_merges

    def begins_with(self, snapshot: Snapshot) -> bool:
        """Whether the cache holds a snapshot, as it was, and perhaps more tokens after it."""
        n = len(snapshot.tokens)
        return (
            self.n_tokens >= n
            and np.array_equal(self.ids[:n], snapshot.tokens)
            and self.merges == snapshot.merges
            and self._counted_merges() == snapshot.n_merges
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Make the cache hold a snapshot and nothing else.

        Raises
        ------
        StateError
            If llama.cpp refuses it; the cache is empty then.
        """
        # Books that claim less than there is do no harm if an interrupt comes now.
        self.forget()
        if len(snapshot.tokens) == 0:
            self.clear()  # llama.cpp leaves what is there where a state has no cells
        size = len(snapshot.cells)
        data = np.frombuffer(snapshot.cells, np.uint8).ctypes.data_as(
            ctypes.POINTER(ctypes.c_uint8)
        )
        with caught() as errors:
            if snapshot.is_whole:
                read = llama_cpp.llama_state_set_data(self._context.ctx, data, size)
            else:
                read = llama_cpp.llama_state_seq_set_data(self._context.ctx, data, size, 0)
        if read != size:
            self.clear()
            raise StateError(errors.reason or f"llama.cpp read {read} of {size} bytes")
        if not snapshot.is_whole:
            self._check(snapshot)
        self._spans[:] = snapshot.spans
        self._merges[:] = snapshot.merges
        self._n_merges = self._counted_merges()
        known, n = len(snapshot.positions) - 1, len(snapshot.tokens)
        self.append(snapshot.tokens[:known].tolist(), snapshot.positions)
        self.ids[known:n] = snapshot.tokens[known:]
        self.n_tokens = n
        self.n_restored = n if snapshot.is_small else 0

    def _check(self, snapshot: Snapshot) -> None:
        """Check that the cells that were read are those of the tokens."""
        n, end = len(snapshot.tokens), int(snapshot.positions[-1])
        seen = n if self.engine is None else self.engine.n_tokens()
        last = self._last_position()
        if seen != n or last >= end:
            self.clear()
            raise StateError(
                f"the cells are of {seen} tokens and end at position {last}, and {n} tokens that "
                f"end before position {end} are noted"
            )

    def replace(self, snapshot: Snapshot) -> None:
        """Make the cache hold a snapshot and nothing else, or leave it as it is.

        Raises
        ------
        StateError
            If llama.cpp refuses it; what the cache held is still there then.
        """
        is_whole = snapshot.is_whole
        before = self.snapshot(whole=is_whole) if is_whole or self.n_tokens else None
        had_logits = self.has_logits
        try:
            if not is_whole:
                # What was there is multiplied by 0 where a cell is free: a NaN would stay one.
                self.clear()
            self.restore(snapshot)
        except BaseException:
            if before is not None:
                self.restore(before)
                self.has_logits = had_logits
            raise
