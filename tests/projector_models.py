"""Projectors with random weights for the pocket model: pictures in slices, and sound."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from kvmerge import pocket

WIDTH, HEADS, SIDE, PATCH, MERGE, MELS = 32, 2, 32, 4, 2, 80
SLICE_TOKENS = (SIDE // PATCH // MERGE) ** 2
"""Tokens of each slice of a picture, and of its thumbnail."""
SOUND_TOKENS = 750
"""Tokens of half a minute of sound."""


class _Writer(gguf.GGUFWriter):
    def __init__(self, path: Path, part: str) -> None:
        super().__init__(path, "clip")
        self.part = part
        self.rng = np.random.default_rng(7)
        fields = gguf.GGUFReader(pocket.model_path()).fields
        self.width = int(fields["llama.embedding_length"].contents())
        for name, value in (
            ("embedding_length", WIDTH),
            ("feed_forward_length", 2 * WIDTH),
            ("projection_dim", self.width),
            ("block_count", 1),
            ("attention.head_count", HEADS),
        ):
            self.add_uint32(f"clip.{part}.{name}", value)
        self.add_float32(f"clip.{part}.attention.layer_norm_epsilon", 1e-6)

    def matrix(self, name: str, *shape: int) -> None:
        values = self.rng.normal(0, shape[-1] ** -0.5, shape)
        self.add_tensor(name, values.astype(np.float32))

    def vector(self, name: str, *shape: int, value: float = 0.0) -> None:
        self.add_tensor(name, np.full(shape, value, np.float32))

    def norm(self, name: str, size: int) -> None:
        self.vector(f"{name}.weight", size, value=1.0)
        self.vector(f"{name}.bias", size)

    def linear(self, name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        self.matrix(f"{name}.weight", rows, columns)
        if bias:
            self.vector(f"{name}.bias", rows)

    def block(self, prefix: str, *, key_bias: bool) -> None:
        """Write a layer of a transformer."""
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            self.linear(f"{prefix}.{name}", WIDTH, WIDTH, bias=key_bias or name != "attn_k")
        self.linear(f"{prefix}.ffn_up", 2 * WIDTH, WIDTH)
        self.linear(f"{prefix}.ffn_down", WIDTH, 2 * WIDTH)
        self.norm(f"{prefix}.ln1", WIDTH)
        self.norm(f"{prefix}.ln2", WIDTH)

    def finish(self) -> None:
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def write_sliced_mmproj(path: Path) -> Path:
    """Write an mmproj in the manner of InternVL, which shows slices of a picture and then all."""
    w = _Writer(path, "vision")
    w.add_string("clip.projector_type", "internvl")
    w.add_bool("clip.has_vision_encoder", True)
    w.add_bool("clip.use_gelu", True)
    w.add_uint32("clip.vision.image_size", SIDE)
    w.add_uint32("clip.vision.patch_size", PATCH)
    w.add_uint32("clip.vision.projector.scale_factor", MERGE)
    w.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    w.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    w.matrix("v.patch_embd.weight", WIDTH, 3, PATCH, PATCH)
    w.vector("v.patch_embd.bias", WIDTH)
    w.vector("v.class_embd", WIDTH)
    w.matrix("v.position_embd.weight", (SIDE // PATCH) ** 2 + 1, WIDTH)
    w.block("v.blk.0", key_bias=True)
    merged = WIDTH * MERGE**2
    w.norm("mm.model.mlp.0", merged)
    w.linear("mm.model.mlp.1", w.width, merged)
    w.linear("mm.model.mlp.3", w.width, w.width)
    w.finish()
    return path


def write_audio_mmproj(path: Path) -> Path:
    """Write an mmproj in the manner of Qwen2-Audio."""
    w = _Writer(path, "audio")
    w.add_string("clip.projector_type", "qwen2a")
    w.add_bool("clip.has_audio_encoder", True)
    w.add_uint32("clip.audio.num_mel_bins", MELS)
    w.matrix("a.conv1d.1.weight", WIDTH, MELS, 3)
    w.vector("a.conv1d.1.bias", WIDTH, 1)
    w.matrix("a.conv1d.2.weight", WIDTH, WIDTH, 3)
    w.vector("a.conv1d.2.bias", WIDTH, 1)
    w.matrix("a.position_embd.weight", 1500, WIDTH)
    w.block("a.blk.0", key_bias=False)
    w.norm("a.post_ln", WIDTH)
    w.linear("mm.a.fc", w.width, WIDTH)
    w.finish()
    return path
