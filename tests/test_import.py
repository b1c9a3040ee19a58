"""Which library is loaded, and what is said when it does not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmerge import _binding, _library
from kvmerge.errors import LibraryError


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k not in _library._PATH_VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


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
    assert Path(result.stdout.strip()) == _library.library_folder(), result.stderr


def test_llama_is_a_llama_cpp_llama() -> None:
    result = python("from kvmerge import Llama\nimport llama_cpp; print(Llama.__mro__[1])")
    assert "llama_cpp.llama.Llama" in result.stdout, result.stderr


def test_llama_cpp_imported_first(tmp_path: Path) -> None:
    shutil.copytree(_library.library_folder(), tmp_path / "stock")
    stock = str(tmp_path / "stock")
    result = python("import llama_cpp, kvmerge", LLAMA_CPP_LIB_PATH=stock, MTMD_CPP_LIB=stock)
    assert result.returncode != 0
    assert last_line(result).startswith("kvmerge.errors.LibraryError")
    assert stock in last_line(result)
    assert "Put `import kvmerge` before" in last_line(result)


def test_llama_cpp_imported_first_from_our_folder_is_fine() -> None:
    ours = str(_library.library_folder())
    result = python(
        "import llama_cpp, kvmerge; print(kvmerge.Llama.__name__)",
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
        (tmp_path / _library.library_file(name).name).write_bytes(b"not a library")
    result = python("import kvmerge; kvmerge.Llama", KVMERGE_LIB_PATH=str(tmp_path))
    assert "LibraryError" in last_line(result)


def test_other_version_of_llama_cpp_python() -> None:
    result = python(
        "import kvmerge, llama_cpp; llama_cpp.__version__ = '0.3.1'; kvmerge.Llama",
    )
    assert "LibraryError" in last_line(result)
    assert _library.LLAMA_CPP_PYTHON in last_line(result)
    assert "0.3.1" in last_line(result)


def test_struct_layout() -> None:
    with pytest.raises(LibraryError, match=r"params\.type_k is 7 where 1 was expected"):
        _library._check_layout("params", SimpleNamespace(type_k=7), {"type_k": 1})


def test_unpatched_library(monkeypatch: pytest.MonkeyPatch) -> None:
    ffi, _, version = _binding._native()
    monkeypatch.setattr(_binding, "_native", lambda: (ffi, SimpleNamespace(), version))
    with pytest.raises(LibraryError, match="without the kvmerge patch"):
        _binding.check()


def test_library_of_another_api_version(monkeypatch: pytest.MonkeyPatch) -> None:
    ffi, library, version = _binding._native()
    monkeypatch.setattr(_binding, "_native", lambda: (ffi, library, version + 1))
    with pytest.raises(LibraryError, match=f"expects {version + 1}"):
        _binding.check()


def test_params_struct_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    ffi, library, version = _binding._native()
    other = SimpleNamespace(
        kvmerge_api_version=library.kvmerge_api_version,
        kvmerge_params_default=lambda: SimpleNamespace(size=3),
    )
    monkeypatch.setattr(_binding, "_native", lambda: (ffi, other, version))
    with pytest.raises(LibraryError, match="struct kvmerge_params has 3 bytes"):
        _binding.check()


def test_unknown_attribute() -> None:
    import kvmerge

    with pytest.raises(AttributeError, match="FlowM"):
        _ = kvmerge.FlowM  # type: ignore[attr-defined]
    assert "Llama" in dir(kvmerge)
