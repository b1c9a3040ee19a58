"""Names for ``kv_merge=``."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ..errors import PolicyError, did_you_mean
from .base import Policy


def _presets() -> dict[str, Policy | None]:
    """Import every file of this folder; each method in them is known by its name then."""
    package = import_module(__package__)
    for module in sorted(iter_modules(package.__path__), key=lambda module: module.name):
        import_module(f"{__package__}.{module.name}")
    return {"none": None} | {name: method() for name, method in sorted(Policy.named.items())}


PRESETS: dict[str, Policy | None] = _presets()
"""Every name that comes with the package, with its policy; ``None`` is merging off."""


def presets() -> tuple[str, ...]:
    """Return the names that ``kv_merge=`` accepts."""
    return tuple(dict.fromkeys([*PRESETS, *Policy.named]))


def resolve(kv_merge: Any) -> Policy | None:
    """Return the policy that a ``kv_merge`` value means, or None for merging off.

    Raises
    ------
    PolicyError
        If it means none.
    """
    if kv_merge is None or isinstance(kv_merge, Policy):
        return kv_merge
    name = kv_merge.lower() if isinstance(kv_merge, str) else None
    if name in PRESETS:
        return PRESETS[name]
    if name in Policy.named:
        return Policy.named[name]()
    hint = did_you_mean(kv_merge, presets())
    if isinstance(kv_merge, type) and issubclass(kv_merge, Policy):
        hint = f" Did you mean {kv_merge.__name__}()?"
    names = ", ".join(repr(name) for name in presets())
    raise PolicyError(
        f"kv_merge={kv_merge!r} is not known: it must be None, one of {names}, or a policy such "
        f"as kvmerge.FlowMM(theta=0.25).{hint}"
    )
