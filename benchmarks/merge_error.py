"""How far merges move what attention returns, as they measure it themselves.

Prompts are read, and merged by each method to several shares of the tokens that it merges; printed
is the error that `kv_stats()` reports, as the mean over the prompts with the least and the largest.
``kv_budget="auto"`` keeps the smallest share whose error is within its tolerance.

    python benchmarks/merge_error.py
    python benchmarks/merge_error.py --photographs FOLDER

Without ``--photographs`` the prompts are the pocket model's, with it those of ``album.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import kvmerge
from kvmerge import pocket
from kvmerge.budget import SHARES, TOLERANCE, Budget
from kvmerge.policies import resolve

Chat = list[dict[str, Any]]


def of_the_pocket_model(n: int, pictures: int) -> Iterator[Chat]:
    for i in range(n):
        yield pocket.make_prompt(np.random.default_rng([7, i]), pictures).messages(0)


def of_albums(folder: Path, n: int, pictures: int) -> Iterator[Chat]:
    from real_parts import album, parts

    model = parts.fetch(parts.SMOLLM2)
    photographs, words = album.photographs(folder, model), album.vocabulary(model)
    for sample in album.samples(n, pictures, photographs, words):
        yield sample.load()[0].messages


def errors(llm: kvmerge.Llama, chat: Chat, policy: kvmerge.Policy) -> list[float]:
    """Return the error of a merge to each share, all from the same cache."""
    assert llm.engine is not None
    llm.reset()
    llm.create_chat_completion(chat, max_tokens=1, temperature=0)
    media, state = llm.kv_cache.n_media_tokens(), llm.save_state()
    text, spans = llm.n_tokens - media, len(llm.media_spans)
    found = []
    for share in SHARES:
        llm.load_state(state)
        llm.engine.merge(policy.kept_cells(Budget(share), text, media, spans))
        found.append(llm.engine.stats().error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="ask the album model")
    parser.add_argument("--methods", nargs="+", default=["auto", "flowmm"], metavar="NAME")
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="of each prompt")
    parser.add_argument("--prompts", type=int, default=8, metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    if args.photographs is None:
        model, mmproj = pocket.model_path(), pocket.mmproj_path()
        chats = list(of_the_pocket_model(args.prompts, args.pictures))
    else:
        from real_parts import build

        model, mmproj = build.build()
        chats = list(of_albums(args.photographs, args.prompts, args.pictures))
    print(f"{model.stem}, {args.prompts} prompts of {args.pictures} pictures")
    print(f'error, least to largest; kv_budget="auto" allows {TOLERANCE:g}\n')
    print("| method | " + " | ".join(f"{share:.0%} kept" for share in SHARES) + " |")
    print("| --- |" + " ---: |" * len(SHARES))
    for name in args.methods:
        policy = resolve(name)
        assert policy is not None
        with kvmerge.Llama(
            model, mmproj=mmproj, kv_merge=policy, kv_budget=0.999, n_ctx=4096,
            n_threads=args.threads, n_threads_batch=args.threads, verbose=False,
        ) as llm:  # fmt: skip
            found = np.array([errors(llm, chat, policy) for chat in chats])
        cells = [
            f"{mean:.3f} ({low:.3f} to {high:.3f})"
            for mean, low, high in zip(found.mean(0), found.min(0), found.max(0), strict=True)
        ]
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
