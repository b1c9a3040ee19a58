"""Which back ends take what the engine's graphs consist of: ``python tools/supports_op.py``.

The functions by which Metal, CUDA, Vulkan, SYCL and OpenCL say whether they take an operation are
cut out of the pinned release's sources, compiled here beside the few declarations that they need
(`tools/supports_op/*.cpp`), and asked about every node that ggml's scheduler computes while each
policy merges, with the CPU treated as any other device.  So nothing is listed by hand: neither
what a back end takes nor what the engine builds.  A release that changes one of the functions so
that it needs more declarations does not compile here, and says so.

What the model's graph does without an engine is the model's own matter and left out.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(__file__).resolve().parent / "supports_op"
BACKENDS = ("Metal", "CUDA", "Vulkan", "SYCL", "OpenCL")
"""In the order of the bits of `supported_by`."""

CACHES = [("f16", True), ("f16", False), ("f32", False), ("q8_0", True), ("q4_0", True)]
"""Type of the cache, and whether attention is fused."""
HEADS_KV = (2, 1)
"""One head for keys and values has a path of its own."""

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "python")]

Found = dict[str, tuple[str, ...]]
"""Operations with their types, and the back ends that do not take them."""


class CutError(Exception):
    """A function is not where it was, or needs what it did not need."""


def upstream() -> Path:
    """Return the folder of ggml in the pinned release, with the hooks in it."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "vendor" / "prepare.py")
    assert spec and spec.loader
    prepare: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = prepare
    spec.loader.exec_module(prepare)
    cache = Path(os.environ.get("KVMERGE_VENDOR_CACHE") or ROOT / "build" / "vendor").resolve()
    patches = prepare.read_series(prepare.HERE / "patches")
    return Path(prepare.make_tree(prepare.HERE / "requirements.txt", patches, cache)) / "ggml"


def cut(text: str, name: str) -> str:
    """Return the definition of a function, from its first line to the brace that closes it.

    Raises
    ------
    CutError
        If there is not exactly one.
    """
    found = re.findall(rf"^[a-z][^\n;]*\b{name}\s*\((?:[^;{{]*)\) \{{\n.*?^\}}", text, re.M | re.S)
    if len(found) != 1:
        raise CutError(f"{len(found)} definitions of {name} instead of one")
    return str(found[0])


def complete(source: str, ggml: Path) -> str:
    """Return a file of `SOURCES` with each line ``//@ FILE: FUNCTION`` replaced by the function."""

    def replace(match: re.Match[str]) -> str:
        file, name = match.groups()
        try:
            return cut((ggml / "src" / file).read_text(), name)
        except (OSError, CutError) as error:
            raise CutError(f"{file} of the pinned release: {error}") from None

    return re.sub(r"^//@ (\S+): (\w+)$", replace, source, flags=re.M)


class Checker:
    """The five functions, compiled.

    Parameters
    ----------
    folder
        Where to compile.
    libraries
        Folder of the package's libraries.

    Raises
    ------
    CutError
        If the sources of the release no longer fit the declarations here.
    """

    def __init__(self, folder: Path, libraries: Path) -> None:
        ggml = upstream()
        files = []
        for source in sorted(SOURCES.glob("*.cpp")):
            files.append(folder / source.name)
            files[-1].write_text(complete(source.read_text(), ggml))
        base = next(path for path in libraries.glob("*ggml-base*") if path.suffix != ".a")
        ctypes.CDLL(str(base))  # it is found by its name then
        made = folder / "supports_op.so"
        compiler = os.environ.get("CXX") or shutil.which("c++") or "c++"
        done = subprocess.run(
            [compiler, "-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-I", SOURCES,
             "-I", ggml / "include", "-I", ggml / "src", "-o", made, *files, base],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise CutError(f"supports_op of the pinned release has changed:\n{done.stderr}")
        self._library: Any = ctypes.CDLL(str(made))
        node, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
        for name, result, arguments in (
            ("operation", number, [text]),
            ("describe", text, [node, number]),
            ("is_asked", ctypes.c_bool, [node]),
            ("supported_by", number, [node, number]),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    def _see(self, node: int, swap: tuple[str, str] | None, found: Found) -> None:
        text, operation = self._library.describe(node, -1).decode(), -1
        if swap and text.startswith(swap[0]):
            operation = self._library.operation(swap[1].encode())
            text = self._library.describe(node, operation).decode()
        if self._library.is_asked(node):
            bits = self._library.supported_by(node, operation)
            refusals = {name for i, name in enumerate(BACKENDS) if not bits >> i & 1}
            found[text] = tuple(sorted({*found.get(text, ()), *refusals}))

    @contextmanager
    def watch(self, swap: tuple[str, str] | None = None) -> Iterator[Found]:
        """Note all nodes that contexts made meanwhile compute.

        Parameters
        ----------
        swap
            An operation, and another one as which its nodes are shown to the back ends.
        """
        from session import llama_cpp

        found: Found = {}
        default = llama_cpp.llama_context_default_params

        @llama_cpp.ggml_backend_sched_eval_callback
        def callback(node: int, ask: bool, _: None) -> bool:
            if ask:
                self._see(node, swap, found)
            return not ask

        def watched() -> Any:
            params = default()
            params.cb_eval = callback
            return params

        llama_cpp.llama_context_default_params = watched
        try:
            yield found
        finally:
            llama_cpp.llama_context_default_params = default


def merge_and_read_on(model: Path, policy: Any, cache_type: str, flash_attention: bool) -> None:
    """Do all that a policy has graphs for; without a policy: the same without merging."""
    from session import Session

    rng = np.random.default_rng(0)
    options = {"cache_type": cache_type, "flash_attention": flash_attention, "n_batch": 128}
    merge = policy and policy.engine_params()
    with Session(
        model, merge=merge, n_ctx=1024, first_cells=256 if merge else 0, **options
    ) as session:
        for _ in range(2):
            logits = session.decode(rng.integers(0, 512, 40).tolist())
            for _ in range(3):
                rows = rng.standard_normal((49, session.n_embd)).astype(np.float32)
                with session.engine.media("image") if session.engine else nullcontext():
                    session.decode(embeddings=rows)
                logits = session.decode(rng.integers(0, 512, 20).tolist())
            session.decode([5], sequence=0)
            if session.engine:
                session.engine.merge(100)
            session.generate(logits, 2)


def record(checker: Checker, folder: Path) -> Found:
    """Return what merging adds to graphs, and for each the back ends that do not take it."""
    from kvmerge.policies import PRESETS
    from random_model import Shape, write_random_model

    added: Found = {}
    for heads_kv in HEADS_KV:
        shape = Shape(layers=2, heads=4, heads_kv=heads_kv)
        model = write_random_model(folder / f"{heads_kv}.gguf", shape, seed=1)
        for cache in CACHES:
            with checker.watch() as without:
                merge_and_read_on(model, None, *cache)
            for policy in filter(None, PRESETS.values()):
                with checker.watch() as found:
                    merge_and_read_on(model, policy, *cache)
                for text, refusals in found.items():
                    if text not in without:
                        added[text] = tuple(sorted({*added.get(text, ()), *refusals}))
    return added


def main() -> int:
    """Print the table; return how many operations some back end does not take."""
    from kvmerge.native import library

    os.environ["KVMERGE_AS_DEVICE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        checker = Checker(Path(scratch), library.library_folder())
        added = record(checker, Path(scratch))
    print(f"| operation | {' | '.join(BACKENDS)} |\n| --- |{' --- |' * len(BACKENDS)}")
    for text, refusals in sorted(added.items()):
        marks = ["no" if name in refusals else "yes" for name in BACKENDS]
        print(f"| {text} | {' | '.join(marks)} |")
    return sum(map(bool, added.values()))


if __name__ == "__main__":
    print(f"{main()} operations are not taken everywhere", file=sys.stderr)
