"""Models by the name of a repository: a local folder, and a hub that cannot be reached."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmerge import Llama, pocket
from kvmerge.errors import ModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "parts").mkdir()
    shutil.copy(pocket.model_path(), folder / "pocket-Q8_0.gguf")
    shutil.copy(pocket.mmproj_path(), folder / "parts" / "mmproj-F16.gguf")
    return folder


@pytest.mark.parametrize(
    "options", [{"mmproj": "*mmproj*"}, {"additional_files": ["parts/mmproj-F16.gguf"]}]
)
def test_a_folder_with_its_mmproj(options: dict[str, object], folder: Path) -> None:
    with Llama.from_pretrained(
        folder, "*Q8_0.gguf", n_ctx=512, n_threads=1, verbose=False, **options
    ) as llm:
        answer = llm.create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=1)
        assert answer["choices"]
        assert llm.chat_handler is not None


@pytest.mark.parametrize(
    ("filename", "options", "said"),
    [
        ("pocket-Q4.gguf", {}, "matches no file.*Did you mean 'pocket-Q8_0.gguf'"),
        ("*gguf", {}, "matches several files"),
        ("*Q8_0.gguf", {"mmproj": "vision*"}, "mmproj='vision.*matches no file"),
        ("*Q8_0.gguf", {"additional_files": ["x*"]}, "additional_files='x.*matches no file"),
    ],
)
def test_files_that_are_not_there(
    filename: str, options: dict[str, object], said: str, folder: Path
) -> None:
    with pytest.raises(ModelError, match=said):
        Llama.from_pretrained(folder, filename, **options)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match="pip install huggingface_hub"):
        Llama.from_pretrained("someone/model-GGUF", "*.gguf")


OFFLINE = """
from kvmerge import Llama
from kvmerge.errors import ModelError
try:
    Llama.from_pretrained("someone/model-GGUF", "*.gguf", mmproj="*mmproj*")
except ModelError as error:
    print(error)
"""


def test_a_hub_without_network() -> None:
    """What huggingface_hub itself raises, in a process that it lets reach nothing."""
    pytest.importorskip("huggingface_hub")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith("the files of 'someone/model-GGUF' cannot be had from the hub: ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(hub, "list_repo_files", refuse)
    with pytest.raises(ModelError, match="cannot be had from the hub: OSError: no route to host$"):
        Llama.from_pretrained("someone/model-GGUF", "*.gguf")
