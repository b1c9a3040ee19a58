"""What a process takes that may not have more than a phone gives one.

Each row is a process of its own: the model of the package with its vision part, 12 pictures in one
prompt and questions about them, with the full cache and with a cap on cells of q8_0, each under no
limit and under limits of its address space (what ``ulimit -v`` sets).  The address space counts
everything that is mapped, files and stacks of threads too; the resident memory is what was in use.

    python benchmarks/small_machine.py
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
CAPPED: dict[str, Any] = {
    "kv_merge": "auto",
    "kv_max_cells": 512,
    "type_k": "q8_0",
    "type_v": "q8_0",
    "flash_attn": True,
}
SETUPS: dict[str, dict[str, Any]] = {"full cache": {}, "512 cells of q8_0": CAPPED}


def status(name: str) -> float:
    """Return a size out of ``/proc/self/status``, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def worker(setup: str, limit: int, pictures: int) -> None:
    """Answer the questions under a limit in MiB, 0 for none; print what it took as JSON."""
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit * MIB, limit * MIB))
    begin = time.perf_counter()
    from kvmerge import Llama, pocket

    imported = time.perf_counter() - begin
    import numpy as np

    prompt = pocket.make_prompt(np.random.default_rng(12), pictures)
    with Llama(
        pocket.model_path(),
        mmproj=pocket.mmproj_path(),
        n_ctx=4096,
        n_threads=2,
        n_threads_batch=2,
        verbose=False,
        **SETUPS[setup],
    ) as llm:
        loaded = status("VmRSS")
        with llm.context(prompt.context(), temperature=0.0, max_tokens=48) as ctx:
            right = []
            for question in prompt.questions:
                answer = ctx.ask(question.text)["choices"][0]["message"]["content"]
                right.append(pocket.score(question.task, answer, question.answer) == 1)
        stats = llm.kv_stats()
    print(
        json.dumps(
            {
                "import": 1000 * imported,
                "loaded": loaded,
                "resident": status("VmHWM"),
                "mapped": status("VmPeak"),
                "tokens": stats.tokens,
                "cells": stats.cells,
                "right": f"{sum(right)}/{len(right)}",
            }
        )
    )


def run(setup: str, limit: int, pictures: int) -> dict[str, Any] | str:
    """Return what a process of its own measured, or the last line of its error."""
    command = [sys.executable, __file__, "--worker", setup, "--pictures", str(pictures)]
    # glibc gives each thread an arena of 64 MiB of address space; a limit on that is met sooner.
    done = subprocess.run(
        [*command, "--limit", str(limit)],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = done.stderr.strip().splitlines()
    return f"{said[-1] if said else 'no message'} (status {done.returncode})"


def row(setup: str, limit: int, pictures: int) -> None:
    """Print one row."""
    got = run(setup, limit, pictures)
    name = f"| {setup} | {f'{limit} MiB' if limit else 'none'} |"
    if isinstance(got, str):
        print(f"{name} {got} | | | | | | |", flush=True)
        return
    print(
        f"{name} {got['import']:.0f} | {got['loaded']:.0f} | {got['resident']:.0f} "
        f"| {got['mapped']:.0f} | {got['tokens']} | {got['cells']} | {got['right']} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--limits", type=int, nargs="+", default=[0, 2048, 1024, 512], help="MiB")
    parser.add_argument("--worker", choices=SETUPS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.limit, args.pictures)
        return
    print(
        "| cache | limit | import ms | loaded MiB | peak resident MiB | peak mapped MiB | tokens "
        "| cells | right |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for setup in SETUPS:
        for limit in args.limits:
            row(setup, limit, args.pictures)


if __name__ == "__main__":
    main()
