"""The album model's vision part: DINOv2 up to a layer, and a projector, as llama.cpp reads it.

llama.cpp's InternVL layout fits: a class token, layer scale, four patches side by side that become
one token (pixel shuffle), LayerNorm and two linear layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import numpy_helper
from PIL import Image

Array = npt.NDArray[np.float32]

SIDE, PATCH, SHUFFLE = 224, 14, 2
TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
"""Tokens of a picture."""
WIDTH, HEADS, LAYERS = 384, 6, 6
"""Only the first half of the encoder's layers is used: later ones know what stands out in a
picture and have forgotten what is written there."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_POSITIONS = "/backbone/embeddings/Concat_6_output_0"
_INPUT = "input_image"


def _with_output(file: Path, name: str) -> onnxruntime.InferenceSession:
    """Open the encoder so that it returns something from its inside and computes no more."""
    model = onnx.load(file)
    for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.dim_param = "side"  # what it was written for is not all that it can
    del model.graph.output[:]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    )
    return onnxruntime.InferenceSession(model.SerializeToString())


class Features:
    """What the encoder's last used layer says of pictures, [n, tokens, 4 x width]."""

    def __init__(self, file: Path) -> None:
        self._name = f"/backbone/encoder/layer.{LAYERS - 1}/Add_1_output_0"
        self._session = _with_output(file, self._name)

    def __call__(self, pictures: Iterable[Image.Image]) -> Array:
        """Return them with the patches of a token side by side, as pixel shuffle has them."""
        pixels = [
            (np.asarray(picture.convert("RGB").resize((SIDE, SIDE)), np.float32) / 255 - MEAN) / STD
            for picture in pictures
        ]
        x = np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32)
        (found,) = self._session.run([self._name], {_INPUT: x})
        side = SIDE // PATCH // SHUFFLE
        patches = found[:, 1:].reshape(len(x), side, SHUFFLE, side, SHUFFLE, WIDTH)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), TOKENS, -1)


def write_mmproj(path: Path, encoder: Path, projector: dict[str, Array], side: int = SIDE) -> Path:
    """Write the vision part as a GGUF.

    Parameters
    ----------
    path : Path
        The file to write.
    encoder : Path
        The ONNX file.
    projector : dict
        ``norm.weight``, ``norm.bias``, ``a.weight``, ``a.bias``, ``b.weight`` and ``b.bias``.
    side : int
        Pixels of a side that pictures are brought to, a multiple of 28.
    """
    graph = onnx.load(encoder).graph
    weights = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    products = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    writer = gguf.GGUFWriter(path, "clip")

    def add(name: str, value: Any, kind: type = np.float32) -> None:
        writer.add_tensor(name, np.ascontiguousarray(value, dtype=kind))

    writer.add_string("clip.projector_type", "internvl")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    for name, value in (
        ("image_size", side),
        ("patch_size", PATCH),
        ("projector.scale_factor", SHUFFLE),
        ("preproc_min_tiles", 1),
        ("preproc_max_tiles", 1),
        ("embedding_length", WIDTH),
        ("feed_forward_length", 4 * WIDTH),
        ("projection_dim", len(projector["b.bias"])),
        ("block_count", LAYERS),
        ("attention.head_count", HEADS),
    ):
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", list(MEAN))
    writer.add_array("clip.vision.image_std", list(STD))

    # Positions are of a larger picture; the model itself brings them to this size.
    (positions,) = _with_output(encoder, _POSITIONS).run(
        [_POSITIONS], {_INPUT: np.zeros((1, 3, side, side), np.float32)}
    )
    patches = "backbone.embeddings.patch_embeddings.projection"
    add("v.patch_embd.weight", weights[f"{patches}.weight"])
    add("v.patch_embd.bias", weights[f"{patches}.bias"])
    add("v.class_embd", weights["backbone.embeddings.cls_token"].reshape(WIDTH))
    # llama.cpp has the class token at the end.
    add("v.position_embd.weight", np.concatenate([positions[0, 1:], positions[0, :1]]))
    for i in range(LAYERS):
        old, new = f"backbone.encoder.layer.{i}", f"v.blk.{i}"
        for name, old_name in (("ln1", "norm1"), ("ln2", "norm2")):
            add(f"{new}.{name}.weight", weights[f"{old}.{old_name}.weight"])
            add(f"{new}.{name}.bias", weights[f"{old}.{old_name}.bias"])
        for name, old_name in (
            ("attn_q", "attention.attention.query"),
            ("attn_k", "attention.attention.key"),
            ("attn_v", "attention.attention.value"),
            ("attn_out", "attention.output.dense"),
            ("ffn_up", "mlp.fc1"),
            ("ffn_down", "mlp.fc2"),
        ):
            product = f"/{old}.{old_name}/MatMul".replace(".", "/").replace("layer/", "layer.")
            add(f"{new}.{name}.weight", weights[products[product]].T, np.float16)
            add(f"{new}.{name}.bias", weights[f"{old}.{old_name}.bias"])
        for number in (1, 2):
            add(f"{new}.ls{number}.weight", weights[f"{old}.layer_scale{number}.lambda1"])
    for number, name in ((0, "norm"), (1, "a"), (3, "b")):
        kind = np.float32 if name == "norm" else np.float16
        add(f"mm.model.mlp.{number}.weight", projector[f"{name}.weight"], kind)
        add(f"mm.model.mlp.{number}.bias", projector[f"{name}.bias"])

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
