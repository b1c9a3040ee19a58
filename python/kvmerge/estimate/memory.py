"""What a model, its cache and its pictures take, with the full cache and with one that merges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from ..budget import Budget
from ..errors import UnsupportedError
from ..policies import Policy
from .dry_load import ContextOptions, ContextSizes, DryModel, EngineSizes, GraphSizes
from .gguf_outline import graph_bytes

_STEP = 256
"""A cache grows and shrinks by as many cells."""

_RECORD = 16
"""Bytes that the engine keeps for a merged cell, a layer and KV head."""

_GRAPHS = 3
"""Graphs that llama.cpp keeps: the largest one, and the last ones with and without logits."""

_SCHEDULER = 1024
"""Bytes that ggml's scheduler keeps for a node that a graph may have."""

_KERNELS = 2**20
"""Bytes of the code that computes, a model or an encoder; laying one out does not bring it in."""

_PAGE = 4096
"""Bytes of a page of memory, on most systems."""


@dataclass(frozen=True)
class Reading:
    """What is read: pictures of one size, and text.

    Attributes
    ----------
    images, image_tokens : int
        How many pictures, and the tokens of one.
    text_tokens : int
        Tokens of text beside them.
    """

    images: int
    image_tokens: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.images * self.image_tokens + self.text_tokens


@dataclass(frozen=True)
class Vision:
    """Bytes of the vision part; ``encoder`` is None where it is not known.

    ``graphs`` are what describes the encoder's graph, and the rest of its state.
    """

    weights: int = 0
    encoder: int | None = 0
    graphs: int = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes that are resident, by what they are for.

    ``process`` is all that is there before a model is loaded, ``repacked`` are weights that the CPU
    keeps a second time, in an order of its own, ``queries`` and ``records`` are what
    merging keeps of the prompt and of each merged cell, ``cells`` is the size of the cache that
    merges, and ``held`` are those in use, which ``kv_stats()`` calls ``cells``.
    """

    process: int
    weights: int
    repacked: int
    mmproj: int
    vocabulary: int
    kv: int
    queries: int
    records: int
    compute: int
    graphs: int
    encoder: int
    cells: int
    held: int

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name not in ("cells", "held"))


@dataclass(frozen=True)
class Fit:
    """What is resident with the full cache, and with one that merges.

    ``merged`` is after the merge and ``peak`` before it, when all has been read; both are None
    where the model cannot be merged, and ``refusal`` says why.
    """

    full: Footprint
    merged: Footprint | None
    peak: Footprint | None
    refusal: str = ""


class Estimate:
    """Arithmetic over what llama.cpp would allocate.

    Parameters
    ----------
    model : DryModel
        The model.
    options : ContextOptions
        Options of the context.
    vision : Vision
        What the mmproj takes.
    policy : Policy
        How the cache is merged.
    budget : Budget
        What is kept.
    max_cells : int, optional
        The most cells that the cache that merges may have; None is no limit but ``n_ctx``.
    process : int
        Bytes of the process before a model is loaded.
    """

    def __init__(
        self,
        model: DryModel,
        options: ContextOptions,
        vision: Vision,
        policy: Policy,
        budget: Budget,
        max_cells: int | None = None,
        process: int = 0,
    ) -> None:
        self._model = model
        self._options = options
        self._vision = vision
        self._policy = policy
        self._budget = budget
        self._max_cells = max_cells
        self._process = process

    def fit(self, reading: Reading) -> Fit:
        """Return what is resident when all that is read fits into the context."""
        full = self._full(self._options, reading.tokens)
        try:
            return Fit(full, self._merged(reading), self._peak(reading.tokens))
        except UnsupportedError as refusal:
            return Fit(full, None, None, str(refusal))

    def images_within(self, memory: int, one: Reading) -> dict[str, int]:
        """Return how many pictures fit into an amount of memory, up to the longest context.

        Parameters
        ----------
        memory : int
            Bytes, weights included.
        one : Reading
            One picture and the text.

        Returns
        -------
        dict
            ``full``: with the full cache and ``n_ctx`` just large enough; ``merged``: read in one
            prompt; ``merged_in_turns``: read one a turn, so that earlier ones are merged already.
        """

        def tokens(images: int) -> int:
            return replace(one, images=images).tokens

        def full(images: int) -> int:
            n_ctx = _round_up(tokens(images))
            return self._full(replace(self._options, n_ctx=n_ctx), tokens(images)).total

        def merged(images: int) -> int:
            larger = self._with_context(_round_up(tokens(images)))
            return larger._peak(tokens(images)).total

        def in_turns(images: int) -> int:
            larger = self._with_context(_round_up(tokens(images)))
            earlier = replace(one, images=images - 1)
            held = larger._kept(earlier) if images > 1 else one.text_tokens
            return larger._peak(held + one.image_tokens, is_merged=images > 1).total

        most = max(0, self.longest_context - one.text_tokens) // one.image_tokens
        found = {"full": _largest(most, lambda images: full(images) <= memory)}
        try:
            found["merged"] = _largest(most, lambda images: merged(images) <= memory)
            found["merged_in_turns"] = _largest(most, lambda images: in_turns(images) <= memory)
        except UnsupportedError:
            pass
        return found

    @property
    def longest_context(self) -> int:
        """``n_ctx``, or what the model was trained for if that is more."""
        return max(self._options.n_ctx, self._model.trained_context)

    # The parts.

    def _with_context(self, n_ctx: int) -> Estimate:
        return Estimate(
            self._model,
            replace(self._options, n_ctx=max(n_ctx, self._options.n_ubatch)),
            self._vision,
            self._policy,
            self._budget,
            self._max_cells,
            self._process,
        )

    def _scratch(self, cells: int) -> int:
        """Return what computing on the CPU needs beside the graph's own buffers.

        The second operand of a product of matrices is brought into the form of the first: that of
        the weights, or of V, where attention is not fused, with the weights of all cells for each
        head. And llama-cpp-python's batch has room for ``n_ctx`` sequences a token, of which it
        uses one.
        """
        options = self._options
        n_batch = min(options.n_batch, options.n_ctx)
        row = self._model.widest
        if not options.flash_attn:
            row = max(row, cells * self._model.heads)
        batch = n_batch * min(_PAGE, 4 * options.n_ctx)
        return 2 * min(options.n_ubatch, n_batch) * row + batch + _KERNELS

    def _footprint(
        self,
        sizes: ContextSizes,
        kv: int,
        graphs: GraphSizes,
        scratch: int,
        held: int,
        queries: int = 0,
        records: int = 0,
    ) -> Footprint:
        model, vision = self._model, self._vision
        described = _GRAPHS * graph_bytes(graphs.nodes) + _SCHEDULER * graphs.nodes
        return Footprint(
            process=self._process,
            weights=model.weights,
            repacked=model.repacked,
            mmproj=vision.weights,
            vocabulary=model.vocabulary,
            kv=kv,
            queries=queries,
            records=records,
            compute=graphs.compute + sizes.output,
            graphs=described + scratch + vision.graphs + (_KERNELS if vision.weights else 0),
            encoder=vision.encoder or 0,
            cells=sizes.cells,
            held=min(held, sizes.cells),
        )

    def _full(self, options: ContextOptions, tokens: int) -> Footprint:
        sizes = self._model.context(options)
        # All cells are allocated and cleared, but a graph goes through those in use.
        used = min(_round_up(max(tokens, 1)), sizes.cells)
        graphs = self._model.context(replace(options, n_ctx=max(used, options.n_ubatch))).graphs
        return self._footprint(sizes, sizes.kv, graphs, self._scratch(used), tokens)

    def _kept(self, reading: Reading) -> int:
        """Return the cells that are held of what was read, after the merge."""
        pictures = reading.images * reading.image_tokens
        return self._policy.kept_cells(self._budget, reading.text_tokens, pictures, reading.images)

    def _capped(self, cells: int) -> int:
        cells = _round_up(max(cells, self._options.n_ubatch))
        most = _round_up(self._options.n_ctx)
        if self._max_cells is not None:
            most = min(most, max(_STEP, self._max_cells // _STEP * _STEP))
        return min(cells, most)

    def _merged(self, reading: Reading) -> Footprint:
        kept, most = self._kept(reading), self._capped(reading.tokens)
        merged = kept if kept < reading.tokens else 0
        # One cell more: the next token needs one.
        footprint = replace(self._with_engine(kept + 1, most, merged), held=min(kept, most))
        if footprint.cells == most or self._model.offloads:
            return footprint
        # A cache of another size has buffers of its own to compute in. They are as large as while
        # reading, and in the host's memory as much of them is resident as a token writes to.
        cells = self._capped(kept + 1)
        one = self._model.engine(replace(self._options, n_ubatch=1), cells, self._policy)
        less = self._engine(cells).merged.compute - one.merged.compute
        return replace(footprint, compute=footprint.compute - less)

    def _peak(self, tokens: int, is_merged: bool = False) -> Footprint:
        # Where there may be fewer cells than tokens, the cache was merged on the way.
        cells = self._capped(tokens)
        is_merged = is_merged or cells < tokens
        peak = self._with_engine(tokens, cells, merged=min(cells, tokens) if is_merged else 0)
        if self._model.grows_in_place:
            return peak
        # Elsewhere the cache changes its size tensor by tensor: one is there twice.
        n_layers = len(self._engine(cells).layers)
        return replace(peak, kv=peak.kv + peak.kv // (2 * n_layers))

    def _engine(self, cells: int) -> EngineSizes:
        return self._model.engine(self._options, cells, self._policy)

    def _with_engine(self, held: int, most: int, merged: int) -> Footprint:
        """Return what is resident with some cells in use, of which some are merged.

        `most` is the size that the cache has had: its scratch stays.
        """
        cells = self._capped(held)
        engine = self._engine(cells)
        sizes = self._model.context(self._options, cells)
        return self._footprint(
            sizes,
            sizes.kv_of(held, together=self._options.flash_attn) + engine.bias,
            engine.merged if merged else engine.before,
            self._scratch(most),
            held,
            queries=engine.observed,
            records=merged * _RECORD * sum(layer.n_head_kv for layer in engine.layers),
        )


def _round_up(cells: int) -> int:
    return -(-cells // _STEP) * _STEP


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to `most` that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
