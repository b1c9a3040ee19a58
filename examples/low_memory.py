"""A chat with pictures on a laptop with little memory: a cache that never takes more than you say.

python examples/low_memory.py                            # the model in the package
python examples/low_memory.py MODEL.gguf MMPROJ.gguf photo.jpg ...
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from kvmerge import Llama, pocket


def pictures() -> list[dict[str, Any]]:
    """Return the pictures of the command line, or some that the model in the package knows."""
    if len(sys.argv) > 3:
        return [{"type": "image", "image": file} for file in sys.argv[3:]]
    prompt = pocket.make_prompt(np.random.default_rng(2), 16)
    return [{"type": "image", "image": picture.image} for picture in prompt.pictures]


def main() -> None:
    """Show the pictures one a turn, ask about each, and say what the cache takes."""
    model, mmproj = sys.argv[1:3] or (pocket.model_path(), pocket.mmproj_path())
    with Llama(
        model,
        mmproj=mmproj,
        n_ctx=8192,  # how long the conversation may become; it takes no memory by itself
        kv_merge="auto",
        kv_max_cells=512,  # or what the cells may take, such as "256MiB"
        type_k="q8_0",  # half the memory of each cell
        type_v="q8_0",
        flash_attn=True,  # which a quantized cache needs
        n_batch=128,  # smaller buffers while reading
        verbose=False,
    ) as llm:
        messages: list[dict[str, Any]] = []
        for picture in pictures():
            question = {"type": "text", "text": "What is on this picture?"}
            messages.append({"role": "user", "content": [picture, question]})
            answer = llm.create_chat_completion(messages, max_tokens=24, temperature=0)
            messages.append(answer["choices"][0]["message"])
            stats = llm.kv_stats()
            print(f"{stats.tokens:>5} tokens, {stats.cells:>4} cells, {stats.mib:5.2f} MiB")
        print(stats)


if __name__ == "__main__":
    main()
