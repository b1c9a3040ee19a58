"""The rows of the quality table: a name, and how the cache is kept.

To add one, write a line in `_methods`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import OptionError, did_you_mean
from ..policies import PRESETS, ArrayPolicy, FlowMM, Policy

FULL = "full"
"""The method that all others are compared with."""

KINDS = ("reference", "preset", "quantized", "ablation")
"""What a method is in the table: a yardstick, a method of its own, one to hold against quantized
caches or to put on top of them, or one with a part changed."""

WINDOW, FLOW_ROWS = 16, 64
"""The proxy window and the flow samples of every method: what is read is observed once for all."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the quality table.

    Attributes
    ----------
    name : str
        Name for the command line.
    what : str
        What it is, in a few words.
    policy : Policy or None
        How the cache is merged; None for not at all.
    cache_type : str
        Type of K and V.
    kind : str
        One of `KINDS`.
    base : str or None
        The method that an ablation changes.
    budgets : tuple of float or None
        What it keeps; None for what is asked for.
    """

    name: str
    what: str
    policy: Policy | None = None
    cache_type: str = "f16"
    kind: str = "preset"
    base: str | None = None
    budgets: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        policy = self.policy
        if policy is not None and (policy.window, policy.flow_rows) != (WINDOW, FLOW_ROWS):
            raise OptionError(
                f"{self.name}: evaluated policies have window={WINDOW} and flow_rows={FLOW_ROWS}"
            )

    def kept(self, budgets: Sequence[float]) -> tuple[float, ...]:
        """Return the budgets at which it is measured when `budgets` are asked for."""
        if self.policy is None:
            return (1.0,)
        return tuple(budgets) if self.budgets is None else self.budgets

    @property
    def definition(self) -> dict[str, Any]:
        """All that its answers depend on."""
        choices = None if self.policy is None else self.policy.choices
        if isinstance(self.policy, ArrayPolicy):
            # Its options do not say what it is.
            choices = {"name": self.policy.name, **(choices or {})}
        return {"policy": choices, "cache_type": self.cache_type}


def varied(name: str, **changes: Any) -> Policy:
    """Return the policy of a preset with some options changed, fixed ones too."""
    policy = PRESETS[name]
    assert policy is not None
    return Policy(**(policy.choices | changes))


def _ablations(base: str, rows: dict[str, tuple[str, dict[str, Any]]]) -> Iterator[Method]:
    """Return a preset with one part after the other changed, where that changes anything."""
    unchanged = varied(base)
    for name, (what, changes) in rows.items():
        policy = varied(base, **changes)
        if policy != unchanged:
            yield Method(
                name=f"{base}/{name}", what=what, policy=policy, kind="ablation", base=base
            )


def _methods() -> Iterator[Method]:
    yield Method(name=FULL, what="full cache", kind="reference")
    yield Method(name="q8_0", what="no merging, q8_0", cache_type="q8_0", kind="reference")
    yield Method(name="q4_0", what="no merging, q4_0", cache_type="q4_0", kind="reference")

    seen: list[Policy] = []
    for name, policy in PRESETS.items():
        if policy is not None and policy not in seen:
            seen.append(policy)
            what = "flowmm's selection, merging off" if name == "evict" else name
            yield Method(name=name, what=what, policy=policy)
    yield Method(
        name="flowmm-literal",
        what="FlowMM as in the paper",
        policy=FlowMM(bias="none", fold="mean", keys="move"),
    )

    # As many bytes as q8_0 (34 of 64) and q4_0 (18 of 64), and on top of them.
    for cache_type, share in (("q8_0", 34 / 64), ("q4_0", 18 / 64)):
        yield Method(
            name=f"mosaic={cache_type}",
            what=f"mosaic, as many bytes as {cache_type}",
            policy=PRESETS["mosaic"],
            kind="quantized",
            budgets=(share,),
        )
        yield Method(
            name=f"mosaic+{cache_type}",
            what=f"mosaic, cells in {cache_type}",
            policy=PRESETS["mosaic"],
            cache_type=cache_type,
            kind="quantized",
        )

    yield from _ablations(
        "flowmm",
        {
            "no-flow": ("folds into any kept token in every layer", {"match": "any"}),
            "no-sensitivity": ("important tokens take folds too", {"tau": 1.0}),
            "neither": ("no flow, no sensitivity", {"match": "any", "tau": 1.0}),
            "modality": ("never folds across modalities", {"match": "modality"}),
            "segment": ("never folds across pictures", {"match": "segment"}),
            "no-bias": ("no bias", {"bias": "none"}),
            "bias-count": ("bias by count", {"bias": "count"}),
            "bias-fit": ("fitted bias", {"bias": "fit"}),
            "keep-keys": ("keys stay", {"keys": "keep"}),
        },
    )
    yield from _ablations(
        "look-m",
        {
            "mean": ("folds with equal weights", {"fold": "mean"}),
            "weighted": ("folds with weights by similarity", {"fold": "weighted"}),
        },
    )
    yield from _ablations(
        "auto",
        {
            "evict": ("same selection, merging off", {"match": "none", "bias": "none"}),
            "no-bias": ("no bias", {"bias": "none"}),
            "early": ("the first quarter of the layers keeps twice", {"allocate": "early"}),
            "members=2": ("a cell takes up two tokens", {"members": 2}),
            "neighbours=3": ("scores pooled over 3 tokens", {"neighbours": 3}),
        },
    )
    yield from _ablations(
        "mosaic",
        {
            "evict": ("same selection, merging off", {"match": "none", "bias": "none"}),
            "no-bias": ("no bias", {"bias": "none"}),
            "bias-count": ("bias by count", {"bias": "count"}),
            "bias-fit": ("fitted bias", {"bias": "fit"}),
            "keep-keys": ("keys stay", {"keys": "keep"}),
            "pivots=0": ("groups only", {"pivots": 0.0}),
            "pivots=0.25": ("a quarter by importance", {"pivots": 0.25}),
            "pivots=0.5": ("half by importance", {"pivots": 0.5}),
            "pivots=0.75": ("three quarters by importance", {"pivots": 0.75}),
            "pivots=1": ("importance only", {"pivots": 1.0}),
            "members=0": ("a cell takes up all of its group", {"members": 0}),
            "no-floor": ("no floor", {"floor": 0}),
            "floor=1": ("one cell a picture at least", {"floor": 1}),
            "floor=2": ("two cells a picture at least", {"floor": 2}),
            "text=0.25": ("text takes a quarter at most", {"text": 0.25}),
            "text=0.75": ("text takes three quarters at most", {"text": 0.75}),
            "text=0.5": ("text takes half at most", {"text": 0.5}),
            "text=1": ("text before pictures", {"text": 1.0}),
            "text-pivots=0": ("text in groups only", {"text_pivots": 0.0}),
            "text-pivots=0.5": ("half of text by importance", {"text_pivots": 0.5}),
            "text-pivots=0.75": ("three quarters of text by importance", {"text_pivots": 0.75}),
            "text-pivots=1": ("text by importance only", {"text_pivots": 1.0}),
            "keep=4": ("the last four tokens are kept", {"keep": 4}),
            "keep=8": ("the last eight tokens are kept", {"keep": 8}),
            "keep=16": ("the last sixteen tokens are kept", {"keep": 16}),
            "pyramid": ("early layers keep more", {"allocate": "pyramid"}),
            "uniform": ("all layers keep the same", {"allocate": "uniform"}),
            "no-pooling": ("scores not pooled", {"neighbours": 1}),
            "no-value-norm": ("scores without the norm of values", {"value_norm": False}),
        },
    )


METHODS: dict[str, Method] = {method.name: method for method in _methods()}
"""Every method by name, in the order of the table."""


def choose(words: Sequence[str]) -> tuple[Method, ...]:
    """Return methods in the order of the table; the full cache is always among them.

    Parameters
    ----------
    words : sequence of str
        Names, patterns such as ``"mosaic*"``, kinds such as ``"preset"``, or ``"all"``.

    Raises
    ------
    OptionError
        If one is not known.
    """
    chosen = {FULL}
    for word in words:
        found = {
            name
            for name, method in METHODS.items()
            if word in ("all", method.kind) or fnmatchcase(name, word)
        }
        if not found:
            kinds = [*KINDS, "all"]
            raise OptionError(
                f"there is no method {word!r}: it must be one of {', '.join(METHODS)}, a pattern "
                f"such as mosaic*, or one of {', '.join(kinds)}."
                f"{did_you_mean(word, [*METHODS, *kinds])}"
            )
        chosen |= found
    return tuple(method for name, method in METHODS.items() if name in chosen)
