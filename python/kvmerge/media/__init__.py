"""Pictures and sounds, before a model reads them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .part import MediaPart as MediaPart
    from .part import as_png as as_png
    from .part import find_media as find_media

__all__ = ["MediaPart", "as_png", "find_media"]


def __getattr__(name: str) -> Any:
    # Pillow waits until there is a picture. `_png` is what `as_png` was before it took all sources.
    if name not in (*__all__, "_png"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".part", __name__), name)
