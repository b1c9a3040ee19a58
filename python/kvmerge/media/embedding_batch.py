"""Read embeddings at positions of one's own, where libmtmd would read all tokens of a picture."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import mtmd_cpp

Positions = npt.NDArray[np.int32]


def picture_positions(
    mtmd: Any, chunk: Any, position: int, kept: npt.NDArray[np.intp]
) -> tuple[Positions, int]:
    """Return where those tokens of a picture lie that are kept, and the position after it.

    Parameters
    ----------
    mtmd : pointer
        The ``mtmd_context``.
    chunk : pointer
        The picture, all of whose tokens count.
    position : int
        Where it begins.
    kept : array
        Which of its tokens are read, ascending, [m].

    Returns
    -------
    array, int
        [m]: one after the other, since llama.cpp takes no gaps within a sequence.  With M-RoPE
        [4, m]: time, row, column and nothing, as they are in the whole picture, which ends where it
        would have ended.
    """
    if not mtmd_cpp.mtmd_decode_use_mrope(mtmd):
        return np.arange(position, position + len(kept), dtype=np.int32), position + len(kept)
    n = int(mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk))
    places = (mtmd_cpp.mtmd_decoder_pos * n)()
    image = mtmd_cpp.mtmd_input_chunk_get_tokens_image(chunk)
    mtmd_cpp.mtmd_helper_image_get_decoder_pos(image, llama_cpp.llama_pos(position), places)
    table = np.frombuffer(places, np.uint32).reshape(n, 4).astype(np.int32)
    t, x, y, z = table[kept].T
    after = position + int(mtmd_cpp.mtmd_input_chunk_get_n_pos(chunk))
    return np.stack([t, y, x, z]), after


def decode_embeddings(
    context: Any,
    embeddings: npt.NDArray[np.float32],
    positions: Positions,
    n_batch: int,
    after_batch: Callable[[int], None] | None = None,
) -> int:
    """Read embeddings into sequence 0; return the status of ``llama_decode``, 0 if all is well.

    Parameters
    ----------
    context : pointer
        The ``llama_context``.
    embeddings : array
        Float32, [n, n_embd].
    positions : array
        Int32, [n], or [4, n] with M-RoPE.
    n_batch : int
        How many are read at a time.
    after_batch : callable, optional
        Is called with the number of tokens of each batch after it was read.
    """
    n, n_embd = embeddings.shape
    batch = llama_cpp.llama_batch_init(min(n, n_batch), n_embd, 1)
    # As an address: a pointer field of ctypes would change with the struct.
    own = ctypes.cast(batch.pos, ctypes.c_void_p).value
    try:
        for start in range(0, n, n_batch):
            rows = np.ascontiguousarray(embeddings[start : start + n_batch], np.float32)
            places = np.ascontiguousarray(positions[..., start : start + n_batch], np.int32)
            batch.n_tokens = len(rows)
            ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
            batch.pos = places.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            for i in range(len(rows)):
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = False
            status = int(llama_cpp.llama_decode(context, batch))
            if status != 0:
                return status
            if after_batch is not None:
                after_batch(len(rows))
    finally:
        batch.pos = ctypes.cast(own, ctypes.POINTER(ctypes.c_int32))
        llama_cpp.llama_batch_free(batch)
    return 0
