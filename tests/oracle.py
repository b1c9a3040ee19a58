"""FlowMM in NumPy, written from the formulas (arXiv 2511.05534) and not from the engine.

Notation: one layer; ``n`` cells, ``h`` KV heads, ``g`` query heads a group, ``d`` values a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Policy:
    """The choices of FlowMM."""

    theta: float = 0.25
    tau: float = 0.8
    window: int = 16
    sinks: int = 4
    keys: str = "move"
    bias: str = "count"
    match: str = "flow"


def attention(
    q: Array, q_order: npt.NDArray[np.int32], k: Array, order: npt.NDArray[np.int32], scale: float,
    bias: Array | None = None,
) -> Array:
    """Softmax attention ``[rows, heads, n]`` of ``q [rows, heads, d]`` over ``k [n, kv heads, d]``.

    A query sees the cells whose token is not later than its own.
    """
    group = q.shape[1] // k.shape[1]
    logits = np.einsum("rhd,nhd->rhn", q, np.repeat(k, group, axis=1)) * scale
    if bias is not None:
        logits = logits + np.repeat(bias, group, axis=1).T[None]
    seen = order[None, :] <= q_order[:, None]
    logits = np.where(seen[:, None, :], logits, -np.inf)
    logits = logits - logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits)
    return weights / weights.sum(axis=-1, keepdims=True)


def importance(weights: Array, heads_kv: int) -> Array:
    """Eq. 8: what the proxies give to each cell, summed over queries and group: ``[kv heads, n]``."""
    rows, heads, n = weights.shape
    return weights.reshape(rows, heads_kv, heads // heads_kv, n).sum(axis=(0, 2))


def flow(
    weights: Array, q_modality: npt.NDArray[np.uint8], modality: npt.NDArray[np.uint8]
) -> tuple[float, float, float]:
    """Eq. 6-7 for queries that are all those of the prompt: rho, text to media, media to text."""
    cross = (q_modality[:, None] != modality[None, :])[:, None, :]
    mass = (weights * cross).sum(axis=-1).mean(axis=1)  # by query
    text = q_modality == 0
    n = len(q_modality)
    return mass.sum() / n, mass[text].sum() / n, mass[~text].sum() / n


def select(
    score: Array, budget: int, policy: Policy
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the indices of the pivots of one head, and of those that receive folds."""
    n = len(score)
    window = min(policy.window, budget)
    sinks = min(policy.sinks, budget - window)
    forced = list(range(sinks)) + list(range(n - window, n))
    free = [i for i in range(n) if i not in set(forced)]
    free.sort(key=lambda i: (-score[i], i))
    kept = np.array(sorted(forced + free[: budget - len(forced)]))
    of_pivots = np.sort(score[kept])
    tau = of_pivots[max(0, int(np.ceil(np.float32(policy.tau) * len(kept))) - 1)]
    open_ = np.array([i for i in kept if score[i] <= tau and i < n - window], dtype=np.int64)
    return kept, open_


def match(
    k: Array, kept: npt.NDArray[np.int64], open_: npt.NDArray[np.int64],
    modality: npt.NDArray[np.uint8], across: bool,
) -> tuple[npt.NDArray[np.int64], Array]:
    """Eq. 9: the nearest open pivot of every evicted cell, and how much nearer it is than the next.

    Targets are indices of cells: a pivot's own, or -1 when nothing is open.
    """
    n = len(k)
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    target = np.full(n, -1, dtype=np.int64)
    margin = np.full(n, np.inf)
    target[kept] = kept
    for i in sorted(set(range(n)) - set(kept.tolist())):
        options = np.array([p for p in open_ if across or modality[p] == modality[i]], dtype=int)
        if len(options) == 0:
            continue
        similarity = unit[options] @ unit[i]
        ranked = np.sort(similarity)[::-1]
        target[i] = options[int(np.argmax(similarity))]
        margin[i] = ranked[0] - ranked[1] if len(ranked) > 1 else np.inf
    return target, margin


def fold(x: Array, target: npt.NDArray[np.int64], kept: npt.NDArray[np.int64], mass: Array) -> Array:
    """Mean of each group weighted by mass, ``[budget, d]``."""
    out = []
    for pivot in kept:
        members = np.flatnonzero(target == pivot)
        out.append((x[members] * mass[members, None]).sum(axis=0) / mass[members].sum())
    return np.array(out)
