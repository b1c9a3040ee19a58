"""What `kvmerge fit` says against what is then measured.

Each configuration runs in a process of its own. Its buffers are those that llama.cpp itself
reports; RSS is what the system says that the process takes: when the prompt was read, and once it
was merged. Most of it is Python where models are small, so what it takes above that is printed
too. Random models of several shapes, and the model in the package with pictures; with ``--models``
only those, with a text of 1000 tokens.

    python benchmarks/fit_accuracy.py
    python benchmarks/fit_accuracy.py --models one.gguf two.gguf
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

CONTEXT, PROMPT, BATCH, BUDGET = 2048, 2048, 128, 0.2
LARGE_CONTEXT = 8192
PICTURES, SIZE = 20, (640, 480)
TEXT = 1000
LIMIT = 0.05
COUNTS = ("image tokens", "cells held", "cells allocated")

SHAPES = {
    "GQA 8 heads of 64, 2 KV": {"layers": 8, "heads": 8, "heads_kv": 2, "ffn": 2048},
    "MHA 8 heads of 64": {"layers": 6, "heads": 8, "heads_kv": 8, "ffn": 1536},
    "MQA 6 heads of 128, 1 KV": {"layers": 5, "heads": 6, "heads_kv": 1, "head_size": 128},
}
CACHES = (("f16", True), ("f16", False), ("q8_0", True))


def logged(log: list[str], what: str) -> int:
    """Return the sum of a kind of buffer in what llama.cpp has logged, in bytes."""
    found = (re.search(rf"{what} buffer size = +([\d.]+) MiB", line) for line in log)
    return round(sum(float(match[1]) for match in found if match) * 2**20)


def measure_random(model: str, cache: str, flash_attention: bool, merged: bool) -> Any:
    """Read a prompt with a random model, and merge it."""
    import numpy as np

    from kvmerge.native.log import caught
    from kvmerge.policies import PRESETS
    from kvmerge.resident import resident
    from session import Session

    options: dict[str, Any] = {
        "merge": PRESETS["flowmm"].engine_params() if merged else None,
        "cache_type": cache,
        "flash_attention": flash_attention,
        "n_ctx": LARGE_CONTEXT if merged else CONTEXT,
        "n_batch": BATCH,
        "first_cells": 256 if merged else 0,
    }
    numbers = np.random.default_rng(0)
    sizes, process = {}, resident()
    with caught(1, quiet=True) as log, Session(Path(model), **options) as session:
        if merged:
            session.engine.keep_plans(False)
        else:
            sizes["KV"] = logged(log, "KV")
        sizes["weights"] = logged(log, "model")
        prompt = numbers.integers(0, session.n_vocab, PROMPT).tolist()
        for i in range(0, PROMPT, BATCH):
            session.decode(prompt[i : i + BATCH])
        sizes |= {"RSS, all read": resident(), "above Python, all read": resident() - process}
        if merged:
            session.engine.merge(round(BUDGET * PROMPT))
            session.decode(prompt[:1])
            sizes |= {"RSS, merged": resident(), "above Python, merged": resident() - process}
    return sizes


def measure_pocket(picture: str, flash_attention: bool, merged: bool) -> Any:
    """Show pictures to the model in the package."""
    from PIL import Image, ImageOps  # noqa: F401

    from kvmerge import pocket
    from kvmerge.llama import Llama
    from kvmerge.native.log import caught
    from kvmerge.resident import resident

    data = Path(picture).read_bytes()
    content: list[Any] = [{"type": "image_url", "image_url": data} for _ in range(PICTURES)]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]
    options: dict[str, Any] = {
        "n_ctx": CONTEXT,
        "n_batch": BATCH,
        "n_ubatch": BATCH,
        "n_threads": 1,
        "n_threads_batch": 1,
        "flash_attn": flash_attention,
        "verbose": False,
    }
    if merged:
        options |= {"n_ctx": LARGE_CONTEXT, "kv_merge": "flowmm", "kv_budget": BUDGET}
    Image.init()  # Pillow's formats belong to Python, as in `kvmerge fit`
    process = resident()
    with caught(1, quiet=True) as log:
        llm = Llama(pocket.model_path(), mmproj=pocket.mmproj_path(), **options)
        encoder = sum(
            round(float(match[1]) * 2**20)
            for line in log
            if (match := re.search(r"reserve_compute_meta.*buffer size = +([\d.]+) MiB", line))
        )
        usage = llm.create_chat_completion(messages, max_tokens=1)["usage"]
        when = "merged" if merged else "all read"
        sizes = {f"RSS, {when}": resident(), f"above Python, {when}": resident() - process}
        sizes |= {"weights": logged(log, "model")}
        if not merged:
            sizes["KV"] = logged(log, "KV")
        llm.close()
    pictures = usage["prompt_tokens_details"]["image_tokens"]
    return {**sizes, "encoder": encoder, "image tokens": pictures // PICTURES}


def measure_text(model: str, flash_attention: bool, merged: bool) -> Any:
    """Read a text with a real model, and answer."""
    from kvmerge.llama import Llama
    from kvmerge.resident import resident

    options: dict[str, Any] = {"kv_merge": "flowmm", "kv_budget": BUDGET} if merged else {}
    process = resident()
    with Llama(model, n_ctx=CONTEXT, flash_attn=flash_attention, verbose=False, **options) as llm:
        tokens = llm.tokenize(("The boat went down the river to the sea. " * TEXT).encode())[:TEXT]
        llm.create_completion(tokens, max_tokens=4, temperature=0)
        when = "merged" if merged else "all read"
        above = resident() - process
        sizes = {f"above Python, {when}": above}
        if merged:
            sizes["cells held"] = llm.kv_stats().cells - 3
            sizes["cells allocated"] = llm.engine.size()
    return sizes


def predict(
    model: Path,
    cache: str,
    flash_attention: bool,
    merged: bool,
    mmproj: Path | None = None,
    text: bool = False,
) -> dict[str, int]:
    """Return what `kvmerge fit` says."""
    command = [sys.executable, "-m", "kvmerge", "fit", str(model), "--json"]
    command += ["--ctx", str(LARGE_CONTEXT if merged and not text else CONTEXT)]
    command += ["--kv-merge", "flowmm", "--kv-budget", str(BUDGET)]
    command += ["--type-k", cache, "--type-v", cache]
    command += ["--flash-attn"] if flash_attention else []
    if not text:
        command += ["--n-batch", str(BATCH), "--n-ubatch", str(BATCH)]
    if text:
        command += ["--text-tokens", str(TEXT)]
    elif mmproj is None:
        command += ["--text-tokens", str(PROMPT)]
    else:
        size = f"{SIZE[0]}x{SIZE[1]}"
        command += ["--mmproj", str(mmproj), "--images", str(PICTURES), "--size", size]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout)
    column = said["merged" if merged else "full"]
    read = said["while_reading"] if merged else column
    return {
        "weights": column["weights"],
        "KV": column["kv"],
        "encoder": column["encoder"],
        "image tokens": said["image_tokens"],
        "cells held": column["held"],
        "cells allocated": column["cells"],
        "RSS, all read": read["total"],
        "RSS, merged": column["total"],
        "above Python, all read": read["total"] - read["process"],
        "above Python, merged": column["total"] - column["process"],
    }


def compare(
    title: str, predicted: dict[str, int], measured: dict[str, int], strict: bool = False
) -> list[str]:
    """Print one row a number; return the buffers beyond the limit."""
    beyond = []
    for name, value in measured.items():
        error = predicted[name] / value - 1
        shown = [f"{number / 2**20:.2f}" for number in (predicted[name], value)]
        if name in COUNTS:
            shown = [str(predicted[name]), str(value)]
        print(f"| {title} | {name} | {shown[0]} | {shown[1]} | {error:+.1%} |", flush=True)
        if abs(error) > LIMIT and (strict or not name.startswith("above Python")):
            beyond.append(f"{title}, {name}: {error:+.1%}")
    return beyond


def measure(*arguments: object) -> dict[str, int]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def models_in_the_hand(models: list[Path]) -> list[str]:
    """Compare models of the user; return what is beyond the limit."""
    beyond = []
    for model in models:
        for flash_attention in (False, True):
            for merged in (False, True):
                title = f"{model.stem}{', FA' if flash_attention else ''}"
                title += f", {'merged' if merged else 'full'}"
                said = predict(model, "f16", flash_attention, merged, text=True)
                found = measure("text", model, flash_attention, merged)
                beyond += compare(title, said, found, strict=True)
    return beyond


def made_models(quick: bool) -> list[str]:
    """Compare random models and the one in the package; return what is beyond the limit."""
    from PIL import Image

    from kvmerge import pocket
    from random_model import Shape, write_random_model

    beyond: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, numbers in list(SHAPES.items())[: 1 if quick else None]:
            shape = Shape(vocab=4096, **{"ffn": 2048, **numbers})
            model = write_random_model(Path(folder) / "model.gguf", shape)
            for cache, flash_attention in CACHES[: 1 if quick else None]:
                for merged in (False, True):
                    title = f"{name}, {cache}{', FA' if flash_attention else ''}"
                    title += f", {'merged' if merged else 'full'}"
                    beyond += compare(
                        title,
                        predict(model, cache, flash_attention, merged),
                        measure("random", model, cache, flash_attention, merged),
                    )
        files = Path(pocket.model_path()), Path(pocket.mmproj_path())
        picture = Path(folder) / "picture.png"
        Image.new("RGB", SIZE, "red").save(picture)
        for flash_attention in (True,) if quick else (True, False):
            for merged in (False, True):
                title = f"pocket, {PICTURES} pictures{', FA' if flash_attention else ''}"
                title += f", {'merged' if merged else 'full'}"
                beyond += compare(
                    title,
                    predict(files[0], "f16", flash_attention, merged, files[1]),
                    measure("pocket", picture, flash_attention, merged),
                )
    return beyond


def main() -> None:
    """Print a table; fail when something is off by more than the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="one model of each kind")
    parser.add_argument("--models", nargs="+", type=Path, default=[], help="models (GGUF)")
    args = parser.parse_args()
    if args.worker:
        kind, *rest = args.worker
        if kind == "pocket":
            picture, *flags = rest
            print(json.dumps(measure_pocket(picture, *(flag == "True" for flag in flags))))
        elif kind == "text":
            model, *flags = rest
            print(json.dumps(measure_text(model, *(flag == "True" for flag in flags))))
        else:
            model, cache, *flags = rest
            print(json.dumps(measure_random(model, cache, *(flag == "True" for flag in flags))))
        return

    if not args.models:
        from needed_packages import need

        need("gguf")
    print("| configuration | MiB of | predicted | measured | error |")
    print("| --- | --- | ---: | ---: | ---: |")
    beyond = models_in_the_hand(args.models) if args.models else made_models(args.quick)
    print(f"\n{len(beyond)} sizes are off by more than {LIMIT:.0%}")
    for line in beyond:
        print(f"  {line}")
    sys.exit(bool(beyond))


if __name__ == "__main__":
    main()
