"""Memory of the process with a capped cache, with a merged one, and with the stock library.

Three questions, each answered by what the system says of a process of its own (peak and present
RSS):

* a prompt that needs eight times the cap is read: does the peak stay under the loaded model plus
  the cap plus one batch plus 64 MiB, and what does the stock library need at the same ``n_ctx``?
* a prompt is read into a cache that grows: does the peak stay under the loaded model plus what the
  cache is in the end plus 64 MiB?
* that prompt is merged to a fifth: by how much does RSS fall, and by how much should it?

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

MIB = 1024 * 1024
TOKENS, CAP, BATCH, SHARE, LAYERS = 4096, 512, 256, 0.2, 16


def resident() -> float:
    """Return the RSS of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / MIB


def peak() -> float:
    """Return the highest RSS of this process so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(model: str, job: str, tokens: int, threads: int) -> None:
    """Read the prompt in one of three ways; print what the system says."""
    import numpy as np

    from session import Session

    options = {"n_ctx": tokens + 256, "n_batch": BATCH, "threads": threads}
    prompt = np.random.default_rng(5).integers(0, 512, tokens).tolist()
    result: dict[str, float] = {}
    if job == "stock":
        # what a context that holds one batch takes is the model, as far as this goes
        with Session(Path(model), **{**options, "n_ctx": BATCH}) as session:
            session.decode(prompt[:BATCH])
            result["model"] = resident()
        with Session(Path(model), **options) as session:
            for start in range(0, tokens, BATCH):
                session.decode(prompt[start : start + BATCH])
            result["peak"] = peak()
        print(json.dumps(result))
        return

    from kvmerge.policies import PRESETS

    merge = PRESETS["auto"].engine_params()
    with Session(Path(model), merge=merge, first_cells=BATCH, **options) as session:
        engine = session.engine
        assert engine
        engine.keep_plans(False)
        session.decode(prompt[:8])
        result["per_cell"] = engine.bytes() / engine.size() / MIB
        result["model"] = resident() - engine.bytes() / MIB
        if job == "cap":
            engine.set_room(CAP)
        for start in range(8, tokens, BATCH // 2):
            session.decode(prompt[start : start + BATCH // 2])
        result["read"] = resident()
        result["read_peak"] = peak()
        result["bytes_read"] = engine.bytes() / MIB
        if job == "merge":
            engine.merge(int(SHARE * tokens))
            session.decode([1])
            result["merged"] = resident()
        result["peak"] = peak()
        result["merges"] = engine.stats().n_merges
    print(json.dumps(result))


def run(model: Path, job: str, tokens: int, threads: int, stock: Path | None) -> dict[str, float]:
    """Run a worker in a process of its own."""
    environment = dict(os.environ)
    if stock:
        environment["STOCK_LIBRARIES"] = str(stock)
    command = [sys.executable, __file__, "--worker", str(model), job]
    command += ["--tokens", str(tokens), "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print both tables; leave with 1 when a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the prompt")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the random model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "JOB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker, args.tokens, args.threads)
        return

    from needed_packages import STOCK, need

    need("gguf", programs=STOCK)
    import gguf

    from random_model import Shape, write_random_model
    from stock_library import stock_libraries

    stock = stock_libraries()
    with tempfile.TemporaryDirectory() as folder:
        # keys and values of 64 KiB a token, and layers that are quick to compute
        shape = Shape(layers=args.layers, heads=16, heads_kv=16, ffn=1024)
        model = write_random_model(
            Path(folder) / "model.gguf",
            shape,
            quantization=gguf.GGMLQuantizationType.Q8_0,
        )
        plain = run(model, "stock", args.tokens, args.threads, stock)
        capped = run(model, "cap", args.tokens, args.threads, None)
        merged = run(model, "merge", args.tokens, args.threads, None)

    per_cell, tokens = capped["per_cell"], args.tokens
    cap, batch = CAP * per_cell, BATCH * per_cell
    over = capped["peak"] - capped["model"]
    limit = cap + batch + 64
    print(f"{tokens} tokens of {1024 * per_cell:.0f} KiB, at most {CAP} cells\n")
    print("| | peak RSS above the model, MiB |")
    print("|---|---:|")
    print(f"| stock, n_ctx={tokens + 256} | {plain['peak'] - plain['model']:.0f} |")
    print(f"| kv_max_cells={CAP} ({capped['merges']:.0f} merges) | {over:.0f} |")
    print(f"| allowed: cap {cap:.0f} + batch {batch:.0f} + 64 | {limit:.0f} |")

    grown, cache = merged["read_peak"] - merged["model"], merged["bytes_read"]
    print(f"| growing with what is read | {grown:.0f} |")
    print(f"| allowed: cache {cache:.0f} + 64 | {cache + 64:.0f} |")

    fell = merged["read"] - merged["merged"]
    expected = (tokens - int(SHARE * tokens)) * per_cell
    print(f"\nmerged to {SHARE:.0%}: RSS {merged['read']:.0f} -> {merged['merged']:.0f} MiB")
    print(f"fell by {fell:.0f} MiB, {fell / expected:.1%} of the {expected:.0f} MiB of {tokens}")
    print(f"tokens less {int(SHARE * tokens)} cells; peak {merged['peak']:.0f} MiB, as it merged")
    if over > limit or grown > cache + 64 or fell < 0.95 * expected:
        sys.exit("a limit is not kept")


if __name__ == "__main__":
    main()
