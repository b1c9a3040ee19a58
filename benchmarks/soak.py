"""500 requests with pictures to one model: memory and file handles stay where they were.

Requests have one to eight pictures, one in five is cancelled half-way, every tenth chat goes on
for a second turn.  The cache of encoded pictures is small enough to be full when they have warmed
up; after that RSS may differ by two percent, file handles not at all.

    python benchmarks/soak.py
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

import numpy as np

from kvmerge import Llama, pocket
from kvmerge.pocket.tasks import make_prompt

MIB = 1024 * 1024
ALLOWED = 0.02


def resident() -> float:
    """Return the RSS of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / MIB


def request(llm: Llama, rng: np.random.Generator) -> None:
    """Send one request, or a chat of two."""
    prompt = make_prompt(rng, int(rng.integers(1, 9)), n_questions=2)
    if rng.random() < 0.2:
        stream = llm.create_chat_completion(
            prompt.messages(0), max_tokens=40, temperature=0, stream=True
        )
        for _ in range(int(rng.integers(1, 4))):
            next(stream)
        stream.close()
        return
    llm.create_chat_completion(prompt.messages(0), max_tokens=12, temperature=0)
    if rng.random() < 0.1:
        messages = prompt.messages(1, [prompt.questions[0].answer])
        llm.create_chat_completion(messages, max_tokens=12, temperature=0)


def main() -> None:
    """Print RSS over the requests; leave with 1 when it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=100)
    parser.add_argument("--cap", type=int, default=None)
    args = parser.parse_args()

    rng = np.random.default_rng(500)
    handles = Path("/proc/self/fd")
    with Llama(
        pocket.model_path(),
        mmproj=pocket.mmproj_path(),
        n_ctx=4096,
        n_threads=1,
        n_threads_batch=1,
        kv_merge="auto",
        kv_max_cells=args.cap,
        image_cache="16MiB",
        verbose=False,
    ) as llm:
        figures: list[tuple[float, int]] = []
        for i in range(1, args.requests + 1):
            request(llm, rng)
            if i >= args.warm_up and (i - args.warm_up) % 50 == 0:
                gc.collect()
                figures.append((resident(), len(list(handles.iterdir()))))
                print(
                    f"{i:4d} requests: {figures[-1][0]:.1f} MiB, {figures[-1][1]} handles",
                    flush=True,
                )
    sizes = [size for size, _ in figures]
    change = sizes[-1] / sizes[0] - 1
    print(f"RSS {change:+.2%} after the warm-up; highest {max(sizes) / sizes[0] - 1:+.2%}")
    if change > ALLOWED or figures[-1][1] > figures[0][1]:
        sys.exit("memory or file handles have grown")


if __name__ == "__main__":
    main()
