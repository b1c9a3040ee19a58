"""64 pictures in one chat, with a cap that the full cache exceeds after about eleven.

Every turn shows eight pictures and asks about one of them.  At the end comes a question about the
first picture of all and one about the last.  Printed are the shares of right answers, with the cap
and with a full cache large enough for everything, and what each of them held.

Such a chat has twice as many tokens as the prompts that the model in the package was trained with.
Its rotary positions are therefore made slower, by the option that llama-cpp-python has for that;
with ``--rope-freq-base 0`` they are as trained, and no cache answers about the first picture.

    python benchmarks/many_pictures.py
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from kvmerge import Llama, pocket
from kvmerge.pocket.render import COLOURS, LETTERS, SHAPES, render_picture
from kvmerge.pocket.tasks import Picture, Prompt

TURNS, PICTURES = 8, 8


def pictures_of_a_chat(rng: np.random.Generator) -> list[list[Picture]]:
    """Return the pictures of every turn; no two of the chat show the same colour and shape."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    turns = []
    order = rng.permutation(len(pairs))
    for turn in range(TURNS):
        letters = rng.permutation(len(LETTERS))[:PICTURES]
        shown = [pairs[i] for i in order[turn * PICTURES : (turn + 1) * PICTURES]]
        turns.append(
            [
                Picture(*pair, LETTERS[i], render_picture(*pair, LETTERS[i], rng))
                for pair, i in zip(shown, letters, strict=True)
            ]
        )
    return turns


def turn_content(pictures: list[Picture]) -> list[dict[str, Any]]:
    """Return pictures as a user turn, laid out as the model has learnt it."""
    parts: list[str | int] = []
    for i in range(len(pictures)):
        parts += [f"{'' if i == 0 else chr(10)}Picture {i + 1}:", i, str(i + 1)]
    return Prompt((*parts, "\n"), tuple(pictures), (), ()).content()


def ask(llm: Llama, messages: list[dict[str, Any]], picture: Picture) -> bool:
    """Ask for the letter of a picture, note the answer in the chat; return whether it is right."""
    text = f"Which letter is on the {picture.colour} {picture.shape}?"
    messages.append({"role": "user", "content": text})
    answer = llm.create_chat_completion(messages, max_tokens=8, temperature=0)
    said = answer["choices"][0]["message"]
    messages.append(said)
    return said["content"].split()[-1:] == [picture.letter]


def chat(llm: Llama, rng: np.random.Generator) -> tuple[list[bool], bool, bool]:
    """Hold one chat; return which answers were right: during it, about the first, the last."""
    llm.reset()
    turns = pictures_of_a_chat(rng)
    messages: list[dict[str, Any]] = []
    during = []
    for pictures in turns:
        messages.append({"role": "user", "content": turn_content(pictures)})
        during.append(ask(llm, messages, pictures[int(rng.integers(PICTURES))]))
    return during, ask(llm, messages, turns[0][0]), ask(llm, messages, turns[-1][-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=10)
    parser.add_argument("--cap", type=int, default=768, help="cells")
    parser.add_argument("--policies", nargs="+", default=["auto", "flowmm", "evict"])
    parser.add_argument("--rope-freq-base", type=float, default=1e5, help="0: the model's")
    parser.add_argument("--seed", type=int, default=64)
    args = parser.parse_args()

    print(f"{args.chats} chats of {TURNS * PICTURES} pictures, at most {args.cap} cells\n")
    print("| cache | tokens | cells | KV MiB | asked at once % | the first % | the last % |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    rows: list[tuple[str, dict[str, Any]]] = [("full", {})]
    for name in args.policies:
        limits = {"kv_merge": name, "kv_budget": 1.0, "kv_max_cells": args.cap}
        rows.append((f"{name}, capped", limits))
    for name, options in rows:
        with Llama(
            pocket.model_path(),
            mmproj=pocket.mmproj_path(),
            n_ctx=8192,
            n_threads=1,
            n_threads_batch=1,
            rope_freq_base=args.rope_freq_base,
            verbose=False,
            **options,
        ) as llm:
            results = [chat(llm, np.random.default_rng([args.seed, i])) for i in range(args.chats)]
            stats = llm.kv_stats()
        during = np.mean([right for result in results for right in result[0]])
        first, last = (np.mean([result[i] for result in results]) for i in (1, 2))
        print(
            f"| {name} | {stats.tokens} | {stats.cells} | {stats.mib:.1f} | {100 * during:.0f} "
            f"| {100 * first:.0f} | {100 * last:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
