"""Facts hidden in prose: which of them a text that had to shrink still tells.

After RULER (arXiv 2404.06654): sentences with a key and a number are put into essays, and asked for
at the end.  ``one`` hides one, ``keys`` four of which one is asked for, ``values`` two numbers of
one key, ``chain`` a name that leads to another that has the number.  The question comes after the
merge (``unknown``) or before it (``known``).  ``auto`` would leave text alone; here it is told to
shrink it, as a cap does.  Printed is the share of numbers that are told, with the half width of its
95 % interval, and the difference to ``auto``, paired over the prompts.

    python benchmarks/text_needles.py MODEL.gguf FOLDER_OF_TEXTS --kept 0.5 0.2
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from kvmerge import Llama, Policy
from kvmerge.errors import OptionError
from kvmerge.evaluation.needles import ANSWER_TOKENS, TASKS, hide, prose, read_texts, share_told
from kvmerge.policies import resolve

METHODS = ["auto", "flowmm", "evict", "snapkv", "h2o", "streaming"]


def told(llm: Llama, numbers: tuple[str, ...]) -> float:
    """Return the share of the numbers in the greedy answer to what was read."""
    answer: list[int] = []
    for _ in range(ANSWER_TOKENS):
        token = int(np.argmax(llm.eval_logits[-1]))
        if token == llm.token_eos():
            break
        answer.append(token)
        llm.eval([token])
    return share_told(llm.detokenize(answer).decode("utf-8", "replace"), numbers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a language model (GGUF)")
    parser.add_argument("texts", type=Path, help="a folder of .txt files")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME")
    parser.add_argument("--kept", nargs="+", type=float, default=[0.5, 0.2], metavar="SHARE")
    parser.add_argument("--read", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--n", type=int, default=12, help="prompts of each task")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    try:
        texts = read_texts(args.texts)
    except OptionError as error:
        parser.error(str(error))
    policies = {name: resolve(name) for name in args.methods}
    points: dict[tuple[str, float, str], dict[str, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    # One cache answers for all: it observes what any of the methods needs.
    with Llama(
        args.model, kv_merge=Policy(score="all"), n_ctx=args.read + 512, n_threads=args.threads,
        verbose=False,
    ) as llm:  # fmt: skip
        assert llm.engine is not None
        rng = np.random.default_rng(0)

        def count(text: str) -> int:
            return len(llm.tokenize(text.encode(), add_bos=False))

        for task in TASKS:
            for _ in range(args.n):
                needle = hide(rng, task, prose(texts, rng, args.read, count))
                question = llm.tokenize(needle.question.encode(), add_bos=False)
                llm.reset()
                llm.eval(llm.tokenize(needle.text.encode()))
                read = llm.save_state()
                # The end of a known question is read after the merge, as `merge_before` does.
                asked = {"unknown": 0, "known": len(question) - 4}
                for mode, n_before in asked.items():
                    llm.load_state(read)
                    if n_before:
                        llm.eval(question[:n_before])
                    state, n_read = llm.save_state(), llm.n_tokens
                    for kept in (1.0, *args.kept):
                        for name in ["full"] if kept == 1 else args.methods:
                            llm.load_state(state)
                            policy = policies.get(name)
                            if policy is not None:
                                llm.engine.use(policy)
                                llm.engine.merge(int(kept * n_read))
                            llm.eval(question[n_before:])
                            points[mode, kept, name][task].append(told(llm, needle.numbers))
            print(f"{task}: {args.n} prompts done", flush=True)

    print(f"\n{args.n} prompts a task, about {args.read} tokens\n")
    print(f"| question | kept | method | {' | '.join(TASKS)} | all | minus `auto` |")
    print(f"| --- | ---: | --- |{' ---: |' * (len(TASKS) + 2)}")
    for (mode, kept, name), tasks in sorted(
        points.items(), key=lambda row: (row[0][0], -row[0][1])
    ):
        every = np.concatenate([tasks[task] for task in TASKS])
        columns = " | ".join(f"{100 * np.mean(tasks[task]):.0f}" for task in TASKS)
        row = f"| {mode} | {kept:.0%} | `{name}` | {columns} | {percent(every)} |"
        if kept < 1 and "auto" in args.methods:
            auto = points[mode, kept, "auto"]
            row += f" {percent(every - np.concatenate([auto[task] for task in TASKS]))} |"
        else:
            row += " |"
        print(row)


def percent(values: np.ndarray) -> str:
    """Return the mean in percent with the half width of its 95 % interval."""
    half = 1.96 * np.std(values, ddof=min(1, len(values) - 1)) / np.sqrt(len(values))
    return f"{100 * np.mean(values):.0f} ± {100 * half:.0f}"


if __name__ == "__main__":
    main()
