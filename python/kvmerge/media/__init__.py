"""Pictures and sounds, before a model reads them."""

from .part import MediaPart, as_png, find_media

__all__ = ["MediaPart", "as_png", "find_media"]
