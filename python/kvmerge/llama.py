"""`Llama`: the class of llama-cpp-python with a cache that merges."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .native import backends, loading

loading.load()

from llama_cpp.llama import Llama as StockLlama
from llama_cpp.llama import LlamaState

from . import options as option_table
from .answering import AnsweringLlama
from .byte_size import MIB
from .cache import KVCache, SavedState
from .cache_types import bytes_per_cell
from .chat.prompt_tokens import PromptTokens
from .errors import ClosedError, ModelError, OptionError, OutOfMemoryError, StateError
from .forks import check_threads
from .gguf_file import check_gguf
from .media.access import MediaAccess
from .media.image_merge import ImageMerge
from .native.binding import Engine, small_beginning
from .native.log import caught, set_verbose
from .policies import Policy
from .progress import Listener, listener_of
from .prompt import MediaSpan
from .reading import PromptReader
from .settings import N_UBATCH, Settings, check_stock, take_projector
from .stats import KVStats, layer_flow
from .turns import Turns, looks, takes_turn

if TYPE_CHECKING:
    from .chat.context import Context

log = logging.getLogger("kvmerge")

_NATIVE = ("_ctx", "_model", "_batch", "tokenizer_")
_abandoned: list[Any] = []
"""What a forked process must neither use nor free."""


class _Closed:
    """Stands in for a freed object of llama.cpp, whose use would crash the process."""

    def __getattr__(self, name: str) -> Any:
        raise ClosedError("this Llama is closed: make a new one")


class Llama(AnsweringLlama):
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
    kv_budget : float, int or "auto"
        What is **kept**: a float in (0, 1] is a fraction of the tokens, an int is cells.  A
        fraction never goes below the tokens that the policy always keeps (its sinks and window).
        1.0 never merges.  ``"auto"`` keeps the smallest share, of a few, whose measured error is
        within `kvmerge.budget.TOLERANCE`.  With ``kv_merge="auto"`` it is what is kept of pictures
        and sound, as a fraction of their tokens or as cells for all of them; text is kept whole
        beside it, unless `kv_max_cells` leaves no room.
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
        kv_budget: float | int | str = 0.2,
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
        progress: bool | Listener | None = None,
        **options: Any,
    ) -> None:
        self.turns = Turns()
        self.kv_cache = KVCache()
        mmproj = take_projector(mmproj, options)
        check_stock(options)
        check_threads(options.get("n_threads"), options.get("n_threads_batch"))
        self.settings = Settings.of(
            mmproj=mmproj,
            kv_merge=kv_merge,
            kv_budget=kv_budget,
            merge_before=merge_before,
            kv_max_cells=kv_max_cells,
            keep_last_images=keep_last_images,
            kv_trace=kv_trace,
            image_min_tokens=image_min_tokens,
            image_max_tokens=image_max_tokens,
            media_access=media_access,
            image_cache=image_cache,
            image_cache_dir=image_cache_dir,
            image_merge=image_merge,
            progress=progress,
        )
        listener = listener_of(progress, bool(options.get("verbose", True)))
        self.settings.check_beside(options)
        self.reader = PromptReader(self.kv_cache, self.settings, self.turns, listener)

        path = check_gguf(model_path, "model", ModelError)
        handler = self._make_handler()
        if handler is not None:
            options["chat_handler"] = handler
            self._fit_batches(path, handler.clip_model_path, options)

        try:
            self._load(path, options)
            self._open_cache()
            if self.draft_model is not None:
                from .draft import TextDraft

                self.draft_model = TextDraft(self.draft_model, self.kv_cache, self._n_vocab)
            if handler is not None:
                handler.load(self)
            backends.log_device(options.get("n_gpu_layers"))
            if self.settings.is_merging:
                self._attach_engine()
        except BaseException:
            self.close()
            raise

    def _open_cache(self) -> None:
        self._fit_arrays()
        params = self.context_params
        per_cell = bytes_per_cell(self.metadata, params.type_k, params.type_v)
        self.kv_cache.open(self._ctx, per_cell)
        scores = self.scores if self._logits_all else None
        self.reader.open(self._ctx, self._batch, self._n_vocab, scores)

    def _attach_engine(self) -> None:
        settings, cells = self.settings, 0
        policy = settings.kv_merge
        assert policy is not None
        engine = Engine(int(self._ctx.ctx), policy.engine_params())
        self.kv_cache.attach(engine)
        engine.use(policy)
        if settings.kv_max_cells is not None:
            cells = settings.kv_max_cells.cells(engine.bytes() / engine.size())
            # A batch has to fit next to what is kept of the tokens before it.
            self.n_batch = min(self.n_batch, cells // 4)
        engine.set_room(cells, settings.share, settings.keep_last_images)
        engine.keep_plans(settings.kv_trace)

    def _load(self, path: Path, options: dict[str, Any]) -> None:
        # With merging the cache begins with room for one batch, and grows with what is read.
        set_verbose(bool(options.get("verbose", True)))
        first = max(options.get("n_ubatch", N_UBATCH), 256) if self.settings.is_merging else 0
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

    def _make_handler(self) -> Any:
        from .media.image_cache import ImageCache, bytes_of

        settings = self.settings
        if settings.mmproj is None:
            bytes_of(settings.image_cache)
            return None
        from .chat.handler import ChatHandler

        return ChatHandler(
            settings.mmproj,
            settings.image_min_tokens,
            settings.image_max_tokens,
            ImageCache(settings.image_cache, settings.image_cache_dir),
            ImageMerge.of(settings.image_merge, settings.image_min_tokens),
        )

    def _fit_batches(self, path: Path, mmproj: str, options: dict[str, Any]) -> None:
        """Make batches large enough for pictures that have to be read at once."""
        from .estimate.projector_size import ImageBounds
        from .media.picture_batch import picture_batch

        settings = self.settings
        bounds = ImageBounds(settings.image_min_tokens, settings.image_max_tokens)
        needed = picture_batch(path, mmproj, bounds)
        for name in ("n_batch", "n_ubatch"):
            asked = options.get(name, N_UBATCH)
            if isinstance(asked, Integral) and needed > int(asked):
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
        from .hub import fetch

        options.pop("local_dir_use_symlinks", None)
        patterns = (filename, mmproj, additional_files or ())
        model, projector = fetch(repo_id, *patterns, local_dir, cache_dir)
        if projector is not None:
            options["mmproj"] = projector
        return cls(model, **options)

    # Life.

    def close(self) -> None:
        """Free the model, the cache and the vision part; the object cannot be used after.

        A call that runs in another thread ends with a `ClosedError` at its next token or batch.
        """
        turns: Turns | None = getattr(self, "turns", None)
        if turns is None or turns.is_closed:
            return
        if not turns.is_of_this_process:
            self._abandon()
            return
        turns.is_closing = True
        with turns.call(ends_streams=True):
            if turns.is_closed:
                return
            turns.is_closed = True
            engine = self.kv_cache.close()
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
        self.turns.is_closed = True
        stack = getattr(self, "_stack", None)
        native = [getattr(self, name, None) for name in _NATIVE]
        engine = self.kv_cache.close()
        _abandoned.append((engine, native, None if stack is None else stack.pop_all()))
        self._make_unusable()

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Llama:
        self.turns.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def at_close(self, function: Callable[[], None]) -> None:
        """Call a function when the model is freed, before it is."""
        self._stack.callback(function)

    def __getstate__(self) -> dict[str, Any]:
        self.turns.check_open()
        state = super().__getstate__()
        handler = state["chat_handler"]
        mmproj = None
        if hasattr(handler, "load"):
            mmproj, state["chat_handler"] = handler.clip_model_path, None
        state["draft_model"] = getattr(self.draft_model, "draft", self.draft_model)
        return state | self.settings.given() | {"mmproj": mmproj}

    # State.

    @looks
    def save_state(self) -> LlamaState:
        """Return a copy of the cache; see `llama_cpp.Llama.save_state`."""
        snapshot = self.kv_cache.snapshot(whole=True)
        is_merging = self.kv_cache.engine is not None
        return SavedState(snapshot, self.input_ids, self._scores, self._seed, is_merging)

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
        if not isinstance(state, LlamaState):
            raise StateError(f"{type(state).__name__} is not what save_state() returns")
        saved = isinstance(state, SavedState) and state.is_merging
        if saved != (self.kv_cache.engine is not None):
            with_, here = ("with", "without") if saved else ("without", "with")
            raise StateError(f"the state was saved {with_} kv_merge=, this model is {here} it")
        n, n_ctx = state.n_tokens, len(self.input_ids)
        if n > n_ctx:
            raise StateError(f"the state holds {n} tokens, n_ctx here is {n_ctx}")
        try:
            if self.scores[:n].shape != state.scores.shape:
                raise StateError("it has logits of another shape")
            self.kv_cache.replace(SavedState.snapshot_of(state))
        except StateError as error:
            raise StateError(
                "the state does not fit this model, its cache type or its kv_merge= policy: "
                f"{error}. The cache is as it was"
            ) from error
        self.scores[:n] = state.scores
        rest = self.scores[n:]
        rest[rest > 0] = 0
        self._seed = state.seed

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
        from .saving import save

        kept = None if self.engine is None else self.settings.kv_budget.kept
        about = {"origin": self._origin(), "n_ctx": self.n_ctx(), "budget": kept}
        save(self.kv_cache, path, about)

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
        from .saving import load

        load(self.kv_cache, path, self._origin(), self._n_vocab)

    def _origin(self) -> dict[str, Any]:
        from .saving import origin_of

        return origin_of(self, None if self.engine is None else self.policy)

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

        self.turns.check_open()
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

        options = option_table.of_call(
            StockLlama.create_chat_completion, option_table.CHAT, [messages], options
        )
        prompt = chat_tokens(self, self.checked(options.pop("messages")), options)
        return PromptTokens.of(prompt, self.kv_cache.common_prefix(prompt, prompt.tokens))

    # What the cache holds.

    @property
    def engine(self) -> Engine | None:
        """The merging engine, for a look inside; None when merging is off."""
        self.turns.check_open()
        return self.kv_cache.engine

    @property
    def policy(self) -> Policy | None:
        """How the cache is merged; None when merging is off."""
        return self.settings.kv_merge

    @property
    def media_access(self) -> MediaAccess:
        """Which files and URLs messages may name."""
        return self.settings.media_access

    @property
    def kv_trace(self) -> bool:
        """Whether what the last merge did to every token is kept."""
        return self.settings.kv_trace

    @property
    def media_spans(self) -> tuple[MediaSpan, ...]:
        """Where the pictures and sounds lie among the tokens that were read."""
        return self.kv_cache.spans

    @looks
    def kv_stats(self) -> KVStats:
        """Return what the cache holds: tokens seen, positions, cells, MiB, merges and flow."""
        cache, policy = self.kv_cache, self.policy
        engine, per_cell = cache.engine, cache.bytes_per_cell
        cache.note_merges()  # there may have been some while something else decoded, under a cap
        elsewhere = cache.read_elsewhere()
        tokens = cache.n_tokens + elsewhere
        cells, held = (tokens, tokens * per_cell) if engine is None else cache.held()
        merges = cache.merges
        images = getattr(self.chat_handler, "image_cache", None)
        merged = getattr(self.chat_handler, "merge_counts", None)
        return KVStats(
            tokens=tokens,
            positions=cache.position(tokens),
            cells=cells,
            bytes_per_cell=per_cell,
            mib=held / MIB,
            mib_full=tokens * per_cell / MIB,
            policy="none" if policy is None else str(policy),
            budget=None if policy is None else self.settings.kv_budget.kept,
            budget_of="tokens" if policy is None else policy.budget_of,
            merges=merges,
            last_merge_ms=merges[-1].ms if merges else 0.0,
            flow=layer_flow(engine, policy) if engine and policy and merges else (),
            layer_cells=_layer_cells(engine),
            image_cache=None if images is None else images.stats(),
            image_merge=None if merged is None else replace(merged),
            elsewhere=elsewhere,
        )


def _layer_cells(engine: Engine | None) -> tuple[int, ...]:
    if engine is None:
        return ()
    return tuple(engine.layer_cells(i) for i in range(engine.stats().n_layers))
