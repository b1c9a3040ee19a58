"""The stock library to compare with: unpatched, on the ggml libraries of the installed package.

``python tests/stock_library.py`` builds it and prints its folder; with ``--server`` it builds
upstream's llama-server as well and prints the program's path.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).resolve().parent / "stock"
# The environment's own cmake and ninja serve when the machine has none.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def _vendor():
    spec = importlib.util.spec_from_file_location("kvmerge_vendor", ROOT / "vendor" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pristine_tree() -> Path:
    """Return upstream's tree without our patches."""
    vendor = _vendor()
    cache = Path(os.environ.get("KVMERGE_VENDOR_CACHE") or ROOT / "build" / "vendor").resolve()
    return vendor.make_tree(vendor.HERE / "requirements.txt", [], cache)


def package_libraries() -> Path:
    """Return the folder of the package's libraries, without loading them."""
    return Path(importlib.util.find_spec("kvmerge").origin).parent / "lib"


def stock_libraries() -> Path:
    """Return a folder for LLAMA_CPP_LIB_PATH and MTMD_CPP_LIB, built on the first call.

    The build takes about a minute of two cores and is kept in build/stock, under a hash of what
    goes into it.
    """
    return _built(server=False)


def stock_server() -> Path:
    """Return upstream's llama-server, built like `stock_libraries` on the first call.

    It has no web interface and no HTTPS, as ours.  The build takes a few minutes.
    """
    return _built(server=True) / ("llama-server.exe" if sys.platform == "win32" else "llama-server")


def _built(server: bool) -> Path:
    vendor = _vendor()
    changed = [f for p in vendor.read_series(vendor.HERE / "patches") for f, _ in p.hunks()]
    assert not any(f.startswith("ggml/") for f in changed), "the stock build shares ggml with ours"
    with_mtmd = server or any(f.startswith("tools/mtmd/") and "-cli." not in f for f in changed)

    ours = package_libraries()
    shared = sorted(p for p in ours.iterdir() if "ggml" in p.name or "mtmd" in p.name)
    digest = hashlib.sha256(f"{sys.platform} {with_mtmd} {server}".encode())
    for path in [vendor.HERE / "requirements.txt", SOURCE / "CMakeLists.txt", *shared]:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    target = ROOT / "build" / "stock" / digest.hexdigest()[:16]
    if target.is_dir():
        return target

    work = target.with_name(f"{target.name}.{os.getpid()}")
    made = work / "lib"
    made.mkdir(parents=True)
    for path in shared:
        if "ggml" in path.name or not with_mtmd:
            shutil.copy2(path, made / path.name)
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    options = {"STOCK_MTMD": with_mtmd, "STOCK_SERVER": server}
    _run("cmake", "-S", SOURCE, "-B", work / "build", *generator, "-DCMAKE_BUILD_TYPE=Release",
         f"-DSTOCK_LLAMA_CPP_DIR={pristine_tree()}", f"-DSTOCK_LIB_DIR={made}",
         *(f"-D{name}={'ON' if on else 'OFF'}" for name, on in options.items()))  # fmt: skip
    _run("cmake", "--build", work / "build", "--target", "stock", "--parallel", os.cpu_count())
    made.rename(target)
    shutil.rmtree(work)
    return target


def _run(*command) -> None:
    program = shutil.which(command[0], path=PATH)
    if program is None:
        raise RuntimeError(f"The stock library needs {command[0]}: pip install {command[0]}.")
    command = [program, *(str(part) for part in command[1:])]
    done = subprocess.run(
        command,
        env=os.environ | {"PATH": PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-40:])
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", action="store_true", help="build llama-server too")
    print(stock_server() if parser.parse_args().server else stock_libraries())
