"""Every method in NumPy, written from the papers' formulas and not from the engine.

Notation: one layer; ``n`` cells, ``h`` KV heads, ``g`` query heads a group, ``d`` values a head.
Each function is one step for one KV head, on plain arrays.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]


def logits(q: Array, k: Array, scale: float) -> Array:
    """``[rows, heads, n]`` for ``q [rows, heads, d]`` and ``k [n, kv heads, d]``."""
    group = q.shape[1] // k.shape[1]
    return np.einsum("rhd,nhd->rhn", q, np.repeat(k, group, axis=1)) * scale


def attention(values: Array, q_order: Index, order: Index, bias: Array | None = None) -> Array:
    """Softmax over logits ``[rows, heads, n]``; a query sees cells not later than its own token."""
    if bias is not None:
        group = values.shape[1] // bias.shape[1]
        values = values + np.repeat(bias, group, axis=1).T[None]
    seen = order[None, :] <= q_order[:, None]
    values = np.where(seen[:, None, :], values, -np.inf)
    values = values - values.max(axis=-1, keepdims=True)
    weights = np.exp(values)
    return weights / weights.sum(axis=-1, keepdims=True)


def spread(rows: Index, order: Index, n: int) -> Index:
    """At most ``n`` of the rows, evenly spread in the order of their tokens."""
    rows = rows[np.argsort(order[rows])]
    n = min(n, len(rows))
    return rows[[i * len(rows) // n for i in range(n)]]


def importance(weights: Array, heads_kv: int) -> Array:
    """FlowMM eq. 8: summed over queries and group, ``[kv heads, n]``."""
    rows, heads, n = weights.shape
    return weights.reshape(rows, heads_kv, heads // heads_kv, n).sum(axis=(0, 2))


def flow(weights: Array, q_modality: Index, modality: Index) -> tuple[float, float, float]:
    """FlowMM eq. 6-7 for all queries of the prompt: rho, text to media, media to text."""
    cross = (q_modality[:, None] != modality[None, :])[:, None, :]
    mass = (weights * cross).sum(axis=-1).mean(axis=1)  # by query
    text = q_modality == 0
    n = len(q_modality)
    return mass.sum() / n, mass[text].sum() / n, mass[~text].sum() / n


def pool(score: Array, segment: Index, width: int, by_max: bool) -> Array:
    """Pool over neighbours of the same segment."""
    out = np.zeros_like(score)
    for i in range(len(score)):
        near = range(max(0, i - width // 2), min(len(score), i + width // 2 + 1))
        values = [score[j] for j in near if segment[j] == segment[i]]
        out[i] = max(values) if by_max else float(np.mean(values))
    return out


def forced(n: int, budget: int, p: dict[str, Any]) -> tuple[set[int], set[int]]:
    """Return the window (with the recent share) and the sinks."""
    window = min(max(p["keep"] or p["window"], int(np.float32(p["recent"]) * budget)), budget)
    sinks = min(p["sinks"], budget - window)
    return set(range(n - window, n)), set(range(sinks))


def allocate(how: str, budget: int, n: int, p: dict[str, Any], need: Array, flows: Array) -> Array:
    """Cells each layer should have before rounding.

    ``need`` [layers]: cells per head that cover the attention; ``flows`` [layers, 2].
    """
    layers = len(need)
    least = min(budget, p["sinks"] + (p["keep"] or p["window"]))
    if how == "pyramid":
        low = budget / 20
        want = np.linspace(2 * budget - low, low, layers)
    elif how == "early":
        early = layers // 4
        want = np.full(layers, budget * (layers - 2 * early) / (layers - early))
        want[:early] = 2 * budget
    elif how == "cover":
        want = np.zeros(layers)
        phi = float(budget)
        for layer in range(layers):
            want[layer] = phi
            phi = max(least, phi - (need[layer] - phi) / (layers - layer))
    elif how == "entropy":
        entropy = -(flows * np.log(np.where(flows > 0, flows, 1))).sum(axis=1)
        want = np.exp(entropy - entropy.max())
    else:
        want = np.full(layers, float(budget))
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(middle * want, least, n).sum() < budget * layers:
            low = middle
        else:
            high = middle
    return np.clip(low * want, least, n)


def cover(score: Array, modality: Index, share: float) -> int:
    """MadaKV: fewest tokens of each modality that cover a share of its attention."""
    total = 0
    for text in (True, False):
        values = np.sort(score[(modality == 0) == text])[::-1]
        reached, count = 0.0, 0
        while count < len(values) and reached < share * values.sum():
            reached += values[count]
            count += 1
        total += count
    return total


def select(score: Array, modality: Index, budget: int, p: dict[str, Any]) -> tuple[Index, Index]:
    """Return the indices of the pivots of one head, and of those that receive folds."""
    n = len(score)
    window, sinks = forced(n, budget, p)
    protected = set(range(n - min(p["keep"] or p["window"], budget), n))
    free = [i for i in range(n) if i not in window | sinks]
    free.sort(key=lambda i: (-score[i], i))
    left = budget - len(window) - len(sinks)
    if p["select"] == "text":
        free.sort(key=lambda i: modality[i] != 0)
    if p["select"] == "modality":
        texts = [i for i in free if modality[i] == 0]
        media = [i for i in free if modality[i] != 0]
        everything = score[free].sum()
        # halves are rounded away from zero
        n_text = int(np.floor(left * score[texts].sum() / everything + 0.5))
        n_text = min(max(n_text, left - len(media)), len(texts))
        free = texts[:n_text] + media[: left - n_text]
    kept = np.array(sorted(window | sinks | set(free[:left])))
    of_pivots = np.sort(score[kept])
    tau = of_pivots[max(0, int(np.ceil(np.float32(p["tau"]) * len(kept))) - 1)]
    open_ = [i for i in kept if score[i] <= tau and i not in protected]
    return kept, np.array(open_, dtype=np.int64)


def match(k: Array, kept: Index, open_: Index, groups: Index | None) -> tuple[Index, Array]:
    """FlowMM eq. 9: the nearest open pivot (of the same group), and by how much it is nearest.

    Targets are indices of cells: a pivot's own, or -1 when nothing is open.
    """
    n = len(k)
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    target = np.full(n, -1, dtype=np.int64)
    margin = np.full(n, np.inf)
    target[kept] = kept
    for i in sorted(set(range(n)) - set(kept.tolist())):
        options = open_ if groups is None else open_[groups[open_] == groups[i]]
        if len(options) == 0:
            continue
        similarity = unit[options] @ unit[i]
        ranked = np.sort(similarity)[::-1]
        target[i] = options[int(np.argmax(similarity))]
        margin[i] = ranked[0] - ranked[1] if len(ranked) > 1 else np.inf
    return target, margin


def cosine(k: Array, target: Index) -> Array:
    """Cosine of every cell's key to its pivot's (1 where there is none)."""
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    return np.array([unit[i] @ unit[t] if t >= 0 else 1.0 for i, t in enumerate(target)])


def share(wanted: list[int], floors: list[int], total: int) -> list[int]:
    """Share cells over blocks in proportion to their sizes, with floors, never above a size."""
    given, left = [], total
    for size, floor in zip(wanted, floors, strict=True):
        given.append(min(floor, size, left))
        left -= given[-1]
    ideal = [total * size / sum(wanted) - got for size, got in zip(wanted, given, strict=True)]
    while left > 0:
        room = [b for b in range(len(given)) if given[b] < wanted[b]]
        if not room:
            break
        best = max(room, key=lambda b: (ideal[b], -b))
        given[best] += 1
        ideal[best] -= 1
        left -= 1
    return given


def cap(target: Array, k: Array, members: int) -> Array:
    """Leave the `members` of each pivot that are most like it, all of them for 0."""
    out = target.copy()
    unit = k / np.linalg.norm(k, axis=1, keepdims=True)
    for pivot in np.unique(target[target >= 0]):
        others = np.flatnonzero((target == pivot) & (np.arange(len(target)) != pivot))
        order = np.argsort(-(unit[others] @ unit[pivot]), kind="stable")
        if members:
            out[others[order[members:]]] = -1
    return out


def k_center(k: Array, score: Array, members: list[int], groups: int) -> dict[int, int]:
    """Farthest-point seeds from the highest score on; every member to its nearest seed."""
    keys = k[members]
    seed = int(np.argmax(score[members]))
    nearest = np.full(len(members), np.inf)
    owner = np.full(len(members), -1)
    for _ in range(groups):
        distance = ((keys - keys[seed]) ** 2).sum(axis=1)
        distance[seed] = -1
        closer = distance < nearest
        nearest[closer], owner[closer] = distance[closer], seed
        seed = int(np.argmax(nearest))
    return {members[i]: members[owner[i]] for i in range(len(members))}


def mosaic(
    k: Array, score: Array, modality: Index, segment: Index, budget: int, p: dict[str, Any]
) -> Index:
    """Targets of ``mosaic``: pivots as they are, the rest of each picture in groups."""
    n = len(score)
    window, sinks = forced(n, budget, p)
    free = budget - len(window) - len(sinks)
    rest = [i for i in range(n) if i not in window | sinks]
    blocks: dict[bool, dict[int, list[int]]] = {True: defaultdict(list), False: defaultdict(list)}
    for i in rest:
        is_text = bool(modality[i] == 0)
        blocks[is_text][0 if is_text else int(segment[i])].append(i)
    n_all, texts = len(rest), sum(len(b) for b in blocks[True].values())
    floor_sum = p["floor"] * len(blocks[False])
    if texts == n_all:
        n_text = min(free, texts)
    else:
        wish = max(2 * free * texts // max(1, n_all), int(np.float32(p["text"]) * free))
        n_media = max(floor_sum, free * (n_all - texts) // n_all // 8)
        n_text = max(0, min(min(texts, wish), free - n_media))
    n_media = free - n_text
    media_groups = max(
        min(n_media, floor_sum), int(np.floor(n_media * (1 - np.float32(p["pivots"])) + 0.5))
    )
    text_pivots = n_text
    if n_text < texts:
        text_pivots = int(np.floor(n_text * np.float32(p["text_pivots"]) + 0.5))
    target = np.full(n, -1, dtype=np.int64)
    target[sorted(window | sinks)] = sorted(window | sinks)
    for text, pivots, groups in (
        (True, text_pivots, n_text - text_pivots),
        (False, n_media - media_groups, media_groups),
    ):
        everyone = [i for block in blocks[text].values() for i in block]
        everyone.sort(key=lambda i: -score[i])
        for i in everyone[:pivots]:
            target[i] = i
        members = [[i for i in b if target[i] < 0] for _, b in sorted(blocks[text].items())]
        floors = [0 if text else p["floor"]] * len(members)
        if not any(members):
            continue
        for block, count in zip(members, share([len(m) for m in members], floors, groups),
                                strict=True):  # fmt: skip
            if count and block:
                for i, seed in k_center(k, score, block, count).items():
                    target[i] = seed
    return target


def media(
    k: Array, score: Array, modality: Index, segment: Index, budget: int, p: dict[str, Any]
) -> Index:
    """Targets of ``auto`` with room enough: text as it is, each picture in groups."""
    text = np.flatnonzero(modality == 0)
    target = np.full(len(score), -1, dtype=np.int64)
    target[text] = text
    pictures = [np.flatnonzero((modality > 0) & (segment == s)) for s in np.unique(segment)]
    pictures = [picture for picture in pictures if len(picture)]
    seeds = [[picture[np.argmax(score[picture])]] for picture in pictures]
    assert p["floor"] == 1, "written for the default"

    def farthest(picture: Index, seeds: list[int]) -> tuple[float, int]:
        distance = ((k[picture][:, None] - k[seeds][None]) ** 2).sum(axis=-1).min(axis=1)
        return float(distance.max()), int(picture[np.argmax(distance)])

    for _ in range(budget - len(text) - len(pictures)):
        found = [farthest(*each) for each in zip(pictures, seeds, strict=True)]
        best = int(np.argmax([radius for radius, _ in found]))
        seeds[best].append(found[best][1])
    for picture, chosen in zip(pictures, seeds, strict=True):
        distance = ((k[picture][:, None] - k[chosen][None]) ** 2).sum(axis=-1)
        target[picture] = np.array(chosen)[distance.argmin(axis=1)]
        target[chosen] = chosen
    return target


def runs(k: Array, score: Array, segment: Index, budget: int, p: dict[str, Any]) -> Index:
    """KVMerger: half of the free cells by score, the rest as runs of similar neighbours."""
    n = len(score)
    window, sinks = forced(n, budget, p)
    free = budget - len(window) - len(sinks)
    rest = [i for i in range(n) if i not in window | sinks]
    rest.sort(key=lambda i: -score[i])
    target = np.full(n, -1, dtype=np.int64)
    for i in sorted(window | sinks) + rest[: free // 2]:
        target[i] = i
    groups = free - free // 2
    members = sorted(rest[free // 2 :])
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    pairs = [
        (a, b) for a, b in zip(members, members[1:], strict=False)
        if b == a + 1 and segment[a] == segment[b]
    ]  # fmt: skip
    pairs.sort(key=lambda ab: -(unit[ab[0]] @ unit[ab[1]]))
    joined = set(pairs[: max(0, len(members) - groups)])
    found: list[list[int]] = []
    for i in members:
        if found and (found[-1][-1], i) in joined:
            found[-1].append(i)
        else:
            found.append([i])
    heads = [max(run, key=lambda i: (score[i], -i)) for run in found]
    for r in sorted(range(len(found)), key=lambda r: -score[heads[r]])[:groups]:
        target[found[r]] = heads[r]
    return target


def limit(target: Index, kept: Index, similarity: Array, p: dict[str, Any]) -> Index:
    """Drop what is not similar enough (D2O's threshold is the mean similarity)."""
    target = target.copy()
    folded = np.array([i for i, t in enumerate(target) if t >= 0 and t != i], dtype=int)
    threshold = p["similarity"]
    if p["fold"] == "exp" and len(folded):
        threshold = max(threshold, similarity[folded].mean())
    for i in folded:
        if similarity[i] < threshold:
            target[i] = -1
    return target


def weights(target: Index, kept: Index, mass: Array, similarity: Array, how: str) -> Array:
    """Weight of every cell in the mean of its group, adding up to 1 over a group."""
    out = np.zeros(len(target))
    for pivot in kept:
        members = np.flatnonzero(target == pivot)
        others = len(members) - 1
        raw = np.ones(len(members))
        for j, i in enumerate(members):
            if how == "pivot":
                raw[j] = 1 + others / 2 if i == pivot else 0.5
            elif i == pivot:
                continue
            elif how == "weighted":
                raw[j] = max(similarity[i], 0)
            elif how == "exp":
                raw[j] = np.exp(similarity[i] - 1)
            elif how == "gaussian":
                raw[j] = np.exp(-2 * (1 - similarity[i]))
        raw *= mass[members]
        out[members] = raw / raw.sum()
    return out


def fold(x: Array, target: Index, kept: Index, weight: Array) -> Array:
    """Weighted mean of each group, ``[budget, d]``."""
    return np.array([weight[target == pivot] @ x[target == pivot] for pivot in kept])


def biases(
    target: Index, kept: Index, mass: Array, weight: Array, values: Array, how: str, keys: str
) -> Array:
    """Bias of every pivot; ``values [queries, n]`` are logits of one KV head."""
    out = np.zeros(len(kept))
    for c, pivot in enumerate(kept):
        members = np.flatnonzero(target == pivot)
        if how == "none" or len(members) == 1:
            continue
        if how == "count":
            out[c] = np.log(mass[members].sum())
        else:
            own = values[:, pivot] if keys == "keep" else values[:, members] @ weight[members]
            out[c] = np.mean(np.log(np.exp(values[:, members]).sum(axis=1)) - own)
    return np.clip(out, -8, 8)
