"""A policy: one choice for each step of a merge."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..budget import Budget
from ..errors import BudgetError, PolicyError
from .options import OPTIONS

if TYPE_CHECKING:
    from ..native.binding import Engine, Planner

_GROUPING = ("mosaic", "runs", "media")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a cache is merged: one choice for each step.

    The methods with a name are subclasses that fix some of the choices and have other defaults.
    This class combines them, where they go together: ``"mosaic"``, ``"runs"`` and ``"media"`` form
    their own groups inside a picture or stretch of text, so that `match` is ``"segment"`` or
    ``"none"`` there and `tau` 1.

    Parameters
    ----------
    score : {"proxy", "position", "all"}
        How important a token is: the attention that the last `window` tokens of the prompt give
        it, its place (the later, the better), or the attention that all tokens give it.
    allocate : {"uniform", "pyramid", "cover", "entropy", "early"}
        How many cells each layer gets: the same, fewer with depth, as many as cover the share
        `cover` of each modality's attention, by the entropy of attention between modalities, or
        twice the mean in the first quarter of the layers.
    select : {"top", "text", "modality", "mosaic", "runs", "media"}
        Which tokens are kept: the highest scores; text before all else; each modality by the
        attention that it gets; partly by score and partly as groups that cover every picture; runs
        of similar neighbours become one; or all text beside groups that cover every picture.
    match : {"flow", "any", "modality", "segment", "none"}
        Where a token that is not kept may be folded: into any kept one where much attention
        crosses modalities and else into one of its modality; into any; into one of its modality;
        into one of its own picture or stretch of text; or nowhere.
    fold : {"mean", "pivot", "weighted", "exp", "gaussian"}
        The weights in the mean of a group: equal; each member half and the kept token the rest;
        by similarity; by its exponential; or by a Gaussian of the distance.
    bias : {"count", "none", "fit"}
        What is added to the attention logit of a token that stands for others: the logarithm of
        how many, nothing, or what the window's queries and as many queries of text before them say
        that the group weighs.
    keys : {"move", "keep"}
        Whether the key of a token that stands for others becomes the mean of its group.
    pool : {"mean", "max"}
        How scores are pooled over neighbours.
    value_norm : bool
        Whether scores are multiplied with the norm of the value.
    window : int
        Tokens at the end of the prompt whose queries score, 1 to 256.
    keep : int
        Last tokens, always kept and never folded into, 0 to 256; 0 is as many as `window`.
    sinks : int
        First tokens, always kept, 0 to 256.
    flow_rows : int
        Queries sampled per modality to estimate the flow, 1 to 65536.
    neighbours : int
        Neighbours over which scores are pooled, odd, 1 to 63; 1 does not pool.
    floor : int
        Cells that every picture keeps at least with ``select="mosaic"``, 0 to 1024.
    members : int
        Tokens that a kept one may receive, 0 to 65536; 0 is any number.
    theta : float
        Share of attention that crosses modalities from which on a layer folds across them, 0 to 1.
    tau : float
        Kept tokens above this quantile of importance receive no folds, 0 to 1; 1 protects none.
    recent : float
        Share of the budget that goes to the last tokens, 0 to 1.
    cover : float
        Share of attention to cover with ``allocate="cover"``, 0 to 1.
    similarity : float
        Cosine below which nothing is folded, -1 to 1.
    pivots : float
        Share of a picture's cells that go by score with ``select="mosaic"``, 0 to 1.
    text : float
        Share of the budget that text may take with ``select="mosaic"``, 0 to 1.
    text_pivots : float
        Share of the cells of text that go by score with ``select="mosaic"``, 0 to 1.
    """

    name: ClassVar[str] = "custom"

    named: ClassVar[dict[str, type[Policy]]] = {}
    """Every method that has a name of its own, by it."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Make a method known by its name, from the moment that its module is imported."""
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            Policy.named[cls.name.lower()] = cls

    score: str = "proxy"
    allocate: str = "uniform"
    select: str = "top"
    match: str = "flow"
    fold: str = "mean"
    bias: str = "count"
    keys: str = "move"
    pool: str = "mean"
    value_norm: bool = False
    window: int = 16
    keep: int = 0
    sinks: int = 4
    flow_rows: int = 64
    neighbours: int = 1
    floor: int = 1
    members: int = 0
    theta: float = 0.25
    tau: float = 0.8
    recent: float = 0.0
    cover: float = 0.9
    similarity: float = -1.0
    pivots: float = 0.5
    text: float = 0.5
    text_pivots: float = 0.75

    def __post_init__(self) -> None:
        for option, value in self.choices.items():
            problem = OPTIONS[option].problem(value)
            if problem is not None:
                raise PolicyError(
                    f"{type(self).__name__}({option}={value!r}): {option} must be {problem}"
                )
        if self.select in _GROUPING and (self.match not in ("segment", "none") or self.tau != 1.0):
            raise PolicyError(
                f"{type(self).__name__}(select={self.select!r}, match={self.match!r}, "
                f"tau={self.tau}): it forms its own groups, inside a picture or stretch of text: "
                "match must be 'segment', or 'none' to fold nothing, and tau 1.0"
            )
        if self.neighbours % 2 == 0:
            raise PolicyError(
                f"{type(self).__name__}(neighbours={self.neighbours}): neighbours must be odd, the "
                "token itself and as many on each side"
            )

    @property
    def choices(self) -> dict[str, Any]:
        """The value of every option by name, chosen or fixed."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def engine_params(self) -> dict[str, Any]:
        """Return the fields of ``struct kvmerge_params`` by name."""
        return {
            OPTIONS[name].param: OPTIONS[name].native(value) for name, value in self.choices.items()
        }

    def planner(self, engine: Engine) -> Planner | None:
        """Return what plans the merges of an engine, or None where its own steps do."""
        return None

    @property
    def always_kept(self) -> int:
        """Tokens that a merge keeps whatever the budget: the sinks and the last ones."""
        return int(self.sinks + (self.keep or self.window))

    @property
    def budget_of(self) -> str:
        """What a budget is of: ``"tokens"``, or ``"media"`` where text is left alone."""
        return "media" if self.select == "media" else "tokens"

    def check_budget(self, budget: Budget) -> None:
        """Refuse a number of cells that leaves nothing but the first and last tokens.

        Raises
        ------
        BudgetError
            If it does.
        """
        least = int(self.sinks + max(self.keep, self.window)) + 1
        if isinstance(budget.kept, int) and budget.kept < least:
            meant = "1.0 keeps everything" if budget.kept == 1 else "a float is a fraction"
            raise BudgetError(
                f"kv_budget={budget.kept}: a whole number is cells, and {budget.kept} of them hold "
                f"nothing of the prompt but its first and last tokens: at least {least} are needed "
                f"with {self.name}. Did you mean a fraction? {meant}, 0.2 a fifth"
            )

    def kept_cells(self, budget: Budget, n_text: int, n_media: int, n_spans: int) -> int:
        """Return the cells that a merge leaves.

        Parameters
        ----------
        budget : Budget
            What is asked for.
        n_text, n_media : int
            Tokens of text, and of pictures and sound.
        n_spans : int
            Pictures and sounds.
        """
        if self.budget_of == "media":
            return n_text + budget.cells(n_media, n_spans * self.floor)
        return budget.cells(n_text + n_media, self.always_kept)

    def __str__(self) -> str:
        """Return the name with what differs from the defaults of the method."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.init and getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(shown)})" if shown else self.name
