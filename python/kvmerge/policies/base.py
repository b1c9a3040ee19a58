"""A policy: one choice for each step of a merge."""

from __future__ import annotations

from dataclasses import dataclass, fields
from inspect import getdoc
from typing import TYPE_CHECKING, Any, ClassVar

from ..budget import Budget
from ..errors import BudgetError, PolicyError
from .options import OPTIONS, default, described

if TYPE_CHECKING:
    from ..native.binding import Engine, Planner

_GROUPING = ("mosaic", "runs", "media")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a cache is merged: one choice for each step.

    The methods with a name are subclasses that fix some of the choices and have other defaults.
    This class combines them, where they go together: ``"mosaic"``, ``"runs"`` and ``"media"`` form
    their own groups inside a picture or stretch of text, so that `match` is ``"segment"`` or
    ``"none"`` there and `tau` 1.  ``help(Policy)`` lists every option, with its range and default.
    """

    name: ClassVar[str] = "custom"

    named: ClassVar[dict[str, type[Policy]]] = {}
    """Every method that has a name of its own, by it."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Make a method known by its name, from the moment that its module is imported."""
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            Policy.named[cls.name.lower()] = cls

    score: str = default("score")
    allocate: str = default("allocate")
    select: str = default("select")
    match: str = default("match")
    fold: str = default("fold")
    bias: str = default("bias")
    keys: str = default("keys")
    pool: str = default("pool")
    value_norm: bool = default("value_norm")
    window: int = default("window")
    keep: int = default("keep")
    sinks: int = default("sinks")
    flow_rows: int = default("flow_rows")
    neighbours: int = default("neighbours")
    floor: int = default("floor")
    members: int = default("members")
    theta: float = default("theta")
    tau: float = default("tau")
    recent: float = default("recent")
    cover: float = default("cover")
    similarity: float = default("similarity")
    pivots: float = default("pivots")
    text: float = default("text")
    text_pivots: float = default("text_pivots")

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
        if self.score == "position" and self.value_norm:
            raise PolicyError(
                f"{type(self).__name__}(score='position', value_norm=True): a place is multiplied "
                "with nothing: value_norm must be False"
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


Policy.__doc__ = f"{getdoc(Policy)}\n\nParameters\n----------\n{described()}"
