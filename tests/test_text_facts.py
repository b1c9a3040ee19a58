"""Facts in a text that has to shrink, on a language model that nobody here made.

It is fetched with pip, so this is for `pytest -m slow`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from kvmerge.evaluation import needles
from kvmerge.evaluation.answers import Record, Settings, definitions, identity
from kvmerge.evaluation.methods import FULL, choose
from kvmerge.evaluation.run import Models, Plan, run
from kvmerge.evaluation.scores import collect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

WHO = "The old man,A girl,My neighbour,The captain,Nobody,A tired doctor,The whole village".split(
    ","
)
DID = "walked along the shore,sold bread,looked for a dog,painted the fence,kept quiet".split(",")
WHEN = "in the morning,before the rain,all summer,when the bell rang,after supper".split(",")


def story(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(
        f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHEN)} for {rng.integers(2, 90)} days."
        for _ in range(120)
    )


@pytest.mark.slow
def test_auto_keeps_what_is_asked_for(tmp_path: Path) -> None:
    from real_parts.parts import SMOLLM2, fetch

    model = fetch(SMOLLM2)
    methods = choose([FULL, "auto"])
    samples = tuple(
        needles.samples(
            [story(seed) for seed in range(8)],
            3,
            seed=0,
            n_tokens=800,
            count=lambda text: len(text) // 4,
        )
    )
    plan = Plan(samples=samples, methods=methods, budgets=(0.2,), modes=("known",), merge_before=2)
    settings = Settings(
        model=identity(model),
        mmproj="",
        data="stories",
        seed=0,
        merge_before=2,
        methods=definitions(methods),
    )
    with Record(tmp_path, settings) as record:
        run(plan, Models(model, None, 2048, 2), record, jobs=1)
        (found,) = collect(record.answers)
    full, auto = found.average((FULL, 1.0)), found.average(("auto", 0.2))
    assert full >= 0.5, "too hard for the model: this shows nothing"
    assert auto >= 0.8 * full
