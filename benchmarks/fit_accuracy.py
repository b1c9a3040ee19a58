"""What `kvmerge fit` says against what is then measured.

Each configuration runs in a process of its own. Its buffers are those that llama.cpp itself
reports; RSS is what the process grew by, from before the model was loaded until the prompt was read
(and merged). It also holds the vocabulary, the graphs and what the allocator has not given back,
some MiB whatever the size of a model: that shows with models as small as these, so RSS is printed
and does not fail. Nor do the compute buffers alone: how tightly llama.cpp packs a graph that adds
the bias of merged cells is known only roughly. Random models of several shapes, and the model in
the package with pictures.

    python benchmarks/fit_accuracy.py
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "python")]

CONTEXT, PROMPT, BATCH, BUDGET = 2048, 2048, 128, 0.2
LARGE_CONTEXT = 8192
PICTURES, SIZE = 20, (640, 480)
LIMIT = 0.05

SHAPES = {
    "GQA 8 heads of 64, 2 KV": {"layers": 8, "heads": 8, "heads_kv": 2, "ffn": 2048},
    "MHA 8 heads of 64": {"layers": 6, "heads": 8, "heads_kv": 8, "ffn": 1536},
    "MQA 6 heads of 128, 1 KV": {"layers": 5, "heads": 6, "heads_kv": 1, "head_size": 128},
}
CACHES = (("f16", True), ("f16", False), ("q8_0", True))


def resident(name: str = "VmRSS") -> int:
    """Return bytes of this process, as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def logged(log: list[str], what: str) -> int:
    """Return the sum of a kind of buffer in what llama.cpp has logged, in bytes."""
    found = (re.search(rf"{what} buffer size = +([\d.]+) MiB", line) for line in log)
    return round(sum(float(match[1]) for match in found if match) * 2**20)


def compute_at_the_end(log: list[str]) -> int:
    """Return the compute buffers that a context had when it was freed."""
    found = (re.search(r"compute buffer size (?:is|of) +([\d.]+) MiB", line) for line in log)
    return round(sum(float(match[1]) for match in found if match) * 2**20)


def measure_random(model: str, cache: str, flash_attention: bool, merged: bool, tiny: str) -> Any:
    """Read a prompt with a random model, and merge it."""
    import numpy as np

    from kvmerge.native_log import caught
    from kvmerge.policies import PRESETS
    from session import Session

    # What is allocated once for any model does not count.
    with Session(Path(tiny), n_ctx=256) as session:
        session.decode([1, 2, 3])
    options: dict[str, Any] = {
        "merge": PRESETS["flowmm"].engine_params() if merged else None,
        "cache_type": cache,
        "flash_attention": flash_attention,
        "n_ctx": LARGE_CONTEXT if merged else CONTEXT,
        "n_batch": BATCH,
        "first_cells": 256 if merged else 0,
    }
    before = resident()
    with caught(1, quiet=True) as log:
        with Session(Path(model), **options) as session:
            kv = logged(log, "KV")
            weights = logged(log, "model")
            prompt = np.random.default_rng(0).integers(0, session.n_vocab, PROMPT).tolist()
            for i in range(0, PROMPT, BATCH):
                session.decode(prompt[i : i + BATCH])
            peak = resident("VmHWM") - before
            if merged:
                session.engine.merge(round(BUDGET * PROMPT))
                session.decode(prompt[:90])
                kv = session.engine.bytes()
            rss = resident() - before
        compute = compute_at_the_end(log)
    return {"weights": weights, "kv": kv, "compute": compute, "RSS": rss, "peak RSS": peak}


def measure_pocket(flash_attention: bool) -> Any:
    """Show pictures to the model in the package."""
    from PIL import Image

    import kvmerge
    from kvmerge import pocket
    from kvmerge.native_log import caught

    buffer = io.BytesIO()
    Image.new("RGB", SIZE, "red").save(buffer, "PNG")
    content: list[Any] = [
        {"type": "image_url", "image_url": buffer.getvalue()} for _ in range(PICTURES)
    ]
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
    with kvmerge.Llama(pocket.model_path(), **{**options, "n_ctx": 256}) as llm:
        llm.eval([1, 2, 3])
    before = resident()
    with caught(1, quiet=True) as log:
        llm = kvmerge.Llama(pocket.model_path(), mmproj=pocket.mmproj_path(), **options)
        encoder = sum(
            round(float(match[1]) * 2**20)
            for line in log
            if (match := re.search(r"reserve_compute_meta.*buffer size = +([\d.]+) MiB", line))
        )
        usage = llm.create_chat_completion(messages, max_tokens=1)["usage"]
        rss, peak = resident() - before, resident("VmHWM") - before
        sizes = {"weights": logged(log, "model"), "kv": logged(log, "KV")}
        llm.close()
        sizes["compute"] = compute_at_the_end(log)
    pictures = usage["prompt_tokens_details"]["image_tokens"]
    return {
        **sizes,
        "encoder": encoder,
        "image tokens": pictures // PICTURES,
        "RSS": rss,
        "peak RSS": peak,
    }


def predict(
    model: Path, cache: str, flash_attention: bool, merged: bool, mmproj: Path | None = None
) -> dict[str, int]:
    """Return what `kvmerge fit` says."""
    from kvmerge import cli

    command = ["fit", str(model), "--json"]
    command += ["--ctx", str(LARGE_CONTEXT if merged else CONTEXT)]
    command += ["--n-batch", str(BATCH), "--n-ubatch", str(BATCH), "--kv-budget", str(BUDGET)]
    command += ["--type-k", cache, "--type-v", cache]
    command += ["--flash-attn"] if flash_attention else []
    if mmproj is None:
        command += ["--text-tokens", str(PROMPT)]
    else:
        size = f"{SIZE[0]}x{SIZE[1]}"
        command += ["--mmproj", str(mmproj), "--images", str(PICTURES), "--size", size]
    with redirect_stdout(io.StringIO()) as output:
        assert cli.main(command) == 0
    said = json.loads(output.getvalue())
    column = said["merged" if merged else "full"]
    parts = {name: column[name] for name in ("weights", "kv", "compute")}
    if mmproj is not None:
        parts |= {"encoder": column["encoder"], "image tokens": said["image_tokens"]}
    return {
        **parts,
        "RSS": column["total"],
        "peak RSS": (said["while_reading"] if merged else column)["total"],
    }


def compare(title: str, predicted: dict[str, int], measured: dict[str, int]) -> list[str]:
    """Print one row a number; return the buffers beyond the limit."""
    beyond = []
    buffers = ("weights", "kv", "compute", "encoder")
    for sizes in (predicted, measured):
        sizes["buffers"] = sum(sizes.get(name, 0) for name in buffers)
    for name, value in measured.items():
        error = predicted[name] / value - 1
        shown = [f"{number / 2**20:.2f}" for number in (predicted[name], value)]
        if name == "image tokens":
            shown = [str(predicted[name]), str(value)]
        print(f"| {title} | {name} | {shown[0]} | {shown[1]} | {error:+.1%} |", flush=True)
        if abs(error) > LIMIT and name not in ("compute", "RSS", "peak RSS"):
            beyond.append(f"{title}, {name}: {error:+.1%}")
    return beyond


def measure(*arguments: object) -> dict[str, int]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Print a table; fail when something is off by more than the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, *rest = args.worker
        if kind == "pocket":
            print(json.dumps(measure_pocket(rest[0] == "True")))
        else:
            model, cache, flash_attention, merged, tiny = rest
            flags = flash_attention == "True", merged == "True"
            print(json.dumps(measure_random(model, cache, *flags, tiny)))
        return

    from kvmerge import pocket
    from random_model import Shape, write_random_model

    beyond = []
    print("| configuration | MiB of | predicted | measured | error |")
    print("| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_random_model(Path(folder) / "tiny.gguf", Shape(layers=1))
        for name, numbers in SHAPES.items():
            shape = Shape(vocab=4096, **{"ffn": 2048, **numbers})
            model = write_random_model(Path(folder) / "model.gguf", shape)
            for cache, flash_attention in CACHES:
                for merged in (False, True):
                    title = f"{name}, {cache}{', FA' if flash_attention else ''}"
                    title += f", {'merged' if merged else 'full'}"
                    beyond += compare(
                        title,
                        predict(model, cache, flash_attention, merged),
                        measure("random", model, cache, flash_attention, merged, tiny),
                    )
    for flash_attention in (True, False):
        beyond += compare(
            f"pocket, {PICTURES} pictures{', FA' if flash_attention else ''}",
            predict(
                Path(pocket.model_path()),
                "f16",
                flash_attention,
                False,
                Path(pocket.mmproj_path()),
            ),
            measure("pocket", flash_attention),
        )
    print(f"\n{len(beyond)} sizes of buffers are off by more than {LIMIT:.0%}")
    for line in beyond:
        print(f"  {line}")
    sys.exit(bool(beyond))


if __name__ == "__main__":
    main()
