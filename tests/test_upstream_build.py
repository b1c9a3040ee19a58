"""Upstream's tests call its common parts, which are in a library of their own there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stock_library import PATH, ROOT

CMAKE = shutil.which("cmake", path=PATH)

pytestmark = [
    pytest.mark.skipif(CMAKE is None, reason="needs cmake"),
    pytest.mark.skipif(shutil.which("c++", path=PATH) is None, reason="no compiler"),
    pytest.mark.skipif(sys.platform == "win32", reason="symbols are hidden there anyway"),
]

# Targets as upstream has them where its tests are built, of nothing.
PROJECT = f"""
cmake_minimum_required(VERSION 3.21)
project(check LANGUAGES CXX)
set(KVMERGE_SOURCE_DIR "{ROOT}")
include("{ROOT / "cmake" / "KvmergeServer.cmake"}")
foreach(target cpp-httplib llama-common-base llama-common llama-ui server-context llama-server-impl)
    add_library(${{target}} STATIC empty.cpp)
endforeach()
add_executable(llama-server empty.cpp)
kvmerge_add_server("${{CMAKE_CURRENT_SOURCE_DIR}}")
get_target_property(options llama-common COMPILE_OPTIONS)
message(STATUS "common is compiled with: ${{options}}.")
"""


@pytest.mark.parametrize("tests", ["ON", "OFF"])
def test_common_parts_are_hidden_only_inside_the_server(tests: str, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "empty.cpp").touch()
    assert CMAKE is not None
    option = f"-DKVMERGE_BUILD_UPSTREAM_TESTS={tests}"
    done = subprocess.run(
        [CMAKE, "-S", tmp_path, "-B", tmp_path / "build", option],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (said,) = (line for line in done.stdout.splitlines() if "common is compiled with" in line)
    assert ("-fvisibility=hidden" in said) == (tests == "OFF")
