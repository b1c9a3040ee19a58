"""What a cache holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from .media.image_cache import ImageCacheStats
from .media.image_merge import ImageMergeCounts

if TYPE_CHECKING:
    from .native.binding import Engine
    from .policies import Policy


@dataclass(frozen=True)
class LayerFlow:
    """Cross-modal flow of one layer in the last merge.

    Attributes
    ----------
    layer : int
        Place of the layer in the model.
    rho : float
        Share of all attention that crosses modalities.
    text_to_media : float
        The part that text gives to pictures and sound.
    media_to_text : float
        The part that pictures and sound give to text.
    across : bool
        Whether tokens of this layer were folded across modalities.
    """

    layer: int
    rho: float
    text_to_media: float
    media_to_text: float
    across: bool


def layer_flow(engine: Engine, policy: Policy) -> tuple[LayerFlow, ...]:
    """Return the flow of the layers in which the last merge has measured it."""
    flows, found = engine.flow(), []
    for i, values in enumerate(
        zip(flows.rho, flows.text_to_media, flows.media_to_text, strict=True)
    ):
        rho, text_to_media, media_to_text = (float(value) for value in values)
        if rho >= 0:
            across = policy.match == "any" or (policy.match == "flow" and rho >= policy.theta)
            index = engine.layer(i).index
            found.append(LayerFlow(index, rho, text_to_media, media_to_text, across))
    return tuple(found)


@dataclass(frozen=True)
class MergeRecord:
    """One merge.

    Attributes
    ----------
    tokens : int
        Tokens seen when it ran.
    cells_before, cells_after : int
        Cells held before and after.
    ms : float
        How long it took.
    text_before, text_after : int
        Cells of text among them, before and after, as the mean over layers and KV heads.
    error : float or None
        How far the merge moves what attention returns: the length of the difference to what it
        returned before, as a share of it and as the mean over eight layers, or all of fewer.  It is
        measured on queries of the text that was read, to which nothing was fitted; what a question
        that nobody has asked yet looks for is not in it.  None where too little text was read.
    """

    tokens: int
    cells_before: int
    cells_after: int
    ms: float
    text_before: int
    text_after: int
    error: float | None = None


@dataclass(frozen=True)
class KVStats:
    """What the cache holds, in three numbers that differ, and what it costs.

    Attributes
    ----------
    tokens : int
        Inputs that the model has seen: text tokens and picture tokens.
    positions : int
        Length in positions.  Models with M-RoPE count a picture as fewer positions than tokens.
    cells : int
        Cells that the cache holds, as the mean over the layers where a policy gives them different
        numbers.  Without merging as many as there are tokens.
    bytes_per_cell : int
        Bytes of K and V of one cell over all layers; 0 where it is not known.
    mib : float
        MiB of the cells that are held.
    mib_full : float
        MiB that one cell a token would take.
    policy : str
        The policy; ``"none"`` when merging is off.
    budget : float, int, "auto" or None
        What is kept: a fraction of the tokens, a number of cells, or as few as the measured error
        allows; None when merging is off.
    budget_of : str
        What the budget is of: ``"tokens"``, or ``"media"`` where text is left alone and the budget
        says what is kept of pictures and sound.
    merges : tuple of MergeRecord
        The merges since the cache was last empty.
    last_merge_ms : float
        How long the last of them took.
    flow : tuple of LayerFlow
        Cross-modal flow per layer in the last of them; empty where the policy does not use it,
        unless there is a trace (``kv_trace=True``).
    layer_cells : tuple of int
        Cells that each merged layer holds.
    elsewhere : int
        Those of `tokens` that were not read through kvmerge, but by a framework that runs
        llama.cpp on the same context by itself.  They are merged only under a cap, and the next
        call that reads with the `Llama` removes them.  Below 0 where it removed tokens.
    image_cache : ImageCacheStats or None
        What became of the pictures that had to be read; None without an mmproj.  It says nothing of
        what the cache holds: two records that differ in it alone are equal.
    image_merge : ImageMergeCounts or None
        Tokens of the pictures that ``image_merge=`` merged, before and after; not compared either.
    """

    tokens: int
    positions: int
    cells: int
    bytes_per_cell: int
    mib: float
    mib_full: float
    policy: str
    budget: float | int | str | None
    budget_of: str = "tokens"
    merges: tuple[MergeRecord, ...] = ()
    last_merge_ms: float = 0.0
    flow: tuple[LayerFlow, ...] = ()
    layer_cells: tuple[int, ...] = ()
    elsewhere: int = 0
    image_cache: ImageCacheStats | None = field(default=None, compare=False)
    image_merge: ImageMergeCounts | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists and numbers."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """Return the same as a table, which notebooks show."""
        return f"<pre>{escape(str(self))}</pre>{self._bar()}"

    def _bar(self) -> str:
        """Return a bar: the cells that are held of those that a full cache would hold."""
        if not self.tokens:
            return ""
        share = min(100.0, 100 * self.cells / self.tokens)
        return (
            '<div style="width:24em;border:1px solid #888;border-radius:3px">'
            f'<div style="width:{share:.1f}%;background:#4a8;color:#fff;white-space:nowrap;'
            f'padding:0 .4em;box-sizing:border-box">{share:.0f} % of the full cache</div></div>'
        )

    def __str__(self) -> str:
        lines = [
            f"tokens seen     {self.tokens}",
            f"positions       {self.positions}",
            f"cells held      {self.cells}",
        ]
        if self.elsewhere > 0:
            lines.append(f"  elsewhere     {self.elsewhere} tokens were not read through kvmerge")
        elif self.elsewhere < 0:
            lines.append(f"  elsewhere     {-self.elsewhere} tokens were not removed by kvmerge")
        if len(set(self.layer_cells)) > 1:
            lines.append(f"  a layer       {' '.join(map(str, self.layer_cells))}")
        if self.bytes_per_cell:
            lines.append(f"KV MiB          {self.mib:.2f} (full cache: {self.mib_full:.2f})")
        if self.budget is None:
            lines.append("merging         off")
            return "\n".join(lines)
        lines.append(f"policy          {self.policy}")
        if isinstance(self.budget, str):
            what = "pictures and sound" if self.budget_of == "media" else "the tokens"
            lines.append(f"budget          {self.budget}: as few of {what} as the error allows")
        elif self.budget_of == "media":
            unit = "cells for" if isinstance(self.budget, int) else "of"
            kept = f"{self.budget:g} {unit} pictures and sound kept"
            lines.append(f"budget          {kept}, and all text")
        else:
            unit = "cells" if isinstance(self.budget, int) else "of the tokens"
            lines.append(f"budget          {self.budget:g} {unit} kept")
        last = f", the last took {self.last_merge_ms:.1f} ms" if self.merges else ""
        lines.append(f"merges          {len(self.merges)}{last}")
        if self.merges and self.merges[-1].error is not None:
            lines.append(f"error           {self.merges[-1].error:.3f} by the last merge")
        lost = sum(merge.text_before - merge.text_after for merge in self.merges)
        if lost:
            lines.append(f"text            {lost} tokens were merged or dropped")
        elif self.merges:
            lines.append("text            all of it is kept as it was")
        if self.flow:
            lines.append("flow            layer    rho  text->media  media->text  folds across")
        for layer in self.flow:
            lines.append(
                f"                {layer.layer:>5}  {layer.rho:.3f}  {layer.text_to_media:>11.3f}"
                f"  {layer.media_to_text:>11.3f}  {'yes' if layer.across else 'no':>12}"
            )
        return "\n".join(lines)
