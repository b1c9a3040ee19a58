"""What llama.cpp would allocate for a model, learned without loading its weights.

llama.cpp can read a model's metadata only and lay out its buffers without allocating them
(``no_alloc``).  Its function that returns their sizes is for C++ only, so they are read from what
it logs, which is rounded to 0.01 MiB.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _library
from .byte_size import MIB
from .errors import LibraryError, ModelError, OptionError
from .gguf_file import check_gguf
from .native_log import INFO, NativeLog, caught

if TYPE_CHECKING:
    from ._binding import LayerShape
    from .policies import Policy

_CACHE = re.compile(r"size = +([\d.]+) MiB \( *(\d+) cells, +\d+ layers")
_COMPUTE = re.compile(r"compute buffer size = +([\d.]+) MiB")


@dataclass(frozen=True)
class ContextOptions:
    """Options of a context that decide about its buffers; as in `llama_cpp.Llama`.

    ``type_k`` and ``type_v`` are numbers of ``ggml_type``.
    """

    n_ctx: int
    n_batch: int = 512
    n_ubatch: int = 512
    type_k: int = 1
    type_v: int = 1
    flash_attn: bool = False


@dataclass(frozen=True)
class ContextSizes:
    """Buffers of a context, in bytes; ``cells`` is the size of its largest cache."""

    kv: int
    cells: int
    compute: int


@dataclass(frozen=True)
class EngineSizes:
    """What merging adds to a context: the merged layers, and buffers in bytes."""

    layers: tuple[LayerShape, ...]
    bias: int
    observed: int


def logged_sizes(form: re.Pattern[str], log: NativeLog) -> list[tuple[int, ...]]:
    """Return the numbers of the lines of a form; the first of each is in MiB, and becomes bytes.

    Raises
    ------
    LibraryError
        If there is no such line.
    """
    found = [match for line in log if (match := form.search(line))]
    if not found:
        raise LibraryError(
            f"llama.cpp did not log the sizes of its buffers ({form.pattern!r}): the libraries in "
            f"{_library.library_folder()} are of another version; install the package again"
        )
    return [
        (round(float(match[1]) * MIB), *(int(number) for number in match.groups()[1:]))
        for match in found
    ]


def logged_compute(log: NativeLog) -> int:
    """Return the bytes of the compute buffers of all devices that were laid out."""
    return sum(size for (size,) in logged_sizes(_COMPUTE, log))


class DryModel:
    """A model of which only the metadata is loaded.

    Parameters
    ----------
    path : path
        The model (GGUF).
    n_gpu_layers : int
        Layers that would lie on a GPU; -1 is all.

    Raises
    ------
    ModelError
        If it is missing, not a GGUF, or one that llama.cpp refuses.
    """

    def __init__(self, path: str | os.PathLike[str], n_gpu_layers: int = 0) -> None:
        self._llama_cpp: Any = _library.load()
        self._contexts: dict[tuple[ContextOptions, int], ContextSizes] = {}
        self._engines: dict[tuple[ContextOptions, int, Policy], EngineSizes] = {}
        self.path = check_gguf(path, "model", ModelError)
        llama_cpp = self._llama_cpp
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.no_alloc = True
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        params.n_gpu_layers = n_gpu_layers
        with caught(quiet=True) as errors:
            self.pointer = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self.pointer:
            hint = ""
            if "clip" in errors.reason.lower():
                hint = ". It looks like an mmproj: pass it as --mmproj and the model first"
            raise ModelError(f"{self.path} cannot be loaded: {errors.reason}{hint}")

    def __enter__(self) -> DryModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._llama_cpp.llama_model_free(self.pointer)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return int(self._llama_cpp.llama_model_size(self.pointer))

    @property
    def trained_context(self) -> int:
        """Length of context that it was trained for."""
        return int(self._llama_cpp.llama_model_n_ctx_train(self.pointer))

    @property
    def has_vocabulary(self) -> bool:
        """Whether it can tokenize text."""
        vocabulary = self._llama_cpp.llama_model_get_vocab(self.pointer)
        return bool(self._llama_cpp.llama_vocab_type(vocabulary) != 0)

    def context(self, options: ContextOptions, cells: int = 0) -> ContextSizes:
        """Return the buffers of a context.

        Parameters
        ----------
        options : ContextOptions
            Its options.
        cells : int
            Cells of a cache that can grow; 0 is ``n_ctx``, as in llama.cpp.
        """
        key = (options, cells)
        if key not in self._contexts:
            self._contexts[key] = self._in_context(options, cells, lambda _: None)[0]
        return self._contexts[key]

    def engine(self, options: ContextOptions, cells: int, policy: Policy) -> EngineSizes:
        """Return what merging adds to a context with a cache of some cells.

        Raises
        ------
        UnsupportedError
            If this model cannot be merged.
        """
        from ._binding import Engine

        key = (options, cells, policy)
        if key in self._engines:
            return self._engines[key]
        params = policy.engine_params()
        # Observed queries a layer: a ring of twice the window, samples of three modalities, and a
        # row that nothing reads.
        rows = 2 * params["n_window"] + 3 * params["n_flow_rows"] + 1

        def attach(context: Any) -> EngineSizes:
            engine = Engine(ctypes.cast(context, ctypes.c_void_p).value or 0, params)
            layers = tuple(engine.layer(i) for i in range(engine.stats().n_layers))
            observed = sum(rows * layer.n_head * layer.head_size_k * 4 for layer in layers)
            # K and V are not allocated here, so what it counts is the bias.
            return EngineSizes(layers, engine.bytes(), observed)

        self._contexts[key[:2]], self._engines[key] = self._in_context(options, cells, attach)
        return self._engines[key]

    def _in_context(
        self, options: ContextOptions, cells: int, inspect: Callable[[Any], Any]
    ) -> tuple[ContextSizes, Any]:
        from ._binding import small_beginning

        llama_cpp = self._llama_cpp
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = min(options.n_batch, options.n_ctx)
        params.n_ubatch = min(options.n_ubatch, params.n_batch)
        params.type_k, params.type_v = options.type_k, options.type_v
        params.flash_attn_type = int(options.flash_attn)
        with caught() as errors, caught(INFO, quiet=True) as log, small_beginning(cells):
            context = llama_cpp.llama_init_from_model(self.pointer, params)
        if not context:
            raise OptionError(
                f"no context could be made for {self.path}: "
                f"{errors.reason or 'llama.cpp gave no reason'}"
            )
        try:
            caches = logged_sizes(_CACHE, log)
            sizes = ContextSizes(
                kv=sum(size for size, _ in caches),
                cells=max(cells for _, cells in caches),
                compute=logged_compute(log),
            )
            return sizes, inspect(context)
        finally:
            llama_cpp.llama_free(context)
