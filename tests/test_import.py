"""Which library is loaded, and what is said when it does not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

import kvmerge
from kvmerge.errors import LibraryError
from kvmerge.native import binding, library, loading, python_layer

USE = """
import kvmerge, llama_cpp
from kvmerge import pocket
llm = llama_cpp.Llama(str(pocket.model_path()), n_ctx=64, verbose=False)
llm.eval(llm.tokenize(b"red"))
assert llm.n_tokens > 0
merging = kvmerge.Llama(pocket.model_path(), n_ctx=64, verbose=False)
assert isinstance(merging, llama_cpp.Llama)
print(llama_cpp.__file__)
"""
"""A program that uses llama_cpp on its own, and prints which one it got."""

# Without an installed llama-cpp-python there is one to import first only in our own folder.
FIND_LAYER = f"import sys; sys.path.append({str(python_layer.CARRIED.parent)!r}); "

needs_copy = pytest.mark.skipif(
    not python_layer.CARRIED.is_dir(),
    reason="libraries from KVMERGE_LIB_PATH: the package carries no Python layer",
)


def python(
    code: str, *options: str, input: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k not in loading._PATH_VARIABLES}
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        input=input,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """Everything that is installed but llama-cpp-python, for ``python -S`` and PYTHONPATH."""
    folder = tmp_path / "alone"
    folder.mkdir()
    # An editable install is on the path by a file that -S does not read, and leaves a folder of the
    # same name with the other packages.
    for site in (Path(kvmerge.__file__).parents[1], Path(numpy.__file__).parents[1]):
        for entry in site.iterdir():
            if not entry.name.startswith("llama_cpp") and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def install(layer: Path, folder: Path) -> Path:
    """Put a copy of a Python layer into `folder`, as pip would, and return its package."""
    return Path(shutil.copytree(layer, folder / "llama_cpp"))


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.strip().splitlines()[-1]


def test_import_is_light() -> None:
    result = python(
        "import sys, kvmerge, kvmerge.cli\n"
        "print([m for m in ('llama_cpp', 'numpy', 'cffi', 'jinja2', 'PIL') if m in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_llama_cpp_uses_our_library() -> None:
    result = python("import kvmerge, llama_cpp.llama_cpp as n; print(n._base_path)")
    assert Path(result.stdout.strip()) == library.library_folder(), result.stderr


def test_llama_is_a_llama_cpp_llama() -> None:
    result = python("from kvmerge import Llama\nimport llama_cpp\nprint(Llama.__mro__)")
    assert "<class 'llama_cpp.llama.Llama'>" in result.stdout, result.stderr


@needs_copy
def test_the_copy_serves_where_nothing_is_installed(alone: Path) -> None:
    result = python(USE, "-S", PYTHONPATH=str(alone))
    assert Path(result.stdout.strip()).parent == python_layer.CARRIED, result.stderr
    assert result.stderr == ""


@needs_copy
def test_an_installed_one_of_the_same_version_is_used(alone: Path) -> None:
    package = install(python_layer.CARRIED, alone)
    result = python(USE, "-S", PYTHONPATH=str(alone))
    assert Path(result.stdout.strip()).parent == package, result.stderr


@needs_copy
def test_the_copy_goes_before_an_installed_one_of_another_version(alone: Path) -> None:
    package = install(python_layer.CARRIED, alone)
    init = package / "__init__.py"
    init.write_text(init.read_text().replace(library.LLAMA_CPP_PYTHON, "0.3.1"))
    result = python(USE, "-S", PYTHONPATH=str(alone))
    assert Path(result.stdout.strip()).parent == python_layer.CARRIED, result.stderr


@needs_copy
def test_a_folder_of_that_name_is_no_package(alone: Path) -> None:
    (alone / "llama_cpp").mkdir()
    result = python(USE, "-S", PYTHONPATH=str(alone))
    assert Path(result.stdout.strip()).parent == python_layer.CARRIED, result.stderr


def test_neither_a_copy_nor_an_installed_one(alone: Path) -> None:
    (alone / "kvmerge").unlink()
    shutil.copytree(
        Path(kvmerge.__file__).parent,
        alone / "kvmerge",
        ignore=shutil.ignore_patterns("_vendor", "lib", "*.gguf"),
    )
    libraries = str(library.library_folder())
    result = python(
        "import kvmerge; kvmerge.Llama", "-S", PYTHONPATH=str(alone), KVMERGE_LIB_PATH=libraries
    )
    assert "LibraryError: llama_cpp cannot be imported" in last_line(result)
    assert str(alone / "kvmerge" / "_vendor") in last_line(result)


@needs_copy
def test_a_pickled_model_brings_its_layer_along(alone: Path) -> None:
    made = python(
        "import pickle, sys, kvmerge\n"
        "from kvmerge import pocket\n"
        "llm = kvmerge.Llama(pocket.model_path(), n_ctx=768, verbose=False)\n"
        "print(pickle.dumps(llm).hex())",
        "-S",
        PYTHONPATH=str(alone),
    )
    read = python(
        "import pickle\nllm = pickle.loads(bytes.fromhex(input()))\nprint(llm.n_ctx())",
        "-S",
        input=made.stdout,
        PYTHONPATH=str(alone),
    )
    assert read.stdout.strip() == "768", made.stderr + read.stderr


def test_the_licence_of_the_copy_is_shipped() -> None:
    ours = Path(__file__).parent.parent / "licenses" / "llama-cpp-python.txt"
    assert "Andrei Betlen" in ours.read_text()
    if python_layer.CARRIED.is_dir():
        assert (python_layer.CARRIED / "LICENSE.md").read_text() == ours.read_text()


def test_llama_cpp_imported_first(tmp_path: Path) -> None:
    shutil.copytree(library.library_folder(), tmp_path / "stock")
    stock = str(tmp_path / "stock")
    result = python(
        f"{FIND_LAYER}import llama_cpp, kvmerge", LLAMA_CPP_LIB_PATH=stock, MTMD_CPP_LIB=stock
    )
    assert result.returncode != 0
    assert last_line(result).startswith("kvmerge.errors.LibraryError")
    assert stock in last_line(result)
    assert "Put `import kvmerge` before" in last_line(result)


def test_llama_cpp_imported_first_from_our_folder_is_fine() -> None:
    ours = str(library.library_folder())
    result = python(
        f"{FIND_LAYER}import llama_cpp, kvmerge; print(kvmerge.Llama.__name__)",
        LLAMA_CPP_LIB_PATH=ours,
        MTMD_CPP_LIB=ours,
    )
    assert result.stdout.strip() == "Llama", result.stderr


def test_missing_library(tmp_path: Path) -> None:
    result = python("import kvmerge; kvmerge.Llama", KVMERGE_LIB_PATH=str(tmp_path))
    assert "LibraryError: libllama" in last_line(result).replace("llama.dll", "libllama")
    assert str(tmp_path) in last_line(result)


def test_broken_library(tmp_path: Path) -> None:
    for name in ("llama", "mtmd", "ggml"):
        (tmp_path / library.library_file(name).name).write_bytes(b"not a library")
    result = python("import kvmerge; kvmerge.Llama", KVMERGE_LIB_PATH=str(tmp_path))
    assert "LibraryError" in last_line(result)


def test_other_version_of_llama_cpp_python() -> None:
    result = python(
        "import kvmerge, llama_cpp; llama_cpp.__version__ = '0.3.1'; kvmerge.Llama",
    )
    assert "LibraryError" in last_line(result)
    assert library.LLAMA_CPP_PYTHON in last_line(result)
    assert "0.3.1" in last_line(result)


def test_struct_layout() -> None:
    with pytest.raises(LibraryError, match=r"params\.type_k is 7 where 1 was expected"):
        loading._check_layout("params", SimpleNamespace(type_k=7), {"type_k": 1})


def test_unpatched_library(monkeypatch: pytest.MonkeyPatch) -> None:
    ffi, _, version = binding._native()
    monkeypatch.setattr(binding, "_native", lambda: (ffi, SimpleNamespace(), version))
    with pytest.raises(LibraryError, match="without the kvmerge patch"):
        binding.check()


def test_library_of_another_api_version(monkeypatch: pytest.MonkeyPatch) -> None:
    ffi, library, version = binding._native()
    monkeypatch.setattr(binding, "_native", lambda: (ffi, library, version + 1))
    with pytest.raises(LibraryError, match=f"expects {version + 1}"):
        binding.check()


def test_params_struct_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    ffi, library, version = binding._native()
    other = SimpleNamespace(
        kvmerge_api_version=library.kvmerge_api_version,
        kvmerge_params_default=lambda: SimpleNamespace(size=3),
    )
    monkeypatch.setattr(binding, "_native", lambda: (ffi, other, version))
    with pytest.raises(LibraryError, match="struct kvmerge_params has 3 bytes"):
        binding.check()


def test_unknown_attribute() -> None:
    import kvmerge

    with pytest.raises(AttributeError, match="FlowM"):
        _ = kvmerge.FlowM  # type: ignore[attr-defined]
    assert "Llama" in dir(kvmerge)
