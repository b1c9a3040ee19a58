"""`Llama`: the class of llama-cpp-python with a cache that merges."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from . import options as option_table
from .budget import Budget
from .cap import Cap
from .chat.messages import check_messages, check_text
from .chat.prompt_tokens import PromptTokens
from .errors import (
    CacheClearedError,
    ClosedError,
    ContextLengthError,
    DecodeError,
    ForkedError,
    MediaError,
    ModelError,
    OptionError,
    OutOfMemoryError,
    StateError,
    StoppedError,
    UnknownOptionError,
    UnsupportedError,
    did_you_mean,
)
from .forks import check_threads
from .gguf_file import check_gguf
from .media.access import MediaAccess
from .media.image_merge import ImageMerge
from .native import backends, loading
from .native.log import caught, set_verbose
from .policies import Policy, resolve
from .progress import Meter, Report, report_of
from .prompt import Media, MediaSpan, Prompt
from .sampling import Processors, bias
from .stats import KVStats, LayerFlow, MergeRecord
from .turns import Stream, Turns, looks, takes_turn

llama_cpp = loading.load()

from llama_cpp.llama import Llama as StockLlama  # noqa: E402
from llama_cpp.llama import LlamaState  # noqa: E402

from .chat.request import Request  # noqa: E402
from .native.binding import Engine, EngineStats, small_beginning  # noqa: E402

if TYPE_CHECKING:
    from llama_cpp.llama_types import (
        CreateChatCompletionResponse,
        CreateChatCompletionStreamResponse,
        CreateCompletionResponse,
        CreateCompletionStreamResponse,
    )
    from typing_extensions import Unpack

    from .chat.call_options import ChatOptions, CompletionOptions
    from .chat.context import Context

log = logging.getLogger("kvmerge")

CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
}
"""Names that ``type_k`` and ``type_v`` accept, with their ``ggml_type``."""

_UNQUANTIZED = ("f32", "f16", "bf16")
_STOCK_OPTIONS = frozenset(inspect.signature(StockLlama.__init__).parameters) - {"self", "kwargs"}
_PROJECTOR_SPELLINGS = ("mmproj", "mmproj_path", "clip_model_path")
_OUR_OPTIONS = frozenset(
    {*_PROJECTOR_SPELLINGS, "kv_merge", "kv_budget", "merge_before"}
    | {"kv_max_cells", "keep_last_images", "kv_trace", "image_min_tokens", "image_max_tokens"}
    | {"media_access", "image_cache", "image_cache_dir", "image_merge", "progress"}
)
_N_UBATCH = inspect.signature(StockLlama.__init__).parameters["n_ubatch"].default
_FORGOTTEN_OPTIONS = frozenset(
    {"rpc_servers", "mul_mat_q", "n_parts", "f16_kv", "low_vram", "n_gqa", "rms_norm_eps"}
)
"""What released versions of llama-cpp-python and frameworks on it pass, and none takes any more."""
_MIB = 1024 * 1024
_NATIVE = ("_ctx", "_model", "_batch", "tokenizer_")
_abandoned: list[Any] = []
"""What a forked process must neither use nor free."""


class _Closed:
    """Stands in for a freed object of llama.cpp, whose use would crash the process."""

    def __getattr__(self, name: str) -> Any:
        raise ClosedError("this Llama is closed: make a new one")


@dataclass
class _Counted:
    """Tokens of a prompt and of its answer, which a stream of llama-cpp-python does not tell."""

    prompt: int = 0
    answer: int = 0


class _State(LlamaState):
    """A saved state that also knows positions and media."""

    positions: npt.NDArray[np.int32]
    spans: list[MediaSpan]
    merges: list[MergeRecord]
    merging: bool


def _cache_type(option: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and value.lower() in CACHE_TYPES:
        return CACHE_TYPES[value.lower()]
    if (
        isinstance(value, Integral)
        and not isinstance(value, bool)
        and int(value) in CACHE_TYPES.values()
    ):
        return int(value)
    names = ", ".join(repr(name) for name in CACHE_TYPES)
    raise OptionError(
        f"{option}={value!r} is not a cache type: it must be one of {names}, or the matching "
        f"llama_cpp.GGML_TYPE_* number.{did_you_mean(value, CACHE_TYPES)}"
    )


def _plain(value: Any) -> Any:
    """Return log probabilities with Python's numbers in the place of NumPy's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _with_bias(options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose biases are a logits processor, where there are others too.

    llama-cpp-python drops all of them where both are given.
    """
    if not options.get("logit_bias") or not options.get("logits_processor"):
        return options
    processors = [*options["logits_processor"], bias(options["logit_bias"])]
    return {**options, "logit_bias": None, "logits_processor": processors}


def _media_access(value: object) -> MediaAccess:
    if value is None:
        return MediaAccess.everything()
    if isinstance(value, MediaAccess):
        return value
    raise OptionError(f"media_access={value!r}: it must be a kvmerge.MediaAccess, or None for all")


class Llama(StockLlama):
    """A `llama_cpp.Llama` whose KV cache can merge instead of growing.

    Parameters
    ----------
    model_path : path
        The model (GGUF).
    mmproj : path, optional
        The vision or audio part that goes with it (GGUF); lets chats show pictures.
        ``mmproj_path`` and ``clip_model_path`` mean the same.
    kv_merge : str or Policy or None
        How the cache is merged: a name from `kvmerge.presets`, a policy such as
        ``kvmerge.FlowMM(theta=0.2)``, or None for not at all.
    kv_budget : float or int
        What is **kept**: a float in (0, 1] is a fraction of the tokens, an int is cells.  A
        fraction never goes below the tokens that the policy always keeps (its sinks and window).
        1.0 never merges.  With ``kv_merge="auto"`` it is what is kept of pictures and sound, as a
        fraction of their tokens or as cells for all of them; text is kept whole beside it, unless
        `kv_max_cells` leaves no room.
    merge_before : int
        How many of the prompt's last tokens are read after the merge instead of before it.  With 0
        the whole prompt is read before, and the first token of the answer still comes from the
        full cache.
    kv_max_cells : int or str, optional
        The most cells that the cache ever has, or what they may take in bytes, such as
        ``"512MiB"``.  When a batch would not fit, what was read so far is merged first, so that a
        prompt many times as long is read to its end and an answer goes on, up to `n_ctx` tokens.
    keep_last_images : int
        Pictures, the last ones, that merges leave as they are.  Their cells come on top of a
        fraction in `kv_budget`, which then is of the other tokens.
    kv_trace : bool
        Keep what the last merge did to every token, for `kvmerge.report`; takes 33 bytes a token,
        layer and KV head.  The flow between modalities is then measured for every policy.
    image_min_tokens, image_max_tokens : int, optional
        Bounds on the tokens of a picture, for models whose pictures vary in size.
    media_access : MediaAccess, optional
        Which files and URLs messages may name; all unless given. Programs that serve others pass
        ``MediaAccess()``, which is none.
    image_cache : int or str, optional
        What encoded pictures and sounds may take in memory, such as ``"256MiB"``: one that is shown
        again is neither decoded nor encoded.  The one used least recently goes first; None keeps
        none.
    image_cache_dir : path, optional
        Folder in which they are kept as well, for later and for other processes.
    image_merge : float or bool, optional
        Cosine from which tokens of a picture are alike, and are made one before the language model
        reads them; True for the default of `kvmerge.media.image_merge`.  No picture is left with
        fewer than `image_min_tokens`.  None reads all.
    progress : bool or callable, optional
        Something that is called with a `kvmerge.progress.ReadingProgress` while a prompt is read,
        and stops it with a `StoppedError` by returning False; True for a bar on standard error.
        Unless given there is a bar where `verbose` is true and standard error is a terminal.
    **options
        Everything that `llama_cpp.Llama` takes.  ``type_k`` and ``type_v`` also take names such as
        ``"q8_0"``.  A keyword that neither class has raises, instead of being ignored.

    Raises
    ------
    KVMergeError
        One of its subclasses in `kvmerge.errors`, each of which is also the matching builtin.

    Notes
    -----
    With ``kv_merge=None`` or ``kv_budget=1.0`` no engine is attached and the results are those of
    llama-cpp-python, bit for bit.  ``n_ctx`` counts tokens.

    Examples
    --------
    >>> llm = Llama("model.gguf", mmproj="mmproj.gguf", kv_merge="flowmm", kv_budget=0.2)
    >>> answer = llm.create_chat_completion(messages)
    >>> print(llm.kv_stats())
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        mmproj: str | os.PathLike[str] | None = None,
        kv_merge: str | Policy | None = None,
        kv_budget: float | int = 0.2,
        merge_before: int = 0,
        kv_max_cells: int | str | None = None,
        keep_last_images: int = 0,
        kv_trace: bool = False,
        image_min_tokens: int | None = None,
        image_max_tokens: int | None = None,
        media_access: MediaAccess | None = None,
        image_cache: int | str | None = "256MiB",
        image_cache_dir: str | os.PathLike[str] | None = None,
        image_merge: float | bool | None = None,
        progress: bool | Report | None = None,
        **options: Any,
    ) -> None:
        self._engine: Engine | None = None
        self._is_closed = self._is_closing = False
        self._process = os.getpid()
        self._turns = Turns()
        mmproj = self._take_projector(mmproj, options)
        self._check_options(options)
        check_threads(options.get("n_threads"), options.get("n_threads_batch"))
        self._policy = resolve(kv_merge)
        self._budget = Budget(kv_budget)
        if self._policy is not None:
            self._policy.check_budget(self._budget)
        self._merge_before = option_table.whole(0)("merge_before", merge_before)
        self._cap = None if kv_max_cells is None else Cap(kv_max_cells)
        self._whole = option_table.whole(0)("keep_last_images", keep_last_images)
        self._trace = option_table.switch("kv_trace", kv_trace)
        self._image_tokens = (image_min_tokens, image_max_tokens)
        self._access = _media_access(media_access)
        self._image_cache = (image_cache, image_cache_dir)
        self._image_merge = image_merge
        self._progress = progress
        self._report = report_of(progress, bool(options.get("verbose", True)))
        self._meter: Meter | None = None
        self._check_combination(mmproj, options)

        path = check_gguf(model_path, "model", ModelError)
        handler = self._make_handler(mmproj)
        if handler is not None:
            options["chat_handler"] = handler
            self._fit_batches(path, mmproj, options)

        self._positions: npt.NDArray[np.int32] = np.zeros(1, np.int32)
        self._known = 0
        self._spans: list[MediaSpan] = []
        self._merges: list[MergeRecord] = []
        self._n_merges = 0
        self._prefilled = False
        self._end: tuple[list[int], npt.NDArray[np.single]] | None = None
        self._cached_tokens = 0
        self._counted = _Counted()
        self._processors: Processors | None = None
        try:
            self._load(path, options)
            self._fit_arrays()
            # Index i is the position at which token i begins; the last known one is the next.
            self._positions = np.zeros(len(self.input_ids) + 1, np.int32)
            if self.draft_model is not None:
                from .draft import TextDraft

                self.draft_model = TextDraft(self.draft_model, self)
            if handler is not None:
                handler.load(self)
            backends.log_device(options.get("n_gpu_layers"))
            if self._policy is not None and self._is_merging:
                self._engine = Engine(int(self._ctx.ctx), self._policy.engine_params())
                self._engine.use(self._policy)
                self._limit_cells(self._engine)
                self._engine.keep_plans(kv_trace)
        except BaseException:
            self.close()
            raise

    @property
    def _is_merging(self) -> bool:
        """Whether there is anything to merge, ever."""
        return self._policy is not None and not (self._budget.keeps_all and self._cap is None)

    def _limit_cells(self, engine: Engine) -> None:
        cells = 0
        if self._cap is not None:
            cells = self._cap.cells(engine.bytes() / engine.size())
            # A batch has to fit next to what is kept of the tokens before it.
            self.n_batch = min(self.n_batch, cells // 4)
        share = self._budget.kept if isinstance(self._budget.kept, float) else 0.0
        engine.set_room(cells, share, self._whole)

    def _load(self, path: Path, options: dict[str, Any]) -> None:
        # With merging the cache begins with room for one batch, and grows with what is read.
        set_verbose(bool(options.get("verbose", True)))
        first = max(options.get("n_ubatch", _N_UBATCH), 256) if self._is_merging else 0
        with caught() as errors, small_beginning(first):
            try:
                super().__init__(os.fspath(path), **options)
            except (ValueError, RuntimeError) as error:
                reason = errors.reason or str(error)
                if "Failed to create llama_context" in str(error):
                    raise OptionError(f"no context could be made for {path}: {reason}") from error
                if "Failed to load model" not in str(error):
                    raise
                hint = ""
                if "clip" in reason.lower():
                    hint = ". It looks like an mmproj: pass it as mmproj= and the model first"
                raise ModelError(f"{path} cannot be loaded: {reason}{hint}") from error
            except MemoryError as error:
                raise OutOfMemoryError(
                    f"there is no memory for this context: {error}. Make n_ctx or n_batch smaller"
                ) from error

    def _fit_arrays(self) -> None:
        """Make the parent's arrays as long as the context that llama.cpp has made.

        It rounds ``n_ctx`` up, and the parent checks against the rounded number, but sizes its
        arrays by what was asked for.
        """
        if len(self.input_ids) < self._n_ctx:
            self.input_ids = np.zeros(self._n_ctx, np.intc)
            if self._logits_all:
                self.scores = np.zeros((self._n_ctx, self._n_vocab), np.single)

    # Options.

    @staticmethod
    def _take_projector(
        mmproj: str | os.PathLike[str] | None, options: dict[str, Any]
    ) -> str | os.PathLike[str] | None:
        given = {"mmproj": mmproj}
        given |= {name: options.pop(name) for name in _PROJECTOR_SPELLINGS if name in options}
        given = {name: value for name, value in given.items() if value is not None}
        if len(set(map(str, given.values()))) > 1:
            raise OptionError(f"{' and '.join(given)} name different files: pass mmproj= only")
        return next(iter(given.values()), None)

    @staticmethod
    def _check_options(options: dict[str, Any]) -> None:
        for name in _FORGOTTEN_OPTIONS & options.keys():
            log.warning("Llama no longer has the option %s: it changes nothing", name)
            del options[name]
        for name in options:
            if name not in _STOCK_OPTIONS:
                hint = did_you_mean(name, _STOCK_OPTIONS | _OUR_OPTIONS)
                raise UnknownOptionError(f"Llama has no option {name!r}.{hint}")
        for name in ("lora_base", "lora_path"):
            if isinstance(options.get(name), os.PathLike):
                options[name] = os.fspath(options[name])
        options |= option_table.checked(option_table.LLAMA, options)
        if options.get("lora_path") is not None:
            check_gguf(options["lora_path"], "LoRA", ModelError)
        for name in ("type_k", "type_v"):
            if name in options:
                options[name] = _cache_type(name, options[name])
        if options.get("n_ctx"):
            # The parent makes an array of as many rows, however few are ever used.
            n_batch = options.get("n_batch", _N_UBATCH)
            options["n_batch"] = min(n_batch, options["n_ctx"])
        unquantized = {CACHE_TYPES[name] for name in _UNQUANTIZED}
        type_v = options.get("type_v")
        if type_v is not None and type_v not in unquantized and not options.get("flash_attn"):
            raise OptionError("a quantized type_v needs flash_attn=True")

    def _check_combination(
        self, mmproj: str | os.PathLike[str] | None, options: dict[str, Any]
    ) -> None:
        handler = options.get("chat_handler")
        merging = self._is_merging
        if self._policy is None and (self._cap is not None or self._whole):
            option = "kv_max_cells" if self._cap is not None else "keep_last_images"
            raise OptionError(f"{option}= needs kv_merge=, which is None: say how to merge")
        if mmproj is not None and handler is not None:
            raise OptionError("mmproj= brings its own chat handler: pass it or chat_handler=")
        if mmproj is not None and options.get("chat_format") is not None:
            raise OptionError(
                f"chat_format={options['chat_format']!r} is not used beside mmproj=: chats are "
                "written as the model's own chat template says"
            )
        if mmproj is None and self._image_tokens != (None, None):
            raise OptionError("image_min_tokens= and image_max_tokens= need mmproj=")
        if mmproj is None and ImageMerge.of(self._image_merge) is not None:
            raise OptionError("image_merge= needs mmproj=")
        if mmproj is None and self._image_cache[1] is not None:
            raise OptionError("image_cache_dir= needs mmproj=")
        if merging and hasattr(handler, "clip_model_path"):
            raise UnsupportedError(
                f"{type(handler).__name__} clears the cache in every call and counts positions as "
                "tokens, so it does not go with kv_merge=: pass the file as mmproj= instead"
            )
        if self._cap is not None and options.get("draft_model") is not None:
            raise UnsupportedError(
                "draft_model= does not go with kv_max_cells=: a proposal that is wrong is taken "
                "back from the end of the cache, which a cap may have merged by then"
            )
        if merging and options.get("embedding"):
            raise UnsupportedError("embedding=True keeps no cache, so there is nothing to merge")

    def _make_handler(self, mmproj: str | os.PathLike[str] | None) -> Any:
        from .media.image_cache import ImageCache, bytes_of

        if mmproj is None:
            bytes_of(self._image_cache[0])
            return None
        from .chat.handler import ChatHandler

        return ChatHandler(
            mmproj,
            *self._image_tokens,
            ImageCache(*self._image_cache),
            ImageMerge.of(self._image_merge, self._image_tokens[0]),
        )

    def _fit_batches(self, path: Path, mmproj: Any, options: dict[str, Any]) -> None:
        """Make batches large enough for pictures that have to be read at once."""
        from .estimate.projector_size import ImageBounds
        from .media.picture_batch import picture_batch

        needed = picture_batch(path, mmproj, ImageBounds(*self._image_tokens))
        for name in ("n_batch", "n_ubatch"):
            given = options.get(name, _N_UBATCH)
            if isinstance(given, Integral) and needed > int(given):
                log.info("%s is %d: this model reads a picture at once", name, needed)
                options[name] = needed

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        repo_id: str | os.PathLike[str],
        filename: str,
        mmproj: str | None = None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Llama:
        """Load a model, and the mmproj that goes with it, from the Hugging Face hub or a folder.

        Parameters
        ----------
        repo_id : str or path
            A repository of the hub, or a local folder.
        filename, mmproj : str
            The model and its vision or audio part: names, or patterns that match one file each,
            such as ``"*Q4_K_M.gguf"`` and ``"*mmproj*F16*"``.
        additional_files : sequence of str, optional
            More files to fetch, such as the other parts of a model that is split.  One that is
            called mmproj is used as such where `mmproj` is not given.
        local_dir, cache_dir : path, optional
            Where huggingface_hub puts the files.
        **options
            Options of `Llama`.

        Raises
        ------
        ModelError
            If a file is not there, or the hub cannot be reached.
        """
        from .hub import only_match, repository

        options.pop("local_dir_use_symlinks", None)
        files = repository(repo_id, local_dir, cache_dir)
        names = files.names()
        model = files.get(only_match(repo_id, names, filename, "filename"))
        for pattern in additional_files or ():
            name = only_match(repo_id, names, pattern, "additional_files")
            files.get(name)
            if mmproj is None and "mmproj" in Path(name).name.lower():
                mmproj = name
        if mmproj is not None:
            options["mmproj"] = files.get(only_match(repo_id, names, mmproj, "mmproj"))
        return cls(model, **options)

    # Life.

    def close(self) -> None:
        """Free the model, the cache and the vision part; the object cannot be used after.

        A call that runs in another thread ends with a `ClosedError` at its next token or batch.
        """
        if getattr(self, "_is_closed", True):
            return
        if self._process != os.getpid():
            self._abandon()
            return
        self._is_closing = True
        with self._turns.call(ends_streams=True):
            if self._is_closed:
                return
            self._is_closed = True
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.detach()
            stack = getattr(self, "_stack", None)
            if stack is not None:
                stack.close()
            self._make_unusable()

    def _make_unusable(self) -> None:
        for name in _NATIVE:
            setattr(self, name, _Closed())

    def _abandon(self) -> None:
        """In a forked process: free nothing, because the threads that would answer are not here."""
        self._is_closed = True
        stack = getattr(self, "_stack", None)
        native = [getattr(self, name, None) for name in _NATIVE]
        _abandoned.append((self._engine, native, None if stack is None else stack.pop_all()))
        self._engine = None
        self._make_unusable()

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Llama:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed or self._is_closing:
            raise ClosedError("this Llama is closed: make a new one")
        if self._process != os.getpid():
            raise ForkedError(
                "this Llama was made before the process forked, and its threads are not in the "
                "new process: make a new Llama there, or start processes with "
                'multiprocessing.set_start_method("spawn")'
            )

    def __getstate__(self) -> dict[str, Any]:
        self._check_open()
        state = super().__getstate__()
        handler = state["chat_handler"]
        mmproj = None
        if hasattr(handler, "load"):
            mmproj, state["chat_handler"] = handler.clip_model_path, None
        state["draft_model"] = getattr(self.draft_model, "draft", self.draft_model)
        return state | {
            "mmproj": mmproj,
            "kv_merge": self._policy,
            "kv_budget": self._budget.kept,
            "merge_before": self._merge_before,
            "kv_max_cells": None if self._cap is None else self._cap.limit,
            "keep_last_images": self._whole,
            "kv_trace": self._trace,
            "image_min_tokens": self._image_tokens[0],
            "image_max_tokens": self._image_tokens[1],
            "media_access": self._access,
            "image_cache": self._image_cache[0],
            "image_cache_dir": self._image_cache[1],
            "image_merge": self._image_merge,
            "progress": self._progress,
        }

    # Tokens, positions and cells.
    #
    # An interrupt may come between any two lines here.  Python's books may then claim less than the
    # cache holds, which the next _trim() puts right, but never more: hence the order of the lines.

    def _position(self, n_tokens: int) -> int:
        """Return the position at which the token after the first `n_tokens` begins."""
        if n_tokens <= self._known:
            return int(self._positions[n_tokens])
        return int(self._positions[self._known]) + n_tokens - self._known

    @property
    def counts_positions_by_token(self) -> bool:
        """Whether every token in the cache took one position, which pictures need not."""
        return self._position(self.n_tokens) == self.n_tokens

    def _trim(self, n_tokens: int) -> bool:
        """Keep the first `n_tokens` tokens; False if that would cut into merged cells."""
        position, seen = self._position(n_tokens), self.n_tokens
        self.n_tokens = n_tokens
        if not self._ctx.kv_cache_seq_rm(0, position, -1):
            self.n_tokens = seen
            return False
        if n_tokens == 0:
            self._merges.clear()
        self._known = min(self._known, n_tokens)
        self._spans = [span for span in self._spans if span.end <= n_tokens]
        return True

    def _forget(self) -> None:
        """Claim nothing of what the cache holds."""
        self.n_tokens = self._known = 0
        self._spans.clear()
        self._merges.clear()
        self._requires_eval = True

    def _clear(self) -> None:
        self._forget()
        self._ctx.kv_cache_clear()

    def _append(self, ids: Sequence[int], positions: npt.NDArray[np.integer[Any]]) -> None:
        """Note tokens that are now in the cache; `positions` has one more entry, the next."""
        n, end = self.n_tokens, self.n_tokens + len(ids)
        self.input_ids[n:end] = ids
        self._positions[n : end + 1] = positions
        self._known = self.n_tokens = end

    @takes_turn
    def reset(self) -> None:
        """Forget what was read."""
        self._check_open()
        super().reset()
        if not self._trim(0):
            self._clear()

    @takes_turn
    def eval(self, tokens: Sequence[int]) -> None:
        """Read tokens into the cache, after those that are there.

        Parameters
        ----------
        tokens : sequence of int
            Text tokens.

        Raises
        ------
        ContextLengthError
            If they do not fit; nothing is read then.
        """
        self._check_open()
        n_tokens = self.n_tokens
        if n_tokens + len(tokens) > self._n_ctx:
            raise ContextLengthError(
                f"{n_tokens + len(tokens)} tokens do not fit into n_ctx={self._n_ctx}: "
                "make n_ctx larger or the prompt shorter"
            )
        if not self._trim(n_tokens):
            raise StateError(
                f"the cache cannot go back to token {n_tokens}, because it was merged since: "
                "call reset() and read everything again"
            )
        if n_tokens > self._known:
            # Something else, such as another chat handler, has filled the cache.
            known = self._known
            self._positions[known : n_tokens + 1] = self._position(known) + np.arange(
                n_tokens + 1 - known
            )
            self._known = n_tokens
        for start in range(0, len(tokens), self.n_batch):
            batch = tokens[start : start + self.n_batch]
            self._decode(batch)
            if self._meter is not None:
                self._meter.read(len(batch))

    def _decode(self, batch: Sequence[int]) -> None:
        self._check_open()
        n, position = self.n_tokens, self._position(self.n_tokens)
        self._batch.set_batch(batch=batch, n_past=position, logits_all=self._logits_all)
        self._requires_eval = True
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as error:
            self._check_not_cleared(error)
            if self._engine is not None:
                self._engine.raise_problem()
            raise DecodeError(
                f"llama.cpp could not read {len(batch)} tokens at position {position}: {error}"
            ) from error
        if self._cap is not None:
            # Only where cells are short does reading merge.
            self._note_merge()
        if self._logits_all:
            logits = np.ctypeslib.as_array(
                self._ctx.get_logits(), shape=(len(batch) * self._n_vocab,)
            )
            self.scores[n : n + len(batch), :].reshape(-1)[:] = logits
        self._append(batch, position + np.arange(len(batch) + 1))
        self._requires_eval = False

    def _check_not_cleared(self, error: Exception) -> None:
        """Raise if reading failed because a merge for want of room left nothing of the cache."""
        if self._engine is not None and self._known > 0 and self._engine.n_tokens() == 0:
            self._clear()
            raise CacheClearedError(
                "a merge that was to make room failed while the cache changed, which is empty now: "
                "read everything again"
            ) from error

    @takes_turn
    def read(self, prompt: Prompt, *, merge: bool = True, answer: bool = True) -> None:
        """Read a prompt, except for the beginning that is in the cache already, and merge.

        Parameters
        ----------
        prompt : Prompt
            The whole conversation so far.
        merge : bool
            Whether to merge when the cache holds more than its budget.
        answer : bool
            Whether tokens are to be sampled next, which needs the logits of the last token.

        Raises
        ------
        ContextLengthError
            If it does not fit into ``n_ctx``; nothing is lost then.
        """
        self._check_open()
        tokens = prompt.tokens
        self._check_length(prompt, len(tokens))
        if not tokens:
            raise StateError("the prompt is empty")
        if prompt.segments[-1].media is not None:
            raise MediaError("the prompt ends with a picture or sound: text has to follow it")

        keep = self._common_prefix(prompt, tokens)
        seen = self.n_tokens
        if keep == seen == len(tokens) and not self._requires_eval:
            self._cached_tokens = keep
            if merge:
                self._merge()
            return
        shared = keep
        if keep == len(tokens) and answer:
            if self._return_to_end(tokens):
                self._cached_tokens = keep
                return
            # The logits of the last token are needed again.
            keep -= 1
        if any(token < 0 for token in tokens[keep:]) and len(prompt.segments) == 1:
            raise MediaError(
                "the pictures of this prompt are no longer in the cache: something else was read "
                "in the meantime, call create_chat_completion() again"
            )
        if not self._trim(keep):
            log.info(
                "reading all %d tokens of the prompt again: %s, and what comes before was merged",
                len(tokens),
                self._difference(prompt, len(tokens), shared),
            )
            self._clear()
            keep = 0
        elif 0 < keep < seen:
            log.debug("keeping %d of %d tokens in the cache", keep, seen)
        self._cached_tokens = keep

        split = len(tokens) if self._engine is None else len(tokens) - self._merge_before
        last_media = max((span.end for span in prompt.spans()), default=0)
        split = max(split, keep, last_media)
        self._requires_eval = True
        rest = [segment.media for segment in prompt.rest(keep) if segment.media is not None]
        with self.reporting(len(tokens) - keep, rest):
            self._read_range(prompt, keep, split)
            if split < len(tokens):
                if merge:
                    self._merge()
                self._read_range(prompt, split, len(tokens))
                self._note_end(tokens)
            else:
                self._note_end(tokens)
                if merge:
                    self._merge()

    @contextmanager
    def reporting(self, n_tokens: int, media: Sequence[Media]) -> Iterator[Meter | None]:
        """Report how far the reading of so many tokens is, among them these pictures and sounds."""
        if self._report is None:
            yield None
            return
        before, meter = self._meter, Meter(self._report, n_tokens, media)
        self._meter = meter
        try:
            yield meter
        finally:
            self._meter = before
            meter.close()

    def _note_end(self, tokens: list[int]) -> None:
        """Keep the logits from which an answer begins, where a merge is going to change them."""
        logits = self._last_logits() if self._engine is not None else None
        self._end = None if logits is None else (tokens, logits.copy())

    def _return_to_end(self, tokens: list[int]) -> bool:
        """Go back to the end of the prompt that was read last; False if it was another.

        The same question then begins its answer as it did the first time.
        """
        if self._end is None or self._end[0] != tokens or not self._trim(len(tokens)):
            return False
        logits = self._last_logits()
        if logits is None:
            return False
        logits[:] = self._end[1]
        self._requires_eval = False
        return True

    def _last_logits(self) -> npt.NDArray[np.single] | None:
        """Return those that the next token is sampled from, where llama.cpp has them."""
        pointer = self._ctx.get_logits_ith(-1)
        return np.ctypeslib.as_array(pointer, shape=(self._n_vocab,)) if pointer else None

    def _check_length(self, prompt: Prompt, n_tokens: int) -> None:
        if n_tokens < self._n_ctx:
            return
        images = prompt.n_media_tokens("image")
        of_images = f" ({images} of them pictures)" if images else ""
        raise ContextLengthError(
            f"the prompt has {n_tokens} tokens{of_images}, and n_ctx={self._n_ctx} takes "
            f"{self._n_ctx - 1} with room for an answer: make n_ctx larger or the prompt shorter"
        )

    def _common_prefix(self, prompt: Prompt, tokens: list[int]) -> int:
        """Return how many tokens at the beginning are in the cache, in whole media."""
        n = min(self.n_tokens, len(tokens))
        differ = np.flatnonzero(self.input_ids[:n] != np.asarray(tokens[:n], np.int64))
        keep = int(differ[0]) if differ.size else n
        spans = {span.start: span for span in self._spans}
        for span in [*self._spans, *prompt.spans()]:
            if span.start < keep and (span.end > keep or spans.get(span.start) != span):
                keep = span.start
        return keep

    def _difference(self, prompt: Prompt, n_tokens: int, shared: int) -> str:
        """Return in words where a prompt leaves what is in the cache."""
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

    def _read_range(self, prompt: Prompt, start: int, end: int) -> None:
        """Read the tokens from `start` up to `end`; media are read as a whole."""
        at = 0
        for segment in prompt.segments:
            first, last = max(start - at, 0), min(end - at, len(segment.ids))
            at += len(segment.ids)
            if first >= last:
                continue
            if segment.media is None:
                self.eval(segment.ids[first:last])
                continue
            media = segment.media
            n, position = self.n_tokens, self._position(self.n_tokens)
            scope = nullcontext() if self._engine is None else self._engine.media(media.modality)
            try:
                with scope:
                    after = media.decode(position)
            except StoppedError:
                self._trim(n)  # What was read of a picture is no use without the rest.
                raise
            except DecodeError as error:
                self._check_not_cleared(error)
                raise
            positions = np.full(len(segment.ids) + 1, position, np.int32)
            positions[-1] = after
            self._note_merge()
            span = MediaSpan(n, n + len(segment.ids), media.digest, media.modality)
            self._spans.append(span)
            self._append(segment.ids, positions)

    def _merge(self) -> None:
        """Merge the cache when it holds more cells than the budget says."""
        if self._engine is None or self._policy is None:
            return
        # What stays as it is comes on top of a fraction; a number of cells is what was asked for.
        whole = 0 if isinstance(self._budget.kept, int) else self._whole_tokens()
        media = sum(span.end - span.start for span in self._spans)
        budget = whole + self._policy.kept_cells(
            self._budget, self.n_tokens - media, media - whole, len(self._spans)
        )
        before, bytes_before = self._held()
        if before <= budget:
            return
        try:
            self._engine.merge(budget)
        except CacheClearedError:
            self._clear()
            raise
        self._note_merge(before, bytes_before)

    def _whole_tokens(self) -> int:
        """Return the tokens of the pictures that are not merged."""
        spans = [span for span in self._spans if span.modality == "image"]
        return sum(span.end - span.start for span in spans[max(0, len(spans) - self._whole) :])

    def _note_merge(self, before: int | None = None, bytes_before: float | None = None) -> None:
        """Note every merge since the last one noted: we asked, or batches needed room."""
        if self._engine is None:
            return
        count = self._engine.stats().n_merges - self._n_merges
        self._n_merges += count
        try:
            merges = self._engine.merges(count)
        except StateError:
            return  # A state was restored past this class: those merges were of another past.
        for merge in merges:
            cells, held = merge.n_cells_before, merge.n_cells_before * merge.bytes_per_cell
            if before is not None and bytes_before is not None:
                cells, held = before, bytes_before
            self._note(merge, cells, held)

    def _note(self, merge: EngineStats, before: int, bytes_before: float) -> None:
        ms, after = merge.t_total_us / 1000, round(merge.bytes_after / merge.bytes_per_cell)
        text, text_after = merge.n_text_before, merge.n_text_after
        self._merges.append(MergeRecord(merge.n_tokens, before, after, ms, text, text_after))
        log.info(
            "merged %d cells into %d (%s; %d tokens, %d positions), %.2f MiB into %.2f MiB, "
            "%.1f ms",
            before,
            after,
            f"text: {text} into {text_after}" if text_after < text else "all text kept",
            merge.n_tokens,
            self._position(merge.n_tokens),
            bytes_before / _MIB,
            merge.bytes_after / _MIB,
            ms,
        )

    # Generation.

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        *args: Any,
        **options: Any,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Read a prompt and generate tokens; as `llama_cpp.Llama.generate`, and merging."""
        sampling = (top_k, top_p, min_p, typical_p, temp, repeat_penalty)
        return self._stream(self._generate(list(tokens), sampling, reset, *args, **options))

    @takes_turn
    def _stream(self, chunks: Iterator[Any]) -> Stream:
        return self._turns.stream(chunks)

    def _generate(
        self, tokens: list[int], sampling: tuple[Any, ...], reset: bool, *args: Any, **options: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        prefilled, self._prefilled = self._prefilled, False
        counted, ends = self._counted, self._ends
        counted.prompt = len(tokens)
        if not reset:
            self.eval(tokens)
            self._merge()
        elif not (prefilled and self._is_read(tokens)):
            self.read(Prompt.from_tokens(tokens))
        # The parent finds no tokens left to read, and samples.
        generated = super().generate([], *sampling, False, *args, **options)
        sent: Sequence[int] | None = None
        with closing(generated):
            while True:
                try:
                    token = generated.send(sent)
                except StopIteration:
                    return
                counted.answer += not ends(token)
                sent = yield token
                if sent and not self._logits_all:
                    # It samples after each of them, and llama.cpp ends the process without logits.
                    raise OptionError(
                        "tokens that are sent to generate() need the logits of every token: "
                        "make the Llama with logits_all=True"
                    )

    def _is_read(self, tokens: list[int]) -> bool:
        """Whether exactly these tokens are in the cache, ready to be sampled from."""
        n = self.n_tokens
        return (
            n == len(tokens) and not self._requires_eval and self.input_ids[:n].tolist() == tokens
        )

    def _ends(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def _init_sampler(self, *args: Any, logits_processor: Any = None, **options: Any) -> Any:
        processors = None if logits_processor is None else Processors(logits_processor)
        self._processors = processors
        return super()._init_sampler(*args, logits_processor=processors, **options)

    def sample(self, *args: Any, **options: Any) -> int:
        """Sample a token; see `llama_cpp.Llama.sample`.

        What a logits processor raises is raised here.
        """
        token = int(super().sample(*args, **options))
        if self._processors is not None:
            self._processors.check()
        return token

    def _create_completion(self, *args: Any, **options: Any) -> Iterator[Any]:
        self._check_open()
        self._counted = _Counted()
        if self.cache is not None and self._engine is not None:
            raise UnsupportedError(
                "set_cache() does not go with kv_merge=: it would cut saved states to what a new "
                "prompt shares, and merged cells cannot be cut. Call set_cache(None)"
            )
        try:
            for part in super()._create_completion(*args, **options):
                usage: Any = part.get("usage")
                if usage is not None:
                    usage["prompt_tokens_details"] = self._prompt_tokens_details()
                for choice in part["choices"]:
                    choice["logprobs"] = _plain(choice["logprobs"])
                yield part
        except ValueError as error:
            # It counts the tokens of a text before anything of ours sees them.
            if too_long := re.match(r"Requested tokens \((\d+)\) exceed", str(error)):
                self._check_length(Prompt(), int(too_long[1]))
            raise

    def _prompt_tokens_details(self) -> dict[str, int]:
        details = {"cached_tokens": self._cached_tokens, "cells": self._held()[0]}
        for modality in ("image", "audio"):
            details[f"{modality}_tokens"] = sum(
                span.end - span.start for span in self._spans if span.modality == modality
            )
        return details

    def _usage(self) -> dict[str, Any]:
        """Return what the last completion has read and written, as OpenAI calls it."""
        counted = self._counted
        return {
            "prompt_tokens": counted.prompt,
            "completion_tokens": counted.answer,
            "total_tokens": counted.prompt + counted.answer,
            "prompt_tokens_details": self._prompt_tokens_details(),
        }

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        **options: Unpack[CompletionOptions],
    ) -> CreateCompletionResponse: ...

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[True],
        **options: Unpack[CompletionOptions],
    ) -> Iterator[CreateCompletionStreamResponse]: ...

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool,
        **options: Unpack[CompletionOptions],
    ) -> CreateCompletionResponse | Iterator[CreateCompletionStreamResponse]: ...

    @takes_turn
    def create_completion(self, *args: Any, **options: Any) -> Any:
        """Complete a text; see `llama_cpp.Llama.create_completion`."""
        request = Request.completion(args, options)
        self._check_logits(request.options)
        for name, value in request.options.items():
            if name != "prompt" or isinstance(value, str):
                check_text(value, name)
        answer = super().create_completion(**_with_bias(request.options))
        return self._in_steps(request.shape(answer, self._usage))

    def _check_logits(self, options: dict[str, Any]) -> None:
        biases = options.get("logit_bias") or {}
        if biases and max(biases) >= self._n_vocab:
            raise OptionError(
                f"logit_bias names token {max(biases)}, and the model has {self._n_vocab}"
            )
        # False is None to a chat; 0 most likely log probabilities, of a completion, is not.
        wanted = options.get("logprobs")
        if wanted is not None and wanted is not False and not self._logits_all:
            raise OptionError("logprobs needs the logits of every token: pass logits_all=True")

    def _in_steps(self, answer: Any) -> Any:
        """Return an answer as it is, or one that streams as a stream that has the turn."""
        return self._turns.stream(answer) if isinstance(answer, Iterator) else answer

    @overload
    def create_chat_completion(
        self, messages: Any, *, stream: Literal[False] = False, **options: Unpack[ChatOptions]
    ) -> CreateChatCompletionResponse: ...

    @overload
    def create_chat_completion(
        self, messages: Any, *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> Iterator[CreateChatCompletionStreamResponse]: ...

    @overload
    def create_chat_completion(
        self, messages: Any, *, stream: bool, **options: Unpack[ChatOptions]
    ) -> CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]: ...

    @takes_turn
    def create_chat_completion(self, messages: Any, *args: Any, **options: Any) -> Any:
        """Answer a chat; see `llama_cpp.Llama.create_chat_completion`.

        A later call whose messages begin with those of the one before reads only what is new.
        """
        chat_format = None if self.chat_handler is not None else self.chat_format
        request = Request.chat([messages, *args], options, chat_format)
        options = request.options
        self._check_logits(options)
        messages = options.pop("messages")
        for name, value in options.items():
            check_text(value, name)
        answer = super().create_chat_completion(self._checked(messages), **options)
        return self._in_steps(request.shape(answer, self._usage))

    def _checked(self, messages: Any) -> list[Any]:
        """Return messages in the form that the chat handler takes."""
        from .chat.text import TextHandler

        if self.chat_handler is None:
            self._chat_handlers[self.chat_format] = TextHandler.of(self, self.chat_format)
        elif not hasattr(self.chat_handler, "load"):
            # Somebody else's, which may know other parts.
            check_text(messages := list(messages), "messages")
            return messages
        messages = check_messages(messages)
        self._check_media(messages)
        return messages

    def _check_media(self, messages: list[Any]) -> None:
        if self.chat_handler is not None:
            return
        from .media import find_media

        if found := find_media(messages):
            raise MediaError(
                f"the messages show {len(found)} pictures or sounds, and this model was loaded "
                "without a vision part: pass mmproj= to Llama"
            )

    @looks
    def detokenize(
        self,
        tokens: list[int],
        prev_tokens: list[int] | None = None,
        special: bool = False,
    ) -> bytes:
        """Turn tokens into text; what stands for pictures is left out."""
        self._check_open()
        if prev_tokens is not None:
            prev_tokens = [token for token in prev_tokens if token >= 0]
        tokens = [token for token in tokens if token >= 0]
        return super().detokenize(tokens, prev_tokens, special)

    # State.

    @looks
    def save_state(self) -> LlamaState:
        """Return a copy of the cache; see `llama_cpp.Llama.save_state`."""
        self._check_open()
        stock = super().save_state()
        state = _State.__new__(_State)
        state.__dict__.update(stock.__dict__)
        state.positions = self._positions[: self._known + 1].copy()
        state.spans = list(self._spans)
        state.merges = list(self._merges)
        state.merging = self._engine is not None
        return state

    @takes_turn
    def load_state(self, state: LlamaState) -> None:
        """Put a saved cache back; see `llama_cpp.Llama.load_state`.

        Raises
        ------
        StateError
            If the state does not fit: it is of another model, or it was saved with merging where
            this model has none, or the other way round, or with another policy.
            What the cache held is still there then.
        """
        self._check_open()
        merging = isinstance(state, _State) and state.merging
        if merging != (self._engine is not None):
            with_, here = ("with", "without") if merging else ("without", "with")
            raise StateError(f"the state was saved {with_} kv_merge=, this model is {here} it")
        n_ctx = len(self.input_ids)
        if state.n_tokens > n_ctx:
            raise StateError(f"the state holds {state.n_tokens} tokens, n_ctx here is {n_ctx}")
        before, needs_eval = super().save_state(), self._requires_eval
        try:
            with caught() as errors:
                super().load_state(state)
        except (RuntimeError, ValueError) as error:
            super().load_state(before)
            self._requires_eval = needs_eval
            raise StateError(
                "the state does not fit this model, its cache type or its kv_merge= policy: "
                f"{errors.reason or error}. The cache is as it was"
            ) from error
        ids = np.zeros(n_ctx, np.intc)
        ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        self.input_ids = ids
        self._n_merges = 0 if self._engine is None else self._engine.stats().n_merges
        if isinstance(state, _State):
            self._known = len(state.positions) - 1
            self._positions[: self._known + 1] = state.positions
            self._spans = list(state.spans)
            self._merges = list(state.merges)
        else:
            self._known, self._spans, self._merges = 0, [], []

    @looks
    def report(self, path: str | os.PathLike[str], messages: Any) -> Path:
        """Write a report of a chat as one HTML file: figures, answers, what became of each patch.

        Parameters
        ----------
        path : path
            The file.
        messages : list
            The chat that was read last, with its answers if they are to be in the report.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        OptionError
            If the file cannot be written.
        StateError
            If the cache was merged, and the model does not keep what merges do
            (``kv_trace=True``).
        """
        from .report import report_chat

        return report_chat(self, messages, path)

    @looks
    def save_context(self, path: str | os.PathLike[str]) -> None:
        """Write what the cache holds to a file, from which `load_context` goes on.

        The file is written beside its place and moved there when it is complete: a file of that
        name is replaced as a whole or not at all.

        Parameters
        ----------
        path : path
            The file; its folder has to exist.

        Raises
        ------
        StateError
            If the cache is empty or the file cannot be written.
        """
        from . import saving

        self._check_open()
        saving.save(self, path)

    @takes_turn
    def load_context(self, path: str | os.PathLike[str]) -> None:
        """Go on from what `save_context` has written, also in another process.

        A chat whose messages begin with those that were saved then reads only what is new.

        Parameters
        ----------
        path : path
            The file.

        Raises
        ------
        StateError
            If the file is missing, damaged, of another format version, or of another model, cache
            type or policy; the message says which.  What the cache held is still there then.
        """
        from . import saving

        self._check_open()
        saving.load(self, path)

    def context(self, messages: Any, **options: Any) -> Context:
        """Return a context that reads messages once and answers many questions about them.

        Parameters
        ----------
        messages : list
            What all questions are about, in OpenAI's format, without a question.
        **options
            Options of `create_chat_completion` for all questions.

        Examples
        --------
        >>> with llm.context(messages) as ctx:
        ...     first = ctx.ask("How many people are there?")
        ...     second = ctx.ask("What is on the sign?")
        """
        from .chat.context import Context

        self._check_open()
        return Context(self, messages, options)

    @looks
    def count_tokens(self, messages: Any, **options: Any) -> PromptTokens:
        """Return how many tokens a chat takes; nothing is read and no picture is encoded.

        Of a picture that was not seen before the file is only looked into for its size; a sound is
        decoded.

        Parameters
        ----------
        messages : list
            The messages, as `create_chat_completion` takes them.
        **options
            Options of `create_chat_completion` that the chat template sees, such as ``tools``.

        Raises
        ------
        MediaError
            If one of the pictures cannot be had.
        """
        from .chat.context import chat_tokens

        self._check_open()
        options = option_table.of_call(
            StockLlama.create_chat_completion, option_table.CHAT, [messages], options
        )
        prompt = chat_tokens(self, self._checked(options.pop("messages")), options)
        return PromptTokens.of(prompt, self._common_prefix(prompt, prompt.tokens))

    # What the cache holds.

    @property
    def engine(self) -> Engine | None:
        """The merging engine, for a look inside; None when merging is off."""
        self._check_open()
        return self._engine

    @property
    def policy(self) -> Policy | None:
        """How the cache is merged; None when merging is off."""
        return self._policy

    @property
    def media_access(self) -> MediaAccess:
        """Which files and URLs messages may name."""
        return self._access

    @property
    def kv_trace(self) -> bool:
        """Whether what the last merge did to every token is kept."""
        return self._trace

    @property
    def media_spans(self) -> tuple[MediaSpan, ...]:
        """Where the pictures and sounds lie among the tokens that were read."""
        return tuple(self._spans)

    def _held(self) -> tuple[int, int]:
        """Return the cells that are held, as the mean over the layers, and their bytes."""
        if self._engine is None:
            return self.n_tokens, self.n_tokens * self._bytes_per_cell()
        cells, last = self._engine.n_cells(), self._engine.stats()
        if not self._merges:
            return cells, cells * last.bytes_per_cell
        # Layers may hold different numbers of cells; each new token takes one in all of them.
        held = last.bytes_after + (cells - last.n_cells_after) * last.bytes_per_cell
        return round(held / last.bytes_per_cell), held

    @looks
    def kv_stats(self) -> KVStats:
        """Return what the cache holds: tokens seen, positions, cells, MiB, merges and flow."""
        self._check_open()
        engine, policy = self._engine, self._policy
        self._note_merge()  # there may have been one while something else decoded, under a cap
        elsewhere = self._read_elsewhere()
        tokens, positions = self.n_tokens + elsewhere, self._position(self.n_tokens + elsewhere)
        cells, held = self._held()
        images = getattr(self.chat_handler, "image_cache", None)
        merged = getattr(self.chat_handler, "merge_counts", None)
        if engine is None or policy is None:
            per_cell = self._bytes_per_cell()
            return KVStats(
                tokens=tokens,
                positions=positions,
                cells=tokens,
                bytes_per_cell=per_cell,
                mib=tokens * per_cell / _MIB,
                mib_full=tokens * per_cell / _MIB,
                policy="none" if policy is None else str(policy),
                budget=None if policy is None else self._budget.kept,
                budget_of="tokens" if policy is None else policy.budget_of,
                image_cache=None if images is None else images.stats(),
                image_merge=None if merged is None else replace(merged),
                elsewhere=elsewhere,
            )
        per_cell = engine.stats().bytes_per_cell
        flow: list[LayerFlow] = []
        if self._merges:
            flows = engine.flow()
            for i, values in enumerate(
                zip(flows.rho, flows.text_to_media, flows.media_to_text, strict=True)
            ):
                rho, text_to_media, media_to_text = (float(value) for value in values)
                if rho < 0:
                    continue
                across = policy.match == "any" or (policy.match == "flow" and rho >= policy.theta)
                index = engine.layer(i).index
                flow.append(LayerFlow(index, rho, text_to_media, media_to_text, across))
        return KVStats(
            tokens=tokens,
            positions=positions,
            cells=cells,
            bytes_per_cell=per_cell,
            mib=held / _MIB,
            mib_full=tokens * per_cell / _MIB,
            policy=str(policy),
            budget=self._budget.kept,
            budget_of=policy.budget_of,
            merges=tuple(self._merges),
            last_merge_ms=self._merges[-1].ms if self._merges else 0.0,
            flow=tuple(flow),
            layer_cells=tuple(engine.layer_cells(i) for i in range(engine.stats().n_layers)),
            image_cache=None if images is None else images.stats(),
            image_merge=None if merged is None else replace(merged),
            elsewhere=elsewhere,
        )

    def _read_elsewhere(self) -> int:
        """Return the tokens that are in the cache and that no call of this class has read.

        Below 0 where something else has removed some.
        """
        if self._engine is not None:
            return self._engine.n_tokens() - self.n_tokens
        memory = llama_cpp.llama_get_memory(self.ctx)
        if memory is None:
            return 0
        return (
            int(llama_cpp.llama_memory_seq_pos_max(memory, 0)) + 1 - self._position(self.n_tokens)
        )

    def _bytes_per_cell(self) -> int:
        """Return the bytes of K and V of a cell from the model's shape; 0 where it varies."""
        arch = self.metadata.get("general.architecture", "")
        try:
            heads = int(self.metadata[f"{arch}.attention.head_count"])
            heads_kv = int(self.metadata.get(f"{arch}.attention.head_count_kv", heads))
            layers = int(self.metadata[f"{arch}.block_count"])
            size = int(self.metadata[f"{arch}.embedding_length"]) // heads
            size_k = int(self.metadata.get(f"{arch}.attention.key_length", size))
            size_v = int(self.metadata.get(f"{arch}.attention.value_length", size))
        except (KeyError, ValueError, ZeroDivisionError):
            return 0
        params = self.context_params
        return layers * (
            _row_size(params.type_k, heads_kv * size_k)
            + _row_size(params.type_v, heads_kv * size_v)
        )


def _row_size(ggml_type: int, n: int) -> int:
    """Return the bytes of a row of `n` numbers of one of `CACHE_TYPES`."""
    # ggml_type: (numbers a block, bytes a block)
    blocks = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24)}
    blocks |= {8: (32, 34), 20: (32, 18)}
    numbers, size = blocks[ggml_type]
    return n // numbers * size
