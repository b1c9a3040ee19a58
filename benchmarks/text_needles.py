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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvmerge import Llama, Policy
from kvmerge.policies import resolve

METHODS = ["auto", "flowmm", "evict", "snapkv", "h2o", "streaming"]
TASKS = ("one", "keys", "values", "chain")
WORDS = (
    "river candle garden ladder window marble button forest pocket silver lantern bridge castle "
    "anchor basket feather hammer island jacket kettle"
).split()
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Needle:
    """One prompt: the text with its facts, the question, and the numbers to be told."""

    task: str
    text: str
    question: str
    numbers: tuple[str, ...]


def hide(rng: np.random.Generator, task: str, prose: list[str]) -> Needle:
    """Put facts between the paragraphs or sentences of a prose."""
    words = rng.choice(WORDS, 5, replace=False)
    numbers = [str(rng.integers(10000, 100000)) for _ in range(4)]

    def fact(word: str, value: str) -> str:
        return f"The special magic number of the {word} is {value}."

    if task == "chain":
        facts = [fact(words[0], numbers[0]), fact(words[1], numbers[1])]
        facts.append(f"The {words[2]} has the same special magic number as the {words[0]}.")
        asked, wanted = words[2], numbers[:1]
    elif task == "values":
        facts = [fact(words[0], value) for value in numbers[:2]]
        asked, wanted = words[0], numbers[:2]
    else:
        n = 1 if task == "one" else 4
        facts = [fact(words[i], numbers[i]) for i in range(n)]
        which = int(rng.integers(n))
        asked, wanted = words[which], [numbers[which]]
    sentences = list(prose)
    for place, sentence in zip(
        sorted(rng.integers(0, len(sentences) + 1, len(facts)), reverse=True),
        rng.permutation(facts),
        strict=True,
    ):
        sentences.insert(int(place), str(sentence))
    several = "numbers" if len(wanted) > 1 else "number"
    verb = "are" if len(wanted) > 1 else "is"
    return Needle(
        task=task,
        text=" ".join(sentences),
        question=(
            f"\n\nQuestion: What {verb} the special magic {several} of the {asked}?\n"
            f"Answer: The special magic {several} of the {asked} {verb}"
        ),
        numbers=tuple(wanted),
    )


def prose_of(llm: Llama, texts: list[str], rng: np.random.Generator, n_tokens: int) -> list[str]:
    """Return sentences of a text that have about so many tokens together."""
    sentences = [
        sentence for place in rng.permutation(len(texts)) for sentence in texts[place].split(". ")
    ]
    taken: list[str] = []
    count = 0
    for sentence in sentences:
        count += len(llm.tokenize(sentence.encode(), add_bos=False)) + 1
        if count > n_tokens:
            break
        taken.append(sentence.strip() + ".")
    return taken


def told(llm: Llama, numbers: tuple[str, ...]) -> float:
    """Return the share of the numbers in the greedy answer to what was read."""
    answer: list[int] = []
    for _ in range(ANSWER_TOKENS):
        token = int(np.argmax(llm.eval_logits[-1]))
        if token == llm.token_eos():
            break
        answer.append(token)
        llm.eval([token])
    text = llm.detokenize(answer).decode("utf-8", "replace")
    return sum(number in text for number in numbers) / len(numbers)


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

    texts = [file.read_text(encoding="utf-8") for file in sorted(args.texts.rglob("*.txt"))]
    if not texts:
        parser.error(f"there is no .txt file in {args.texts}")
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
        for task in TASKS:
            for _ in range(args.n):
                needle = hide(rng, task, prose_of(llm, texts, rng, args.read))
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
