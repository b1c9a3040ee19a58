"""Every figure of the quality section and of docs/quality.md, one run after the other.

All of it takes about five hours on two cores; what was interrupted goes on where it stopped.

    python benchmarks/quality.py --jobs 2 --update docs/quality.md
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ABLATIONS = (
    "flowmm/no-flow,flowmm/no-sensitivity,flowmm/no-bias,flowmm/keep-keys,"
    "mosaic/evict,mosaic/no-bias,mosaic/bias-count,mosaic/keep-keys,mosaic/members=0,"
    "mosaic/uniform,mosaic/no-floor"
)
KNOWN = f"--pictures 12 --questions 200 --methods reference,preset,mosaic=*,{ABLATIONS}"
UNKNOWN = "--pictures 12 --questions 200 --mode unknown --methods reference,preset"
OTHERS = "--questions 200 --methods full,mosaic,mosaic/evict,flowmm"
OTHER_PROMPTS = (f"--pictures 2,24 {OTHERS}", f"--pictures 12 --distractors 400 {OTHERS}")
RUNS = (KNOWN, UNKNOWN, *OTHER_PROMPTS)
"""Options of ``kvmerge eval``; all write into one folder."""
QUICK = ("--pictures 2 --questions 2 --methods full,auto",)


def main() -> int:
    """Run all and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two questions, two methods")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--out", type=Path, default=Path("kvmerge-eval"), help="folder of answers")
    parser.add_argument(
        "--update", type=Path, action="append", default=[], help="page to put the tables into"
    )
    arguments = parser.parse_args()
    evaluate = [sys.executable, "-m", "kvmerge", "eval", "--out", str(arguments.out)]
    for options in QUICK if arguments.quick else RUNS:
        subprocess.run([*evaluate, *options.split(), "--jobs", str(arguments.jobs)], check=True)
    pages = [word for page in arguments.update for word in ("--update", str(page))]
    return subprocess.run([*evaluate, "--report-only", *pages], check=True).returncode


if __name__ == "__main__":
    sys.exit(main())
