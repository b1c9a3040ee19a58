"""An mmproj in the manner of Gemma 3, with random weights: its pictures are read non-causally."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from kvmerge import pocket

VISION_WIDTH, VISION_HEADS, PATCH, MERGE = 32, 2, 4, 2


def write_gemma_mmproj(path: Path, side: int) -> int:
    """Write an mmproj for the pocket model, for pictures of `side` pixels; return their tokens."""
    rng = np.random.default_rng(5)
    fields = gguf.GGUFReader(pocket.model_path()).fields
    width = int(fields["llama.embedding_length"].contents())
    w = gguf.GGUFWriter(path, "clip")

    def matrix(name: str, *shape: int) -> None:
        w.add_tensor(name, rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32))

    def norm(name: str, size: int) -> None:
        w.add_tensor(f"{name}.weight", np.ones(size, np.float32))
        w.add_tensor(f"{name}.bias", np.zeros(size, np.float32))

    w.add_string("clip.projector_type", "gemma3")
    w.add_bool("clip.has_vision_encoder", True)
    w.add_bool("clip.use_gelu", True)
    w.add_uint32("clip.vision.image_size", side)
    w.add_uint32("clip.vision.patch_size", PATCH)
    w.add_uint32("clip.vision.embedding_length", VISION_WIDTH)
    w.add_uint32("clip.vision.feed_forward_length", 2 * VISION_WIDTH)
    w.add_uint32("clip.vision.projection_dim", width)
    w.add_uint32("clip.vision.block_count", 1)
    w.add_uint32("clip.vision.attention.head_count", VISION_HEADS)
    w.add_uint32("clip.vision.projector.scale_factor", MERGE)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    w.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    w.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    matrix("v.patch_embd.weight", VISION_WIDTH, 3, PATCH, PATCH)
    w.add_tensor("v.patch_embd.bias", np.zeros(VISION_WIDTH, np.float32))
    matrix("v.position_embd.weight", (side // PATCH) ** 2, VISION_WIDTH)
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        matrix(f"v.blk.0.{name}.weight", VISION_WIDTH, VISION_WIDTH)
        w.add_tensor(f"v.blk.0.{name}.bias", np.zeros(VISION_WIDTH, np.float32))
    matrix("v.blk.0.ffn_up.weight", 2 * VISION_WIDTH, VISION_WIDTH)
    w.add_tensor("v.blk.0.ffn_up.bias", np.zeros(2 * VISION_WIDTH, np.float32))
    matrix("v.blk.0.ffn_down.weight", VISION_WIDTH, 2 * VISION_WIDTH)
    w.add_tensor("v.blk.0.ffn_down.bias", np.zeros(VISION_WIDTH, np.float32))
    norm("v.blk.0.ln1", VISION_WIDTH)
    norm("v.blk.0.ln2", VISION_WIDTH)
    norm("v.post_ln", VISION_WIDTH)
    matrix("mm.input_projection.weight", VISION_WIDTH, width)
    w.add_tensor("mm.soft_emb_norm.weight", np.ones(VISION_WIDTH, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return (side // PATCH // MERGE) ** 2
