"""Back ends in packages of their own, and what is said about devices."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvmerge
from conftest import Factory
from kvmerge.native import backends, library
from kvmerge.native.backends import Device
from kvmerge.native.python_layer import stated_version

MODULE = library.library_folder() / "libggml-cpu.so"

READ = """
import kvmerge
from kvmerge import pocket
llm = kvmerge.Llama(pocket.model_path(), n_ctx=64, verbose=False)
llm.eval(llm.tokenize(b"red"))
print(llm.n_tokens)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with the module of the CPU, which the folder of libraries lacks."""
    if not MODULE.exists():
        pytest.skip("the CPU's back end is no file of its own here")
    libraries = tmp_path / "lib"
    libraries.mkdir()
    for file in library.library_folder().iterdir():
        if not file.name.startswith("libggml-cpu"):
            (libraries / file.name).symlink_to(file)
    folder = tmp_path / "site" / backends.PACKAGES / "cpu"
    folder.mkdir(parents=True)
    shutil.copy2(MODULE, folder)
    (folder / "__init__.py").write_text(f'__version__ = "{kvmerge.__version__}"\n')
    return folder


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(package.parents[1]), *filter(None, sys.path)]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "KVMERGE_LIB_PATH": str(package.parents[2] / "lib"),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_module_of_a_package_is_used(package: Path) -> None:
    done = run(package, "-c", READ)
    assert int(done.stdout) > 0, done.stderr
    assert done.stderr == ""
    doctor = run(package, "-m", "kvmerge", "doctor").stdout
    assert f"back-end package   {package}" in doctor
    assert "backends loaded    libggml-cpu.so" in doctor


def test_a_package_may_load_what_its_module_needs(package: Path) -> None:
    with (package / "__init__.py").open("a") as file:
        file.write("print('prepared')\n")
    assert run(package, "-c", READ).stdout.startswith("prepared")


@pytest.mark.parametrize(
    ("stated", "module", "said"),
    [
        ("0.0.9", None, "kvmerge-cpu is of version 0.0.9, which does not fit kvmerge"),
        (None, b"not a library", "kvmerge-cpu is installed and cannot be used: "),
    ],
)
def test_a_package_that_does_not_fit_is_left_out(
    package: Path, stated: str | None, module: bytes | None, said: str
) -> None:
    if stated is not None:
        (package / "__init__.py").write_text(f'__version__ = "{stated}"\n')
    if module is not None:
        (package / MODULE.name).write_bytes(module)
    done = run(package, "-c", READ)
    assert done.returncode != 0
    assert said in done.stderr
    assert "LibraryError: no ggml backend in" in done.stderr.splitlines()[-1]


def test_the_package_of_a_back_end_that_is_there_is_not_loaded_again(package: Path) -> None:
    shutil.copy2(MODULE, package.parents[2] / "lib")
    with (package / "__init__.py").open("a") as file:
        file.write("raise RuntimeError('loaded twice')\n")
    assert run(package, "-c", READ).returncode == 0


def test_a_model_says_what_it_computes_on(llama: Factory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvmerge")
    llama()
    assert caplog.messages[0].startswith("computes on CPU ("), caplog.messages


ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml"))


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_of_the_version_of_kvmerge(name: str) -> None:
    project = (ROOT / "packages" / name / "pyproject.toml").read_text()
    version = kvmerge.__version__
    assert f'name = "kvmerge-{name}"\nversion = "{version}"' in project
    assert f'"kvmerge=={version}"' in project
    folder = ROOT / "packages" / name / backends.PACKAGES / name
    assert stated_version(folder) == version
    assert f'{name} = ["kvmerge-{name}=={version}"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not MODULE.exists(), reason="back ends are no files of their own here")
def test_a_package_is_built_and_loaded(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for command in (
        ["wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT / "packages" / "rpc"],
        ["install", "--no-deps", "--no-index", "--find-links", tmp_path, "--target",
         tmp_path / "site", "kvmerge-rpc"],
    ):  # fmt: skip
        subprocess.run([*pip, *map(str, command)], check=True, stdin=subprocess.DEVNULL)
    doctor = subprocess.run(
        [sys.executable, "-m", "kvmerge", "doctor"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path[1:]])},
        capture_output=True,
        text=True,
    )
    assert "libggml-rpc.so" in doctor.stdout, doctor.stderr


# There is no graphics card to test with: the list of devices is made up from here on.

CPU = Device("CPU", "Some CPU", 0, 0, 0)
GPU = Device("Vulkan0", "Some Graphics", 2, 0, 0)
SOFTWARE = Device("Vulkan0", "llvmpipe (LLVM 15.0.6, 256 bits)", 1, 0, 0)


@pytest.mark.parametrize(
    ("devices", "n_gpu_layers", "warning", "used"),
    [
        ([GPU, CPU], None, "Vulkan0 (Some Graphics) is unused: n_gpu_layers=-1", "CPU (Some CPU)"),
        ([GPU, CPU], 0, "", "CPU (Some CPU)"),
        ([GPU, CPU], -1, "", "Vulkan0 (Some Graphics)"),
        ([SOFTWARE, CPU], None, "", "CPU (Some CPU)"),
        ([CPU], None, "", "CPU (Some CPU)"),
    ],
)
def test_a_faster_device_that_is_unused_is_named_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    devices: list[Device],
    n_gpu_layers: int | None,
    warning: str,
    used: str,
) -> None:
    monkeypatch.setattr(backends, "devices", lambda: devices)
    backends._warn_unused.cache_clear()
    caplog.set_level(logging.INFO, "kvmerge")
    for _ in range(2):
        backends.log_device(n_gpu_layers)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == bool(warning)
    assert all(message.startswith(warning) for message in warnings)
    assert caplog.messages.count(f"computes on {used}") == 2


def test_hardware_that_is_served_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "devices", lambda: [GPU, CPU])
    assert backends.unserved_hardware() is None
