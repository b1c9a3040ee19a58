"""A llama.cpp context at the level of the C API: what tests and benchmarks need.

With ``STOCK_LIBRARIES`` in the environment it runs on the unpatched library of that folder, to
compare with.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvmerge.policies import Policy

STOCK = os.environ.get("STOCK_LIBRARIES")

if STOCK:
    # The package finds the Python layer, and with it loads the back ends of that folder.
    os.environ["KVMERGE_LIB_PATH"] = STOCK
    import kvmerge  # noqa: F401

    import llama_cpp  # isort: skip
else:
    from kvmerge.native import loading
    from kvmerge.native.binding import Engine, small_beginning

    llama_cpp = loading.load()

GGML_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}


class Session:
    """One model and one context, with an engine when ``merge`` is given.

    Parameters
    ----------
    model
        GGUF file.
    merge
        A policy, or fields of ``kvmerge_params``; ``None``: no engine.
    cache_type
        Type of K and V.
    flash_attention
        Whether attention is fused; a quantized V needs it.
    n_ctx, n_batch, n_seq_max, unified, swa_full, n_rs_seq
        As in llama.cpp.
    first_cells
        Cells that the cache begins with; 0: ``n_ctx``.
    rope_scale
        Factor of positions; 0: the model's own.
    """

    def __init__(
        self,
        model: Path,
        *,
        merge: Mapping[str, Any] | Policy | None = None,
        cache_type: str = "f16",
        flash_attention: bool = True,
        n_ctx: int = 1024,
        n_batch: int = 512,
        n_seq_max: int = 1,
        unified: bool = True,
        swa_full: bool = True,
        n_rs_seq: int = 0,
        threads: int = 1,
        first_cells: int = 0,
        rope_scale: float = 0.0,
    ) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = int(os.environ.get("KVMERGE_TEST_GPU_LAYERS", "0"))
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        assert self.model, f"{model} does not load"
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = n_ctx
        context.n_batch = context.n_ubatch = n_batch
        context.n_seq_max = n_seq_max
        context.kv_unified = unified
        context.swa_full = swa_full
        context.n_rs_seq = n_rs_seq
        context.rope_freq_scale = rope_scale
        context.n_threads = context.n_threads_batch = threads
        context.type_k = context.type_v = GGML_TYPES[cache_type]
        context.flash_attn_type = 1 if flash_attention else 0
        with nullcontext() if STOCK else small_beginning(first_cells):
            self.context = llama_cpp.llama_init_from_model(self.model, context)
        assert self.context, "no context"
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.n_embd = llama_cpp.llama_model_n_embd(self.model)
        # M-RoPE: a picture has positions in time, height and width
        self.is_mrope = llama_cpp.llama_model_rope_type(self.model) in (8, 40)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.position = 0
        address = ctypes.cast(self.context, ctypes.c_void_p).value or 0
        self.engine = None
        if merge is not None:
            policy = merge if isinstance(merge, Mapping) else merge.engine_params()
            self.engine = Engine(address, policy)
            if not isinstance(merge, Mapping):
                self.engine.use(merge)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model."""
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def decode(
        self,
        tokens: Sequence[int] | None = None,
        embeddings: npt.NDArray[np.float32] | None = None,
        sequence: int = 0,
        position: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Read tokens or embedding rows; return the logits of the last one, [n_vocab]."""
        start = self.position if position is None else position
        n = len(tokens) if tokens is not None else len(embeddings)  # type: ignore[arg-type]
        batch = llama_cpp.llama_batch_init(n, 0 if tokens is not None else self.n_embd, 1)
        try:
            batch.n_tokens = n
            for i in range(n):
                if tokens is not None:
                    batch.token[i] = int(tokens[i])
                batch.pos[i] = start + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = i == n - 1
            step = n
            # the address: a pointer field of ctypes would change with the struct
            plain = ctypes.cast(batch.pos, ctypes.c_void_p).value
            if embeddings is not None:
                rows = np.ascontiguousarray(embeddings, np.float32)
                ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
                if self.is_mrope:
                    step = int(n**0.5)
                    assert step * step == n, "a square picture"
                    y, x = np.divmod(np.arange(n), step)
                    grid = np.concatenate([0 * y, y, x, 0 * y]) + start
                    grid[3 * n :] = 0
                    pos = np.ascontiguousarray(grid, np.int32)
                    batch.pos = pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            status = llama_cpp.llama_decode(self.context, batch)
            batch.pos = ctypes.cast(plain, ctypes.POINTER(ctypes.c_int32))
            assert status == 0
        finally:
            llama_cpp.llama_batch_free(batch)
        if position is None:
            self.position += step
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.n_vocab,)).copy()

    def generate(self, logits: npt.NDArray[np.float32], n: int) -> list[npt.NDArray[np.float32]]:
        """Greedily read n tokens on; return the logits of each."""
        out = []
        for _ in range(n):
            logits = self.decode([int(np.argmax(logits))])
            out.append(logits)
        return out

    def remove(self, start: int, end: int, sequence: int = 0) -> bool:
        """Remove positions [start, end) of a sequence; false when it is refused."""
        return bool(llama_cpp.llama_memory_seq_rm(self.memory, sequence, start, end))

    def save(self, *, whole: bool = False) -> bytes:
        """Return the state of sequence 0, or of the whole context."""
        if whole:
            size = llama_cpp.llama_state_get_size(self.context)
            buffer = (ctypes.c_uint8 * size)()
            assert llama_cpp.llama_state_get_data(self.context, buffer, size) == size
        else:
            size = llama_cpp.llama_state_seq_get_size(self.context, 0)
            buffer = (ctypes.c_uint8 * size)()
            assert llama_cpp.llama_state_seq_get_data(self.context, buffer, size, 0) == size
        return bytes(buffer)

    def restore(self, state: bytes, *, whole: bool = False) -> bool:
        """Put a state back; false when it is refused."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if whole:
            return llama_cpp.llama_state_set_data(self.context, buffer, len(state)) == len(state)
        return llama_cpp.llama_state_seq_set_data(self.context, buffer, len(state), 0) == len(state)
