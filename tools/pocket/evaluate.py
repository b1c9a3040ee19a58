"""Measure the exported pocket model through llama.cpp.

``python tools/pocket/evaluate.py --pictures 4 8 12 --prompts 30`` asks fresh prompts, every
question right after the pictures, and prints a Markdown table of the accuracy of every task.  With
``--checkpoint`` it also tells how many tokens of the greedy answers the PyTorch model agrees with.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "python" / "kvmerge"))
sys.path.append(str(ROOT / "python" / "kvmerge" / "_vendor"))  # unless llama_cpp is installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

import llama_cpp  # noqa: E402
import llama_cpp.mtmd_cpp as mtmd_cpp  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402
from llama_cpp.llama_chat_format import MTMDChatHandler  # noqa: E402
from pocket.render import COLOURS  # noqa: E402
from pocket.tasks import LONG_TASKS, TASKS, Prompt, data_uri, make_prompt, score  # noqa: E402

if "LLAMA_CPP_LIB_PATH" in os.environ:
    # Libraries whose backends are separate files do not load them on their own.
    _folder = Path(os.environ["LLAMA_CPP_LIB_PATH"])
    _ggml = ctypes.CDLL(str(_folder / "libggml.so"))
    _ggml.ggml_backend_load_all_from_path(str(_folder).encode())

TEST_SEED = 777_000_001
"""Base of the seeds of test prompts; training never uses them."""


class Runner:
    """Reads the pictures turn once and asks several questions after it."""

    def __init__(self, model: Path, mmproj: Path, threads: int, n_ctx: int = 8192) -> None:
        self.handler = MTMDChatHandler(clip_model_path=str(mmproj), verbose=False)
        self.llm = llama_cpp.Llama(
            str(model),
            chat_handler=self.handler,
            n_ctx=n_ctx,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.handler._init_mtmd_context(self.llm)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.template = environment.from_string(self.llm.metadata["tokenizer.chat_template"])
        self.tokens: list[int] = []

    def render(self, messages: list[dict[str, Any]], answer_next: bool) -> str:
        """Return the text that llama-cpp-python's handler makes of the messages."""
        marker = mtmd_cpp.mtmd_default_marker().decode()
        shaped = self.handler._get_template_messages(messages, marker)
        return self.template.render(messages=shaped, add_generation_prompt=answer_next)

    def read(self, prompt: Prompt) -> list[int]:
        """Read the pictures turn; return its tokens, -1 for a token of a picture."""
        text = self.render(prompt.context(), False).encode()
        bitmaps = [
            self.handler._create_bitmap_from_bytes(self.handler.load_image(data_uri(p.image)))
            for p in prompt.pictures
        ]
        item = mtmd_cpp.mtmd_input_text()
        item.text, item.text_len, item.add_special, item.parse_special = text, len(text), True, True
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        array = (mtmd_cpp.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        context = self.handler.mtmd_ctx
        if mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(item), array, len(bitmaps)):
            raise RuntimeError("mtmd_tokenize failed")
        llm = self.llm
        llm.reset()
        llm._ctx.kv_cache_clear()
        self.tokens = []
        for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                pointer = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids = [pointer[j] for j in range(count.value)]
                llm.eval(ids)
                self.tokens += ids
            else:
                past = llama_cpp.llama_pos(0)
                code = mtmd_cpp.mtmd_helper_eval_chunk_single(
                    context, llm._ctx.ctx, chunk, llama_cpp.llama_pos(llm.n_tokens),
                    llama_cpp.llama_seq_id(0), llm.n_batch, False, ctypes.byref(past),
                )  # fmt: skip
                if code:
                    raise RuntimeError(f"picture failed: {code}")
                self.tokens += [-1] * (past.value - llm.n_tokens)
                llm.n_tokens = past.value
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd_cpp.mtmd_bitmap_free(bitmap)
        return list(self.tokens)

    def ask(self, question: str, most: int) -> tuple[str, list[int], list[int]]:
        """Answer greedily right after the pictures turn.

        Returns the answer, its tokens with the end marker, and the tokens of the question turn.
        """
        llm = self.llm
        llm.n_tokens = len(self.tokens)
        text = self.render([{"role": "user", "content": question}], True)
        asked = llm.tokenize(text.encode(), add_bos=False, special=True)
        llm.eval(asked)
        answer: list[int] = []
        size = llm.n_vocab()
        while len(answer) < most:
            logits = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, shape=(size,)).argmax())
            answer.append(token)
            if token == llm.token_eos():
                break
            llm.eval([token])
        said = llm.detokenize([t for t in answer if t != llm.token_eos()])
        return said.decode("utf-8", "replace"), answer, asked


class Reference:
    """The PyTorch model, for comparing tokens."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        import vocabulary
        from model import Config, PocketModel

        self.torch = torch
        self.model = PocketModel(Config(vocabulary.SIZE))
        self.model.load_state_dict(torch.load(checkpoint)["model"])
        self.model.eval()

    def agreement(
        self, prompt: Prompt, context: list[int], asked: list[int], answer: list[int]
    ) -> tuple[int, int]:
        """Return how many answer tokens are the model's first choice, and their number."""
        torch = self.torch
        pixels = np.stack([np.asarray(p.image) for p in prompt.pictures])
        with torch.no_grad():
            x = torch.from_numpy(pixels).float() / 127.5 - 1
            features = self.model.vision(x).flatten(0, 1)
            ids = torch.tensor([context + asked + answer])
            inputs = self.model.decoder.embed(ids.clamp(min=0))
            inputs = inputs.masked_scatter((ids == -1)[..., None], features)
            hidden = self.model.decoder(inputs)[:, -len(answer) - 1 : -1]
            first = self.model.decoder.logits(hidden).argmax(-1)[0].tolist()
        return sum(a == b for a, b in zip(first, answer, strict=True)), len(answer)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    folder = ROOT / "python" / "kvmerge" / "pocket"
    parser.add_argument("--model", type=Path, default=folder / "pocket.gguf")
    parser.add_argument("--mmproj", type=Path, default=folder / "pocket-mmproj.gguf")
    parser.add_argument("--pictures", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--checkpoint", type=Path, help="compare with this PyTorch checkpoint")
    parser.add_argument("--compare", type=int, default=5, help="prompts to compare per size")
    parser.add_argument("--chat", type=int, default=1, help="prompts to check through chat calls")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    runner = Runner(args.model, args.mmproj, args.threads)
    reference = Reference(args.checkpoint) if args.checkpoint else None
    table: dict[int, dict[str, list[float]]] = {}
    exact: dict[int, dict[str, list[float]]] = {}
    lengths: dict[int, list[int]] = {}
    same = total = chats = chats_same = 0
    begun = time.time()
    for n in args.pictures:
        table[n] = {t: [] for t in TASKS}
        exact[n] = {t: [] for t in LONG_TASKS}
        lengths[n] = []
        for i in range(args.prompts):
            rng = np.random.default_rng([TEST_SEED, n, i])
            prompt = make_prompt(rng, n)
            context = runner.read(prompt)
            lengths[n].append(len(context))
            said = []
            for question in prompt.questions:
                answer, ids, asked = runner.ask(question.text, 8 * n + 16)
                said.append(answer)
                table[n][question.task].append(score(question.task, answer, question.answer))
                if question.task in LONG_TASKS:
                    exact[n][question.task].append(float(answer == question.answer))
                if reference is not None and i < args.compare:
                    right, count = reference.agreement(prompt, context, asked, ids)
                    same, total = same + right, total + count
            if i < args.chat:
                for k in range(3):
                    reply = runner.llm.create_chat_completion(
                        prompt.messages(k), temperature=0.0, repeat_penalty=1.0, max_tokens=200
                    )
                    chats += 1
                    chats_same += reply["choices"][0]["message"]["content"].strip() == said[k]
    names = " | ".join(f"n = {n}" for n in args.pictures)
    print(f"| task | {names} |")
    print("|---|" + "---|" * len(args.pictures))

    def share(values: list[float]) -> str:
        return f"{100 * sum(values) / max(1, len(values)):.1f}"

    for task in TASKS:
        print(f"| `{task}` | " + " | ".join(share(table[n][task]) for n in args.pictures) + " |")
    means = [
        f"**{np.mean([100 * np.mean(table[n][t]) for t in TASKS]):.1f}**" for n in args.pictures
    ]
    print("| **mean** | " + " | ".join(means) + " |")
    for task in LONG_TASKS:
        print(
            f"| `{task}`, exact | "
            + " | ".join(share(exact[n][task]) for n in args.pictures)
            + " |"
        )
    print(
        "| prompt tokens | "
        + " | ".join(f"{np.mean(lengths[n]):.0f}" for n in args.pictures)
        + " |"
    )
    print(
        f"\n{args.prompts} prompts per column, {time.time() - begun:.0f} s, {len(COLOURS)} colours"
    )
    print(f"chat calls that gave the same answer: {chats_same}/{chats}")
    if total:
        print(f"tokens that PyTorch agrees with: {same}/{total} = {100 * same / total:.2f} %")


if __name__ == "__main__":
    main()
