"""The quality plot: points over budget, one line a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from .answers import Answer
from .methods import FULL, METHODS
from .scores import Row, Scores, collect

_HIGHLIGHTED = ("mosaic", "flowmm", "flowmm-literal", "evict")
_PANEL = (6.4, 4.4)
_MARKS = "osD^vP*X"


def draw(answers: Sequence[Answer], file: Path) -> None:
    """Draw one panel for every collection and mode into a PNG.

    Raises
    ------
    UnsupportedError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("the plot needs matplotlib: install kvmerge[eval]") from error
    panels = collect(answers)
    columns = min(len(panels), 2) or 1
    lines = -(-len(panels) // columns) or 1
    figure: Any = Figure(
        figsize=(_PANEL[0] * columns, _PANEL[1] * lines), layout="constrained", dpi=120
    )
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    colours = _colours()
    for axis, scores in zip(axes, panels, strict=False):
        _panel(axis, scores, colours)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    drawn: dict[str, Any] = {}
    for axis in axes[: len(panels)]:
        handles, labels = axis.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    if drawn:
        figure.legend(
            drawn.values(), drawn.keys(), loc="outside lower center", ncols=min(5, len(drawn))
        )
    figure.savefig(file)


def _colours() -> dict[str, Any]:
    import matplotlib

    names = [name for name, method in METHODS.items() if method.kind == "preset"]
    palette = matplotlib.colormaps["tab20"]
    return {name: palette(i % 20) for i, name in enumerate(names)}


def _panel(axis: Any, scores: Scores, colours: dict[str, Any]) -> None:
    for i, (name, colour) in enumerate(colours.items()):
        rows: list[Row] = [
            (name, budget) for budget in sorted(scores.budgets) if (name, budget) in scores.values
        ]
        if not rows:
            continue
        axis.plot(
            [budget for _, budget in rows],
            [100 * scores.average(row) for row in rows],
            color=colour,
            marker=_MARKS[i % len(_MARKS)],
            markersize=4,
            linewidth=2.2 if name in _HIGHLIGHTED else 1.2,
            zorder=3 if name in _HIGHLIGHTED else 2,
            label=name,
        )
    full: Row = (FULL, 1.0)
    if full in scores.values:
        axis.axhline(100 * scores.average(full), color="black", linestyle="--", label="full cache")
        whole = scores.mib[full]
        for row in scores.rows(1.0, ["reference"]):
            if row != full:
                share = scores.mib[row] / whole
                axis.plot(share, 100 * scores.average(row), "kx", zorder=4)
                axis.annotate(
                    row[0],
                    (share, 100 * scores.average(row)),
                    xytext=(0, -12),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        mib = axis.secondary_xaxis(
            "top", functions=(lambda share: share * whole, lambda size: size / whole)
        )
        mib.set_xlabel("KV MiB")
        mib.ticklabel_format(style="plain")
    axis.set_title(f"{scores.collection}, question {scores.mode}", fontsize=10)
    axis.set_xlabel("budget (share of the full cache)")
    axis.set_ylabel("points, %")
    axis.set_ylim(0, 102)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
