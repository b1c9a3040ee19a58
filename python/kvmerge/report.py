"""Reports, of ``kvmerge demo`` and of one chat: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .chat.messages import check_messages, joined
from .errors import OptionError, StateError
from .media.part import find_media
from .model import Model
from .native.binding import FATES, MODALITIES

_TEMPLATE = Path(__file__).with_name("report.html")


_COMPARED = (
    "The same pictures and questions, answered with the full KV cache and with a merged one. One "
    "conversation each, greedy answers."
)


def patch_grid(n_tokens: int) -> tuple[int, int]:
    """Return columns and rows of a picture's patches: the grid that is nearest to a square."""
    for rows in range(math.isqrt(n_tokens), 0, -1):
        if n_tokens % rows == 0:
            return n_tokens // rows, rows
    return n_tokens, 1


def merge_view(llm: Model) -> dict[str, Any] | None:
    """Return what the last merge of a model did, per layer and head, as plain data.

    Parameters
    ----------
    llm : Llama
        A model with ``kv_trace=True`` that has merged once, so that each cell it found was one
        token.

    Returns
    -------
    dict or None
        None when nothing was merged.

    Raises
    ------
    StateError
        If the model does not keep what merges do.
    """
    engine, stats = llm.engine, llm.kv_stats()
    policy = llm.settings.kv_merge
    if engine is None or policy is None or not stats.merges:
        return None
    if not llm.settings.kv_trace:
        raise StateError(
            "what the merge did to every token was not kept: make Llama(kv_trace=True)"
        )
    spans = [span for span in llm.kv_cache.spans if span.modality == "image"]
    layers = []
    for index, flow in enumerate(stats.flow):
        heads = []
        kept = {name: [0, 0] for name in MODALITIES[:2]}
        for head in range(engine.layer(index).n_head_kv):
            plan = engine.plan(index, head)
            fates = np.full(int(plan.order.max(initial=-1)) + 1, FATES.index("dropped"))
            fates[plan.order] = plan.fate
            heads.append(
                ["".join(str(fate) for fate in fates[span.start : span.end]) for span in spans]
            )
            survives = plan.fate >= FATES.index("kept")
            for value, name in enumerate(MODALITIES[:2]):
                of_kind = plan.modality == value
                kept[name][0] += int((survives & of_kind).sum())
                kept[name][1] += int(of_kind.sum())
        layers.append(
            {
                "layer": flow.layer,
                "rho": flow.rho,
                "text_to_media": flow.text_to_media,
                "media_to_text": flow.media_to_text,
                "across": flow.across,
                "kept": {name: part / max(whole, 1) for name, (part, whole) in kept.items()},
                "heads": heads,
            }
        )
    merge = stats.merges[-1]
    return {
        "theta": policy.theta,
        "match": policy.match,
        "policy": stats.policy,
        "cells_before": merge.cells_before,
        "cells_after": merge.cells_after,
        "grids": [patch_grid(span.end - span.start) for span in spans],
        "layers": layers,
    }


def check_place(path: Path) -> None:
    """Check that a report can be written to a place, before there is one.

    Raises
    ------
    OptionError
        If it is a folder, or in a folder that is missing or must not be written to.
    """
    reason = ""
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "it is not allowed"
    if reason:
        raise OptionError(f"the report {path} cannot be written: {reason}")


def _data_uri(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def write_report(
    path: Path,
    *,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    meanings: Sequence[tuple[str, str]],
    turns: Sequence[dict[str, Any]],
    pictures: Sequence[tuple[Any, str]],
    view: dict[str, Any] | None,
    about: str = _COMPARED,
    judged: bool = True,
) -> None:
    """Write the report.

    Parameters
    ----------
    path : Path
        Where to.
    title : str
        Headline.
    header, rows, meanings
        The table of figures, and what its columns mean.
    turns : sequence of dict
        ``question``, ``expected`` and two ``answers`` with ``text``, ``score`` and ``mark``.
    pictures : sequence of (PIL.Image.Image, str)
        The pictures with their captions.
    view : dict or None
        See `merge_view`.
    about : str
        What the report is of, in a sentence.
    judged : bool
        Whether there is a right answer to each question.

    Raises
    ------
    OptionError
        If the file cannot be written.
    """
    data = {
        "header": list(header),
        "rows": [list(row) for row in rows],
        "meanings": list(meanings),
        "turns": list(turns),
        "pictures": [{"src": _data_uri(image), "caption": text} for image, text in pictures],
        "view": view,
        "judged": judged,
    }
    # "<" would end the script element if it came as "</script>".
    encoded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = _TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{title}}", html.escape(title)).replace("{{about}}", html.escape(about))
    page = page.replace("{{data}}", encoded)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"the report {path} cannot be written: {error.strerror}") from error


def report_chat(llm: Model, messages: Any, file: str | os.PathLike[str]) -> Path:
    """Write a report of the chat that a model has in its cache; see `Llama.report`."""
    path = Path(os.fsdecode(file)).expanduser()
    check_place(path)
    messages, stats = check_messages(messages), llm.kv_stats()
    view = merge_view(llm) if len(stats.merges) == 1 else None
    media = find_media(messages, llm.settings.media_access)
    media = [part for part in media if part.modality == "image"]
    merge_ms = sum(merge.ms for merge in stats.merges)
    about = "One chat, and what its cache holds after it."
    if len(stats.merges) > 1:
        about += (
            f" It was merged {len(stats.merges)} times: what became of each patch is shown after "
            "one merge only."
        )
    write_report(
        path,
        title=f"{len(media)} pictures, {Path(llm.model_path).name}, {stats.policy}",
        header=("", "tokens seen", "cells held", "KV MiB", "full cache, MiB", "merge ms"),
        rows=[
            (
                "this chat",
                str(stats.tokens),
                str(stats.cells),
                f"{stats.mib:.2f}",
                f"{stats.mib_full:.2f}",
                f"{merge_ms:.0f} ({len(stats.merges)} merges)",
            )
        ],
        meanings=_MEANINGS,
        turns=[
            {"question": question, "expected": "", "answers": [{"text": answer}]}
            for question, answer in _turns(messages)
        ],  # fmt: skip
        pictures=[(part.picture(), f"picture {i}") for i, part in enumerate(media, 1)],
        view=view,
        about=about,
        judged=False,
    )
    return path


_MEANINGS = (
    ("tokens seen", "text and picture tokens that the model has read and written"),
    ("cells held", "slots of the KV cache that attention goes through now"),
    ("KV MiB", "K and V of these cells over all layers"),
    ("full cache", "what one cell a token would take"),
    ("merge ms", "time of all merges together, and how many there were"),
)


def _turns(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what was said by others, and what the assistant has answered."""
    turns: list[tuple[str, str]] = []
    said: list[str] = []
    for message in joined(messages, "[picture]"):
        if message["role"] == "assistant":
            turns.append(("\n".join(said), message["content"]))
            said = []
        else:
            said.append(message["content"])
    return turns + ([("\n".join(said), "")] if said else [])
