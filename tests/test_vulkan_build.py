"""What the Vulkan back end needs is asked for before anything is compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from stock_library import PATH, ROOT

CMAKE = shutil.which("cmake", path=PATH)

pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")

PROJECT = f"""
cmake_minimum_required(VERSION 3.21)
project(check LANGUAGES NONE)
# nothing of the machine that the tests run on
set(CMAKE_FIND_USE_CMAKE_SYSTEM_PATH OFF)
set(CMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH OFF)
set(CMAKE_FIND_USE_PACKAGE_REGISTRY OFF)
include("{ROOT / "cmake" / "KvmergeVulkan.cmake"}")
kvmerge_check_vulkan()
message(STATUS "nothing is missing")
"""


class Machine:
    """A folder in which all is there that the back end needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers = folder / "include" / "vulkan"
        self.headers.mkdir(parents=True)
        (self.headers / "vulkan.hpp").touch()
        (self.headers / "vulkan_structs.hpp").write_text("  struct LayerSettingEXT\n")
        (self.headers / "vulkan_enums.hpp").write_text("    eMesaHoneykrisp = 1,\n")
        version = "#define VK_HEADER_VERSION 309\n"
        version += (
            "#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 4, VK_HEADER_VERSION)\n"
        )
        (self.headers / "vulkan_core.h").write_text(version)
        self.library = folder / "libvulkan.so"
        self.library.touch()
        self.spirv = folder / "spirv"
        self.spirv.mkdir()
        (self.spirv / "SPIRV-HeadersConfig.cmake").touch()
        self.glslc = folder / "glslc"
        self.write_glslc("exit 0")
        (folder / "CMakeLists.txt").write_text(PROJECT)

    def write_glslc(self, command: str) -> None:
        self.glslc.write_text(f"#!/bin/sh\n{command}\n")
        self.glslc.chmod(0o755)

    def configure(self, on: bool = True) -> str:
        """Return what CMake says, in one line."""
        found = {
            "GGML_VULKAN": "ON" if on else "OFF",
            "Vulkan_INCLUDE_DIR": self.headers.parent,
            "Vulkan_LIBRARY": self.library if self.library.exists() else "NOTFOUND",
            "Vulkan_GLSLC_EXECUTABLE": self.glslc if self.glslc.exists() else "NOTFOUND",
            "SPIRV-Headers_DIR": self.spirv,
        }
        build = self.folder / "build"
        shutil.rmtree(build, ignore_errors=True)
        done = subprocess.run(
            [str(CMAKE), "-S", self.folder, "-B", build, *(f"-D{k}={v}" for k, v in found.items())],
            env=os.environ | {"VULKAN_SDK": str(self.folder / "sdk")},  # CMake looks into /bin else
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert (done.returncode == 0) == ("nothing is missing" in done.stdout), done.stdout
        return " ".join(done.stdout.split())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_nothing_is_missing(machine: Machine) -> None:
    assert "nothing is missing" in machine.configure()


def test_nothing_is_asked_without_the_back_end(machine: Machine) -> None:
    machine.library.unlink()
    assert "nothing is missing" in machine.configure(on=False)


@pytest.mark.parametrize("file", ["libvulkan.so", "include/vulkan/vulkan.hpp"])
def test_no_headers_or_loader(machine: Machine, file: str) -> None:
    (machine.folder / file).unlink()
    assert "apt install libvulkan-dev" in machine.configure()


@pytest.mark.parametrize(
    ("file", "name"),
    [("vulkan_structs.hpp", "struct LayerSettingEXT"), ("vulkan_enums.hpp", "eMesaHoneykrisp")],
)
def test_old_headers(machine: Machine, file: str, name: str) -> None:
    (machine.headers / file).write_text("struct LayerProperties\n")
    said = machine.configure()
    assert f"(1.4.309) are too old for this llama.cpp: {file} has no `{name}`" in said
    assert "-DVulkan_INCLUDE_DIR=folder/usr/include" in said


def test_no_glslc(machine: Machine) -> None:
    machine.glslc.unlink()
    assert "apt install glslc" in machine.configure()


def test_old_glslc(machine: Machine) -> None:
    machine.write_glslc("echo \"invalid value 'vulkan1.3'\" >&2; exit 1")
    said = machine.configure()
    assert "does not compile for Vulkan 1.3, so it is too old" in said
    assert "It says: invalid value 'vulkan1.3'" in said


def test_no_spirv_headers(machine: Machine) -> None:
    shutil.rmtree(machine.spirv)
    assert "apt install spirv-headers" in machine.configure()
