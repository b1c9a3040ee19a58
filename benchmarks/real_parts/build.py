"""The album model, put together from its parts and from what was trained to join them."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize, quantize

from . import parts

WEIGHTS = Path(__file__).with_name("album.npz")
"""What was trained: the projector, and the adapter of the attention's matrices (`train.py`)."""

ADAPTED = ("attn_q", "attn_k", "attn_v", "attn_output")
SCALE = 2.0
"""Factor of the adapter's product."""

Array = npt.NDArray[np.float32]


def build(weights: Path = WEIGHTS, side: int = 224) -> tuple[Path, Path]:
    """Return model and mmproj; made when they are not there yet, in the folder of the parts.

    Parameters
    ----------
    weights : Path
        What was trained.
    side : int
        Pixels of a side that pictures are brought to: 224, as trained, or fewer.
    """
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    model = parts.folder() / f"album-{digest}.gguf"
    mmproj = parts.folder() / f"album-{digest}-mmproj-{side}.gguf"
    trained = {name: value.astype(np.float32) for name, value in np.load(weights).items()}
    for file, make in ((model, _write_model), (mmproj, partial(_write_mmproj, side=side))):
        if not file.exists():
            unfinished = file.with_suffix(f".{os.getpid()}")
            make(unfinished, trained)
            os.replace(unfinished, file)
    return model, mmproj


def _write_mmproj(path: Path, trained: dict[str, Array], side: int) -> None:
    from .encoder import write_mmproj

    names = [f"{name}.{kind}" for name in ("norm", "a", "b") for kind in ("weight", "bias")]
    write_mmproj(path, parts.fetch(parts.ENCODER), {name: trained[name] for name in names}, side)


def _write_model(path: Path, trained: dict[str, Array]) -> None:
    """Write the language model with the adapter added to its matrices, which become Q8_0."""
    base = gguf.GGUFReader(parts.fetch(parts.SMOLLM2))
    writer = gguf.GGUFWriter(path, base.fields["general.architecture"].contents())
    for name, field in base.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            inner = field.types[1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in base.tensors:
        part = tensor.name.split(".")
        adapter = ".".join(part[:3])
        if f"{adapter}.lora_a" not in trained:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        change = trained[f"{adapter}.lora_b"] @ trained[f"{adapter}.lora_a"]
        matrix = dequantize(tensor.data, tensor.tensor_type).reshape(change.shape) + SCALE * change
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, quantize(matrix.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
