"""A policy: one choice for each step of a merge."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

from ..errors import PolicyError, did_you_mean

# Accepted words, each with its value in kvmerge.h.
SCORES = {"proxy": 0, "position": 1, "all": 2}
MATCHES = {"none": 0, "any": 1, "modality": 2, "flow": 3, "segment": 4}
BIASES = {"none": 0, "count": 1}
KEYS = {"keep": False, "move": True}
FOLDS = {"mean": 0}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One choice for each step of score, select, match and fold.

    The methods with a name are subclasses that fix some of the choices; this class combines them
    freely.

    Parameters
    ----------
    score : {"proxy", "position", "all"}
        How important a token is: the attention that the last `window` tokens of the prompt give
        it, its place (the later, the better), or the attention that all tokens give it.
    match : {"flow", "any", "modality", "segment", "none"}
        Where a token that is not kept may be folded: into any kept one where much attention
        crosses modalities and else into one of its modality, into any, into one of its modality,
        into one of its own picture or stretch of text, or nowhere.
    bias : {"count", "none"}
        What is added to the attention logit of a token that stands for others: the logarithm of
        how many it stands for, or nothing.
    keys : {"move", "keep"}
        Whether such a token's key becomes the mean of its group or stays as it is.
    fold : {"mean"}
        How values (and moved keys) are put together.
    window : int
        Tokens at the end of the prompt whose queries score and which are kept, 1 to 256.
    sinks : int
        First tokens of a sequence, always kept, 0 to 256.
    flow_rows : int
        Queries sampled per modality to estimate the flow, 1 to 65536.
    theta : float
        Share of attention that crosses modalities from which on a layer folds across them, 0 to 1.
    tau : float
        Kept tokens above this quantile of importance receive no folds, 0 to 1; 1 protects none.
    """

    name: ClassVar[str] = "custom"

    score: str = "proxy"
    match: str = "flow"
    bias: str = "count"
    keys: str = "move"
    fold: str = "mean"
    window: int = 16
    sinks: int = 4
    flow_rows: int = 64
    theta: float = 0.25
    tau: float = 0.8

    def __post_init__(self) -> None:
        self._check_word("score", SCORES)
        self._check_word("match", MATCHES)
        self._check_word("bias", BIASES)
        self._check_word("keys", KEYS)
        self._check_word("fold", FOLDS)
        self._check_int("window", 1, 256)
        self._check_int("sinks", 0, 256)
        self._check_int("flow_rows", 1, 65536)
        self._check_fraction("theta")
        self._check_fraction("tau")

    def _refuse(self, field: str, accepted: str, hint: str = "") -> PolicyError:
        value = getattr(self, field)
        return PolicyError(
            f"{type(self).__name__}({field}={value!r}): {field} must be {accepted}.{hint}"
        )

    def _check_word(self, field: str, accepted: dict[str, Any]) -> None:
        value = getattr(self, field)
        if not isinstance(value, str) or value not in accepted:
            words = ", ".join(repr(word) for word in accepted)
            raise self._refuse(field, f"one of {words}", did_you_mean(value, accepted))

    def _check_int(self, field: str, low: int, high: int) -> None:
        value = getattr(self, field)
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or not low <= int(value) <= high:
            raise self._refuse(field, f"a whole number from {low} to {high}")

    def _check_fraction(self, field: str) -> None:
        value = getattr(self, field)
        number = isinstance(value, Real) and not isinstance(value, bool)
        # A comparison with NaN is false.
        if not number or not 0 <= float(value) <= 1:
            raise self._refuse(field, "a number from 0 to 1")

    def engine_params(self) -> dict[str, Any]:
        """Return the fields of ``struct kvmerge_params`` by name."""
        return {
            "score": SCORES[self.score],
            "match": MATCHES[self.match],
            "bias": BIASES[self.bias],
            "move_keys": KEYS[self.keys],
            "n_window": int(self.window),
            "n_sink": int(self.sinks),
            "n_flow_rows": int(self.flow_rows),
            "theta": float(self.theta),
            "tau": float(self.tau),
        }

    @property
    def always_kept(self) -> int:
        """Tokens that a merge keeps whatever the budget: the sinks and the window."""
        return int(self.sinks + self.window)

    def __str__(self) -> str:
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.init)
        return f"{self.name}({shown})"
