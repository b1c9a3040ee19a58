"""FlowMM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Policy


@dataclass(frozen=True, kw_only=True)
class FlowMM(Policy):
    r"""Fold across modalities only in layers where attention crosses them.

    FlowMM (arXiv 2511.05534).  Per layer, the share of attention that crosses modalities

    .. math:: \rho = \frac{1}{H} \sum_h \frac{\sum_{m(j) \ne m(i)} \alpha^h_{j \to i}}
              {\sum_{j, i} \alpha^h_{j \to i}}

    decides (eq. 6-7): from `theta` on a token may be folded into any kept one, below it only into
    one of its own modality.  Kept are the tokens with the most attention from the prompt's last
    `window` tokens (eq. 8), per layer and KV head.  Each other token is folded into the kept one
    whose key is nearest by cosine (eq. 9), the most important of which, above the quantile `tau`,
    take no folds (eq. 10).

    ``FlowMM(bias="none", keys="move", fold="mean")`` is the paper to the letter.

    Parameters
    ----------
    theta : float, default 0.25
        Share of attention that crosses modalities from which on a layer folds across them, 0 to 1.
    tau : float, default 0.8
        Kept tokens above this quantile of importance receive no folds, 0 to 1; 1 protects none.
        The paper leaves it open.
    window : int, default 16
        Tokens at the end of the prompt whose queries score and which are kept, 1 to 256.
    sinks : int, default 4
        First tokens, always kept, 0 to 256.
    flow_rows : int, default 64
        Queries sampled per modality to estimate the flow, 1 to 65536; as many as the prompt has
        tokens makes it exact.
    keys : {"move", "keep"}
        Whether the key of a token that stands for others becomes the mean of its group.
    bias : {"fit", "count", "none"}
        What such a token's attention logit gets: what makes the window's queries and as many of the
        text before give it the attention of its group, the logarithm of the number it stands for,
        or nothing.  The paper leaves it open.
    fold : {"mean", "pivot", "weighted", "exp", "gaussian"}
        The weights in the mean of a group: equal; each member half and the kept token the rest;
        by similarity; by its exponential; or by a Gaussian of the distance.
    """

    name: ClassVar[str] = "flowmm"

    score: str = field(default="proxy", init=False)
    select: str = field(default="top", init=False)
    match: str = field(default="flow", init=False)
    bias: str = "fit"
