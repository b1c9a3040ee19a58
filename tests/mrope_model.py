"""A Qwen2-VL with random weights: a model whose pictures advance fewer positions than tokens."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from kvmerge import pocket

WIDTH, LAYERS, HEADS, HEADS_KV, HEAD_SIZE, FFN = 128, 2, 2, 1, 64, 128
VISION_WIDTH, VISION_LAYERS, VISION_HEADS, PATCH = 64, 1, 2, 8
PICTURE = 64
PICTURE_TOKENS = (PICTURE // PATCH // 2) ** 2
PICTURE_POSITIONS = PICTURE // PATCH // 2


class _Writer(gguf.GGUFWriter):
    def __init__(self, path: Path, arch: str) -> None:
        super().__init__(path, arch)
        self.rng = np.random.default_rng(3)

    def matrix(self, name: str, *shape: int) -> None:
        values = self.rng.normal(0, 0.3 / np.sqrt(shape[-1]) ** 0.5, shape)
        self.add_tensor(name, values.astype(np.float32))

    def vector(self, name: str, size: int, value: float = 0.0) -> None:
        self.add_tensor(name, np.full(size, value, np.float32))

    def finish(self) -> None:
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def _copy_tokenizer(writer: gguf.GGUFWriter) -> int:
    """Take over the tokenizer and chat template of the pocket model; return the vocabulary size."""
    fields = gguf.GGUFReader(pocket.model_path()).fields
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            kinds = field.types
            sub_type = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=sub_type)
    return len(fields["tokenizer.ggml.tokens"].contents())


def write_mrope_model(folder: Path) -> tuple[Path, Path]:
    """Write a language model and its mmproj, and return their paths."""
    model, mmproj = folder / "mrope.gguf", folder / "mrope-mmproj.gguf"

    w = _Writer(model, "qwen2vl")
    vocabulary = _copy_tokenizer(w)
    w.add_context_length(4096)
    w.add_embedding_length(WIDTH)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(HEADS_KV)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_sections([16, 8, 8, 0])
    w.matrix("token_embd.weight", vocabulary, WIDTH)
    w.vector("output_norm.weight", WIDTH, 1.0)
    w.matrix("output.weight", vocabulary, WIDTH)
    for i in range(LAYERS):
        for name, rows in (("q", HEADS), ("k", HEADS_KV), ("v", HEADS_KV)):
            w.matrix(f"blk.{i}.attn_{name}.weight", rows * HEAD_SIZE, WIDTH)
            w.vector(f"blk.{i}.attn_{name}.bias", rows * HEAD_SIZE)
        w.matrix(f"blk.{i}.attn_output.weight", WIDTH, WIDTH)
        w.matrix(f"blk.{i}.ffn_gate.weight", FFN, WIDTH)
        w.matrix(f"blk.{i}.ffn_up.weight", FFN, WIDTH)
        w.matrix(f"blk.{i}.ffn_down.weight", WIDTH, FFN)
        w.vector(f"blk.{i}.attn_norm.weight", WIDTH, 1.0)
        w.vector(f"blk.{i}.ffn_norm.weight", WIDTH, 1.0)
    w.finish()

    w = _Writer(mmproj, "clip")
    w.add_string("clip.projector_type", "qwen2vl_merger")
    w.add_bool("clip.has_vision_encoder", True)
    w.add_bool("clip.use_silu", False)
    w.add_bool("clip.use_gelu", False)
    w.add_uint32("clip.vision.image_size", PICTURE)
    w.add_uint32("clip.vision.patch_size", PATCH)
    w.add_uint32("clip.vision.embedding_length", VISION_WIDTH)
    w.add_uint32("clip.vision.feed_forward_length", 2 * VISION_WIDTH)
    w.add_uint32("clip.vision.projection_dim", WIDTH)
    w.add_uint32("clip.vision.block_count", VISION_LAYERS)
    w.add_uint32("clip.vision.attention.head_count", VISION_HEADS)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    w.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    w.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    w.matrix("v.patch_embd.weight", VISION_WIDTH, 3, PATCH, PATCH)
    w.matrix("v.patch_embd.weight.1", VISION_WIDTH, 3, PATCH, PATCH)
    for i in range(VISION_LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            w.matrix(f"v.blk.{i}.{name}.weight", VISION_WIDTH, VISION_WIDTH)
            w.vector(f"v.blk.{i}.{name}.bias", VISION_WIDTH)
        w.matrix(f"v.blk.{i}.ffn_up.weight", 2 * VISION_WIDTH, VISION_WIDTH)
        w.vector(f"v.blk.{i}.ffn_up.bias", 2 * VISION_WIDTH)
        w.matrix(f"v.blk.{i}.ffn_down.weight", VISION_WIDTH, 2 * VISION_WIDTH)
        w.vector(f"v.blk.{i}.ffn_down.bias", VISION_WIDTH)
        for name in ("ln1", "ln2"):
            w.vector(f"v.blk.{i}.{name}.weight", VISION_WIDTH, 1.0)
            w.vector(f"v.blk.{i}.{name}.bias", VISION_WIDTH)
    w.vector("v.post_ln.weight", VISION_WIDTH, 1.0)
    w.vector("v.post_ln.bias", VISION_WIDTH)
    for name, rows in (("mm.0", 4 * VISION_WIDTH), ("mm.2", WIDTH)):
        w.matrix(f"{name}.weight", rows, 4 * VISION_WIDTH)
        w.vector(f"{name}.bias", rows)
    w.finish()
    return model, mmproj
