"""What the engine's graphs consist of, against what the back ends of graphics cards take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvmerge.native import library
from kvmerge.policies import PRESETS

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import supports_op  # noqa: E402
from supports_op import Checker, CutError, complete, cut, merge_and_read_on  # noqa: E402

from random_model import Shape, write_random_model  # noqa: E402

ASKED = ("FLASH_ATTN_EXT", "REPEAT f16")
"""A mask per head: the engine asks the device, and takes one head at a time where it must not."""

KNOWN = {
    # ggml computes these on the CPU there, and copies what they read.
    ("OpenCL", "ARGMAX i32 from f32"),
    ("OpenCL", "GET_ROWS f32 from q8_0, i32"),
    ("Vulkan", "MUL_MAT f32 from q4_0 rows, f32"),
    ("Vulkan", "MUL_MAT f32 from q4_0 rows, f32 rows"),
    ("Vulkan", "MUL_MAT f32 from q8_0 rows, f32"),
    ("Vulkan", "MUL_MAT f32 from q8_0 rows, f32 rows"),
}


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Checker:
    return Checker(tmp_path_factory.mktemp("supports_op"), library.library_folder())


@pytest.fixture(autouse=True)
def as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMERGE_AS_DEVICE", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random.gguf"
    return write_random_model(path, Shape(layers=2), seed=1)


def test_every_back_end_takes_what_merging_adds(checker: Checker, tmp_path: Path) -> None:
    added = supports_op.record(checker, tmp_path)
    refused = {
        (backend, text)
        for text, backends in added.items()
        for backend in backends
        if not text.startswith(ASKED)
    }
    assert refused == KNOWN
    # the recording sees what a merge is made of: scores, the nearest pivot, sums, bias, queries
    for operation in ("SOFT_MAX", "ARGMAX", "MUL_MAT", "REPEAT", "SET_ROWS", "L2_NORM"):
        assert any(text.startswith(operation) for text in added), operation


@pytest.mark.parametrize(
    ("operation", "swapped", "refusals"),
    [
        ("GET_ROWS", "GET_ROWS_BACK", {"Metal", "OpenCL"}),
        ("MUL_MAT", "OUT_PROD", {"Metal", "OpenCL"}),
        ("SCALE", "WIN_PART", set(supports_op.BACKENDS)),
    ],
)
def test_an_operation_that_is_swapped_is_noticed(
    checker: Checker, model: Path, operation: str, swapped: str, refusals: set[str]
) -> None:
    """With the operations that a merge really has, one of them replaced by another."""
    with checker.watch(swap=(operation, swapped)) as found:
        merge_and_read_on(model, PRESETS["flowmm"], "f16", True)
    noticed = {backend for backends in found.values() for backend in backends}
    assert refusals <= noticed
    assert not any(text.split()[0] == operation for text in found)


def test_the_host_s_own_operations_are_refused_everywhere(
    checker: Checker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVMERGE_AS_DEVICE")
    with checker.watch() as found:
        merge_and_read_on(model, PRESETS["flowmm"], "f16", True)
    custom = [backends for text, backends in found.items() if text.startswith("CUSTOM")]
    assert custom
    assert all(set(backends) == set(supports_op.BACKENDS) for backends in custom)


def test_a_function_that_moved_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "ggml-x"
    folder.mkdir(parents=True)
    (folder / "x.cpp").write_text("bool takes(int);\n\nbool takes(int n) {\n    return n;\n}\n")
    line = "//@ ggml-x/x.cpp: takes"
    assert complete(line, tmp_path) == "bool takes(int n) {\n    return n;\n}"
    with pytest.raises(CutError, match="0 definitions of gives instead of one"):
        complete(line.replace("takes", "gives"), tmp_path)
    with pytest.raises(CutError, match="ggml-y/x.cpp of the pinned release"):
        complete(line.replace("ggml-x", "ggml-y"), tmp_path)
    with pytest.raises(CutError, match="2 definitions"):
        cut("bool takes(int) {\n}\n\nstatic bool takes(long) {\n}\n", "takes")


def test_a_function_that_needs_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = supports_op.complete

    def changed(source: str, ggml: Path) -> str:
        return real(source, ggml).replace("has_simdgroup_mm;", "has_simdgroup_mm && device_is_new;")

    monkeypatch.setattr(supports_op, "complete", changed)
    with pytest.raises(CutError, match="has changed(.|\n)*device_is_new"):
        Checker(tmp_path, library.library_folder())
