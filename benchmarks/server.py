"""Several people at once: `kvmerge serve` as llama-server is, and with a cache that merges.

Every client shows its own album and asks about it, one question after another in one conversation.
Printed for both servers are the memory above the files of the model (when the server is ready, its
peak, and at the end), what the slots hold, the time to the first token of the first question and of
later ones, the tokens per second of an answer, the share of right answers, and how many are, word
by word, what each client is told by a server of its own.

With --cancelled so many requests of others, with albums of their own, come in between and are
broken off: before their answer or while it is written.  The benchmark fails where merging gives a
client another answer than alone, or, with --kv-max-cells, takes more memory than those cells, one
batch a slot and 64 MiB.

The server that does not merge is the same program without a flag of merging; with --stock it is
upstream's llama-server of the same release, which is built on the first call, or the one at a path.
Prompt caches in the host's memory are off in both, so that the KV cache is what is compared;
--cache-ram allows them.

    python benchmarks/server.py --stock
    python benchmarks/server.py --stock --questions 10 --kv-max-cells 4096 --cancelled 40
    python benchmarks/server.py --stock --soak 2000
    python benchmarks/server.py --stock --stall 20

With --soak so many requests with pictures of their own, of mixed sizes, are sent to each server;
one in ten is cancelled.  After the warm-up, a quarter of them, RSS may differ by two percent, and
handles and slots not at all.  With --stall one client's answer is streamed while another shows so
many albums; printed are the longest pauses of that stream, and the longest merge.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from kvmerge import pocket

MIB = 2**20
BUILD = ""
"""Stands for a llama-server of upstream that is built here."""


@dataclass
class Result:
    """What one server did."""

    ready: float = 0.0  # MiB above the files of the model
    peak: float = 0.0
    end: float = 0.0
    allowed: float = 0.0
    cells: str = "-"
    tokens: int = 0
    cancelled: int = 0
    answers: dict[int, list[str]] = field(default_factory=dict)  # by client
    alone: int = 0  # that are as a client's own server gives them
    first: list[float] = field(default_factory=list)  # seconds to the first token
    later: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)  # tokens per second
    scores: list[float] = field(default_factory=list)


class Memory(threading.Thread):
    """Watches how much memory a process has of its own."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self.ready = self.peak = self.now()

    def now(self) -> float:
        return self._process.memory_full_info().uss / MIB

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, self.now())

    def stop(self) -> None:
        self._ended.set()
        self.join()


@dataclass(frozen=True)
class Side:
    """One of the servers that are compared: its name, how it is called, and its flags."""

    name: str
    program: tuple[str, ...]
    flags: tuple[str, ...] = ()


class Server:
    """A server that runs, and the file that it logs into."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self.process, self.log = port, process, log

    def request(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        return connection.getresponse()

    def slots(self) -> list[dict[str, Any]]:
        return json.loads(self.request("GET", "/slots").read())


@contextmanager
def serving(arguments: argparse.Namespace, side: Side) -> Iterator[Server]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    line = [*side.program, "--model", arguments.model]
    line += ["--mmproj", arguments.mmproj, "--port", str(port), "--parallel"]
    line += [str(arguments.clients), "--threads", str(arguments.threads)]
    line += ["--cache-ram", str(arguments.cache_ram)]
    line += ["--ctx-size", str(arguments.ctx_size), "--kv-unified"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*line, *side.flags], stdout=stream, stderr=subprocess.STDOUT
            )
        server = Server(port, process, log)
        try:
            while True:
                if process.poll() is not None:
                    sys.exit(f"the server did not start:\n{log.read_text()[-2000:]}")
                try:
                    if server.request("GET", "/health").status == 200:
                        break
                except OSError:
                    pass
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            process.wait()


def converse(server: Server, client: int, prompt: pocket.Prompt, n: int, result: Result) -> None:
    said = result.answers[client] = []
    for i in range(n):
        body = {
            "messages": prompt.messages(i, said),
            "temperature": 0,
            "max_tokens": 48,
            "stream": True,
        }
        start, first, text, last = time.perf_counter(), 0.0, "", {}
        for line in server.request("POST", "/v1/chat/completions", body):
            if not line.startswith(b"data: {"):
                continue
            last = json.loads(line[6:])
            piece = last["choices"][0]["delta"].get("content") if last["choices"] else None
            if piece:
                first = first or time.perf_counter() - start
                text += piece
        said.append(text.strip())
        (result.first if i == 0 else result.later).append(first)
        if timings := last.get("timings"):
            result.speed.append(timings["predicted_per_second"])
        question = prompt.questions[i]
        result.scores.append(pocket.score(question.task, said[-1], question.answer))


def break_off(server: Server, arguments: argparse.Namespace, clients_end: threading.Event) -> int:
    """Send requests and cancel them, every other one while it is answered; return how many."""
    for n in range(arguments.cancelled):
        if clients_end.is_set():
            return n
        prompt = pocket.make_prompt(np.random.default_rng([9, n]), arguments.pictures)
        body = {"messages": prompt.messages(0), "max_tokens": 500, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=3600)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        if n % 2:
            connection.getresponse().read(300)
        else:
            time.sleep(0.1)
        connection.close()
        clients_end.wait(0.2)
    return arguments.cancelled


def albums(arguments: argparse.Namespace) -> list[pocket.Prompt]:
    return [
        pocket.make_prompt(
            np.random.default_rng(seed), arguments.pictures, n_questions=arguments.questions
        )
        for seed in range(arguments.clients)
    ]


def alone(arguments: argparse.Namespace, side: Side) -> dict[int, list[str]]:
    """Return what each client is told by a server that nobody else uses."""
    result = Result()
    for client, prompt in enumerate(albums(arguments)):
        with serving(arguments, side) as server:
            converse(server, client, prompt, arguments.questions, result)
    return result.answers


def measure(arguments: argparse.Namespace, side: Side) -> Result:
    result = Result()
    with serving(arguments, side) as server:
        warm_up = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 1}
        server.request("POST", "/v1/chat/completions", warm_up).read()
        memory = Memory(server.process.pid)
        memory.start()
        clients_end = threading.Event()
        with ThreadPoolExecutor(arguments.clients + 1) as pool:
            jobs = [
                pool.submit(converse, server, client, prompt, arguments.questions, result)
                for client, prompt in enumerate(albums(arguments))
            ]
            others = pool.submit(break_off, server, arguments, clients_end)
            for job in jobs:
                job.result()
            clients_end.set()
            result.cancelled = others.result()
        slots = server.slots()
        memory.stop()
        files = sum(os.path.getsize(file) for file in (arguments.model, arguments.mmproj)) / MIB
        result.ready, result.peak = memory.ready - files, memory.peak - files
        result.end = memory.now() - files
    result.tokens = sum(slot.get("n_prompt_tokens", 0) for slot in slots)
    if "kv_merge" in slots[0]:
        held = [slot["kv_merge"] for slot in slots]
        cells = sum(slot["cells"] for slot in held)
        result.cells = str(cells)
        if (cap := arguments.kv_max_cells) and cap.isdecimal():
            batches = len(slots) * min(2048, int(cap) // 4)  # as large as the server makes them
            size = sum(slot["bytes"] for slot in held) / cells
            result.allowed = (int(cap) + batches) * size / MIB + 64
    expected = alone(arguments, side)
    result.alone = sum(
        mine == its
        for client, answers in result.answers.items()
        for mine, its in zip(answers, expected[client], strict=True)
    )
    return result


ALLOWED = 0.02
"""By how much RSS may differ after the warm-up."""


def picture(image: Any, size: int) -> dict[str, Any]:
    """Return a part of a message."""
    data = io.BytesIO()
    image.resize((size, size)).save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def send(server: Server, seed: int) -> None:
    """Send one request of the soak; one in ten is cancelled, half of them before any answer."""
    rng = np.random.default_rng([7, seed])
    prompt = pocket.make_prompt(rng, int(rng.integers(1, 5)), n_questions=1)
    content: list[Any] = [picture(p.image, int(rng.integers(24, 200))) for p in prompt.pictures]
    content.append({"type": "text", "text": prompt.questions[0].text})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=3600)
    headers = {"Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        if seed % 20 == 3:
            return
        response = connection.getresponse()
        if response.status != 200:
            sys.exit(f"request {seed}: {response.read().decode()}")
        response.read(100 if seed % 20 == 13 else None)
    finally:
        connection.close()


def soak(arguments: argparse.Namespace, side: Side) -> bool:
    """Print RSS over the requests; return whether it and the rest stayed where they were."""
    n, warm_up = arguments.soak, arguments.soak // 4
    with serving(arguments, side) as server:
        process = psutil.Process(server.process.pid)
        curve: list[float] = []
        handles = 0
        with ThreadPoolExecutor(arguments.clients) as pool:
            for i, _ in enumerate(pool.map(lambda seed: send(server, seed), range(n))):
                curve.append(process.memory_info().rss / MIB)
                if i == warm_up:
                    handles = process.num_fds()
        for _ in range(600):  # those that were cancelled end when the server notices
            slots = server.slots()
            if not any(slot["is_processing"] for slot in slots):
                break
            time.sleep(0.1)
        time.sleep(1)
        left = process.num_fds() - handles
        busy = sum(slot["is_processing"] for slot in slots)
    window = max(n // 10, 1)
    points = [statistics.median(curve[i : i + window]) for i in range(0, n, window)]
    first = statistics.median(curve[warm_up : warm_up + window])
    growth = points[-1] / first - 1
    print(
        f"{side.name}: RSS {' '.join(f'{point:.1f}' for point in points)} MiB, median of each tenth"
    )
    print(
        f"{side.name}: {100 * growth:+.1f} % after {warm_up} of {n} requests, {max(left, 0)} more "
        f"handles (connections included), {busy} of {len(slots)} slots lost",
        flush=True,
    )
    # One connection a client may have been open when handles were counted, and none is now.
    return growth <= ALLOWED and left <= 0 and busy == 0


def stall(arguments: argparse.Namespace, side: Side) -> tuple[list[float], list[float]]:
    """Return the pauses of a stream while another client shows albums, and the merges (ms)."""
    pauses: list[float] = []
    ended = threading.Event()

    def read(server: Server) -> None:
        last = time.perf_counter()
        while not ended.is_set():
            body = {"prompt": "red", "n_predict": 500, "stream": True, "ignore_eos": True}
            for line in server.request("POST", "/completion", body):
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                pauses.append(1000 * (now - last))
                last = now
                if ended.is_set():
                    return
            last = time.perf_counter()

    with serving(arguments, side) as server:
        reader = threading.Thread(target=read, args=(server,))
        reader.start()
        time.sleep(2)
        pauses.clear()
        for seed in range(arguments.stall):
            prompt = pocket.make_prompt(np.random.default_rng([8, seed]), arguments.pictures)
            body = {"messages": prompt.messages(0), "max_tokens": 8, "temperature": 0}
            server.request("POST", "/v1/chat/completions", body).read()
        ended.set()
        reader.join()
        merges = re.findall(r"merged .* ([0-9.]+) ms", server.log.read_text(errors="replace"))
    return sorted(pauses), sorted(map(float, merges))


def print_stalls(arguments: argparse.Namespace, sides: tuple[Side, Side]) -> None:
    print(
        f"{arguments.stall} albums of {arguments.pictures} pictures while an answer is streamed\n"
    )
    for side in sides:
        pauses, merges = stall(arguments, side)
        percentile = pauses[int(0.99 * len(pauses))]
        print(
            f"{side.name}: {len(pauses)} pauses, longest {pauses[-1]:.0f} ms, 99 % below "
            f"{percentile:.0f} ms; {len(merges)} merges, longest "
            f"{max(merges, default=0):.0f} ms, median {statistics.median(merges or [0]):.0f} ms"
        )


def both(arguments: argparse.Namespace) -> tuple[Side, Side]:
    """Return the server that does not merge, and the one that does."""
    ours = (sys.executable, "-m", "kvmerge", "serve")
    flags = ["--kv-merge", arguments.kv_merge, "--kv-budget", arguments.kv_budget]
    if arguments.kv_max_cells:
        flags += ["--kv-max-cells", arguments.kv_max_cells]
    plain = Side("not merging", ours)
    if arguments.stock is not None:
        stock = arguments.stock
        if stock == BUILD:
            sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent / "tests"))
            from needed_packages import STOCK, need
            from stock_library import stock_server

            need(programs=STOCK)
            stock = os.fspath(stock_server())
        plain = Side("llama-server", (stock,))
    return plain, Side("merging", ours, tuple(flags))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stock",
        nargs="?",
        const=BUILD,
        metavar="PROGRAM",
        help="compare with upstream's llama-server: this one, or one that is built here",
    )
    parser.add_argument("--model", default=os.fspath(pocket.model_path()))
    parser.add_argument("--mmproj", default=os.fspath(pocket.mmproj_path()))
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ctx-size", type=int, default=8192)
    parser.add_argument("--cache-ram", type=int, default=0)
    parser.add_argument("--kv-merge", default="auto")
    parser.add_argument("--kv-budget", default="0.2")
    parser.add_argument("--kv-max-cells")
    parser.add_argument("--cancelled", type=int, default=0, metavar="REQUESTS")
    parser.add_argument("--soak", type=int, metavar="REQUESTS")
    parser.add_argument("--stall", type=int, metavar="ALBUMS")
    arguments = parser.parse_args()

    sides = both(arguments)
    if arguments.stall:
        print_stalls(arguments, sides)
        return
    if arguments.soak:
        held = [soak(arguments, side) for side in reversed(sides)]
        sys.exit(0 if held[0] else 1)  # the other stands beside it, and is not what is judged
    runs = {side.name: measure(arguments, side) for side in sides}

    print(
        f"{arguments.clients} clients, {arguments.pictures} pictures and {arguments.questions} "
        f"questions each, {Path(arguments.model).name}, {' '.join(sides[1].flags)}\n"
    )
    print(f"{'':32}" + "".join(f"{name:>18}" for name in runs))
    rows: list[tuple[str, Any]] = [
        ("tokens of the conversations", lambda r: f"{r.tokens}"),
        ("cells held at the end", lambda r: r.cells),
        ("MiB above the model, ready", lambda r: f"{r.ready:.1f}"),
        ("MiB above the model, peak", lambda r: f"{r.peak:.1f}"),
        ("MiB above the model, end", lambda r: f"{r.end:.1f}"),
        ("first token, first question (s)", lambda r: f"{statistics.median(r.first):.2f}"),
        (
            "first token, later ones (s)",
            lambda r: f"{statistics.median(r.later):.2f}" if r.later else "-",
        ),
        ("tokens/s of an answer", lambda r: f"{statistics.median(r.speed):.1f}"),
        ("right answers", lambda r: f"{100 * statistics.mean(r.scores):.0f} %"),
        ("answers as alone", lambda r: f"{r.alone} of {len(r.scores)}"),
    ]
    if arguments.cancelled:
        rows.append(("cancelled in between", lambda r: f"{r.cancelled}"))
    if runs["merging"].allowed:
        rows.insert(4, ("allowed", lambda r: f"{r.allowed:.1f}" if r.allowed else "-"))
    for name, value in rows:
        print(f"{name:32}" + "".join(f"{value(run):>18}" for run in runs.values()))
    merging = runs["merging"]
    too_much = bool(merging.allowed) and merging.peak > merging.allowed
    sys.exit(too_much or merging.alone < len(merging.scores))


if __name__ == "__main__":
    main()
