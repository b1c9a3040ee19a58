"""Run upstream's own server tests: ``python tools/upstream_server_tests.py``.

On llama-server as it is upstream, on ours with merging off, and on ours with merging on.  The
models that the tests want to download are not there: some of random weights, and the pocket model
where pictures are shown, stand in for them, so tests that know what a model says fail on all three.
It fails when a test passes on upstream's server and not on ours with merging off, and lists those
that fail with merging on only.

Upstream's server is built from the pinned source on the first call (``tests/stock_library.py``).
What the tests import has to be installed: openai, aiohttp, prometheus-client, requests, filelock,
wget.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent / "upstream_server"
IMPORTED = (
    "aiohttp",
    "filelock",
    "gguf",
    "numpy",
    "openai",
    "prometheus_client",
    "requests",
    "wget",
)
TEXT = (
    ("ggml-org/test-model-stories260K", "stories260K-f32.gguf"),
    ("ggml-org/stories15M_MOE", "stories15M_MOE-F16.gguf"),
    ("ggml-org/models", "jina-reranker-v1-tiny-en/ggml-model-f16.gguf"),
)
"""Files of repositories in whose place a model of text stands."""
EMBEDDING = ("ggml-org/models", "bert-bge-small/ggml-model-f16.gguf")
"""In its place stands a model that makes one embedding of a text."""
DRAFT = "stories15M-q4_0.gguf"
"""A file that it stands for too, in the folder in which the tests keep what they have fetched."""
INFILL = ("ggml-org/test-model-stories260K-infill", "stories260K-infill-f32.gguf")
"""In its place stands a model whose tokens say where text is to be filled in."""
PICTURES = ("11_truck.png", "91_cat.png")
COMMIT = "0" * 40


@dataclass
class Run:
    """One server, and what the tests came to on it."""

    name: str
    program: Path
    environment: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    def passed(self) -> set[str]:
        return {test for test, outcome in self.outcomes.items() if outcome == "passed"}

    def failed(self) -> set[str]:
        return {test for test, outcome in self.outcomes.items() if outcome == "failed"}


def pristine() -> Path:
    """Return upstream's tree with its tests."""
    line = [sys.executable, ROOT / "vendor" / "prepare.py", "--pristine", "--full"]
    return Path(subprocess.check_output([str(part) for part in line], text=True).strip())


def cached(cache: Path, repository: str, name: str, file: Path) -> None:
    """Put a file where llama-server looks for one that it has fetched before."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    place = folder / "snapshots" / COMMIT / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(file.resolve())


def stand_in(scratch: Path, tree: Path, text: Path | None) -> dict[str, str]:
    """Lay out models and pictures; return the environment that names them."""
    import numpy as np

    from kvmerge import pocket
    from random_model import Shape, write_random_model

    shape = Shape(heads=2, heads_kv=1, head_size=32, vocab=32000, context=2048)
    llama = tree / "models" / "ggml-vocab-llama-spm.gguf"
    coder = tree / "models" / "ggml-vocab-deepseek-coder.gguf"
    text = text or write_random_model(scratch / "random.gguf", shape, vocabulary=llama)
    pooling = replace(shape, pools=True)
    embedding = write_random_model(scratch / "embedding.gguf", pooling, vocabulary=llama)
    larger = replace(shape, vocab=32256)
    infill = write_random_model(scratch / "infill.gguf", larger, vocabulary=coder)
    cache, pictures = scratch / "cache", scratch / "pictures"
    (scratch / DRAFT).symlink_to(text.resolve())
    for repository, name in TEXT:
        cached(cache, repository, name, text)
    cached(cache, *EMBEDDING, embedding)
    cached(cache, *INFILL, infill)
    seeing = "ggml-org/tinygemma3-GGUF"
    cached(cache, seeing, "tinygemma3-Q8_0.gguf", pocket.model_path())
    cached(cache, seeing, "mmproj-tinygemma3.gguf", pocket.mmproj_path())
    pictures.mkdir()
    shown = pocket.make_prompt(np.random.default_rng(0), len(PICTURES)).pictures
    for name, picture in zip(PICTURES, shown, strict=True):
        picture.image.save(pictures / name)
    return {"LLAMA_CACHE": str(cache), "KVMERGE_PICTURES": str(pictures)}


def run_tests(run: Run, tests: Path, options: Sequence[str], scratch: Path) -> None:
    """Run the tests on one server."""
    report = scratch / f"{run.name}.jsonl"
    report.touch()
    paths = [str(tests), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **run.environment,
        "LLAMA_SERVER_BIN_PATH": str(run.program),
        "KVMERGE_OUTCOMES": str(report),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    line = [sys.executable, "-m", "pytest", "-q", "-p", "stand_ins", "-p", "no:cacheprovider"]
    line += ["--tb=line", "-m", "not slow", *options]
    print("+", run.name, *line[1:], flush=True)
    with (scratch / f"{run.name}.log").open("wb") as log:
        subprocess.run(line, cwd=tests, env=environment, stdout=log, stderr=subprocess.STDOUT)
    for row in report.read_text(encoding="utf-8").splitlines():
        test, outcome, said = json.loads(row)
        if run.outcomes.get(test) != "failed":  # a later part of a test may be its end
            run.outcomes[test] = outcome
            run.said[test] = said


def by_file(tests: set[str]) -> str:
    """Return tests, a line a file."""
    files: dict[str, list[str]] = {}
    for test in sorted(tests):
        file, _, name = test.partition("::")
        files.setdefault(Path(file).name, []).append(name)
    return "\n".join(f"  {file}: {', '.join(names)}" for file, names in files.items())


def tell(runs: list[Run]) -> bool:
    """Print what they came to; return whether ours is as upstream's with merging off."""
    for run in runs:
        counts = [list(run.outcomes.values()).count(x) for x in ("passed", "failed", "skipped")]
        print(f"{run.name}: {counts[0]} passed, {counts[1]} failed, {counts[2]} skipped")
    *stock, off, on = runs
    print(f"\nfail on every server:\n{by_file(set.intersection(*(r.failed() for r in runs)))}")
    lost = set().union(*(other.passed() for other in stock)) - off.passed()
    print(f"\npass on upstream's and not on ours with merging off:\n{by_file(lost)}")
    merging = off.passed() - on.passed()
    print(f"\nfail with merging on only:\n{by_file(merging)}")
    for name, tests, run in (("off", lost, off), ("on", merging, on)):
        for test in sorted(tests):
            last = re.sub(r"\s+", " ", run.said.get(test, "it did not run"))[-160:]
            print(f"merging {name}, {test}: {last}")
    return not lost and bool(off.passed())


def main() -> None:
    """Build and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stock", type=Path, help="a llama-server of upstream, built before")
    parser.add_argument("--no-stock", action="store_true", help="only run ours")
    parser.add_argument(
        "--model",
        type=Path,
        help="GGUF that stands in for models of text (default: random weights)",
    )
    parser.add_argument("--kv-merge", default="auto")
    parser.add_argument("--kv-budget", default="0.2")
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--keep", type=Path, help="folder for logs (default: none are kept)")
    parser.add_argument("tests", nargs="*", help="such as unit/test_slot_save.py (default: all)")
    args = parser.parse_args()

    sys.path[:0] = [str(ROOT / "tests")]
    from needed_packages import STOCK, need

    need(*IMPORTED, programs=() if args.stock or args.no_stock else STOCK)

    from kvmerge.commands.serve import program
    from stock_library import stock_server

    tree = pristine()
    merging = {"LLAMA_ARG_KV_MERGE": args.kv_merge, "LLAMA_ARG_KV_BUDGET": args.kv_budget}
    runs = [Run("off", program()), Run("on", program(), merging)]
    if not args.no_stock:
        runs.insert(0, Run("upstream", (args.stock or stock_server()).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        scratch = (args.keep or Path(folder)).resolve()
        # They look for templates and a picture beside themselves.
        shutil.copytree(tree / "models" / "templates", scratch / "models" / "templates")
        (scratch / "tools" / "mtmd").mkdir(parents=True)
        shutil.copy(tree / "tools" / "mtmd" / "test-1.jpeg", scratch / "tools" / "mtmd")
        tests = scratch / "tools" / "server" / "tests"
        shutil.copytree(tree / "tools" / "server" / "tests", tests)
        given = stand_in(scratch, tree, args.model)
        for run in runs:
            (tests / "tmp").mkdir(exist_ok=True)
            (tests / "tmp" / DRAFT).symlink_to(scratch / DRAFT)
            run.environment |= {**given, "PORT": str(args.port)}
            run_tests(run, tests, args.tests, scratch)
            shutil.rmtree(tests / "tmp", ignore_errors=True)
        held = tell(runs)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
