"""Serve a model behind OpenAI's protocol, and ask it something with its SDK.

pip install "kvmerge[fastapi]" openai
python examples/server.py                                # the model in the package
python examples/server.py MODEL.gguf MMPROJ.gguf
"""

from __future__ import annotations

import socket
import sys
import threading
import time

import numpy as np
import uvicorn
from openai import OpenAI

from kvmerge import pocket
from kvmerge.llama_cpp_server import Settings, create_app


def main() -> None:
    """Start the server, ask one question about two pictures, and stop."""
    model, mmproj = map(str, sys.argv[1:3] or (pocket.model_path(), pocket.mmproj_path()))
    app = create_app(
        Settings(model=model, mmproj=mmproj, n_ctx=4096, kv_merge="auto", verbose=False)
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.05)

    address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    with OpenAI(base_url=address, api_key="none") as client:
        messages = pocket.make_prompt(np.random.default_rng(1), 2).messages(0)
        parts = client.chat.completions.create(
            model=model, messages=messages, max_tokens=24, temperature=0, stream=True
        )
        for part in parts:
            print(part.choices[0].delta.content or "", end="", flush=True)
        print()
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    main()
