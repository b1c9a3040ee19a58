"""Names for ``kv_merge=``."""

from __future__ import annotations

from ..errors import PolicyError, did_you_mean
from .auto import Auto
from .base import Policy
from .d2o import D2O
from .evict import Evict
from .flowmm import FlowMM
from .h2o import H2O
from .kvmerger import KVMerger
from .lookm import LookM
from .madakv import MadaKV
from .meda import MEDA
from .mosaic import Mosaic
from .snapkv import Pyramid, SnapKV
from .streaming import Streaming

PRESETS: dict[str, Policy | None] = {
    "none": None,
    "flowmm": FlowMM(),
    "mosaic": Mosaic(),
    "evict": Evict(),
    "look-m": LookM(),
    "madakv": MadaKV(),
    "meda": MEDA(),
    "d2o": D2O(),
    "h2o": H2O(),
    "snapkv": SnapKV(),
    "pyramid": Pyramid(),
    "kvmerger": KVMerger(),
    "streaming": Streaming(),
    "auto": Auto(),
}
"""Every accepted name with its policy; ``None`` is merging off."""


def presets() -> tuple[str, ...]:
    """Return the names that ``kv_merge=`` accepts."""
    return tuple(PRESETS)


def resolve(kv_merge: str | Policy | None) -> Policy | None:
    """Return the policy that a ``kv_merge`` value means, or None for merging off.

    Raises
    ------
    PolicyError
        If it means none.
    """
    if kv_merge is None or isinstance(kv_merge, Policy):
        return kv_merge
    if isinstance(kv_merge, str) and kv_merge.lower() in PRESETS:
        return PRESETS[kv_merge.lower()]
    hint = did_you_mean(kv_merge, PRESETS)
    if isinstance(kv_merge, type) and issubclass(kv_merge, Policy):
        hint = f" Did you mean {kv_merge.__name__}()?"
    names = ", ".join(repr(name) for name in PRESETS)
    raise PolicyError(
        f"kv_merge={kv_merge!r} is not known: it must be None, one of {names}, or a policy such "
        f"as kvmerge.FlowMM(theta=0.25).{hint}"
    )
