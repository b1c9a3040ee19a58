"""Run upstream's own tests on the patched libraries: ``python tools/upstream_tests.py``.

With merging off nothing may have changed.  Builds three of llama.cpp's tests (of saved states and
of all architectures, with models that they make themselves) and runs them, and then the tests of
llama-cpp-python that need no download.  Needs what the package's tests need, scipy and
huggingface_hub; takes some minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test-llama-archs", "test-save-load-state", "test-state-restore-fragmented")
NEED_DOWNLOAD = (
    "real",
    "prompt_cache",
    "prompt_reuse",
    "prompt_hit",
    "prefix_reuse",
)
"""Parts of the names of tests of llama-cpp-python that fetch a model."""
IMPORTED = ("huggingface_hub", "numpy", "pytest", "scipy")
"""What tests of llama-cpp-python import."""


def run(*command: str | Path, **options: object) -> None:
    """Run a command, and stop when it fails."""
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def build(folder: Path, jobs: int) -> Path:
    """Build the tests; return the folder that they are in."""
    # One of them loads no back ends at run time: the CPU's has to be linked.
    run(
        "cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release",
        "-DKVMERGE_BUILD_UPSTREAM_TESTS=ON", "-DGGML_BACKEND_DL=OFF", "-DGGML_NATIVE=OFF",
    )  # fmt: skip
    run("cmake", "--build", folder, "-j", str(jobs), "--target", *TESTS)
    return folder / "bin"


def unpack_python_tests(folder: Path) -> Path:
    """Unpack llama-cpp-python's tests beside the vocabulary that they read."""
    (sdist,) = (ROOT / "build" / "vendor").glob("llama_cpp_python-*.tar.gz")
    wanted = ("/tests/test_", "/vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf")
    with tarfile.open(sdist) as archive:
        members = [
            member
            for member in archive.getmembers()
            if any(part in member.name for part in wanted)
            and "/vendor/llama.cpp/tests/" not in member.name
        ]
        archive.extractall(folder, members, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def main() -> None:
    """Build and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "upstream-tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    args = parser.parse_args()

    sys.path[:0] = [str(ROOT / "tests")]
    from needed_packages import need

    need(*IMPORTED, programs=("cmake",))

    bin_folder = build(args.build, args.jobs)
    models = args.build / "models"
    models.mkdir(exist_ok=True)
    run(bin_folder / TESTS[0], "-o", models, cwd=bin_folder)
    run(bin_folder / TESTS[0], cwd=bin_folder)
    run(bin_folder / TESTS[1], "--models", models, cwd=bin_folder)
    pocket = ROOT / "python" / "kvmerge" / "pocket" / "pocket.gguf"
    run(bin_folder / TESTS[2], "-m", pocket, cwd=bin_folder)

    python_tests = unpack_python_tests(args.build)
    found = importlib.util.find_spec("kvmerge")
    assert found is not None and found.origin is not None
    package = Path(found.origin).parent  # installed, or the tree itself
    library = str(package / "lib")
    paths = [str(package / "_vendor"), os.environ.get("PYTHONPATH", "")]
    skipped = " and ".join(f"not {part}" for part in NEED_DOWNLOAD)
    run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", skipped, "tests",
        cwd=python_tests,
        env={
            **os.environ,
            "LLAMA_CPP_LIB_PATH": library,
            "MTMD_CPP_LIB": library,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
