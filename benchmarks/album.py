"""Answers about albums, on a model of real parts: every method at equal cells.

The model is DINOv2-small and SmolLM2-135M-Instruct, fetched with pip by version and SHA-256, joined
by what is in ``real_parts/album.npz`` (trained with ``real_parts/train.py``).  The albums are
photographs of your own, each named by what it shows (``camel.jpg``), and pages of print that are
drawn afresh.  A budget is a share of the pictures' tokens, and every method gets as many cells as
that and all text take.  A run that was interrupted goes on.

    pip install "kvmerge[album]"
    python benchmarks/album.py FOLDER_OF_PHOTOGRAPHS --out kvmerge-album
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from real_parts import album, build, parts
from real_parts.controls import RANDOM

from kvmerge.evaluation.answers import Answer, Record, Settings, definitions, identity
from kvmerge.evaluation.bootstrap import difference
from kvmerge.evaluation.methods import FULL, choose
from kvmerge.evaluation.run import Models, Plan, run
from kvmerge.evaluation.scores import Row, Scores, collect

METHODS = "random,reference,preset,auto/*"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", type=Path, help="folder of .jpg files")
    parser.add_argument("--albums", type=int, default=30, metavar="N")
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="of each album")
    parser.add_argument("--methods", default=METHODS, help=f"as for kvmerge eval: {METHODS}")
    parser.add_argument("--budgets", default="0.2,0.1,0.05", help="shares of the pictures")
    parser.add_argument("--modes", default="known,unknown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kvmerge-album"))
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    args = parser.parse_args()

    language_model = parts.fetch(parts.SMOLLM2)
    model, mmproj = build.build()
    photographs = album.photographs(args.photographs, language_model)
    vocabulary = album.vocabulary(language_model)
    words = args.methods.split(",")
    methods = choose([word for word in words if word != RANDOM.name])
    if RANDOM.name in words:
        methods += (RANDOM,)
    plan = Plan(
        samples=tuple(
            album.samples(args.albums, args.pictures, photographs, vocabulary, args.seed)
        ),
        methods=methods,
        budgets=tuple(map(float, args.budgets.split(","))),
        modes=tuple(args.modes.split(",")),
        merge_before=2,
        of_pictures=True,
    )
    settings = Settings(
        model=identity(model),
        mmproj=identity(mmproj),
        data="albums of photographs and pages",
        seed=args.seed,
        merge_before=2,
        methods=definitions(methods),
    )
    n_ctx = 512 + 128 * args.pictures
    with Record(args.out, settings) as record:
        run(plan, Models(model, mmproj, n_ctx, args.threads), record, jobs=args.jobs)
        print(table(record.answers))


def table(answers: list[Answer]) -> str:
    """Return a line a method: points, and the paired difference to the full cache, in per cent."""
    found = collect(answers)
    columns = [(scores, budget) for scores in found for budget in scores.budgets]
    names = dict.fromkeys(name for scores in found for name, _ in scores.values)
    lines = [
        ["method", *(f"{scores.mode}, {budget:.0%}" for scores, budget in columns)],
        ["---", *("---:" for _ in columns)],
    ]
    for name in names:
        cells = []
        for scores, budget in columns:
            row = (name, budget) if (name, budget) in scores.values else (name, 1.0)
            cells.append(_shown(scores, row) if row in scores.values else "")
        lines.append([f"`{name}`", *cells])
    counts = ", ".join(f"{scores.mode} {_n(scores)}" for scores in found)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"Questions: {counts}\n\n{text}"


def _n(scores: Scores) -> int:
    return int((~np.isnan(scores.values[FULL, 1.0])).sum())


def _shown(scores: Scores, row: Row) -> str:
    points = scores.average(row)
    if row[0] == FULL:
        return f"{100 * points:.0f}"
    apart = difference(scores.values[row], scores.values[FULL, 1.0])
    if apart is None:
        return f"{100 * points:.0f}"
    low, high = (f"{100 * end:+.0f}".replace("-", "−") for end in (apart.low, apart.high))
    return f"{100 * points:.0f} [{low}, {high}]"


if __name__ == "__main__":
    main()
