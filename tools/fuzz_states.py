"""Damage saved states and load them: ``python tools/fuzz_states.py --states 10000``.

Builds the engine, llama.cpp and ggml with AddressSanitizer (the engine with
UndefinedBehaviorSanitizer too) in a folder of its own, saves contexts of small random models,
changes them at random, most of them with a SHA-256 that fits again so that the change is not
noticed by that alone, and loads each one.  A state has to be refused or to be one that can be gone
on from; after a refusal `load_context` must have left what was there.  A crash, a hang or a wrong
access to memory is reported with the number of the state, and a command that repeats it.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib.util
import json
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCH = 500
SECONDS = 120
"""For one state, with all that sanitizers and a busy machine add."""
MIB = 2000
"""What a worker may take; an allocation of more than half of it is refused or is an error."""

INTEGERS = [0, 1, -1, 2, 7, 255, 256, 2**15, 2**16, 2**30, 2**31 - 1, -(2**31), 2**32 - 1]
LONG_INTEGERS = [2**32, 2**53, 2**62, 2**63 - 1, -(2**63), 2**64 - 1]
FLOATS = [0.0, -0.0, -1.0, 1e30, -1e30, 1e-40, float("nan"), float("inf"), float("-inf")]
ODD_VALUES = [
    *INTEGERS,
    *LONG_INTEGERS,
    *FLOATS,
    *["", "x", "12", "\x00", "é" * 50, None, True, [], {}, [[]], {"a": 1}, 10**40],
]


# Changes.


def _number(rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return struct.pack("<Q", rng.choice(INTEGERS + LONG_INTEGERS) % 2**64)
    if kind == 1:
        return struct.pack("<f", rng.choice(FLOATS))
    if kind == 2:
        return struct.pack("<i", rng.randrange(-3, 300))
    return struct.pack("<I", rng.choice(INTEGERS) % 2**32)


def _place(data: bytearray, rng: random.Random) -> int:
    """Return a place to change, rather among what tells of cells than in their keys and values."""
    size, engine = len(data), data.rfind(b"KGVM")
    kind = rng.randrange(8)
    if kind == 0 or size < 64:
        return rng.randrange(size)
    if kind <= 3:
        # The beginning, and the table of cells after it.
        at = rng.randrange(min(size, 64 if kind == 1 else 4096))
    elif engine < 0:
        at = rng.randrange(size)
    else:
        at = engine + rng.randrange(min(size - engine, 256 if kind <= 5 else 65536))
    return at - at % 4 if rng.random() < 0.7 else at


def damaged(data: bytes, rng: random.Random, other: bytes = b"") -> bytearray:
    """Return a copy of a state with one to four changes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not out:
            break
        at = _place(out, rng)
        kind = rng.randrange(16)
        if kind < 4:
            out[at] ^= 1 << rng.randrange(8)
        elif kind < 9:
            number = _number(rng)
            out[at : at + len(number)] = number[: max(len(out) - at, 0)]
        elif kind == 9:
            run = rng.randbytes(rng.choice([1, 4, 16, 200]))
            out[at : at + len(run)] = run[: len(out) - at]
        elif kind == 10:
            del out[rng.choice([at, rng.randrange(len(out)), len(out) - 1]) :]
        elif kind == 11:
            out += rng.randbytes(rng.choice([1, 4, 100]))
        elif kind == 12:
            del out[at : at + rng.choice([1, 4, 8, 64, 500])]
        elif kind == 13:
            length = rng.choice([4, 8, 64, 500])
            out[at:at] = out[at : at + length]
        elif kind == 14 and other:
            length, start = rng.choice([4, 64, 4096]), rng.randrange(len(other))
            out[at : at + length] = other[start : start + length][: len(out) - at]
        else:
            start = rng.randrange(len(out))
            length = min(rng.choice([4, 17, 256]), len(out) - max(at, start))
            out[at : at + length] = out[start : start + length]
    return out


def _damage_json(value: Any, rng: random.Random) -> Any:
    """Return a value of a header with something in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, kind = rng.choice(list(value)), rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, "more": rng.choice(ODD_VALUES)}
        return {**value, key: _damage_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at, kind = rng.randrange(len(value)), rng.randrange(6)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return value[:at] + [value[at]] * rng.choice([2, 3000]) + value[at + 1 :]
        return value[:at] + [_damage_json(value[at], rng)] + value[at + 1 :]
    return rng.choice(ODD_VALUES)


def damaged_file(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Return a copy of a file of `save_context` with changes in one of its parts or anywhere."""
    from kvmerge import saving

    kind = rng.randrange(10)
    if kind == 0:
        return bytes(damaged(data, rng))
    magic, version, header_size, _ = saving._START.unpack_from(data)
    header = data[saving._START.size :][:header_size]
    cells = data[saving._START.size + header_size : -32]
    if kind <= 3:
        fields = json.loads(header)
        for _ in range(rng.choice([1, 1, 3])):
            fields = _damage_json(fields, rng)
        header = json.dumps(fields).encode()
    elif kind == 4:
        header = bytes(damaged(header, rng))
    else:
        cells = bytes(damaged(cells, rng, other))
    start = saving._START.pack(magic, version, len(header), len(cells))
    if rng.random() < 0.02:
        start = bytes(damaged(start, rng))
    body = start + header + cells
    return body + hashlib.sha256(body).digest()


# What is damaged.


class Files:
    """Files of `save_context`."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        import kvmerge
        from mrope_model import write_mrope_model

        model, mmproj = folder / "mrope.gguf", folder / "mrope-mmproj.gguf"
        if not mmproj.exists():
            write_mrope_model(folder)
        self.llm = kvmerge.Llama(
            model, mmproj=mmproj, n_ctx=1024, n_batch=128, n_threads=1, verbose=False, **options
        )
        self.file = folder / f"{os.getpid()}.kvm"
        self.data = [self._saved(seed) for seed in (2, 1)]
        self.answer = self._answer()

    def close(self) -> None:
        self.llm.close()

    def _saved(self, seed: int) -> bytes:
        import numpy as np

        from kvmerge import pocket

        prompt = pocket.make_prompt(np.random.default_rng(seed), seed)
        self.llm.create_chat_completion(prompt.messages(0), max_tokens=2, temperature=0.0)
        self.llm.save_context(self.file)
        return self.file.read_bytes()

    def _answer(self) -> list[int]:
        """Read on from what is held, and cut that off again."""
        import numpy as np

        llm, n = self.llm, self.llm.n_tokens
        ids = []
        for token in (5, 6, 7):
            llm.eval([token])
            logits = llm._ctx.get_logits_ith(-1)
            ids.append(int(np.argmax(np.ctypeslib.as_array(logits, (llm.n_vocab(),)))))
        if not llm.kv_cache.trim(n):
            raise AssertionError("what was read last cannot be removed")
        return ids

    def _held(self) -> tuple[Any, ...]:
        llm = self.llm
        cells = 0 if llm.engine is None else llm.engine.n_cells()
        return llm.input_ids[: llm.n_tokens].tolist(), llm.media_spans, llm.kv_stats(), cells

    def damage(self, rng: random.Random) -> bytes:
        return damaged_file(self.data[0], rng, self.data[1])

    def load(self, data: bytes, look_close: bool) -> str:
        import kvmerge

        self.file.write_bytes(data)
        before = self._held()
        try:
            self.llm.load_context(self.file)
        except kvmerge.errors.StateError:
            assert self._held() == before, "a refused file has changed what was there"
            if look_close:
                assert self._answer() == self.answer, "after a refusal the answer is another"
            return "refused"
        # It was taken: everything that asks for what is held has to work.
        llm = self.llm
        str(llm.kv_stats())
        llm.detokenize(llm.input_ids[: llm.n_tokens].tolist())
        llm.eval([5, 6])
        if llm.engine is not None:
            llm.engine.merge(max(1, llm.engine.n_cells() // 2))
        llm.eval([7])
        llm.save_context(self.file)
        self.file.write_bytes(self.data[1])
        llm.load_context(self.file)
        return "loaded"


class States:
    """States of llama.cpp's own calls, of one sequence or of a whole context."""

    def __init__(self, folder: Path, arch: str, options: dict[str, Any]) -> None:
        from kvmerge.policies import PRESETS
        from random_model import Shape, write_random_model
        from session import Session

        options = dict(options)
        self.whole = options.pop("whole", False)
        model = folder / f"{arch}.gguf"
        if not model.exists():
            write_random_model(model, Shape(arch, 2, 4, 2, 32, 64, 512))
        policy = PRESETS[options.pop("policy", "flowmm")]
        merge = {**policy.engine_params(), "n_window": 8, "n_flow_rows": 16}
        self.session = Session(model, merge=merge, n_ctx=1024, n_batch=64, n_seq_max=2, **options)
        self.data = [self._saved(seed) for seed in (2, 1)]
        self.answers = self._answer()

    def close(self) -> None:
        self.session.close()

    def _saved(self, seed: int) -> bytes:
        import numpy as np

        rng, session = np.random.default_rng(seed), self.session
        self._clear()
        for _ in range(1 + seed):
            session.decode(rng.integers(0, 512, 40).tolist())
            with session.engine.media("image"):
                session.decode(embeddings=rng.standard_normal((25, session.n_embd)))
        session.decode(rng.integers(0, 512, 20).tolist())
        if seed != 1:
            session.engine.merge(30)
            session.decode(rng.integers(0, 512, 10).tolist())
        return session.save(whole=self.whole)

    def _clear(self) -> None:
        from session import llama_cpp

        llama_cpp.llama_memory_clear(self.session.memory, True)
        self.session.position = 0

    def _answer(self) -> list[float]:
        """Read something anew."""
        self._clear()
        return self.session.decode([1, 2, 3]).tolist()

    def damage(self, rng: random.Random) -> bytes:
        return bytes(damaged(self.data[0], rng, self.data[1]))

    def load(self, data: bytes, look_close: bool) -> str:
        from session import llama_cpp

        session = self.session
        loaded = session.restore(data, whole=self.whole)
        if not loaded and look_close:
            assert self._answer() == self.answers, "after a refusal the answer is another"
        for sequence in (0, 1):
            # llama.cpp may have taken a part: that, too, has to be one to go on from.
            end = llama_cpp.llama_memory_seq_pos_max(session.memory, sequence) + 1
            if end < 2**30:
                session.decode([1, 2], sequence=sequence, position=end)
            for cells in (20, 5):
                if session.engine.n_cells(sequence) > cells and not self._is_shared(sequence):
                    session.engine.merge(cells, sequence)
            assert session.remove(-1, -1, sequence)
            assert session.engine.n_cells(sequence) == 0
        return "loaded" if loaded else "refused"

    def _is_shared(self, sequence: int) -> bool:
        from kvmerge.errors import KVMergeError

        try:
            self.session.engine.merge(max(1, self.session.engine.n_cells(sequence) - 1), sequence)
        except KVMergeError:
            return True
        return False


TARGETS: dict[str, Callable[[Path], Files | States]] = {
    "file": lambda folder: Files(folder, {"kv_merge": "flowmm", "kv_budget": 40}),
    "file, all queries, q8_0": lambda folder: Files(
        folder,
        {
            "kv_merge": "h2o",
            "kv_budget": 40,
            "type_k": "q8_0",
            "type_v": "q8_0",
            "flash_attn": True,
        },
    ),
    "file, mosaic, cap": lambda folder: Files(
        folder, {"kv_merge": "mosaic", "kv_budget": 0.3, "kv_max_cells": 512}
    ),
    "file, off": lambda folder: Files(folder, {"kv_merge": "none"}),
    "sequence": lambda folder: States(folder, "llama", {"first_cells": 256}),
    "sequence, all queries, f32": lambda folder: States(
        folder, "llama", {"policy": "h2o", "cache_type": "f32", "flash_attention": False}
    ),
    "sequence, sliding window": lambda folder: States(
        folder, "gemma3", {"swa_full": False, "policy": "mosaic"}
    ),
    "sequence, recurrent part": lambda folder: States(folder, "lfm2", {"first_cells": 256}),
    "context": lambda folder: States(folder, "llama", {"whole": True, "first_cells": 256}),
    "context, sliding window": lambda folder: States(
        folder, "gemma3", {"whole": True, "swa_full": False}
    ),
    "context, recurrent part": lambda folder: States(folder, "lfm2", {"whole": True}),
}


# The worker: a process that loads a batch, and dies of what it finds.


def work(kind: str, seeds: range, folder: Path) -> None:
    """Load damaged states of one kind; print a line before each and after all."""
    sys.path[:0] = [str(ROOT / "tests")]
    if importlib.util.find_spec("kvmerge") is None:
        sys.path.append(str(ROOT / "python"))  # built here, and not installed
    limit = faulthandler.dump_traceback_later
    limit(5 * SECONDS, exit=True)
    import kvmerge  # noqa: F401  (loads the libraries)

    target = TARGETS[kind](folder)
    found: Counter[str] = Counter()
    for seed in seeds:
        print(f"state {seed}", flush=True)
        limit(SECONDS, exit=True)
        rng = random.Random(f"{kind} {seed}")
        found[target.load(target.damage(rng), seed % 100 == 0)] += 1
    faulthandler.cancel_dump_traceback_later()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    assert used < MIB, f"{used} MiB were used"
    print(f"done {json.dumps({**found, 'MiB': used})}", flush=True)


# The rest: build, hand out, report.


def build(folder: Path, jobs: int) -> Path:
    """Build the libraries; return the folder that they are in."""
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja"]
    configure += ["-DKVMERGE_DEV=ON", "-DKVMERGE_SANITIZE=ON"]
    subprocess.run([str(part) for part in configure], check=True)
    subprocess.run(["cmake", "--build", str(folder), "-j", str(jobs)], check=True)
    return folder / "lib"


def _runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "c++")
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return os.path.realpath(found.stdout.strip())


def environment(libraries: Path, sanitized: bool) -> dict[str, str]:
    """Return the variables of a worker."""
    out = {**os.environ, "KVMERGE_LIB_PATH": str(libraries), "PYTHONUNBUFFERED": "1"}
    if sanitized:
        # libstdc++ too: the sanitizer looks for its `throw` before anything has loaded it.
        preload = " ".join(_runtime(name) for name in ("libasan.so", "libstdc++.so"))
        limits = f"max_allocation_size_mb={MIB // 2}:hard_rss_limit_mb={MIB}"
        out |= {
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:{limits}",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",
        }
    return out


def batches(kinds: list[str], first: int, n: int) -> Iterator[tuple[str, range]]:
    """Share the states among the kinds, in batches."""
    for i, kind in enumerate(kinds):
        start, end = first + n * i // len(kinds), first + n * (i + 1) // len(kinds)
        for at in range(start, end, BATCH):
            yield kind, range(at, min(at + BATCH, end))


def run_batch(kind: str, seeds: range, folder: Path, variables: dict[str, str]) -> dict[str, int]:
    """Run a worker; raise with the state that it died of."""
    span = f"{seeds.start}:{seeds.stop}"
    command = [sys.executable, __file__, "--worker", kind, "--span", span, "--folder", str(folder)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.run(
            command, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        lines = process.stdout.splitlines()
        if process.returncode == 0 and lines and lines[-1].startswith("done "):
            return dict(json.loads(lines[-1].removeprefix("done ")))
        errors.seek(0)
        said = errors.read()
    states = [line.removeprefix("state ") for line in lines if line.startswith("state ")]
    at = states[-1] if states else "none"
    raise SystemExit(
        f"{said[-6000:]}\nFAILED: {kind!r}, state {at} (exit status {process.returncode}); again "
        f'with: python tools/fuzz_states.py --no-build --kind "{kind}" --seed {at} --states 1'
    )


def main() -> None:
    """Build, damage, load, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first state")
    parser.add_argument("--kind", choices=sorted(TARGETS), help="of these only")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "sanitize")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--no-build", action="store_true", help="the libraries are there already")
    parser.add_argument("--libraries", type=Path, help="other libraries than those of --build")
    parser.add_argument("--plain", action="store_true", help="libraries without sanitizers")
    parser.add_argument(
        "--pytest", nargs=argparse.REMAINDER, help="run tests with the sanitizers; all that follows"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--span", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        start, stop = map(int, args.span.split(":"))
        work(args.worker, range(start, stop), args.folder)
        return
    sys.path[:0] = [str(ROOT / "tests")]
    from needed_packages import STOCK, need

    is_built = args.no_build or args.libraries
    need("gguf", programs=() if is_built else STOCK)
    libraries = args.libraries or args.build / "lib"
    if not is_built:
        libraries = build(args.build, args.jobs)
    variables = environment(libraries.resolve(), not args.plain)
    if args.pytest:
        command = [sys.executable, "-m", "pytest", *args.pytest]
        sys.exit(subprocess.run(command, env=variables, cwd=ROOT).returncode)
    kinds = [args.kind] if args.kind else list(TARGETS)
    total: Counter[str] = Counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for kind, seeds in batches(kinds, args.seed, args.states):
            found = run_batch(kind, seeds, folder, variables)
            print(f"{kind:28} {seeds.start:>6} to {seeds.stop - 1:>6}: {found}", flush=True)
            total.update({name: found.get(name, 0) for name in ("refused", "loaded")})
    print(f"{total.total()} states: {total['refused']} refused, {total['loaded']} loaded, no error")


if __name__ == "__main__":
    main()
