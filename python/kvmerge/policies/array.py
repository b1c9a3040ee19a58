"""Methods that are written in Python: a function from what the cache holds to what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .base import Policy

if TYPE_CHECKING:
    from ..native.binding import Engine, Planner, Question

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """What one layer of the cache holds for one sequence, copied.

    Attributes
    ----------
    index : int
        The layer, among those that are merged.
    k, v : arrays [n, heads, head size]
        Keys, after RoPE, and values.
    bias, mass : arrays [heads, n]
        What is added to the attention logit of a cell, and the tokens that it stands for.
    order, segment : arrays [heads, n]
        Index of a cell's token, and the picture or run of text that it belongs to.
    modality : array [heads, n]
        0 is text, 1 a picture, 2 sound.
    held : array [heads, n]
        Cells that have to be kept: the last ones, the first ones and pictures that stay whole.
    empty : array [heads, n]
        Cells in which the layer holds nothing.
    q : array [rows, query heads, head size]
        Queries of the last tokens, the last one at the end.
    q_order : array [rows]
        Index of their tokens.
    scale : float
        Factor of the attention logits.
    below : Layer or None
        The layer before this one.
    """

    index: int
    k: Array
    v: Array
    bias: Array
    mass: Array
    order: npt.NDArray[np.int32]
    segment: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    held: npt.NDArray[np.bool_]
    empty: npt.NDArray[np.bool_]
    q: Array
    q_order: npt.NDArray[np.int32]
    scale: float
    below: Layer | None

    def attention(self) -> Array:
        """Return what each query gives to each cell, [rows, heads, query heads a group, n]."""
        heads, n = self.mass.shape
        group = self.q.shape[1] // heads
        q = self.q.reshape(len(self.q), heads, group, -1)
        logits = np.einsum("rhgd,nhd->rhgn", q, self.k) * self.scale + self.bias[None, :, None]
        seen = self.order[None] <= self.q_order[:, None, None]
        logits = np.where((seen & ~self.empty)[:, :, None], logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True), np.float32)


@dataclass(frozen=True, kw_only=True)
class ArrayPolicy(Policy):
    """A method in Python: give `scores`, or `targets` where more than a choice is wanted.

    A subclass with a `name` can be chosen by it, ``Llama(kv_merge="that name")``, as soon as the
    module that defines it was imported.  Arrays are copied from the cache and back, so it is
    slower than the methods of the engine: it is for trying an idea.

    Every layer gets the same number of cells, unless `shares` says otherwise.
    """

    select: str = field(default="top", init=False)
    allocate: str = field(default="uniform", init=False)
    match: str = field(default="none", init=False)
    tau: float = field(default=1.0, init=False)
    bias: str = "none"

    def scores(self, layer: Layer) -> npt.NDArray[Any]:
        """Return how important each cell is, [heads, n]: the highest are kept."""
        raise NotImplementedError(f"{type(self).__name__} has neither scores() nor targets()")

    def shares(self, layers: Sequence[Layer]) -> npt.NDArray[Any]:
        """Return what each layer gets of the cells in proportion to the others, [layers]."""
        return np.ones(len(layers))

    def targets(self, layer: Layer, cells: int) -> npt.NDArray[np.integer[Any]]:
        """Return where each cell goes, [heads, n].

        A cell's own index where it is kept, that of a kept cell where it is folded into it, and -1
        where it is dropped.  At most `cells` of each head are kept; those that are `held` have to
        be.
        """
        score = np.where(layer.held, np.inf, np.where(layer.empty, -np.inf, self.scores(layer)))
        # Of equals the last one first: where there is not even room for all that are held.
        n = score.shape[1]
        best = n - 1 - np.argsort(-score[:, ::-1], axis=1, kind="stable")[:, :cells]
        targets = np.full(score.shape, -1)
        np.put_along_axis(targets, best, best, axis=1)
        return np.where(layer.empty, -1, targets)

    def planner(self, engine: Engine) -> Planner:
        """Return `plan` for an engine."""
        return partial(self.plan, engine)

    def plan(self, engine: Engine, question: Question) -> Sequence[npt.NDArray[np.integer[Any]]]:
        """Return the targets of every layer; what the engine asks for in a merge."""
        layers: list[Layer] = []
        first = 0
        for index in range(engine.stats().n_layers):
            last = first + engine.layer(index).n_head_kv
            below = layers[-1] if layers else None
            layers.append(self._layer(engine, question, index, slice(first, last), below))
            first = last
        cells = share_out(
            self.shares(layers),
            question.cells * len(layers),
            least=np.array([layer.held.sum(axis=1).max() for layer in layers]),
            most=question.most,
        )
        return [self.targets(layer, int(n)) for layer, n in zip(layers, cells, strict=True)]

    def _layer(
        self, engine: Engine, question: Question, index: int, heads: slice, below: Layer | None
    ) -> Layer:
        cells = engine.read_cells(index, question.sequence)
        queries = engine.read_queries(index, question.sequence)
        rows = np.flatnonzero(queries.proxy)
        rows = rows[np.argsort(queries.order[rows])]
        mass = question.mass[heads]
        empty = mass == 0
        # From the end and from the beginning, as many as are kept whatever the method says.
        place = np.cumsum(~empty, axis=1)
        last = place > place[:, -1:] - (self.keep or self.window)
        held = ~empty & (last | (place <= self.sinks) | question.whole[heads])
        return Layer(
            index=index,
            k=cells.k,
            v=cells.v,
            bias=cells.bias.T,
            mass=mass,
            order=question.order[heads],
            segment=question.segment[heads],
            modality=question.modality[heads],
            held=held,
            empty=empty,
            q=queries.q[rows],
            q_order=queries.order[rows],
            scale=queries.scale,
            below=below,
        )


def share_out(
    shares: npt.NDArray[Any], total: int, *, least: npt.NDArray[Any], most: int
) -> npt.NDArray[np.integer[Any]]:
    """Return whole numbers in proportion to `shares`, none outside `least` to `most`.

    Their sum is at most `total`; where `least` alone is more than that, each gets the same.
    """
    n = len(shares)
    most = min(most, total)
    least = np.minimum(least, most)
    if least.sum() >= total:
        return np.full(n, min(most, total // n))
    # The sum grows with the factor, so halving finds the largest one that fits.
    low, high = 0.0, total / max(float(shares[shares > 0].min(initial=1.0)), 1e-9)
    for _ in range(60):
        middle = (low + high) / 2
        if np.clip(middle * shares, least, most).sum() <= total:
            low = middle
        else:
            high = middle
    exact = np.clip(low * shares, least, most)
    cells = np.floor(exact + 1e-6).astype(int)
    # What is left by rounding goes to those that lost most by it.
    for layer in np.argsort(cells - exact, kind="stable"):
        if cells.sum() < total and cells[layer] < most:
            cells[layer] += 1
    return cells
