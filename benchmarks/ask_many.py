"""Ten questions about the same twelve pictures, against the first of them alone.

With `Llama.context` the pictures are encoded, read and merged once.  llama-cpp-python's own
handler, on the same libraries without merging, reads all of them again for each question.

    python benchmarks/ask_many.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import kvmerge

BOUND = 1.5


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print both times and their ratio; fail when it is not below the bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="GGUF; by default the model in the package")
    parser.add_argument("--mmproj", help="GGUF that goes with it")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import llama_cpp
    import numpy as np
    from llama_cpp.llama_chat_format import MTMDChatHandler

    from kvmerge import pocket

    model = args.model or str(pocket.model_path())
    mmproj = args.mmproj or str(pocket.mmproj_path())
    prompt = pocket.make_prompt(np.random.default_rng(1), args.pictures)
    asked = [prompt.questions[i % len(prompt.questions)] for i in range(args.questions)]
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": args.max_tokens}
    common: dict[str, Any] = {
        "n_ctx": 4096,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "verbose": False,
    }

    def ask(llm: kvmerge.Llama, n: int) -> None:
        llm.reset()
        with llm.context(prompt.context(), **options) as ctx:
            for question in asked[:n]:
                ctx.ask(question.text)

    def ask_stock(llm: llama_cpp.Llama, n: int) -> None:
        for question in asked[:n]:
            turn = {"role": "user", "content": question.text}
            llm.create_chat_completion([*prompt.context(), turn], **options)

    handler = MTMDChatHandler(clip_model_path=mmproj, verbose=False)
    ours = kvmerge.Llama(model, mmproj=mmproj, kv_merge="flowmm", **common)
    stock = llama_cpp.Llama(model, chat_handler=handler, **common)
    ask(ours, 1)
    ask_stock(stock, 1)

    print(f"{args.pictures} pictures, {args.threads} threads, fastest of {args.rounds} rounds\n")
    print(f"| | 1 question, s | {args.questions} questions, s | ratio |")
    print("| --- | ---: | ---: | ---: |")
    times: dict[str, list[float]] = {"one": [], "many": [], "stock, one": [], "stock, many": []}
    for _ in range(args.rounds):
        times["one"].append(seconds(lambda: ask(ours, 1)))
        times["many"].append(seconds(lambda: ask(ours, args.questions)))
        times["stock, one"].append(seconds(lambda: ask_stock(stock, 1)))
    times["stock, many"].append(seconds(lambda: ask_stock(stock, args.questions)))
    one, many, stock_one, stock_many = (min(found) for found in times.values())
    print(f"| kvmerge, `context` | {one:.2f} | {many:.2f} | {many / one:.2f} |")
    print(
        f"| llama-cpp-python | {stock_one:.2f} | {stock_many:.2f} | {stock_many / stock_one:.2f} |"
    )
    ours.close()
    stock.close()
    if many >= BOUND * one:
        raise SystemExit(f"{args.questions} questions cost {many / one:.2f} times the first alone")


if __name__ == "__main__":
    main()
