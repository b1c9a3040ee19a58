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
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from ..byte_size import MIB
from ..errors import LibraryError, ModelError, OptionError
from ..gguf_file import check_gguf
from ..native.library import library_file, library_folder
from ..native.loading import load
from ..native.log import DEBUG, NativeLog, caught
from ..resident import resident
from .gguf_outline import GgufHeader

if TYPE_CHECKING:
    from ..native.binding import LayerShape
    from ..policies import Policy

_CACHE = re.compile(
    r"size = +([\d.]+) MiB \( *(\d+) cells, +\d+ layers.*"
    r"K \(\w+\): +([\d.]+) MiB, V \(\w+\): +([\d.]+) MiB"
)
_COMPUTE = re.compile(r"compute buffer size = +([\d.]+) MiB")
_OUTPUT = re.compile(r"output buffer size = +([\d.]+) MiB")
_NODES = re.compile(r"max_nodes = (\d+)")
# A method of llama_model, which is C++; `this` is its first argument.
_GET_TENSOR = "_ZNK11llama_model10get_tensorEPKc"
_CPU = 0  # ggml_backend_dev_type

_T = TypeVar("_T")

_LAID_OUT = 2**17
"""Cells up to which buffers are laid out; beyond, they grow in proportion.

llama.cpp keeps books of every cell, which for the longest contexts would fill the memory.
"""


class _Tensor(ctypes.Structure):
    """The beginning of ``ggml_tensor``."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p)]


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
class GraphSizes:
    """Buffers that a context computes in, in bytes, and the most nodes that a graph may have."""

    compute: int
    nodes: int


@dataclass(frozen=True)
class CacheSize:
    """A KV cache: its cells, and the bytes of its keys and values."""

    cells: int
    keys: int
    values: int


@dataclass(frozen=True)
class ContextSizes:
    """Buffers of a context, in bytes.

    A model with a sliding window has two caches: first the one that sees everything, which merges,
    then that of the window.
    """

    caches: tuple[CacheSize, ...]
    output: int
    graphs: GraphSizes

    @property
    def cells(self) -> int:
        """Cells of the cache that merges."""
        return self._base.cells

    @property
    def kv(self) -> int:
        """Bytes of all keys and values."""
        return sum(cache.keys + cache.values for cache in self.caches)

    def kv_of(self, cells: int, together: bool) -> int:
        """Return the bytes of keys and values where the cache that merges holds so many cells.

        Parameters
        ----------
        cells : int
            Cells that were written; what lies behind them takes no memory.
        together : bool
            Whether the values of a cell lie together. If not, there is one row a channel over all
            cells, and all of it takes memory.
        """
        cache = self._base
        unused = cache.keys + (cache.values if together else 0)
        return self.kv - unused * max(0, cache.cells - cells) // cache.cells

    @property
    def _base(self) -> CacheSize:
        return self.caches[0]


@dataclass(frozen=True)
class EngineSizes:
    """What merging adds to a context: the merged layers, and buffers in bytes.

    ``before`` and ``merged`` are the graphs before and after the first merge.
    """

    layers: tuple[LayerShape, ...]
    bias: int
    observed: int
    before: GraphSizes
    merged: GraphSizes


def _logged(form: re.Pattern[str], log: NativeLog) -> list[tuple[str, ...]]:
    """Return the groups of the lines of a form.

    Raises
    ------
    LibraryError
        If there is no such line.
    """
    found = [match.groups() for line in log if (match := form.search(line))]
    if not found:
        raise LibraryError(
            f"llama.cpp did not log the sizes of its buffers ({form.pattern!r}): the libraries in "
            f"{library_folder()} are of another version; install the package again"
        )
    return found


def _bytes(mib: str) -> int:
    return round(float(mib) * MIB)


def logged_compute(log: NativeLog) -> int:
    """Return the bytes of the compute buffers of all devices that were laid out."""
    return sum(_bytes(size) for (size,) in _logged(_COMPUTE, log))


def _logged_graphs(log: NativeLog) -> GraphSizes:
    return GraphSizes(logged_compute(log), int(_logged(_NODES, log)[-1][0]))


def _in_proportion(
    options: ContextOptions, cells: int, lay_out: Callable[[ContextOptions, int], _T]
) -> _T:
    """Return what `lay_out` says, or what it would say of more cells than are laid out."""
    options = replace(options, n_ctx=min(options.n_ctx, _LAID_OUT)) if cells else options
    n = cells or options.n_ctx
    if n <= _LAID_OUT:
        return lay_out(options, cells)
    fewer = []
    for size in (_LAID_OUT // 2, _LAID_OUT):
        fewer.append(lay_out(replace(options, n_ctx=size), size if cells else 0))
    return _grown(*fewer, steps=(n - _LAID_OUT) / (_LAID_OUT // 2))


def _grown(one: Any, two: Any, steps: float) -> Any:
    """Return numbers that go on from the second as they went from the first to the second."""
    if is_dataclass(two):
        pairs = {f.name: (getattr(one, f.name), getattr(two, f.name)) for f in fields(two)}
        return replace(two, **{name: _grown(*pair, steps) for name, pair in pairs.items()})
    if isinstance(two, tuple):
        return tuple(_grown(a, b, steps) for a, b in zip(one, two, strict=True))
    return two + round((two - one) * steps) if isinstance(two, int) else two


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
        self._llama_cpp: Any = load()
        before = resident()
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
        self.vocabulary = max(0, resident() - before)
        """Bytes that reading the metadata took: the vocabulary, for the most part."""
        self._offloads = n_gpu_layers != 0 and bool(llama_cpp.llama_supports_gpu_offload())

    def __enter__(self) -> DryModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama_cpp.llama_model_free(self.pointer)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return int(self._llama_cpp.llama_model_size(self.pointer))

    @cached_property
    def repacked(self) -> int:
        """Bytes of weights that the CPU keeps once more, in an order that it multiplies faster.

        The file stays mapped as a whole.  0 where the library does not say.
        """
        llama = ctypes.CDLL(str(library_file("llama")))
        base = ctypes.CDLL(str(library_file("ggml-base")))
        try:
            get_tensor = getattr(llama, _GET_TENSOR)
        except AttributeError:
            return 0
        get_tensor.restype = ctypes.POINTER(_Tensor)
        get_tensor.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        for name in (
            "ggml_backend_buffer_get_type",
            "ggml_backend_buft_get_device",
            "ggml_backend_buft_is_host",
            "ggml_backend_dev_type",
        ):
            getattr(base, name).argtypes = [ctypes.c_void_p]
        base.ggml_backend_buffer_get_type.restype = ctypes.c_void_p
        base.ggml_backend_buft_get_device.restype = ctypes.c_void_p
        base.ggml_backend_buft_is_host.restype = ctypes.c_bool

        def is_repacked(name: str) -> bool:
            tensor = get_tensor(ctypes.cast(self.pointer, ctypes.c_void_p), name.encode())
            if not tensor or not tensor.contents.buffer:
                return False
            kind = base.ggml_backend_buffer_get_type(tensor.contents.buffer)
            device = base.ggml_backend_buft_get_device(kind)
            on_cpu = device is not None and base.ggml_backend_dev_type(device) == _CPU
            return on_cpu and not base.ggml_backend_buft_is_host(kind)

        with GgufHeader(self.path, "model", ModelError) as header:
            return sum(size for name, size in header.tensors.items() if is_repacked(name))

    @cached_property
    def widest(self) -> int:
        """Values in the longest row of a weight."""
        with GgufHeader(self.path, "model", ModelError) as header:
            return header.widest

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return int(self._llama_cpp.llama_model_n_head(self.pointer))

    @property
    def grows_in_place(self) -> bool:
        """Whether a cache that grows never is in memory twice, in part."""
        return not self._offloads

    @property
    def offloads(self) -> bool:
        """Whether buffers lie on another device, where all of them take memory."""
        return self._offloads

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
            self._contexts[key] = _in_proportion(
                options, cells, lambda *less: self._in_context(*less, lambda _: None)[0]
            )
        return self._contexts[key]

    def engine(self, options: ContextOptions, cells: int, policy: Policy) -> EngineSizes:
        """Return what merging adds to a context with a cache of some cells.

        Raises
        ------
        UnsupportedError
            If this model cannot be merged.
        """
        from ..native.binding import Engine

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
            graphs = []
            for merged in (False, True):
                with caught(DEBUG, quiet=True) as log:
                    engine.lay_out(merged)
                graphs.append(_logged_graphs(log))
            # K and V are not allocated here, so what it counts is the bias.
            return EngineSizes(layers, engine.bytes(), observed, *graphs)

        self._contexts[key[:2]], self._engines[key] = _in_proportion(
            options, cells, lambda *less: self._in_context(*less, attach)
        )
        return self._engines[key]

    def _in_context(
        self, options: ContextOptions, cells: int, inspect: Callable[[Any], Any]
    ) -> tuple[ContextSizes, Any]:
        from ..native.binding import small_beginning

        llama_cpp = self._llama_cpp
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = min(options.n_batch, options.n_ctx)
        params.n_ubatch = min(options.n_ubatch, params.n_batch)
        if not self._offloads:
            # Room for the logits of a whole batch is set aside, but only those of one token are
            # written, and memory of the host that nothing writes to is not resident.
            params.n_outputs_max = 1
        params.type_k, params.type_v = options.type_k, options.type_v
        params.flash_attn_type = int(options.flash_attn)
        with caught() as errors, caught(DEBUG, quiet=True) as log, small_beginning(cells):
            context = llama_cpp.llama_init_from_model(self.pointer, params)
        if not context:
            raise OptionError(
                f"no context could be made for {self.path}: "
                f"{errors.reason or 'llama.cpp gave no reason'}"
            )
        try:
            sizes = ContextSizes(
                caches=tuple(
                    CacheSize(int(cells), _bytes(keys), _bytes(values))
                    for _, cells, keys, values in _logged(_CACHE, log)
                ),
                output=sum(_bytes(size) for (size,) in _logged(_OUTPUT, log)),
                graphs=_logged_graphs(log),
            )
            return sizes, inspect(context)
        finally:
            llama_cpp.llama_free(context)
