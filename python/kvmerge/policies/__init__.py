"""How the cache is merged: one small file a method, found by itself."""

from __future__ import annotations

from .array import ArrayPolicy, Layer
from .auto import Auto
from .base import Policy
from .d2o import D2O
from .evict import Evict
from .flowmm import FlowMM
from .h2o import H2O
from .keydiff import KeyDiff
from .kvmerger import KVMerger
from .lookm import LookM
from .madakv import MadaKV
from .meda import MEDA
from .mosaic import Mosaic
from .presets import PRESETS, presets, resolve
from .snapkv import Pyramid, SnapKV
from .streaming import Streaming

__all__ = [
    "D2O",
    "H2O",
    "MEDA",
    "PRESETS",
    "ArrayPolicy",
    "Auto",
    "Evict",
    "FlowMM",
    "KVMerger",
    "KeyDiff",
    "Layer",
    "LookM",
    "MadaKV",
    "Mosaic",
    "Policy",
    "Pyramid",
    "SnapKV",
    "Streaming",
    "presets",
    "resolve",
]
