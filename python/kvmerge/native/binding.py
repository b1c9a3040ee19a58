"""The C API of ``kvmerge.h`` as a Python class with NumPy arrays.

The header that ships with the package is what is bound (cffi, ABI mode): no compiler is needed,
and there is no second list of declarations that could fall behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import (
    CacheClearedError,
    KVMergeError,
    LibraryError,
    MergeError,
    OptionError,
    OutOfMemoryError,
    StateError,
    UnsupportedError,
)
from . import header
from .library import library_file

MODALITIES = ("text", "image", "audio")
"""Names of ``enum kvmerge_modality``, by value."""

FATES = ("dropped", "folded", "kept", "protected")
"""Names of ``enum kvmerge_fate``, by value."""

_ERRORS: dict[int, type[KVMergeError]] = {
    -1: OptionError,
    -2: UnsupportedError,
    -3: StateError,
    -4: OutOfMemoryError,
    -5: MergeError,
    -6: CacheClearedError,
}


@lru_cache(maxsize=1)
def _native() -> tuple[Any, Any, int]:
    """Return cffi's ``ffi``, the library, and the API version of the header."""
    from cffi import FFI

    ffi = FFI()
    ffi.cdef(header.declarations())
    return ffi, ffi.dlopen(str(library_file("llama"))), header.api_version()


def api_version() -> int:
    """Return the version of the library's kvmerge API."""
    return int(_native()[1].kvmerge_api_version())


def check() -> None:
    """Check that the library is patched and of the header's version.

    Raises
    ------
    LibraryError
        If it is not.
    """
    ffi, library, version = _native()
    file = library_file("llama")
    try:
        found = library.kvmerge_api_version()
    except AttributeError as error:
        raise LibraryError(
            f"{file} is a llama.cpp without the kvmerge patch: install the package again "
            "(`pip install .`)"
        ) from error
    if found != version:
        raise LibraryError(
            f"{file} has version {found} of the kvmerge API, the package expects {version}: "
            "install the package again (`pip install .`)"
        )
    size = library.kvmerge_params_default().size
    if size != ffi.sizeof("struct kvmerge_params"):
        raise LibraryError(
            f"struct kvmerge_params has {size} bytes in {file} and "
            f"{ffi.sizeof('struct kvmerge_params')} in {header.folder()}: install the package again"
        )


def log_from(level: int) -> None:
    """Let llama.cpp's log pass on messages of this level and above only."""
    _native()[1].kvmerge_log_from(level)


def log_address() -> int:
    """Return the address of the log callback that passes on what `log_from` lets through."""
    ffi, library, _ = _native()
    return int(ffi.cast("intptr_t", library.kvmerge_log))


def trim() -> None:
    """Give memory that was freed back to the system, as far as its allocator can do that."""
    _native()[1].kvmerge_trim()


@contextmanager
def small_beginning(cells: int) -> Iterator[None]:
    """Let the context that is made inside begin with a cache of few cells, which then grows.

    Parameters
    ----------
    cells : int
        How many; 0 changes nothing.
    """
    library = _native()[1]
    library.kvmerge_begin_small(cells)
    try:
        yield
    finally:
        library.kvmerge_begin_small(0)


@dataclass(frozen=True)
class EngineStats:
    """``struct kvmerge_stats``: figures of the last merge."""

    n_merges: int
    n_tokens: int
    n_cells_before: int
    n_cells_after: int
    n_layers: int
    n_heads: int
    n_text_before: int
    n_text_after: int
    bytes_per_cell: int
    bytes_after: int
    error: float
    t_score_us: int
    t_match_us: int
    t_fold_us: int
    t_total_us: int


@dataclass(frozen=True)
class Flow:
    """Cross-modal flow of the last merge, one value a layer; ``rho`` is -1: not measured."""

    rho: npt.NDArray[np.float32]
    text_to_media: npt.NDArray[np.float32]
    media_to_text: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """What the last merge did to each of the cells it found, for one layer and KV head."""

    order: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    segment: npt.NDArray[np.int32]
    fate: npt.NDArray[np.uint8]
    target: npt.NDArray[np.int32]
    score: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Cells:
    """The content of the cells of a sequence, for one layer."""

    k: npt.NDArray[np.float32]
    v: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    mass: npt.NDArray[np.float32]
    order: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Queries:
    """The observed queries of a sequence, for one layer."""

    q: npt.NDArray[np.float32]
    order: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    proxy: npt.NDArray[np.bool_]
    scale: float


@dataclass(frozen=True)
class Question:
    """What a merge asks the caller for, where the caller plans.

    Attributes
    ----------
    sequence : int
        The sequence that is merged.
    cells : int
        Cells to keep: of the widest head of a layer, as the mean over the layers.
    most : int
        Cells that no head may exceed.
    order, segment, modality, whole, mass : arrays [heads of all layers, n]
        Of every cell the index of its token, the picture or run of text that it belongs to, its
        modality (see `MODALITIES`), whether it is of a picture that is to stay as it is, and the
        tokens that it stands for; 0 is an empty cell.
    """

    sequence: int
    cells: int
    most: int
    order: npt.NDArray[np.int32]
    segment: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    whole: npt.NDArray[np.bool_]
    mass: npt.NDArray[np.float32]


Planner = Callable[[Question], Sequence[npt.NDArray[np.integer[Any]]]]
"""Returns for every layer the targets [heads, n] of its cells; see ``struct kvmerge_question``."""


class Method(Protocol):
    """What an engine can merge by; every `kvmerge.policies.Policy` is one."""

    def engine_params(self) -> dict[str, Any]:
        """Return fields of ``struct kvmerge_params`` by name."""

    def planner(self, engine: Engine) -> Planner | None:
        """Return what plans the merges of an engine; None where it does that itself."""


@dataclass(frozen=True)
class LayerShape:
    """Shape of one merged layer; ``index`` is its place in the model."""

    index: int
    n_head: int
    n_head_kv: int
    head_size_k: int
    head_size_v: int


class Engine:
    """The merging engine of one llama.cpp context.

    Parameters
    ----------
    context : int
        Address of the ``llama_context``.
    params : mapping
        Fields of ``struct kvmerge_params`` by name; the others keep the library's defaults.

    Notes
    -----
    The engine is freed with the context; after that, do not use it.  One thread at a time, the
    same as the context.
    """

    def __init__(self, context: int, params: Mapping[str, Any]) -> None:
        self._ffi, self._library, _ = _native()
        self._planner: Any = None
        self._problem: Exception | None = None
        out = self._ffi.new("struct kvmerge_engine **")
        pointer = self._ffi.cast("struct llama_context *", context)
        native = self._params(params)
        self._check(self._library.kvmerge_attach(pointer, native, out))
        self._engine = out[0]

    def _params(self, params: Mapping[str, Any]) -> Any:
        native = self._ffi.new("struct kvmerge_params *", self._library.kvmerge_params_default())
        for name, value in params.items():
            setattr(native, name, value)
        return native

    def _check(self, status: int) -> int:
        if status < 0:
            self.raise_problem()
            message = self._ffi.string(self._library.kvmerge_error_message()).decode(
                "utf-8", "replace"
            )
            raise _ERRORS.get(status, MergeError)(message or f"kvmerge status {status}")
        return status

    def _array(self, array: npt.NDArray[Any], kind: str) -> Any:
        return self._ffi.from_buffer(f"{kind}[]", array, require_writable=True)

    def detach(self) -> None:
        """Switch the engine off; what was merged stays merged."""
        self._library.kvmerge_detach(self._engine)
        self._engine = self._ffi.NULL

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Change the policy; the window and the number of flow rows cannot change."""
        self._check(self._library.kvmerge_set_params(self._engine, self._params(params)))

    def use(self, policy: Method) -> None:
        """Merge as a policy says from now on."""
        self.set_params(policy.engine_params())
        self.set_planner(policy.planner(self))

    def set_room(self, cells: int = 0, share: float = 0.0, whole: int = 0) -> None:
        """Limit the cells of the cache.

        Parameters
        ----------
        cells : int
            The most there may be, at least 256; 0 is no limit.
        share : float
            Share of the tokens that a merge leaves which makes room, 0 to 1; 0 is as many as fit.
        whole : int
            Last pictures that every merge leaves as they are.
        """
        self._check(self._library.kvmerge_set_room(self._engine, cells, share, whole))

    def set_idle(self, sequence: int, idle: bool) -> None:
        """Say whether nobody waits for a sequence: merges that make room take from it first."""
        self._check(self._library.kvmerge_set_idle(self._engine, sequence, idle))

    def was_cleared(self, sequence: int = 0) -> bool:
        """Return whether a merge that broke off cleared a sequence since this was last asked."""
        return bool(self._library.kvmerge_was_cleared(self._engine, sequence))

    def set_planner(self, planner: Planner | None) -> None:
        """Let a function decide in every merge what is kept, and what goes into it.

        Parameters
        ----------
        planner : callable or None
            Gets a `Question` and returns for every merged layer an array [heads, n] of targets:
            a cell's own index where it is kept, that of a kept cell where it is folded into it,
            -1 where it is dropped.  It may read from the engine.  What it raises, the call that
            merged raises.  None lets the policy decide.
        """
        if planner is None:
            self._library.kvmerge_set_planner(self._engine, self._ffi.NULL, self._ffi.NULL)
            self._planner = None
            return

        def ask(_: Any, question: Any) -> int:
            try:
                self._answer(planner, question)
            except Exception as error:
                self._problem = error
                return 1
            return 0

        callback = self._ffi.callback(
            "int32_t(void *, const struct kvmerge_question *)", ask, error=1
        )
        self._library.kvmerge_set_planner(self._engine, callback, self._ffi.NULL)
        # The library calls it as long as it is set, and not the one before any more.
        self._planner = callback

    def raise_problem(self) -> None:
        """Raise what the planner of the last merge raised, if it did."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _answer(self, planner: Planner, native: Any) -> None:
        shape = (native.n_heads, native.n)

        def array(name: str, kind: Any) -> npt.NDArray[Any]:
            size = native.n_heads * native.n * np.dtype(kind).itemsize
            return np.frombuffer(self._ffi.buffer(getattr(native, name), size), kind).reshape(shape)

        layers = planner(
            Question(
                sequence=native.seq_id,
                cells=native.n_cells,
                most=native.n_most,
                order=array("order", np.int32).copy(),
                segment=array("segment", np.int32).copy(),
                modality=array("modality", np.uint8).copy(),
                whole=array("whole", np.uint8).astype(bool),
                mass=array("mass", np.float32).copy(),
            )
        )
        heads = [self.layer(i).n_head_kv for i in range(self.stats().n_layers)]
        shapes = [(count, native.n) for count in heads]
        found = [np.shape(layer) for layer in layers]
        if found != shapes:
            raise MergeError(f"a plan has the shapes {found}, {shapes} are accepted")
        array("target", np.int32)[:] = np.concatenate(list(layers))

    def lay_out(self, merged: bool) -> None:
        """Lay out the graphs of a context of a model without weights, with merged cells or not.

        llama.cpp logs the sizes of the compute buffers that this would take.
        """
        self._check(self._library.kvmerge_lay_out(self._engine, merged))

    def size(self) -> int:
        """Return the cells that the cache has, used or not."""
        return int(self._library.kvmerge_size(self._engine))

    def bytes(self) -> int:
        """Return the bytes of K, V and bias as they are allocated."""
        return int(self._library.kvmerge_bytes(self._engine))

    def layer_cells(self, layer: int, sequence: int = 0) -> int:
        """Return the cells of a sequence in which one merged layer holds something."""
        return self._check(self._library.kvmerge_layer_cells(self._engine, sequence, layer))

    def layer_bytes(self, layer: int) -> int:
        """Return the bytes of K, V and bias of one merged layer as they are allocated."""
        return self._check(self._library.kvmerge_layer_bytes(self._engine, layer))

    @contextmanager
    def media(self, modality: str) -> Iterator[None]:
        """Mark what is decoded inside as one segment of ``"image"`` or ``"audio"``."""
        # An interrupt may have kept the last one from being ended; if not, this only says so.
        self._library.kvmerge_media_end(self._engine)
        self._check(self._library.kvmerge_media_begin(self._engine, MODALITIES.index(modality)))
        try:
            yield
        finally:
            self._check(self._library.kvmerge_media_end(self._engine))

    def media_weights(self, weights: npt.NDArray[np.float32]) -> None:
        """Say how many tokens each of the next ones of a medium stands for, [n], 1 to 65536."""
        weights = np.ascontiguousarray(weights, np.float32)
        array = self._ffi.from_buffer("float[]", weights)
        self._check(self._library.kvmerge_media_weights(self._engine, array, len(weights)))

    def fail_at(self, n: int) -> None:
        """Let the n-th allocation or computation of the engine from now on fail; for tests."""
        self._library.kvmerge_fail_at(n)

    def fail_count(self) -> int:
        """Return how many there were since `fail_at`."""
        return int(self._library.kvmerge_fail_count())

    def merge(self, cells: int, sequence: int = 0) -> None:
        """Merge a sequence down to a number of cells."""
        self._check(self._library.kvmerge_merge(self._engine, sequence, cells))

    def merge_within(self, cells: Sequence[int], tolerance: float, sequence: int = 0) -> None:
        """Merge a sequence to the first of some numbers of cells, ascending.

        Its error is at most `tolerance`; where there is none, nothing is merged.
        """
        numbers = self._ffi.new("int32_t[]", list(cells))
        self._check(
            self._library.kvmerge_merge_within(
                self._engine, sequence, numbers, len(cells), tolerance
            )
        )

    @contextmanager
    def saving_all_queries(self) -> Iterator[None]:
        """Let states that are saved inside hold all observed queries, however large they get."""
        self._library.kvmerge_save_all_queries(self._engine, True)
        try:
            yield
        finally:
            self._library.kvmerge_save_all_queries(self._engine, False)

    def n_cells(self, sequence: int = 0) -> int:
        """Return the cells that a sequence holds."""
        return self._check(self._library.kvmerge_n_cells(self._engine, sequence))

    def n_tokens(self, sequence: int = 0) -> int:
        """Return the tokens that the cells of a sequence stand for."""
        return self._check(self._library.kvmerge_n_tokens(self._engine, sequence))

    def stats(self) -> EngineStats:
        """Return the figures of the last merge."""
        native = self._ffi.new("struct kvmerge_stats *")
        self._check(self._library.kvmerge_get_stats(self._engine, native))
        return self._figures(native)

    @staticmethod
    def _figures(native: Any) -> EngineStats:
        names = EngineStats.__dataclass_fields__
        return EngineStats(**{name: getattr(native, name) for name in names})

    def merges(self, count: int) -> list[EngineStats]:
        """Return the figures of the last merges, the newest at the end; of 64 at most."""
        native = self._ffi.new("struct kvmerge_stats *")
        found = []
        for back in reversed(range(min(count, 64))):
            self._check(self._library.kvmerge_get_merge(self._engine, back, native))
            found.append(self._figures(native))
        return found

    def flow(self) -> Flow:
        """Return the cross-modal flow of the last merge."""
        n = self.stats().n_layers
        rho, text_to_media, media_to_text = (np.zeros(n, np.float32) for _ in range(3))
        self._check(
            self._library.kvmerge_get_flow(
                self._engine,
                self._array(rho, "float"),
                self._array(text_to_media, "float"),
                self._array(media_to_text, "float"),
                n,
            )
        )
        return Flow(rho, text_to_media, media_to_text)

    def keep_plans(self, keep: bool) -> None:
        """Say whether what merges do to each cell is kept for `plan`."""
        self._library.kvmerge_keep_plans(self._engine, keep)

    def plan(self, layer: int, head: int) -> Plan:
        """Return what the last merge did, for one merged layer and KV head."""
        null = self._ffi.NULL
        n = self._check(
            self._library.kvmerge_get_plan(
                self._engine, layer, head, null, null, null, null, null, null, 0
            )
        )
        plan = Plan(
            order=np.zeros(n, np.int32),
            modality=np.zeros(n, np.uint8),
            segment=np.zeros(n, np.int32),
            fate=np.zeros(n, np.uint8),
            target=np.zeros(n, np.int32),
            score=np.zeros(n, np.float32),
        )
        self._check(
            self._library.kvmerge_get_plan(
                self._engine,
                layer,
                head,
                self._array(plan.order, "int32_t"),
                self._array(plan.modality, "uint8_t"),
                self._array(plan.segment, "int32_t"),
                self._array(plan.fate, "uint8_t"),
                self._array(plan.target, "int32_t"),
                self._array(plan.score, "float"),
                n,
            )
        )
        return plan

    def layer(self, layer: int) -> LayerShape:
        """Return the shape of one merged layer."""
        out = [self._ffi.new("int32_t *") for _ in range(5)]
        self._check(self._library.kvmerge_get_layer(self._engine, layer, *out))
        return LayerShape(*(int(value[0]) for value in out))

    def read_cells(self, layer: int, sequence: int = 0) -> Cells:
        """Copy the cells of a sequence, for one merged layer."""
        n, shape = self.n_cells(sequence), self.layer(layer)
        heads = (n, shape.n_head_kv)
        cells = Cells(
            k=np.zeros((*heads, shape.head_size_k), np.float32),
            v=np.zeros((*heads, shape.head_size_v), np.float32),
            bias=np.zeros(heads, np.float32),
            mass=np.zeros(heads, np.float32),
            order=np.zeros(heads, np.int32),
        )
        self._check(
            self._library.kvmerge_read_cells(
                self._engine,
                sequence,
                layer,
                self._array(cells.k, "float"),
                self._array(cells.v, "float"),
                self._array(cells.bias, "float"),
                self._array(cells.mass, "float"),
                self._array(cells.order, "int32_t"),
                n,
            )
        )
        return cells

    def read_queries(self, layer: int, sequence: int = 0) -> Queries:
        """Copy the observed queries of a sequence, for one merged layer."""
        null, scale = self._ffi.NULL, self._ffi.new("float *")
        n = self._check(
            self._library.kvmerge_read_queries(
                self._engine, sequence, layer, null, null, null, null, scale, 0
            )
        )
        shape = self.layer(layer)
        q = np.zeros((n, shape.n_head, shape.head_size_k), np.float32)
        order = np.zeros(n, np.int32)
        modality, proxy = np.zeros(n, np.uint8), np.zeros(n, np.uint8)
        self._check(
            self._library.kvmerge_read_queries(
                self._engine,
                sequence,
                layer,
                self._array(q, "float"),
                self._array(order, "int32_t"),
                self._array(modality, "uint8_t"),
                self._array(proxy, "uint8_t"),
                scale,
                n,
            )
        )
        return Queries(q, order, modality, proxy.astype(bool), float(scale[0]))
