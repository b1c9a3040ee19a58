"""How the cache is merged: one small file a method, one name for each in `presets`."""

from __future__ import annotations

from .base import Policy
from .evict import Evict
from .flowmm import FlowMM
from .presets import PRESETS, presets, resolve

__all__ = ["PRESETS", "Evict", "FlowMM", "Policy", "presets", "resolve"]
