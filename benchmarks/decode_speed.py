"""Decoding speed of a merged prompt against the stock library at the depth that is left.

A 4096-token prompt is held in 819 cells. The stock library holds 819 tokens (what merging should
cost nothing against) and 4096 tokens (what it saves). All workers live at once and are measured in
turns, so that a busy machine slows all of them alike; what counts is the ratio.

    python benchmarks/decode_speed.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

PROMPT, SHARE, GENERATED, LAYERS = 4096, 0.2, 32, 16


def worker(model: str, tokens: int, cells: int, threads: int) -> None:
    """Read a prompt, merge it when cells > 0, then measure on request: one line each."""
    import numpy as np

    from session import Session

    rng = np.random.default_rng(5)
    with Session(
        model, merge={} if cells else None, n_ctx=tokens + 256, threads=threads
    ) as session:
        prompt = rng.integers(0, session.n_vocab, tokens).tolist()
        session.decode(prompt[:8])
        session.remove(-1, -1)
        session.position = 0
        start = time.perf_counter()
        for i in range(0, tokens, 512):
            session.decode(prompt[i : i + 512])
        read = time.perf_counter() - start
        start = time.perf_counter()
        if cells:
            assert session.engine
            session.engine.merge(cells)
        merge = time.perf_counter() - start
        parts = {}
        if cells:
            stats = session.engine.stats()
            parts = {
                "score": stats.t_score_us / 1e6,
                "match": stats.t_match_us / 1e6,
                "fold": stats.t_fold_us / 1e6,
            }
        print(json.dumps({"read": read, "merge": merge, **parts}), flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            for i in range(GENERATED):
                session.decode([i])
            seconds = time.perf_counter() - start
            # back to the depth that is measured
            assert session.remove(tokens, -1)
            session.position = tokens
            print(json.dumps({"seconds": seconds}), flush=True)


class Worker:
    """A process that holds a prompt and generates on request."""

    def __init__(self, model: Path, tokens: int, cells: int, threads: int, stock: Path | None):
        environment = dict(os.environ)
        if stock:
            environment["STOCK_LIBRARIES"] = str(stock)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(model), str(tokens), str(cells),
             "--threads", str(threads)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.prepared = self.answer()

    def answer(self) -> dict[str, float]:
        """Wait for one line of the worker."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker died: run it by hand to see why")
        return json.loads(line)

    def tokens_per_second(self) -> float:
        """Generate once."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return GENERATED / self.answer()["seconds"]


def main() -> None:
    """Print a table of speeds and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=PROMPT, help="of the prompt")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the random model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "TOKENS", "CELLS"))
    args = parser.parse_args()
    if args.worker:
        model, tokens, cells = args.worker
        worker(model, int(tokens), int(cells), args.threads)
        return

    from needed_packages import STOCK, need

    need("gguf", programs=STOCK)
    import gguf

    from random_model import Shape, write_random_model
    from stock_library import stock_libraries

    stock = stock_libraries()
    tokens, cells = args.tokens, int(SHARE * args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        shape = Shape(layers=args.layers, heads=16, heads_kv=16, head_size=64, ffn=4096, vocab=4096)
        model = write_random_model(
            Path(folder) / "random-0.27b.gguf",
            shape,
            quantization=gguf.GGMLQuantizationType.Q8_0,
        )
        workers = {
            f"stock, {cells} tokens": Worker(model, cells, 0, args.threads, stock),
            f"kvmerge, {tokens} tokens in {cells} cells": Worker(
                model, tokens, cells, args.threads, None
            ),
            f"stock, {tokens} tokens": Worker(model, tokens, 0, args.threads, stock),
        }
        speeds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(args.rounds):
            for name, one in workers.items():
                speeds[name].append(one.tokens_per_second())
    names = list(workers)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"0.27 B MHA, {args.layers} layers x 16 heads of 64, Q8_0, {args.threads} threads,")
    print(f"median of {args.rounds} rounds in turns\n")
    print("| | tokens/s | ratio to stock at the same depth |")
    print("| --- | ---: | ---: |")
    for name in names:
        print(f"| {name} | {median[name]:.1f} | {median[name] / median[names[0]]:.2f} |")
    merged = workers[names[1]].prepared
    print(
        f"\nReading {tokens} tokens took {merged['read']:.2f} s, merging {merged['merge']:.2f} s "
        f"({merged['merge'] / merged['read']:.1%}): score {merged['score']:.2f}, "
        f"match {merged['match']:.2f}, fold {merged['fold']:.2f} s."
    )


if __name__ == "__main__":
    main()
