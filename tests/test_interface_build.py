"""Upstream's web interface is built into the server, or the build fails: never silently without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stock_library import PATH, ROOT, pristine_tree

CMAKE = shutil.which("cmake", path=PATH)

pytestmark = [
    pytest.mark.skipif(CMAKE is None, reason="needs cmake"),
    pytest.mark.skipif(shutil.which("c++", path=PATH) is None, reason="no compiler"),
    pytest.mark.skipif(sys.platform == "win32", reason="npm is a script for a shell here"),
]

PROJECT = f"""
cmake_minimum_required(VERSION 3.21)
project(check LANGUAGES CXX)
set(KVMERGE_SOURCE_DIR "{ROOT}")
set(KVMERGE_DEV ON)
set(KVMERGE_DEV_LIBRARIES "${{CMAKE_CURRENT_SOURCE_DIR}}/lib")
include("{ROOT / "cmake" / "KvmergeInterface.cmake"}")
set(LLAMA_BUILD_UI ON)
set(LLAMA_USE_PREBUILT_UI OFF)
kvmerge_interface_sources("${{LLAMA_CPP}}" source)
set(PROJECT_SOURCE_DIR "${{LLAMA_CPP}}")
add_subdirectory("${{source}}" llama.cpp/tools/ui)
file(WRITE "${{CMAKE_CURRENT_BINARY_DIR}}/main.cpp"
    "#include \\"ui.h\\"\\nint main() {{ return llama_ui_find_asset(\\"kv.html\\") ? 0 : 1; }}\\n")
add_executable(llama-server "${{CMAKE_CURRENT_BINARY_DIR}}/main.cpp")
target_link_libraries(llama-server PRIVATE llama-ui)
kvmerge_ship_interface()
"""

BUILDS = """
[ "$1" = ci ] && exit 0
cd static && for file in *.html; do cp "$file" "$LLAMA_UI_OUT_DIR"; done && cd "$LLAMA_UI_OUT_DIR"
for file in index.html manifest.webmanifest sw.js build.json version.json bundle.1.js \\
    bundle.1.css workbox-1.js; do echo 1 > $file; done
"""
"""What stands for npm: what upstream asks for is there, and what lies in `static`."""


def build(folder: Path, npm: str | None) -> subprocess.CompletedProcess[str]:
    """Configure and build the project above, with a script for npm or without any."""
    (folder / "CMakeLists.txt").write_text(PROJECT)
    (folder / "lib").mkdir()
    program = folder / "npm"
    if npm is not None:
        program.write_text(f"#!/bin/sh\n{npm}\n")
        program.chmod(0o755)
    found = {"LLAMA_CPP": pristine_tree(), "KVMERGE_NPM": program if npm is not None else ""}
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{PATH}"}
    work = folder / "build"
    for line in (
        ["-S", folder, "-B", work, *(f"-D{name}={value}" for name, value in found.items())],
        ["--build", work, "--target", "llama-server"],
    ):
        done = subprocess.run(
            [str(CMAKE), *map(str, line)], env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            break
    return done


def test_it_is_built_in_with_our_page_beside_it(tmp_path: Path) -> None:
    done = build(tmp_path, BUILDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "lib" / "web-interface.json").is_file()
    subprocess.run([tmp_path / "build" / "llama-server"], check=True)


def test_npm_is_missing(tmp_path: Path) -> None:
    done = build(tmp_path, None)
    assert done.returncode != 0
    assert "with npm, which was not found" in " ".join(done.stderr.split())


def test_npm_fails(tmp_path: Path) -> None:
    done = build(tmp_path, "exit 1")
    assert done.returncode != 0
    assert "build.json" in done.stdout + done.stderr
    assert not (tmp_path / "lib" / "web-interface.json").exists()
