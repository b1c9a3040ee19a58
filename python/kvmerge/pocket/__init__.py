"""A tiny vision-language model for trying things out, with tasks that need their context.

The two GGUF files lie next to this module.  Drawing and tasks need ``numpy`` and ``Pillow``; they
are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .render import COLOURS, LETTERS, SHAPES, render_picture
    from .tasks import TASKS, Fact, Picture, Prompt, Question, data_uri, make_prompt, score

__all__ = [
    "COLOURS",
    "LETTERS",
    "SHAPES",
    "TASKS",
    "Fact",
    "Picture",
    "Prompt",
    "Question",
    "data_uri",
    "make_prompt",
    "mmproj_path",
    "model_path",
    "render_picture",
    "score",
]

_FROM_RENDER = {"COLOURS", "LETTERS", "SHAPES", "render_picture"}


def model_path() -> Path:
    """Return the path of the language model (GGUF)."""
    return Path(__file__).resolve().parent / "pocket.gguf"


def mmproj_path() -> Path:
    """Return the path of the vision part and projector (GGUF)."""
    return Path(__file__).resolve().parent / "pocket-mmproj.gguf"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(".render" if name in _FROM_RENDER else ".tasks", __name__)
    return getattr(module, name)
